"""A run's folder: what lies in it, how the run stands, and what it measured.

checkpoints/RUN/
  config.yaml     every setting, as resolved when the run was last started
  status.json     running, finished, stopped (with the signal) or failed (with the error), and the step
  metrics.jsonl   one JSON object per line: training steps and held-out losses
  step-000100/    checkpoints (train/run/checkpoint.py)
  final/          the reduced checkpoint
  .run.lock       held by the one process that writes here (train/run/run_start.py)
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

from shortzip.data.errors import UserError
from shortzip.data.files import read_json, write_atomically
from shortzip.train.run.checkpoint import list_checkpoints

Condition = Literal["running", "finished", "stopped", "failed"]

CONFIG, STATUS, METRICS, FINAL, LOCK = "config.yaml", "status.json", "metrics.jsonl", "final", ".run.lock"
RESULTS, CURVE, LAYERS, TRACKER = "evaluation.json", "loss.png", "layers.json", "wandb-run.json"
DROPPED, NONFINITE = "dropped.jsonl", "nonfinite.json"
ANSWERS, PICTURES, CONTROL = "answers", "pictures", "control"
HELD_OUT_PICTURE = "held-out.png"
MARK = "# The settings of a ShortZip run\n"  # the first line of config.yaml: a folder is a run's by what lies in it
# What a run writes beside its checkpoints, and what overwrite_output_dir may therefore delete. CONFIG comes last: a
# folder is recognised by it.
OWN_FOLDERS = (FINAL, ANSWERS, PICTURES, CONTROL, "tensorboard", "wandb")
OWN_FILES = (METRICS, RESULTS, CURVE, LAYERS, TRACKER, DROPPED, NONFINITE, STATUS, CONFIG)
_DAMAGED = re.compile(r"damaged-step-\d{6,}(\.\d+)?")


class RunFolderError(UserError):
    """The output folder holds something that this run must not touch, or cannot be used."""


def is_finished(folder: Path) -> bool:
    """Whether a run has come to its end; not if that cannot be told."""
    try:
        return bool(read_status(folder)["state"] == "finished")
    except UserError:
        return False


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's own, and not one of something else that also has a config.yaml.

    Told by status.json; where that is damaged, by the first line of config.yaml beside the lock.
    """
    if not (folder / CONFIG).is_file():
        return False
    try:
        read_status(folder)
    except UserError:
        return (folder / CONFIG).read_bytes().startswith(MARK.encode()) and (folder / LOCK).is_file()
    return True


def own_files(folder: Path) -> list[Path]:
    """What a run wrote into its folder: files, folders, and links in their place. config.yaml comes last."""
    damaged = sorted(path for path in folder.glob("damaged-step-*") if _DAMAGED.fullmatch(path.name))
    named = [folder / name for name in (*OWN_FOLDERS, *OWN_FILES)]
    return [path for path in (*list_checkpoints(folder), *damaged, *named) if os.path.lexists(path)]


def failed_to_start(folder: Path) -> bool:
    """Whether a run's folder holds nothing but the word of a failure before the first step."""
    metrics = folder / METRICS
    has_measured = metrics.is_file() and metrics.stat().st_size > 0
    if list_checkpoints(folder) or has_measured:
        return False
    try:
        status = read_status(folder)
    except UserError:
        return False
    return status["state"] == "failed" and status["step"] == 0


def write_status(folder: Path, state: Condition, step: int | None = None, reason: str = "") -> None:
    """Replaces status.json: what a scheduler's script reads to know whether to start the run again.

    Without `step`, that of the status so far stays; where that is damaged, it is the newest checkpoint's.
    """
    if step is None:
        try:
            step = read_status(folder)["step"]
        except UserError:
            saved = list_checkpoints(folder)
            step = int(saved[-1].name.removeprefix("step-")) if saved else 0
    entry = {"state": state, "step": step, "reason": reason, "pid": os.getpid(), "time": time.time()}
    write_atomically(folder / STATUS, json.dumps(entry, indent=1) + "\n")


def read_status(folder: Path) -> dict[str, Any]:
    """What `write_status` wrote last. Raises `MissingFile`, and `UserError` for a file that is something else."""
    status = read_json(folder / STATUS)
    if not (
        status.get("state") in get_args(Condition)
        and isinstance(status.get("step"), int)
        and {"reason", "pid", "time"} <= status.keys()
    ):
        raise RunFolderError(f"{folder / STATUS} is not a run's status: the run writes it anew when it is continued")
    return status


class Metrics:
    """Appends to metrics.jsonl, each line in one write, so that a reader never sees half of an earlier line.

    On continuing from step N, lines of later steps (and a half-written last one) are dropped: they come again. Lines
    that cannot be read are dropped, and counted to `say`. Without a folder nothing is written: only the main process
    has one.
    """

    def __init__(self, folder: Path | None, continued_step: int | None, say: Callable[[str], None] = print) -> None:
        self._file: TextIO | None = None
        if folder is None:
            return
        path = folder / METRICS
        if path.exists():
            lines, unreadable = _parsed(path)
            if unreadable:
                say(f"{path}: {unreadable} of its lines cannot be read, and were left out")
            rest = [line for line in lines if line["step"] <= (continued_step or 0) and continued_step]
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in rest))
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: Literal["train", "eval"], step: int, **values: Any) -> None:
        """Adds a line, visible at once. `values` must be finite: JSON knows no NaN."""
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; what is no line of a run's, such as a half-written one, is left out."""
    return _parsed(path)[0]


def _parsed(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines, and how many of those that end could not be read."""
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1].split("\n")[:-1]
    lines = []
    for line in whole:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int) and entry.get("kind") in ("train", "eval"):
            lines.append(entry)
    return lines, len(whole) - len(lines)
