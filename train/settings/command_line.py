"""Reads a dataclass of settings from YAML files and the command line.

`load_config(argv)` reads `--config FILE` (default: configs/demo.yaml), then the command line's own keys over it. A key
that does not exist and a value of the wrong type raise `ConfigError`, as settings that do not go together do.
"""

from __future__ import annotations

import difflib
import errno
import inspect
import json
import os
import re
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml

from shortzip.data.errors import ToldElsewhere, UserError, printable
from shortzip.reduction.errors import ReductionError
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.config import TuneConfig
from shortzip.train.settings.flags import PARAMETERS, Flags
from shortzip.train.settings.method_parameters import ParametersRead, flat_settings, with_parameters
from shortzip.train.settings.recipes import CONFIGS, find_recipe
from shortzip.train.settings.yaml_files import read_settings

MENDABLE = (UserError, ReductionError)  # what the user can mend: two, since reduction/ travels without data/
_FROM_WORKER = re.compile(
    r"Caught (?P<kind>\w+) in DataLoader worker process \d+\.\nOriginal .*\n[\w.]*(?P=kind): (?P<said>.*)",
    re.S,
)
WAIT = 10.0  # seconds, in which a launcher ends the other processes when one has failed
DEFAULT_CONFIG = CONFIGS / "demo.yaml"


