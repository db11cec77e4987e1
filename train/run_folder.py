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
from pathlib import Path
from typing import Any, Literal

from train.checkpoint import list_checkpoints, sweep, write_atomically
from train.config import TuneConfig, dump_config

Condition = Literal["running", "finished", "stopped", "failed"]

CONFIG, STATUS, METRICS, FINAL = "config.yaml", "status.json", "metrics.jsonl", "final"
TRACKER = "wandb-run.json"
# What a run writes, and what overwrite_output_dir may therefore delete.
OWN_FILES = (CONFIG, STATUS, METRICS, TRACKER, "evaluation.json", "bad-samples.jsonl", "nonfinite.json", "layers.json")
OWN_FOLDERS = (FINAL, "control", "answers", "pictures", "tensorboard", "wandb", "failures")


class RunFolderError(RuntimeError):
    """The output folder holds something that this run must not touch, or cannot be used."""


def prepare_folder(config: TuneConfig) -> Path:
    """Makes `output_dir` ready and writes config.yaml; on the main process only.

    Raises `RunFolderError` if the folder holds another run (or anything else) and the config neither resumes nor
    overwrites it.
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
        if not config.overwrite_output_dir:
            raise RunFolderError(
                f"output_dir {folder} holds another run: choose another output_dir, continue that run with "
                "--resume_from_checkpoint latest, or delete it with --overwrite_output_dir true"
            )
        _delete_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    write_atomically(folder / CONFIG, dump_config(config))
    return folder


def _delete_run(folder: Path) -> None:
    for path in [*list_checkpoints(folder), *folder.glob("damaged-step-*"), *(folder / name for name in OWN_FOLDERS)]:
        shutil.rmtree(path, ignore_errors=True)
    for path in [*(folder / name for name in OWN_FILES if name != CONFIG), *folder.glob("*.png")]:
        path.unlink(missing_ok=True)
    (folder / CONFIG).unlink()  # last: until then the folder is recognised as a run's


def write_status(folder: Path, state: Condition, step: int, reason: str = "") -> None:
    """Replaces status.json: what a scheduler's script reads to know whether to start the run again."""
    entry = {"state": state, "step": step, "reason": reason, "pid": os.getpid(), "time": time.time()}
    write_atomically(folder / STATUS, json.dumps(entry, indent=1) + "\n")


class Metrics:
    """Appends to metrics.jsonl, each line in one write, so that a reader never sees half of an earlier line.

    On resuming from step N, lines of later steps (and a half-written last one) are dropped: they come again.
    """

    def __init__(self, folder: Path, resumed_step: int | None) -> None:
        self.path = folder / METRICS
        if resumed_step is not None and self.path.exists():
            kept = [line for line in read_metrics(self.path) if line["step"] <= resumed_step]
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, kind: Literal["train", "eval"], step: int, **values: Any) -> None:
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; a half-written last line is left out."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
