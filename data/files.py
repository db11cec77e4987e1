"""Files: read with words for what is wrong with them, written whole or not at all, and held by one process at a time.

What is being written lies beside its target as `.partial-HOST-NAME-XXXX`, locked for as long as its writer lives. A
killed writer leaves it; `sweep` removes those of this machine whose lock nobody holds any more.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from shortzip.data.errors import Busy, CannotWrite, FileInTheWay, MissingFile, UserError

_PREFIX = f".partial-{re.sub(r'[^A-Za-z0-9.]', '_', socket.gethostname())}-"
_SAMPLE = 1 << 14  # bytes read at each of three places


def read_text(path: Path) -> str:
    """A UTF-8 text file. Raises `MissingFile` or `UserError`, naming the file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MissingFile(f"{path}: there is no such file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `MissingFile` or `UserError`, naming the file and the cure."""
    if not path.is_file():
        raise MissingFile(f"{path} is missing: is {path.parent} the folder of a release, or of a run?")
    text = read_text(path)
    try:
        loaded = json.loads(text)
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply to be read as JSON: write it anew") from error
    except ValueError as error:
        raise UserError(f"{path} is not readable as JSON ({error}): fetch or write it again") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, needed is a JSON object")
    return loaded


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a disk refuses in the block into `CannotWrite`, naming `path` and the cure."""
    try:
        yield
    except UserError:
        raise
    except (OSError, SafetensorError) as error:
        full = isinstance(error, SafetensorError) or error.errno in (errno.ENOSPC, errno.EDQUOT)
        cure = "make space, or choose another disk" if full else "choose a folder that can be written to"
        words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CannotWrite(f"{path} cannot be written: {words}. {cure[0].upper()}{cure[1:]}") from error


def refuse_to_replace(
    *outputs: Path, overwrite: bool, inputs: Iterable[str | Path] = (), cure: str = "give --overwrite"
) -> None:
    """Raises `FileInTheWay` where writing the files `outputs` would replace a file unasked, or an input at all.

    For before the work: what is measured for hours then has a place. Raises `CannotWrite` where no file can be made.
    """
    refuse_inputs(outputs, inputs)
    for output in outputs:
        if output.is_dir():
            raise FileInTheWay(f"{output} is a folder, needed is a file's name: {output / 'NAME'}, say")
        if os.path.lexists(output) and not overwrite:
            raise FileInTheWay(f"{output} exists already: {cure} to replace it, or choose another output")
        above = next(folder for folder in (output.absolute().parent, *output.absolute().parents) if folder.exists())
        if not above.is_dir():
            raise CannotWrite(f"{output} cannot be written: {above} is a file. Choose another output")
        if not os.access(above, os.W_OK):
            raise CannotWrite(f"{output} cannot be written: {above} may not be written to. Choose another output")


def refuse_inputs(outputs: Iterable[Path], inputs: Iterable[str | Path]) -> None:
    """Raises `FileInTheWay` where a file of `outputs` would replace an input, or a file in a folder of them."""
    existing = [source for source in inputs if os.path.exists(source)]
    for output in outputs:
        for source in existing if output.exists() else []:
            is_in_it = os.path.isdir(source) and Path(os.path.realpath(output)).is_relative_to(
                os.path.realpath(source)
            )
            if is_in_it or os.path.samefile(output, source):
                where = "a file of the input" if is_in_it else "the input"
                raise FileInTheWay(f"{output} would replace {where} {source}: choose another output")


def write_atomically(path: Path, text: str) -> None:
    """Replaces a text file in one step: readers see the old one or the new one, whole. Raises `CannotWrite`."""
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make a file of the same name in a folder beside `path`, whose place it then takes in one step.

    The folder is what is locked: `write` may make the file as it likes, as safetensors does with a file of its own
    that it renames. Where `path` is a link, the file that it names is replaced. Raises `CannotWrite`.
    """
    path = Path(os.path.realpath(path))
    with writing(path):
        partial, lock = _claim(path.parent, path.name)
        try:
            file = partial / path.name
            write(file)
            flush_to_disk(file)
            file.chmod(0o666 & ~_umask())
            file.replace(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)


@contextmanager
def written_whole(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` when the block ends well, and vanishes otherwise.

    Where `target` is a link, the folder that it names is made. Raises `FileInTheWay` when `target` exists and is no
    empty folder (with `replace`: no folder), also if another process made it meanwhile; `CannotWrite` for a mount
    point and what the disk refuses.
    """
    named, target = target, Path(os.path.realpath(target))
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not replace)):
        raise FileInTheWay(f"{named} exists and is not empty: choose another folder, or remove it first")
    if os.path.ismount(target):
        raise CannotWrite(f"{named} is a mount point, which cannot appear whole: choose a folder inside it")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent, target.name)
        partial, lock = _claim(target.parent, target.name)
        aside = partial.with_name(f"{partial.name}-old")
        try:
            yield partial
            partial.chmod(0o777 & ~_umask())
            try:
                if target.exists() and replace:
                    target.rename(aside)
                elif target.exists():
                    target.rmdir()
                partial.rename(target)
            except OSError as error:
                if aside.exists() and not target.exists():
                    aside.rename(target)  # what was there stays where nothing takes its place
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                raise FileInTheWay(f"{named} was written by another process meanwhile") from error
        finally:
            for left in (partial, aside):
                shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


@contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """A folder among the machine's temporary files that vanishes with the block; those of killed processes are swept.

    Raises `CannotWrite`.
    """
    place = Path(tempfile.gettempdir())
    with writing(place / name):
        sweep(place, name)
        folder, lock = _claim(place, name)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def sweep(folder: Path, name: str = "") -> None:
    """Removes what killed writers left in `folder` (of the target `name`): what nobody on this machine holds.

    What another machine left, and what lies on a file system without locks, stays: its owner cannot be proved dead.
    """
    for path in folder.glob(f"{_PREFIX}{glob.escape(name)}*"):
        with suppress(OSError):  # another process was faster, or it cannot be removed
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(descriptor)


@contextmanager
def held_alone(lock: Path, what: str, *, signed: bool = True) -> Iterator[bool]:
    """Holds the lock file for this process alone; yields False where the file system knows no locks.

    The lock ends with the process, however it ends, and is not inherited by a fork. The file stays; `signed`: it says
    who held it last, otherwise it stays as it is. Whoever opens and closes it in the same process gives the lock up.
    Raises `Busy`, naming `what` and the holder, and `CannotWrite`.
    """
    descriptor, certain = _locked(lock, what)
    try:
        if signed:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield certain
    finally:
        os.close(descriptor)


def _locked(lock: Path, what: str) -> tuple[int, bool]:
    """The lock file's descriptor, and whether it is locked. One that its holder removes meanwhile is made anew."""
    while True:
        with writing(lock):
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return descriptor, False
            holder = os.read(descriptor, 200).decode("utf-8", "replace").strip() or "another process"
            os.close(descriptor)
            raise Busy(f"{what} is in use by {holder}: wait for its end, or stop it") from error
        if lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()):
            return descriptor, True
        os.close(descriptor)


def sampled_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's size and of 16 KiB at its beginning, middle and end: small files are read whole.

    For files such as images and tables, where other content shows there; releases' weights have
    `shortzip.reduction.base_release.digest`, which looks into every tensor.
    """
    size = path.stat().st_size
    summary = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= 3 * _SAMPLE:
            summary.update(file.read())
        else:
            for start in (0, (size - _SAMPLE) // 2, size - _SAMPLE):
                file.seek(start)
                summary.update(file.read(_SAMPLE))
    return summary.hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    """Waits until a file (or a folder's list of names) is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _claim(place: Path, name: str) -> tuple[Path, int]:
    """Makes a temporary folder in `place` and locks it; a `sweep` may come in between, then another one is made."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{name}-", dir=place))
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        except OSError:
            return path, descriptor  # no locks here: never swept, since a sweep cannot lock it either
        if path.exists():
            return path, descriptor
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
