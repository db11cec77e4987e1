"""Reads a dataclass of settings from YAML files and the command line.

`load_config(argv)` reads `--config FILE` (default: configs/demo.yaml), then the command line's own keys over it. A key
that does not exist and a value of the wrong type raise `ConfigError`, as settings that do not go together do.
"""

from __future__ import annotations

import difflib
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from data.errors import ToldElsewhere, UserError, printable
from reduction.errors import ReductionError
from train.config import ConfigError, TuneConfig

MENDABLE = (UserError, ReductionError)  # what the user can mend: two, since reduction/ travels without data/
DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"


def known_keys(section: type, prefix: str = "") -> Iterator[tuple[str, type | None]]:
    """Every dotted key of a config class, each with its class if it is a section."""
    hints = get_type_hints(section)
    for item in fields(section):
        nested = [kind for kind in (hints[item.name], *get_args(hints[item.name])) if is_dataclass(kind)]
        yield prefix + item.name, nested[0] if nested else None  # type: ignore[misc]
        for kind in nested:
            yield from known_keys(kind, f"{prefix}{item.name}.")  # type: ignore[arg-type]


def check_keys(given: Sequence[str], known: Sequence[str], where: str) -> None:
    """Raises `ConfigError` for the first of the dotted keys `given` that is not `known`, naming the nearest one."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            tails = {name.rsplit(".", 1)[-1]: name for name in known}
            near = near or [
                tails[t] for t in difflib.get_close_matches(key.rsplit(".", 1)[-1], tails, n=1, cutoff=0.5)
            ]
            raise ConfigError(f"{where}: there is no key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _keys_in(mapping: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in mapping.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _keys_in(value, f"{prefix}{key}.")


def parse_config(section: type, argv: Sequence[str], *, default: Path | None, program: str) -> Any:
    """Reads `--config` files and command-line keys into the dataclass `section`.

    `default` is the YAML read when `argv` names none. Later sources win: YAML files in order, then keys in order.
    `--help` prints every key, and exits. Raises `ConfigError`.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    known = [key for key, _ in known_keys(section)]
    options = [token[2:].split("=")[0].removesuffix("+") for token in argv if token.startswith("--")]
    if "config" not in options and default is not None:
        argv = ["--config", str(default), *argv]
    check_keys(options, [*known, "config", "help", "print_config"], "command line")
    for position, token in enumerate(argv):
        path = token.split("=", 1)[1] if token.startswith("--config=") else None
        if token == "--config":
            path = argv[position + 1] if position + 1 < len(argv) else ""
        if path is not None:
            check_keys(list(_keys_in(_read_yaml(path))), known, path)

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=program, exit_on_error=False, default_env=False)
    parser.add_argument("--config", action="config", help=f"YAML file of keys (default: {default})")
    parser.add_class_arguments(section)
    try:
        values = parser.instantiate(parser.parse_args(list(argv)))
    except ConfigError:
        raise
    except Exception as error:  # jsonargparse has one exception per kind of mistake; all are the user's here
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__cause__ or cause.__context__
        raise ConfigError(str(cause) if cause else _plain(str(error))) from error
    return section(**{item.name: values[item.name] for item in fields(section)})


def _plain(message: str) -> str:
    """jsonargparse's tree of type errors in one line: the key, the value and what was expected."""
    keys = re.findall(r'(?:Parser key|argument) "?-*([\w.]+)"?:', message)
    values = re.findall(r"(?:Given|Got) value: (.*)", message)
    expected = re.findall(r"Expected a ([^\n]+?)\.?(?: Got value|\n|$)", message)
    if not (keys and values and expected):
        return message
    kinds = [
        re.sub(r"<class '(\w+)'>", r"\1", kind).replace("typing.", "").replace("NoneType", "null") for kind in expected
    ]
    return f"{'.'.join(keys)}: {values[0]!r} is not of type {' or '.join(dict.fromkeys(kinds))}"


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: keys and values are needed, found a {type(content).__name__}")
    return content


def load_config(argv: Sequence[str]) -> TuneConfig:
    """The run's settings from command-line arguments (without the program's name). Raises `ConfigError`."""
    return parse_config(TuneConfig, argv, default=DEFAULT_CONFIG, program="tune_projector.py")


def dump_config(config: Any) -> str:
    """The config as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def run_command(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Runs a command's `main` on the command line's arguments.

    What the user can mend ends in one line that begins with `error:`; anything else is a fault of ShortZip's own, and
    ends in its traceback with a line that asks for a report. The exit code is 1 either way.
    """
    try:
        main(sys.argv[1:] if argv is None else argv)
    except ToldElsewhere:
        sys.exit(1)
    except MENDABLE as error:
        sys.exit(f"error: {printable(str(error))}")
    except Exception:
        traceback.print_exc()
        sys.exit("This is a fault of ShortZip's own, not of what you gave it: please report it with the lines above")
