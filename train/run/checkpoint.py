"""Checkpoints of a run: the projector, its optimizer moments and the position in the samples.

One format for every engine and every number of processes; nothing that is untrained is in it, and no pickle:

    step-000100/
      projector.safetensors   the projector's weights under the release's names, fp32
      optimizer.safetensors   AdamW's `exp_avg.NAME`, `exp_avg_sq.NAME` and `step.NAME`
      state.json              step, samples seen, scheduler, counters, versions, the settings that shape the result
      SHA256SUMS              of the three files (`sha256sum -c SHA256SUMS` reads it)

There are no random states in it: nothing in the loop draws.

A checkpoint is written beside its place, flushed to the disk and renamed: what bears a checkpoint's name is whole, and
damage that comes later is found by the checksums.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from shortzip.data.errors import UserError
from shortzip.data.files import flush_to_disk, sha256

SINCE: dict[str, Any] = {
    "positions": "compact",
    "distill": None,
    "tune": "projector",
    "data.video_frames": None,
    "data.video_fps": None,
    "budgets": [],
    "sandwich": False,
}  # settings that an older checkpoint does not name, and what they were then
FILES = ("projector.safetensors", "optimizer.safetensors", "state.json")
_OLDER_FILES = {*FILES, "rng.safetensors"}  # nothing reads the fourth any more
CHECKSUMS = "SHA256SUMS"
_NAME = re.compile(r"step-(\d{6,})")
_LEFT = re.compile(r"\.((writing|replaced)-step-\d{6,}|removing-.+)")
_REPLACED = re.compile(r"\.replaced-(step-\d{6,})")


class CheckpointError(UserError):
    """A checkpoint that is not there, is damaged, cannot be written, or belongs to another run."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds."""

    projector: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]


def checkpoint_path(run: Path, step: int) -> Path:
    return run / f"step-{step:06d}"


