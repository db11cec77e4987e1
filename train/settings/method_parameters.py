"""A method's parameters, flat beside its name: `visionzip: {method: random, seed: 3}`, `--visionzip.seed 3`, or as one
word, `random:seed=3`.

The one list of them is the methods' own (reduction/selectors.py). A config holds them in a field that is marked
PARAMETERS: that is no key, its content is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import yaml

from shortzip.reduction.parsing import parse_method, parse_value
from shortzip.reduction.selectors import METHODS, parameters_of
from shortzip.train.settings.checks import ConfigError

GROUP, METHOD = "visionzip", "visionzip.method"
FIELD = "parameters"
Pair = tuple[str, str | None]


def with_parameters(known: Sequence[str], given: Sequence[str]) -> Sequence[str]:
    """The keys `known`, and those of all methods' parameters where `given` may hold one: to ask for them imports
    torch."""
    if GROUP not in known or all(key in known or not key.startswith(f"{GROUP}.") for key in given):
        return known
    names = dict.fromkeys(name for method in METHODS for name in parameters_of(method))
    return [*known, *(key for name in names if (key := f"{GROUP}.{name}") not in known)]


class ParametersRead:
    """The parameters that settings have named so far. Sources come in the order in which they override each other; one
    that names another method takes away what was said of the one before.

    Args:
        kinds: the type of each dotted key.
    """

    def __init__(self, kinds: Mapping[str, Any]) -> None:
        self.kinds = kinds
        self.method: str | None = None
        self.values: dict[str, Any] = {}

    def fold(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """A group's keys, as a file has them, with its parameters in their field."""
        named = {key: value for key, value in content.items() if f"{GROUP}.{key}" not in self.kinds}
        own = {key: value for key, value in content.items() if key not in named}
        if isinstance(content.get("method"), str):
            word = parse_method(content["method"])
            own["method"] = word.pop("method")
            if twice := sorted(set(word) & set(content)):
                raise ConfigError(f"{METHOD} is {content['method']!r}, and {GROUP}.{twice[0]} is given too: give one")
            if self.method not in (None, own["method"]):
                self.values = {}
            self.method = own["method"]
            for key, value in word.items():
                (own if f"{GROUP}.{key}" in self.kinds else named)[key] = str(value)
        self.values |= {key: parse_value(value) if isinstance(value, str) else value for key, value in named.items()}
        return {**own, FIELD: dict(self.values)} if self.method or self.values else own

    def fold_file(self, content: dict[str, Any]) -> dict[str, Any]:
        """A file's keys and values, with the parameters in their field."""
        if GROUP not in content or GROUP not in self.kinds:
            return content
        group = content[GROUP]
        if isinstance(group, dict):
            return {**content, GROUP: self.fold(group)}
        self.method, self.values = None, {}
        return content

    def fold_pairs(self, pairs: Sequence[Pair]) -> Iterator[Pair]:
        """The command line's keys and values, which are one source, with the parameters in their field at the end."""
        if GROUP not in self.kinds:
            yield from pairs
            return
        group: dict[str, Any] = {}
        for key, value in pairs:
            if key == GROUP and value is not None and value.startswith("{"):
                yield key, json.dumps(self.fold(_mapping(value)))
            elif value is not None and (key == METHOD or (key.startswith(f"{GROUP}.") and key not in self.kinds)):
                group[key.removeprefix(f"{GROUP}.")] = value
            else:
                yield key, value
        for name, value in self.fold(group).items() if group else ():
            yield f"{GROUP}.{name}", json.dumps(value) if name == FIELD else value


def _mapping(text: str) -> dict[str, Any]:
    """Keys and values in braces, as one flag's value. Raises `ConfigError` for anything else."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--{GROUP}: {text!r} is no group of keys: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--{GROUP}: {text!r} is no group of keys")
    return content


def flat_settings(config: Any) -> dict[str, Any]:
    """A config's settings as they are written: parameters are keys of their group."""
    settings = asdict(config)
    group = settings.get(GROUP)
    if isinstance(group, dict):
        own = {key: value for key, value in group.items() if key != FIELD and (key, value) != ("per_image", None)}
        settings[GROUP] = {**own, **group[FIELD]}
        if isinstance(own.get("per_image"), dict):
            own_keys = {key: value for key, value in own["per_image"].items() if value is not None}
            settings[GROUP]["per_image"] = own_keys
    return settings
