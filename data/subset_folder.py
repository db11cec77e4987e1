"""The folder of a subset: made by one process at a time, whole or not at all, and recognised afterwards."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from shortzip.data.errors import FileInTheWay
from shortzip.data.files import held_alone, read_json, sweep, writing, written_whole

SUBSET, REPORT, IMAGES = "subset.json", "report.json", "images"
_NEW = ".new-subset"  # in a folder that holds other files too: the subset before it takes its place among them


def subset_report(instructions: str | Path) -> dict[str, Any] | None:
    """The report of `prepare_subset` if `instructions` is what it wrote, else None."""
    path = Path(instructions)
    report = path.parent / REPORT
    return read_json(report) if path.name == SUBSET and report.is_file() else None


@contextmanager
def new_subset(output: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder for a subset, which becomes `output` when the block ends well, and vanishes otherwise.

    With `overwrite`, `output` may hold something: files and folders of the same names are replaced, others stay.

    Raises:
        FileInTheWay: `output` is a file, or holds something that may not be overwritten.
        Busy: another process writes a subset there.
        CannotWrite: what the disk refuses.
    """
    target = Path(os.path.realpath(output))
    lock = target.with_name(f".{target.name}.lock")
    with ExitStack() as stack:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held_alone(lock, str(output)))
        stack.callback(lock.unlink, missing_ok=True)
        sweep(target.parent, target.name)
        _check(output, overwrite)
        yield stack.enter_context(_placed(target))


def _check(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise FileInTheWay(f"{output} is a file: choose another name for the folder")
    if overwrite or not output.exists():
        return
    if (output / SUBSET).exists():
        raise FileInTheWay(f"{output} holds a subset already: choose another folder, or replace it with --overwrite")
    for entry in sorted(output.iterdir()):
        raise FileInTheWay(
            f"{output} holds {entry.name} already: choose a new folder, or write into this one with --overwrite, "
            "which replaces files of a subset's names and keeps the others"
        )


@contextmanager
def _placed(output: Path) -> Iterator[Path]:
    """A folder that becomes `output`, or whose files take their place in an `output` that holds something.

    Of those, subset.json goes first and comes last: without it there is no subset.
    """
    if not output.exists() or not any(output.iterdir()):
        with written_whole(output) as folder:
            yield folder
        return
    new = output / _NEW
    with writing(output):
        shutil.rmtree(new, ignore_errors=True)
        with written_whole(new) as folder:
            yield folder
        # Renamed one by one, since files that are no subset's stay.
        (output / SUBSET).unlink(missing_ok=True)
        for file in sorted(new.iterdir(), key=lambda file: file.name == SUBSET):
            target = output / file.name
            if target.is_dir() and not target.is_symlink():
                target.rename(new / f"replaced-{file.name}")
            file.replace(target)
        shutil.rmtree(new)
