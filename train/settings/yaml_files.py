"""YAML settings without surprises: nothing stands twice, and words and numbers are taken as they are written.

YAML 1.1 makes `no` a truth value, `010` eight and `1:30` ninety. Here a scalar stays the text that it is, and the type
of its key decides what it means: `no` is a word for mixed_precision, and false for a switch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml

from shortzip.data.errors import UserError
from shortzip.data.files import read_text
from shortzip.train.settings.checks import ConfigError

LONGEST = 200_000  # characters of a file
MOST = 10_000  # keys and values, those that aliases repeat included
DEEPEST = 20  # levels
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_MISREAD = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-5]?[0-9])+)")  # octal and sexagesimal in YAML 1.1
_TAGS = ("null", "bool", "int", "float", "str", "seq", "map", "timestamp", "merge", "value")


def read_settings(path: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The keys and values of a YAML file, values as text (integers where the key takes both), lists and None.

    `kinds`: the type of each dotted key. Raises `ConfigError`, naming the file, for what is no YAML, keys that stand
    twice, numbers that YAML would misread, and more values, levels or repetitions by alias than settings have.
    """
    where = f"--config {path}"
    if not path:
        raise ConfigError("--config: a YAML file's name is needed")
    try:
        text = read_text(Path(path))
    except UserError as error:
        raise ConfigError(f"--config {error}") from error
    if len(text) > LONGEST:
        raise ConfigError(
            f"{where} holds {len(text):,} characters, at most {LONGEST:,} are read: is it the right file?"
        )
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{where} has more than {DEEPEST} levels: write it anew") from error
    if root is None or (isinstance(root, yaml.ScalarNode) and root.tag.endswith(":null")):
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"{where}: keys and values are needed, found a {type(_Reader(where, kinds).read(root)).__name__}"
        )
    return dict(_Reader(where, kinds).read(root))


class _Reader:
    """Makes values of YAML's nodes, and keeps count of them."""

    def __init__(self, where: str, kinds: Mapping[str, Any]) -> None:
        self.where, self.kinds = where, kinds
        self.count = 0
        self.lines: dict[str, int] = {}

    def read(self, node: yaml.Node, key: str = "", depth: int = 0) -> Any:
        self.count += 1
        if self.count > MOST or depth > DEEPEST:
            limit = f"{MOST:,} values" if self.count > MOST else f"{DEEPEST} levels"
            raise ConfigError(f"{self.where} has more than {limit}, repetitions by aliases (*) included: write fewer")
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _TAGS:
            raise ConfigError(f"{self._at(node)}: the tag {node.tag} means nothing here: leave it out")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, f"{key}[{place}]", depth + 1) for place, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node, key)

    def _mapping(self, node: yaml.MappingNode, prefix: str, depth: int) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        mapping: dict[str, Any] = {}
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise ConfigError(f"{self._at(name)}: a key must be a word")
            if name.tag.endswith(":merge"):  # <<: *other
                for other in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if not isinstance(other, yaml.MappingNode):
                        raise ConfigError(f"{self._at(name)}: << takes keys and values of another place (*name)")
                    outer, self.lines = self.lines, {}
                    merged = {**self._mapping(other, prefix, depth + 1), **merged}
                    self.lines = outer
                continue
            key = f"{prefix}.{name.value}" if prefix else name.value
            line = name.start_mark.line + 1
            if key in self.lines:
                first = self.lines[key]
                raise ConfigError(f"{self.where}: {key} stands in line {first} and in line {line}: leave one out")
            self.lines[key] = line
            mapping[name.value] = self.read(value, key, depth + 1)
        return {**merged, **mapping}

    def _scalar(self, node: yaml.ScalarNode, key: str) -> str | int | None:
        text, plain = str(node.value), node.style is None
        kind = self.kinds.get(key)
        if not plain:
            return text
        if node.tag.endswith(":null"):
            return None
        takes = {kind, *get_args(kind)}
        if str not in takes and _MISREAD.fullmatch(text):
            cure = f"write {text.lstrip('+-0_') or '0'}" if ":" not in text else "write the number, or quote the text"
            raise ConfigError(f"{self._at(node)}: {key or 'a value'} is {text}, which YAML reads in two ways: {cure}")
        return int(text) if {str, int} <= takes and _INTEGER.fullmatch(text) else text

    def _at(self, node: yaml.Node) -> str:
        return f"{self.where}, line {node.start_mark.line + 1}"
