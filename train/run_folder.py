"""A run's folder: who may write in it, how the run stands, and what it measured.

checkpoints/RUN/
  config.yaml     every setting, as resolved when the run was last started
  status.json     running, finished, stopped (with the signal) or failed (with the error), and the step
  metrics.jsonl   one JSON object per line: training steps and held-out losses
  step-000100/    checkpoints (train/checkpoint.py)
  final/          the reduced checkpoint
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TextIO

from data.errors import UserError
from data.files import write_atomically
from train.checkpoint import (
    Checkpoint,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    set_aside,
    sweep,
)
from train.command_line import dump_config
from train.config import TuneConfig

Condition = Literal["running", "finished", "stopped", "failed"]

CONFIG, STATUS, METRICS, FINAL = "config.yaml", "status.json", "metrics.jsonl", "final"
RESULTS, CURVE, LAYERS, TRACKER = "evaluation.json", "loss.png", "layers.json", "wandb-run.json"
DROPPED, NONFINITE = "dropped.jsonl", "nonfinite.json"
ANSWERS, PICTURES, CONTROL = "answers", "pictures", "control"
HELD_OUT_PICTURE = "held-out.png"
# What a run writes beside its checkpoints, and what overwrite_output_dir may therefore delete.
OWN_FILES = (STATUS, METRICS, RESULTS, CURVE, LAYERS, TRACKER, DROPPED, NONFINITE)
OWN_FOLDERS = (FINAL, ANSWERS, PICTURES, CONTROL, "tensorboard", "wandb")


class RunFolderError(UserError):
    """The output folder holds something that this run must not touch, or cannot be used."""


def prepare_folder(config: TuneConfig) -> Path:
    """Makes `output_dir` ready and writes config.yaml; on the main process only.

    Raises `RunFolderError` if the folder holds another run (or anything else) and the config neither resumes nor
    overwrites it; one that failed before its first step is no hindrance.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"output_dir {folder} is a file: choose a folder")
    if config.resume_from_checkpoint is not None:
        if not (folder / CONFIG).is_file():
            raise RunFolderError(
                f"resume_from_checkpoint {config.resume_from_checkpoint}: output_dir {folder} holds no run. "
                "Give the output_dir of the run to continue, or start without resume_from_checkpoint"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        if not (folder / CONFIG).is_file():
            raise RunFolderError(f"output_dir {folder} is not empty and holds no run: choose another folder")
        if not config.overwrite_output_dir and not _failed_to_start(folder):
            raise RunFolderError(
                f"output_dir {folder} holds another run: choose another output_dir, continue that run with "
                "--resume_from_checkpoint latest, or delete it with --overwrite_output_dir true"
            )
        _delete_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    write_atomically(folder / CONFIG, dump_config(config))
    return folder


def _failed_to_start(folder: Path) -> bool:
    """Whether a run's folder holds nothing but the word of a failure before the first step."""
    metrics = folder / METRICS
    has_measured = metrics.is_file() and metrics.stat().st_size > 0
    if not (folder / STATUS).is_file() or list_checkpoints(folder) or has_measured:
        return False
    status = read_status(folder)
    return status["state"] == "failed" and status["step"] == 0


def _delete_run(folder: Path) -> None:
    for path in [*list_checkpoints(folder), *folder.glob("damaged-step-*"), *(folder / name for name in OWN_FOLDERS)]:
        shutil.rmtree(path, ignore_errors=True)
    for name in OWN_FILES:
        (folder / name).unlink(missing_ok=True)
    (folder / CONFIG).unlink()  # last: until then the folder is recognised as a run's


def checkpoint_to_continue(config: TuneConfig, folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that `resume_from_checkpoint` means; None if the run was stopped before it wrote one.

    Damaged ones that `latest` passes over are renamed, and named. Raises `CheckpointError` if there is no whole one.
    """
    assert config.resume_from_checkpoint is not None
    path, damaged = find_checkpoint(folder, config.resume_from_checkpoint)
    for passed_over, fault in damaged.items():
        say(f"{passed_over} is damaged: {fault}. It was renamed to {set_aside(passed_over).name}")
    if path is None:
        say(f"{folder} holds no checkpoint yet: beginning at step 0")
        return None
    say(f"continuing from {path}")
    return load_checkpoint(path)


def write_status(folder: Path, state: Condition, step: int | None = None, reason: str = "") -> None:
    """Replaces status.json: what a scheduler's script reads to know whether to start the run again.

    Without `step`, that of the status so far stays.
    """
    if step is None:
        step = read_status(folder)["step"]
    entry = {"state": state, "step": step, "reason": reason, "pid": os.getpid(), "time": time.time()}
    write_atomically(folder / STATUS, json.dumps(entry, indent=1) + "\n")


def read_status(folder: Path) -> dict[str, Any]:
    """What `write_status` wrote last."""
    return json.loads((folder / STATUS).read_text(encoding="utf-8"))


class Metrics:
    """Appends to metrics.jsonl, each line in one write, so that a reader never sees half of an earlier line.

    On continuing from step N, lines of later steps (and a half-written last one) are dropped: they come again. Without
    a folder nothing is written: only the main process has one.
    """

    def __init__(self, folder: Path | None, continued_step: int | None) -> None:
        self._file: TextIO | None = None
        if folder is None:
            return
        path = folder / METRICS
        if path.exists():
            kept = [line for line in read_metrics(path) if line["step"] <= (continued_step or 0) and continued_step]
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
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
    """The whole lines of a metrics.jsonl; a half-written last line is left out."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
