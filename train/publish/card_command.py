"""The command in a model card: what repeats a run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from shortzip.train.settings.config import DataConfig, TuneConfig

_NOT_IN_COMMAND = (
    "output_dir", "run_name", "overwrite_output_dir", "resume_from_checkpoint", "report_to", "push_to_hub",
    "hub_model_id", "hub_private_repo", "hub_shape", "hub_base",
)  # fmt: skip


def command_of(config: Mapping[str, Any]) -> str:
    """The command that repeats a run: every setting that is not the default; of paths, the last part alone."""
    defaults = dict(_flat_defaults(TuneConfig))
    options = []
    for name, value in _flat(config):
        if name.split(".")[0] in _NOT_IN_COMMAND or (name in defaults and defaults[name] == value):
            continue
        if isinstance(value, str):
            text = Path(value).name if Path(value).is_absolute() else value
        else:
            text = yaml.safe_dump(value, default_flow_style=True).replace("\n...", "").strip()
        options.append(f"  --{name} {shlex.quote(text)}")
    return " \\\n".join(["accelerate launch train/tune_projector.py", *options])


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _flat_defaults(section: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    assert is_dataclass(section)
    for item in fields(section):
        if item.name == "data":
            yield from _flat_defaults(DataConfig, "data.")
        elif item.default is not MISSING:
            yield prefix + item.name, item.default
        elif item.default_factory is not MISSING:
            made = item.default_factory()
            if is_dataclass(made):
                yield from _flat_defaults(type(made), f"{prefix}{item.name}.")
            else:
                yield prefix + item.name, made
