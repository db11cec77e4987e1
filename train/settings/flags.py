"""What a flag may be called: a key, its short form, or the spelling of an earlier version.

The same thing has the same flag in every command, wherever its key lies: `--instructions`, `--image_root`,
`--budget 54+10`, `--freeze 60%`, `--output`, `--overwrite`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, get_origin

from shortzip.data.errors import printable
from shortzip.reduction.parsing import parse_budget, read_freeze
from shortzip.reduction.selectors import METHODS
from shortzip.train.settings.checks import ConfigError

POSITIONAL = {"flag": "positional"}  # of a field that also takes the words without a flag
REPEATED = {"flag": "repeated"}  # of a list whose flag may stand several times, with one value each
PARAMETERS = {"flag": "parameters"}  # of what is no key: its content is, beside it (method_parameters.py)
SHORT = {
    "instructions": "data.instructions",
    "image_root": "data.image_root",
    "method": "visionzip.method",
    "output": "output_dir",
    "overwrite": "overwrite_output_dir",
}
OLD = {"-o": "output", "--budgets": "budget", "--folder": "output"}  # for one version, as - for _ is
LISTS = ("freeze", "budgets")  # which are written with commas, too
TRUTHS = ("true", "false", "yes", "no", "on", "off", "null")
WITHOUT_VALUE = ("help", "print_config")


class Flags:
    """Reads the flags of one command.

    Args:
        section: the dataclass of its settings.
        kinds: the type of each dotted key.
    """

    def __init__(self, section: type, kinds: Mapping[str, Any]) -> None:
        self.kinds = kinds
        marked = {item.name: item.metadata.get("flag") for item in fields(section)}
        self.positional = next((name for name, how in marked.items() if how == "positional"), None)
        self.repeated = [name for name, how in marked.items() if how == "repeated"]
        self.short = {short: key for short, key in SHORT.items() if short not in kinds and key in kinds}
        self.short |= {key: short for short, key in SHORT.items() if key not in kinds and short in kinds}
        self.budgets = "budget" not in kinds and ("visionzip" in kinds or "budgets" in kinds)
        self.layers = "freeze" not in kinds and ("shortv" in kinds or "layers" in kinds)

    @property
    def names(self) -> list[str]:
        """Every flag that there is, without its dashes: keys first, then short forms."""
        reduced = ["budget"] * self.budgets + ["freeze"] * self.layers
        return [*self.kinds, *self.short, *reduced, "config", *WITHOUT_VALUE]

    @property
    def words(self) -> str:
        """What may stand without a flag, for the usage."""
        if self.positional is None:
            return ""
        several = get_origin(self.kinds[self.positional]) is list
        return f"{self.positional.upper()} {'... ' if several else ''}"

    @property
    def help(self) -> str:
        """The short forms, for the end of --help."""
        lines = [f"--{short} is --{key}" for short, key in self.short.items()]
        lines += ["--budget 54+10 is dominant+contextual, or none"] * self.budgets
        if any(key in self.kinds for key in ("method", "methods", "visionzip")):
            lines.append(f"a method is one of {', '.join(METHODS)}; with parameters, random:seed=3")
        lines += ["--freeze 60% is a share of the layers, 19 a number, 31,29,30 a list"] * self.layers
        return "Short forms: " + "; ".join(lines) + "." if lines else ""

    def read(self, argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
        """(key, value) of everything on the command line, in order; value None for a lone flag.

        What is no flag that there is comes as it was written. Raises `ConfigError` for words without a flag where
        none are taken, and for reductions that cannot be read.
        """
        tokens, loose = list(argv), []
        lists: dict[str, list[str]] = {name: [] for name in self.repeated}
        while tokens:
            token = tokens.pop(0)
            if token == "-h":
                token = "--help"
            if not token.startswith("--") and token not in OLD:
                if self.positional is None or (token.startswith("-") and token != "-"):
                    raise ConfigError(f"command line: {token!r} stands there without a flag: --help lists them")
                loose.append(token)
                continue
            flag, equals, value = token.partition("=")
            key = self._current(flag)
            text: str | None = value if equals else None
            if not equals and self._takes(key, tokens):
                text = tokens.pop(0)
            if key in lists and text is not None and not text.startswith("["):
                lists[key].append(text)
            else:
                yield from self._meant(key, text)
        for name, values in lists.items():
            if values:
                yield name, json.dumps(values)
        if self.positional is not None and loose:
            if get_origin(self.kinds[self.positional]) is list:
                yield self.positional, json.dumps(loose)
            elif len(loose) == 1:
                yield self.positional, loose[0]
            else:
                raise ConfigError(f"command line: one {self.positional} is taken, and there are {', '.join(loose)}")

    def _current(self, flag: str) -> str:
        """The key of a flag; an old spelling is told the new one."""
        key = flag.removeprefix("--")
        if key in self.names:
            return key
        new = OLD.get(flag, key.replace("-", "_"))
        if new == key or new not in self.names:
            return key
        print(printable(f"{flag} is an old spelling, read for this version only: write --{new}"), file=sys.stderr)
        return new

    def _takes(self, key: str, tokens: Sequence[str]) -> bool:
        """Whether the next word is the flag's value."""
        if not tokens or tokens[0].startswith("--") or key in WITHOUT_VALUE:
            return False
        kind = self.kinds.get(self.short.get(key, key))
        return kind is not bool or self.positional is None or tokens[0].lower() in TRUTHS

    def _meant(self, key: str, value: str | None) -> Iterator[tuple[str, str | None]]:
        if key == "budget" and self.budgets and value is not None:
            yield from self._budget(value)
        elif key == "freeze" and self.layers and value is not None:
            yield from self._frozen(value)
        elif key in LISTS and value not in (None, "null") and self._is_list(key) and value[:1] != "[":
            yield key, json.dumps([part.strip() for part in value.split(",")])
        else:
            yield self.short.get(key, key), value

    def _is_list(self, key: str) -> bool:
        return get_origin(self.kinds.get(key)) is list

    def _budget(self, value: str) -> Iterator[tuple[str, str]]:
        if "visionzip" not in self.kinds:
            yield "budgets", json.dumps([budget.strip() for budget in value.strip("[]").split(",")])
        elif value in ("none", "all"):
            yield "visionzip", "null"
        else:
            for name, number in parse_budget(value).items():
                yield f"visionzip.{name}", str(number)

    def _frozen(self, value: str) -> Iterator[tuple[str, str]]:
        nothing = value == "none" or read_freeze(value) in (0, 0.0)
        listed = None if nothing else read_freeze(value)
        if "layers" in self.kinds:
            if not nothing and not isinstance(listed, list):
                raise ConfigError(f"--freeze {value}: which layers these are is not known here; list them: 31,29,30")
            yield "layers", json.dumps(["+".join(map(str, listed)) if isinstance(listed, list) else "none"])
        elif nothing:
            yield "shortv", "null"
        else:
            yield "shortv.layers", json.dumps(listed) if isinstance(listed, list) else "null"
            yield "shortv.freeze", "null" if isinstance(listed, list) else value
