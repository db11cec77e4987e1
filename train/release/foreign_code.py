"""Code of others that a checkpoint's configs name: whoever loads it with trust_remote_code=True would run that too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shortzip.data.errors import UserError
from shortzip.data.files import read_json, write_atomically


def leave_out_foreign_code(folder: Path) -> None:
    """Takes from the configs in `folder` every `auto_map` entry for a class that is not in one of its own files."""
    for path, config in _naming_foreign_code(folder):
        write_atomically(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def refuse_foreign_code(folder: Path) -> None:
    """Raises UserError where `leave_out_foreign_code` would take something away."""
    for path, _ in _naming_foreign_code(folder):
        raise UserError(
            f"{path}: its auto_map names code that is not in this folder, which everybody who loads the checkpoint "
            "would run: take that entry out"
        )


def _naming_foreign_code(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    names = []
    for path in sorted(folder.glob("*config.json")):
        config = read_json(path)
        own = _with_own_code(config, folder)
        if own != config:
            names.append((path, own))
    return names


def _with_own_code(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_with_own_code(entry, folder) for entry in value]
    if not isinstance(value, dict):
        return value
    entries = {key: _with_own_code(entry, folder) for key, entry in value.items() if key != "auto_map"}
    classes = value.get("auto_map")
    if isinstance(classes, dict):
        classes = {key: names for key, names in classes.items() if _is_own(names, folder)}
    elif not _is_own(classes, folder):
        classes = None
    return {**entries, "auto_map": classes} if classes else entries


def _is_own(names: Any, folder: Path) -> bool:
    """Whether each of one or several class references, `module.Class`, is of a file in `folder`."""
    listed = names if isinstance(names, list) else [names]
    present = [name for name in listed if name is not None]
    modules = [name.partition(".")[0] for name in present if isinstance(name, str)]
    return len(modules) == len(present) and all((folder / f"{module}.py").is_file() for module in modules)