def check_keys(keys: Sequence[str], allowed: Sequence[str], where: str) -> None:
    """Raises `ConfigError` for the first of the dotted `keys` that is not `allowed`, naming the nearest one."""
    for key in keys:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1, cutoff=0.5)
            tails = {name.rsplit(".", 1)[-1]: name for name in allowed}
            near = near or [
                tails[t] for t in difflib.get_close_matches(key.rsplit(".", 1)[-1], tails, n=1, cutoff=0.5)
            ]
            raise ConfigError(f"{where}: there is no key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _keys_in(mapping: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in mapping.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _keys_in(value, f"{prefix}{key}.")


def parse_config(section: type, argv: Sequence[str], *, default: Path | None = None, program: str) -> Any:
    """Reads `--config` files and command-line keys into the dataclass `section`.

    `default` is the YAML read when `argv` names none. Later sources win: YAML files in order, then keys in order. A
    switch without a value is true. `--help` prints every key, and `--print_config` the whole YAML; both exit. Raises
    `ConfigError`.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    kinds = dict(kinds_of(section))
    flags = Flags(section, kinds)
    pairs = list(flags.read(argv))
    keys = [key.removesuffix("+") for key, _ in pairs]
    check_keys(keys, with_parameters(flags.names, keys), "command line")
    printed = any(key == "print_config" for key, _ in pairs)
    pairs = [pair for pair in pairs if pair[0] != "print_config"]
    if default is not None and all(key != "config" for key, _ in pairs):
        pairs.insert(0, ("config", str(default)))
    arguments = list(_expanded(pairs, kinds))

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = f"{program} {flags.words}[--KEY VALUE ...]"
    if examples := inspect.cleandoc(section.__doc__ or "").partition("\n\n")[2]:
        usage += "\n\nfor example:\n" + textwrap.indent(examples.replace("%", "%%"), "  ")
    parser = ArgumentParser(prog=program, usage=usage, epilog=flags.help, exit_on_error=False, default_env=False)
    parser.add_argument(
        "--config",
        action="config",
        help=f"a recipe's name, or a YAML file of keys (default: {default.stem if default else 'none'})",
    )
    parser.add_class_arguments(section)
    try:
        values = parser.instantiate(parser.parse_args(arguments))
    except ConfigError:
        raise
    except Exception as error:  # jsonargparse has one exception per kind of mistake; all are the user's here
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__cause__ or cause.__context__
        raise ConfigError(str(cause) if cause else _plain(str(error), kinds)) from error
    config = section(**{item.name: values[item.name] for item in fields(section)})
    if printed:
        print(dump_config(config), end="")
        sys.exit(0)
    return config


def kinds_of(section: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of a config class with its type."""
    hints = get_type_hints(section)
    for item in fields(section):
        kind = hints[item.name]
        if item.metadata == PARAMETERS:
            continue
        yield prefix + item.name, kind
        for nested in (kind, *get_args(kind)):
            if is_dataclass(nested):
                yield from kinds_of(nested, f"{prefix}{item.name}.")  # type: ignore[arg-type]


def _expanded(pairs: Sequence[tuple[str, str | None]], kinds: dict[str, Any]) -> Iterator[str]:
    """The arguments with the content of YAML files, `true` after a lone switch, and [] for a list that is null."""
    parameters = ParametersRead(kinds)
    for key, value in parameters.fold_pairs(pairs):
        if key == "config" and value is not None:
            path = find_recipe(value, compares="budgets" in kinds and "visionzip" not in kinds)
            content = read_settings(path, kinds)
            keys = list(_keys_in(content))
            check_keys(keys, with_parameters(list(kinds), keys), path)
            value = json.dumps(_nulls_checked(parameters.fold_file(content), kinds, path))
        elif value == "null" and get_origin(kinds.get(key)) is list:
            value = "[]"
        elif value is None and kinds.get(key) is bool:
            value = "true"
        yield f"--{key}" if value is None else f"--{key}={value}"


def _nulls_checked(content: dict[str, Any], kinds: dict[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """`content` with [] where a list is null. Raises `ConfigError` for other nulls, which jsonargparse lets pass."""
    checked = {}
    for key, value in content.items():
        kind = kinds.get(prefix + key)
        if isinstance(value, dict):
            value = _nulls_checked(value, kinds, where, f"{prefix}{key}.")
        elif value is None and get_origin(kind) is list:
            value = []
        elif value is None and kind is not None and type(None) not in get_args(kind):
            raise ConfigError(f"{where}: {prefix}{key} is null, and needs a value: leave the key out for the default")
        checked[key] = value
    return checked


def _plain(message: str, kinds: dict[str, Any]) -> str:
    """jsonargparse's tree of type errors in one line: the key, the value and what was expected."""
    keys = re.findall(r'(?:Parser key|argument) "?-*([\w.]+)"?:', message)
    values = re.findall(r"(?:Given|Got) value: (.*)|Unable to load config '(.*)'", message)
    expected = re.findall(r"Expected a ([^\n]+?)\.?(?: Got value|\n|$)", message)
    if not (keys and values):
        return message
    key, value = ".".join(keys[:1] if "Unable to load" in message else keys), "".join(values[0])
    group = next((kind for kind in (kinds.get(key), *get_args(kinds.get(key))) if is_dataclass(kind)), None)
    if group is not None:
        members = [item for item in fields(group) if value[:10] != "Namespace(" or item.default is MISSING]
        named = ", ".join(f"{key}.{item.name}" for item in members)
        return (
            f"{key} needs {named}" if value[:10] == "Namespace(" else f"{key}: {value!r} is no group of keys: {named}"
        )
    if not expected:
        return message
    names = [
        re.sub(r"<class '(\w+)'>", r"\1", kind).replace("typing.", "").replace("NoneType", "null") for kind in expected
    ]
    shown = {"None": "null", "True": "a truth value (true)", "False": "a truth value (false)"}.get(value, repr(value))
    words = f"{key}: {shown} is not of type {' or '.join(dict.fromkeys(names))}"
    return f"{words}: write [{value}], or [] for none" if names[0] == "list" and value != "None" else words


def load_config(argv: Sequence[str]) -> TuneConfig:
    """The run's settings from command-line arguments (without the program's name). Raises `ConfigError`."""
    return parse_config(TuneConfig, argv, default=DEFAULT_CONFIG, program="tune_projector.py")


def dump_config(config: Any) -> str:
    """The config as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(_plain_values(flat_settings(config)), sort_keys=False, allow_unicode=True)


def _plain_values(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain_values(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def run_command(main: Callable[[list[str]], None], argv: Sequence[str] | None = None) -> None:
    """Runs a command's `main` on the command line's arguments.

    What the user can mend ends in one line that begins with `error:`; anything else is a fault of ShortZip's own, and
    ends in its traceback with a line that asks for a report. The exit code is 1 either way, and 130 for Ctrl-C, which
    may carry words of its own. Of several processes that fail together one speaks: the others, and those that fail
    because it did, wait until their launcher ends them.
    """
    try:
        main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except ToldElsewhere:
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        print(one_line(str(interrupt) or "interrupted"), file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        words, alone = what_to_mend(error), os.environ.get("WORLD_SIZE", "1") == "1"
        if not alone and (words is None or os.environ.get("RANK", "0") != "0"):
            time.sleep(WAIT if words is not None else 2 * WAIT)
        if words is not None:
            sys.exit(f"error: {one_line(words)}")
        sys.stderr.write(printable(traceback.format_exc()))
        sys.exit("This is a fault of ShortZip's own, not of what you gave it: please report it with the lines above")


def end_stopped(words: str, by: str = "SIGINT", *, silent: bool = False) -> NoReturn:
    """Ends the process after a signal, the work saved; the exit code is 130 for Ctrl-C, and 1 for others."""
    if not silent:
        print(one_line(words), file=sys.stderr)
    sys.exit(130 if by == "SIGINT" else 1)


def what_to_mend(error: Exception) -> str | None:
    """What the user can do about an error, in words; None where it is a fault of ShortZip's own."""
    if isinstance(error, MENDABLE):
        return str(error)
    match = _FROM_WORKER.match(str(error))
    if match is not None and any(match["kind"] in (kind.__name__, *_names_below(kind)) for kind in MENDABLE):
        return match["said"].strip()  # DataLoader hands on an error of its workers as text
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno is None and type(error) is OSError:
        return str(error)  # transformers' words for what a folder lacks
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.strerror}: make space on the disk that is written to, or choose another one"
    return _full_memory(error) or _hub_refusal(error)


def _names_below(kind: type[Exception]) -> Iterator[str]:
    for below in kind.__subclasses__():
        yield below.__name__
        yield from _names_below(below)


def _full_memory(error: Exception) -> str | None:
    import torch  # here, not above: --help of what needs no torch need not wait for it

    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory is full: give a smaller batch, or free it ({str(error).partition('. ')[0]})"
    if isinstance(error, MemoryError):
        return "the machine's memory is full: give a smaller batch, or fewer data workers"
    return None


def _hub_refusal(error: Exception) -> str | None:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    if isinstance(error, (HfHubHTTPError, OfflineModeIsEnabled, httpx.TransportError)):
        return f"the Hub cannot be used: {error}. Mend the connection or the token (`hf auth login`)"
    return None


def one_line(text: str) -> str:
    """`text` as `printable`, its lines joined by spaces."""
    return printable(" ".join(line.strip() for line in text.splitlines() if line.strip()))


def say(text: str, **how: Any) -> None:
    """Prints a line or several, as `printable`."""
    print(printable(text), **how)
