"""The start of a run in its folder: refused without a trace, or accepted.

Until a run is accepted, nothing of it is in its folder but the lock. One that it overwrites is moved aside then
(train/run/earlier_run.py), and put back if the new one fails before its first checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator

from shortzip.data.files import held_alone, write_atomically, writing
from shortzip.data.files import sweep as sweep_partial
from shortzip.train.run.checkpoint import (
    Checkpoint,
    discard,
    find_checkpoint,
    load_checkpoint,
    put_back_replaced,
    set_aside,
    sweep,
)
from shortzip.train.run.earlier_run import (
    EARLIER,
    is_settled,
    move_aside,
    put_back,
    refuse_inputs_inside,
    refuse_own_inputs,
)
from shortzip.train.run.processes import StopRequested, on_main_process
from shortzip.train.run.run_folder import (
    CONFIG,
    FINAL,
    LOCK,
    MARK,
    RunFolderError,
    failed_to_start,
    is_run,
    own_files,
    read_status,
    write_status,
)
from shortzip.train.settings.command_line import dump_config
from shortzip.train.settings.config import TuneConfig


class RunFolder:
    """The folder of one run, in which no other process writes meanwhile, and nothing changes before `accept`.

    A context manager, on every process. Entering it raises `RunFolderError` for a folder that this run must not use,
    and `Busy` while another process has it; leaving it writes how the run ended.
    """

    def __init__(
        self,
        config: TuneConfig,
        accelerator: Accelerator,
        say: Callable[[str], None],
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.config, self.path = config, Path(config.output_dir)
        self.say, self.warn = cache(say), cache(warn or say)  # whatever is said again and again is said once
        self._accelerator = accelerator
        self._accepted = self._certain = False
        self._held = ExitStack()
        self._waiting: dict[Path, str] = {}
        self._damaged: list[Path] = []

    def __enter__(self) -> RunFolder:
        with ExitStack() as held:
            self._held = held
            on_main_process(self._accelerator, self._hold)
            self._held = held.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._held:
            if not self._accepted or not self._accelerator.is_main_process:
                return
            if error is None:
                write_status(self.path, "finished")
            elif isinstance(error, StopRequested):
                write_status(self.path, "stopped", reason=str(error))
            elif isinstance(error, Exception | KeyboardInterrupt) and (self.path / EARLIER).is_dir():
                self._give_back()

    def _hold(self) -> None:
        check_folder(self.config)
        folder = Path(os.path.realpath(self.path))
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        before = None if made else folder.stat()
        is_new = not (folder / LOCK).exists()
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._held.callback(self._leave_folder, folder, made, before if is_new else None)
        lock = held_alone(folder / LOCK, f"output_dir {self.path}{_starter(folder)}", signed=False)
        self._certain = self._held.enter_context(lock)
        if is_new:
            self._held.callback(self._leave_lock, folder / LOCK)
        if not self._certain:
            self.warn(f"{folder}: this file system knows no locks. See to it that no other run writes there meanwhile")
        check_folder(self.config)  # once more: another process may have had the folder in between
        with writing(folder):
            if not is_settled(folder):
                put_back(folder, self.warn)
            put_back_replaced(folder)

    def _leave_folder(self, folder: Path, made: list[Path], before: os.stat_result | None) -> None:
        if not self._accepted:
            with suppress(OSError):  # not empty: another process came in between
                for path in made:
                    path.rmdir()
                if before is not None:
                    os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))

    def _leave_lock(self, lock: Path) -> None:
        if not self._accepted:
            lock.unlink(missing_ok=True)

    def check_base(self, base: Mapping[str, Any] | None) -> None:
        """Raises `RunFolderError` if the release that the model names as its own lies in a run to be overwritten."""
        if base and self.config.overwrite_output_dir:
            refuse_inputs_inside(self.path, {"the base of the model": str(base["name"])})

    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint that `resume_from_checkpoint` means; None for a run that begins.

        Damaged ones that `latest` passes over are named, and renamed by `accept`. Raises `CheckpointError` if there is
        no whole one.
        """
        if self.config.resume_from_checkpoint is None:
            return None
        return on_main_process(self._accelerator, partial(self._find, self.config.resume_from_checkpoint))

    def _find(self, name: str) -> Checkpoint | None:
        path, damaged = find_checkpoint(self.path, name)
        self._damaged = list(damaged)
        for passed_over, fault in damaged.items():
            self.warn(f"{passed_over} is damaged: {fault}. It is renamed to damaged-{passed_over.name}")
        if path is None:
            self.say(f"{self.path} holds no checkpoint yet: beginning at step 0")
            return None
        self.say(f"continuing from {path}")
        return load_checkpoint(path)

    def accept(self, step: int = 0) -> None:
        """The run goes ahead, from `step`: its settings and status are written. Once; later calls do nothing."""
        if not self._accepted:
            on_main_process(self._accelerator, partial(self._accept, step))
            self._accepted = True

    def _accept(self, step: int) -> None:
        folder = self.path
        sweep_partial(folder)
        if self._certain:
            sweep(folder, self.warn)
        is_overwriting = self.config.resume_from_checkpoint is None and is_run(folder)
        if is_overwriting and failed_to_start(folder) and not (folder / EARLIER).is_dir():
            is_overwriting = False  # the word of a failure is not worth coming back to
            self._discard_own()
        elif is_overwriting:
            move_aside(folder, self.say)
        try:
            for path in self._damaged:
                set_aside(path)
            write_atomically(folder / CONFIG, MARK + dump_config(self.config))
            write_status(folder, "running", step)
            for path, text in self._waiting.items():
                write_atomically(path, text)
        except BaseException:
            if is_overwriting:
                self._give_back()
            elif self.config.resume_from_checkpoint is None:
                self._discard_own()
            raise
        if is_overwriting:
            self.say(f"the run that {folder} held lies in {EARLIER} until this one's first checkpoint is written")

    def write(self, path: Path, text: str) -> None:
        """Writes a file of this folder, as soon as the run is accepted; on the main process."""
        if self._accepted:
            write_atomically(path, text)
        else:
            self._waiting[path] = text

    def saved(self, step: int) -> None:
        """Notes a checkpoint: from now on there is no way back to the run that was overwritten."""
        discard(self.path / EARLIER, self.warn)
        write_status(self.path, "running", step)

    def failed(self, reason: str) -> None:
        """Writes the reason into status.json if the run was accepted, and no other process has written one yet."""
        if self._accepted and read_status(self.path)["state"] == "running":
            write_status(self.path, "failed", reason=reason)

    def _discard_own(self) -> None:
        for path in own_files(self.path):
            discard(path, self.warn)

    def _give_back(self) -> None:
        try:
            put_back(self.path, self.say)
        except OSError as error:
            self.warn(f"the run that was to be overwritten lies in {self.path / EARLIER} ({error})")
        else:
            self.say(f"{self.path} holds again the run that was to be overwritten, and nothing of the one that failed")