def list_checkpoints(run: Path) -> list[Path]:
    """The folders named like checkpoints, oldest step first; damaged ones among them."""
    numbered = [(int(match[1]), path) for path in run.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def save_checkpoint(run: Path, checkpoint: Checkpoint, keep: int | None, say: Callable[[str], None] = print) -> Path:
    """Writes `run/step-N` (N from the state) so that it appears whole or not at all, then removes all but `keep`.

    An older one that cannot be removed is told to `say`. Raises `CheckpointError` if the disk refuses the new one; the
    checkpoints that were there stay as they were.
    """
    final = checkpoint_path(run, checkpoint.state["step"])
    beside = run / f".writing-{final.name}"
    try:
        discard(beside, say)
        beside.mkdir(parents=True)
        save_file(_contiguous(checkpoint.projector), beside / FILES[0])
        save_file(_contiguous(checkpoint.optimizer), beside / FILES[1])
        (beside / FILES[2]).write_text(json.dumps(checkpoint.state, indent=1) + "\n", encoding="utf-8")
        (beside / CHECKSUMS).write_text("".join(f"{sha256(beside / name)}  {name}\n" for name in FILES))
        for path in (*beside.iterdir(), beside):
            flush_to_disk(path)
        # Not `written_whole`, which loses the step that was there if it is killed between its two renames.
        replaced = run / f".replaced-{final.name}"
        if os.path.lexists(final):  # a step that is taken again, after resuming from an older one
            discard(replaced, say)
            final.rename(replaced)
        beside.rename(final)
        flush_to_disk(run)
        discard(replaced, say)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        older = list_checkpoints(run)
        raise CheckpointError(
            f"{final} could not be written: {error}. "
            + (f"{older[-1]} is untouched: " if older else "No checkpoint was written before it. ")
            + "make space, or check the folder's rights, and continue with --resume_from_checkpoint latest"
        ) from error
    if keep is not None:
        others = [path for path in list_checkpoints(run) if path != final]
        for path in others[: max(0, len(others) + 1 - keep)]:
            discard(path, say)
    return final


def sweep(run: Path, say: Callable[[str], None] = print) -> None:
    """Removes what a killed process left half-written or half-removed; for the only process that writes in `run`."""
    put_back_replaced(run)
    for path in sorted(run.glob(".*")):
        if _LEFT.fullmatch(path.name):
            discard(path, say)


def put_back_replaced(run: Path) -> None:
    """Renames what a process left that was killed between two renames: the old checkpoint is the best there is."""
    for path in run.glob(".replaced-*"):
        match = _REPLACED.fullmatch(path.name)
        if match and not os.path.lexists(run / match[1]):
            path.rename(run / match[1])


def discard(path: Path, say: Callable[[str], None]) -> None:
    """Removes a file, a link (never what it names) or a folder, if it is there.

    A folder is renamed first, so that a half-removed one never looks like a whole one. What cannot be removed is told
    to `say`, and stays.
    """
    try:
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir():
            if not path.name.startswith(".removing-"):
                path = path.rename(unused(path.with_name(f".removing-{path.name}")))
            shutil.rmtree(path)
    except OSError as error:
        say(f"{path} cannot be removed ({error.strerror}): left there, remove it by hand")


def unused(path: Path) -> Path:
    """`path`, with a number behind it if there is something of that name."""
    names = itertools.chain([path], (path.with_name(f"{path.name}.{number}") for number in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None. Reads every byte."""
    try:
        lines = (path / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return f"{CHECKSUMS} is missing or unreadable"
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if set(sums) not in (set(FILES), _OLDER_FILES):
        return f"{CHECKSUMS} lists {sorted(sums)} instead of {sorted(FILES)}"
    for name, digest in sums.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if sha256(path / name) != digest:
            return f"{name} does not have the checksum it was written with"
    return None


def find_checkpoint(run: Path, name: str) -> tuple[Path | None, dict[Path, str]]:
    """The checkpoint to continue from, and the damaged ones that were passed over, each with its fault.

    `name` is `latest` (the newest whole one, or None if none was written yet) or a path. Raises `CheckpointError`
    for a path that is not a whole checkpoint, naming the newest whole one before it.
    """
    if name != "latest":
        path = Path(name)
        if not path.is_dir():
            names = ", ".join(p.name for p in list_checkpoints(run)) or "none"
            raise CheckpointError(f"resume_from_checkpoint {name}: no such folder. Checkpoints in {run}: {names}")
        fault = damage(path)
        if fault is None:
            return path, {}
        older = [p for p in list_checkpoints(path.parent) if p.name < path.name and damage(p) is None]
        cure = (
            f"continue from the one before: --resume_from_checkpoint {older[-1]}" if older else "no older one is whole"
        )
        raise CheckpointError(f"{path} is damaged: {fault}. {cure}")
    if not run.is_dir():
        raise CheckpointError(
            f"resume_from_checkpoint latest: there is no run in {run}. Start one without resume_from_checkpoint"
        )
    passed_over: dict[Path, str] = {}
    for path in reversed(list_checkpoints(run)):
        fault = damage(path)
        if fault is None:
            return path, passed_over
        passed_over[path] = fault
    if passed_over:
        faults = "; ".join(f"{path}: {fault}" for path, fault in passed_over.items())
        raise CheckpointError(f"No checkpoint is whole ({faults}). Begin anew in another output_dir")
    return None, {}


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint to `damaged-step-N`, out of the way of the run that continues before it."""
    return path.rename(unused(path.with_name(f"damaged-{path.name}")))


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint after checking its checksums. Raises `CheckpointError` if it is damaged."""
    fault = damage(path)
    if fault is not None:
        raise CheckpointError(f"{path} is damaged: {fault}")
    return Checkpoint(
        projector=load_file(path / FILES[0]),
        optimizer=load_file(path / FILES[1]),
        state=json.loads((path / FILES[2]).read_text(encoding="utf-8")),
    )


def check_same_run(saved: Mapping[str, Any], settings: Mapping[str, Any], path: Path) -> None:
    """Raises `CheckpointError` naming each setting that shapes the result and differs from the checkpoint's."""
    older = {key: value for key, value in SINCE.items() if key in settings}
    differing = differing_settings({**older, **saved}, settings)
    if differing:
        raise CheckpointError(
            f"{path} belongs to a run with other settings: {differing}. "
            "Give the same ones, or start another run in another output_dir"
        )


def differing_settings(saved: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Each setting that differs, with both values; empty where none does."""
    return "; ".join(
        f"{key} was {saved.get(key)!r} and is {settings.get(key)!r}"
        for key in sorted({*saved, *settings})
        if saved.get(key) != settings.get(key)
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str]) -> dict[str, torch.Tensor]:
    """AdamW's state by parameter name; empty before the first step."""
    return {
        f"{kind}.{names[parameter]}": value.detach().cpu()
        for parameter, state in optimizer.state.items()
        for kind, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Puts back what `optimizer_tensors` gave. Raises `CheckpointError` if a name or shape does not fit."""
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        if name not in parameters or (kind != "step" and value.shape != parameters[name].shape):
            raise CheckpointError(
                f"optimizer.safetensors has {key} {tuple(value.shape)}, which this projector has not"
            )
        device = "cpu" if kind == "step" else parameters[name].device
        optimizer.state.setdefault(parameters[name], {})[kind] = value.clone().to(device)


LIBRARIES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "pillow")


def versions(packages: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """The installed version of each package."""
    from importlib.metadata import version

    return {name: version(name) for name in packages}


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
