"""W&B and TensorBoard through Accelerate's trackers. A tracker that fails in mid-run costs its curves, not the run."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from shortzip.data.errors import UserError
from shortzip.data.files import read_json, write_atomically
from shortzip.train.run.run_folder import TRACKER
from shortzip.train.settings.config import TuneConfig
from shortzip.train.settings.method_parameters import flat_settings

PROJECT = "shortzip"


def wandb_run_id(folder: Path, say: Callable[[str], None] = print) -> str:
    """The id of the folder's W&B run: made once and kept in the folder, so that a resumed run goes on in it.

    A copy of the folder has a run of its own: the file names its folder, by path and inode, and one of the two is the
    same wherever the folder is moved.
    """
    path = folder / TRACKER
    place = {"folder": str(folder.resolve()), "inode": folder.stat().st_ino}
    record: dict[str, Any] = {}
    if path.exists():
        try:
            record = read_json(path)
        except UserError as error:
            say(f"W&B: this run goes on as a new one there: {error}")
    if not isinstance(record.get("id"), str):
        record = {}
    elif "inode" in record and not any(record.get(key) == value for key, value in place.items()):
        say(
            f"W&B: {folder} is a copy of {record.get('folder')}, and a new run there; {record['id']} stays "
            "the original's"
        )
        record = {}
    run_id = str(record.get("id") or uuid.uuid4().hex[:12])
    if record != {"id": run_id, **place}:
        write_atomically(path, json.dumps({"id": run_id, **place}) + "\n")
    return run_id


class Trackers:
    """Logs to what `report_to` names; on the main process only, and without effect if it names nothing.

    `say` shows a message to the user. If W&B cannot be reached when the run starts, it records offline instead.
    """

    def __init__(self, accelerator: Accelerator, config: TuneConfig, folder: Path, say: Callable[[str], None]) -> None:
        self._accelerator, self._say = accelerator, say
        self._failed = False
        self._active = bool(config.report_to) and accelerator.is_main_process
        if not self._active:
            return
        if "wandb" in config.report_to:
            self._start(config, folder, {"id": wandb_run_id(folder, say), "name": config.name, "resume": "allow"})
        else:
            self._start(config, folder, None)

    def _start(self, config: TuneConfig, folder: Path, wandb: dict[str, Any] | None) -> None:
        settings = _flat(flat_settings(config))
        options = {} if wandb is None else {"wandb": {**wandb, "dir": str(folder)}}
        try:
            self._accelerator.init_trackers(PROJECT, config=settings, init_kwargs=options)
        except Exception as error:
            from importlib.util import find_spec

            if wandb is None or find_spec("wandb") is None:
                raise
            from wandb.errors import CommError, UsageError

            if not isinstance(error, CommError | UsageError):
                raise
            self._say(
                f"W&B cannot be used ({error}): recording offline in {folder / 'wandb'}; upload it with `wandb sync`"
            )
            options["wandb"]["mode"] = "offline"
            self._accelerator.trackers.clear()
            try:
                self._accelerator.init_trackers(PROJECT, config=settings, init_kwargs=options)
            except Exception as offline:  # W&B's service may still hold the run that it could not start
                self._say(f"W&B cannot record offline either ({offline}): metrics.jsonl has everything")
                self._accelerator.trackers.clear()
                self._active = False

    def log(self, step: int, **values: float) -> None:
        """Adds the values at a step. The first failure is shown, later ones are not."""
        if not self._active:
            return
        try:
            self._accelerator.log(values, step=step)
        except Exception as error:  # whatever a tracker's client throws: no curve is worth a run
            if not self._failed:
                self._say(f"A tracker failed ({error}); training goes on, metrics.jsonl has everything")
            self._failed = True

    def finish(self) -> None:
        """Closes the trackers; the process group stays, unlike after Accelerate's own `end_training`."""
        for tracker in self._accelerator.trackers if self._active else ():
            try:
                tracker.finish()
            except Exception as error:  # as above
                self._say(f"A tracker could not be closed ({error})")
        self._active = False


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys, values that every tracker takes."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