def check_folder(config: TuneConfig) -> None:
    """Raises `RunFolderError` for an `output_dir` that this run must not or cannot use; changes nothing.

    That is one with another run (or anything else) which the config neither resumes nor overwrites; one that failed
    before its first step is no hindrance. And one whose final/ could not be written at the end.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"output_dir {folder} is a file: choose a folder")
    holds_run = is_run(folder) or (folder / EARLIER / CONFIG).is_file()
    if config.resume_from_checkpoint is not None:
        if not holds_run:
            raise RunFolderError(
                f"resume_from_checkpoint {config.resume_from_checkpoint}: output_dir {folder} holds no run. "
                "Give the output_dir of the run to continue, or start without resume_from_checkpoint"
            )
        _check_final(folder / FINAL)
    elif holds_run:
        if not config.overwrite_output_dir and not failed_to_start(folder):
            raise RunFolderError(
                f"output_dir {folder} holds another run: choose another output_dir, continue that run with "
                "--resume_from_checkpoint latest, or delete it with --overwrite_output_dir true"
            )
        refuse_own_inputs(config, folder)
        for path in own_files(folder):
            if os.path.ismount(path):
                raise RunFolderError(f"{path} is a mount point and cannot be overwritten: choose another output_dir")
    elif folder.is_dir() and any(_others(folder)):
        raise RunFolderError(f"output_dir {folder} is not empty and holds no run: choose another folder")


def _others(folder: Path) -> Iterator[Path]:
    """What lies in a folder, without what a run leaves that is killed before it is accepted."""
    for path in folder.iterdir():
        if path.name not in (LOCK, "lost+found") and not path.name.startswith(".partial-"):
            yield path


def _check_final(final: Path) -> None:
    """Raises `RunFolderError` for what could not be replaced by the reduced checkpoint when all work is done."""
    there = Path(os.path.realpath(final))
    if os.path.ismount(there):
        raise RunFolderError(f"{final} is a mount point, and the reduced checkpoint cannot be put there: unmount it")
    if final.exists() and not final.is_dir():
        raise RunFolderError(f"{final} is a file, and the reduced checkpoint is to lie there: move it away")
    if not final.is_symlink():
        return
    if there.is_dir() and any(there.iterdir()):
        raise RunFolderError(f"{final} is a link to {there}, which is not empty and stays as it is: remove the link")
    parent = next(path for path in there.parents if path.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RunFolderError(f"{final} is a link to {there}, and {parent} cannot be written to: remove the link")


def _starter(folder: Path) -> str:
    """Who is likely to hold a folder."""
    try:
        status = read_status(folder)
    except ValueError:
        return ""
    return f" (process {status['pid']})" if status["state"] == "running" else ""
