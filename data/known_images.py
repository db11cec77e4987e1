"""What was read of image files before: a file that has not changed since is not opened again.

That it has not, its size, times and inode tell. The time of its last change (ctime) is the one that no program can
set back; a file that changed in the last seconds before it was looked at might change within the same tick of its
disk's clock, and is not remembered beyond the process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Any

from shortzip.data.images import ImageSource, image_size, resolve_image_path
from shortzip.data.kept import Kept

_PARTS = {"format": 1}  # to be raised when another thing is read under the same name
SETTLED = 2  # seconds: the coarsest clock of a file system
Root = str | os.PathLike[str] | None


class KnownImages:
    """Values that depend on an image's bytes alone, by what they are ("size") and the image's file.

    Args:
        folder: where an earlier run kept them, if at all; None: nowhere.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.files: dict[str, dict[str, Any]] = {}
        if folder is not None:
            self.files = Kept(folder).find("images", _PARTS) or {}

    def get(self, what: str, source: ImageSource, root: Root, read: Callable[[ImageSource, Root], Any]) -> Any:
        """The value `what` of an image, a JSON value, as known or as `read` gives it, which is only then called."""
        file = _file_of(source, root)
        if file is None:
            return read(source, root)
        path, stamp = file
        entry = self.files.get(path)
        if entry is None or entry["stamp"] != stamp:
            entry = self.files[path] = {"stamp": stamp}
        if what not in entry:
            entry[what] = read(source, root)
        return entry[what]

    def has(self, what: str, source: ImageSource, root: Root) -> bool:
        """Whether `get` would open nothing."""
        file = _file_of(source, root)
        entry = self.files.get(file[0], {}) if file else {}
        return file is not None and entry.get("stamp") == file[1] and what in entry

    def size(self, source: ImageSource, root: Root) -> tuple[int, int]:
        """(height, width), as `image_size`. Raises BadImage."""
        height, width = self.get("size", source, root, lambda *image: list(image_size(*image)))
        return height, width

    def of(self, sources: Iterable[ImageSource], root: Root) -> dict[str, dict[str, Any]]:
        """What is known of some images' files, as `learn` takes it."""
        places = (_file_of(source, root) for source in sources)
        return {file[0]: self.files[file[0]] for file in places if file and file[0] in self.files}

    def learn(self, others: dict[str, dict[str, Any]]) -> None:
        """Takes in the `files` of another one, such as another process's."""
        for path, other in others.items():
            entry = self.files.get(path, {})
            same = entry.get("stamp") == other["stamp"]
            self.files[path] = {**entry, **other} if same else other

    def keep(self, folder: str | os.PathLike[str]) -> None:
        """Keeps what is known for the next run. Raises `CannotWrite`."""
        before = time.time_ns() - SETTLED * 1_000_000_000
        settled = {path: entry for path, entry in self.files.items() if entry["stamp"][2] < before}
        Kept(folder).keep("images", _PARTS, settled)


def _file_of(source: ImageSource, root: Root) -> tuple[str, list[int]] | None:
    """The absolute path of an image's file and what tells that it has changed; None for what is no file."""
    if not isinstance(source, str):
        return None
    try:
        path = os.path.abspath(resolve_image_path(source, root))
        status = os.stat(path)
    except (OSError, ValueError):  # who reads it says what is wrong with it
        return None
    return path, [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
