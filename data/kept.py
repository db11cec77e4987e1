"""What is kept because the same was computed before: each result under all that it depends on.

That are named parts: settings, and digests in the place of files, since a file of equal name, size and time may hold
something else. Equal parts have one identity; what is kept under another one, or was damaged, counts as not there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from shortzip.data.errors import UserError
from shortzip.data.files import read_json, sha256, sweep, write_atomically, writing
from shortzip.data.images import BadImage, image_bytes
from shortzip.data.instructions import Conversation
from shortzip.data.videos import VideoSource, files_of


def identity_of(parts: Any) -> str:
    """SHA-256 (hex) of JSON values; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def conversations_digest(
    conversations: Iterable[Conversation], image_root: str | os.PathLike[str] | None = None
) -> str:
    """SHA-256 (hex) of conversations: ids, turns, and the bytes of their images and videos, wherever these lie.

    An image or video that cannot be read counts by what is wrong with it.
    """
    digest = hashlib.sha256()
    for conversation in conversations:
        images = []
        for source in conversation.images:
            try:
                images.append(hashlib.sha256(image_bytes(source, image_root)).hexdigest())
            except (BadImage, OSError) as error:
                images.append(f"{type(error).__name__}: {error}")
        row: list[Any] = [conversation.id, conversation.turns, images]
        if conversation.videos:
            row.append([_video_digests(source, image_root) for source in conversation.videos])
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def _video_digests(source: VideoSource, image_root: str | os.PathLike[str] | None) -> list[str]:
    try:
        return [sha256(file) for file in files_of(source, image_root)]
    except (BadImage, OSError) as error:
        return [f"{type(error).__name__}: {error}"]


class Kept:
    """Results in a folder, one JSON file each, which says what its result depends on.

    Several processes may keep the same: a file is replaced whole. Names are file names without a suffix.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def path(self, name: str) -> Path:
        """Where a result is kept."""
        return self.folder / f"{name}.json"

    def find(self, name: str, parts: Mapping[str, Any]) -> Any:
        """The result that was kept for these parts; None where there is none, or it is not as it was written."""
        try:
            entry = read_json(self.path(name))
        except (UserError, OSError):
            return None
        is_whole = "result" in entry and entry.get("digest") == identity_of(entry["result"])
        return entry["result"] if is_whole and entry.get("identity") == identity_of(parts) else None

    def keep(self, name: str, parts: Mapping[str, Any], result: Any) -> None:
        """Keeps a result, JSON values, in place of the one before. Raises `CannotWrite`."""
        entry = {"identity": identity_of(parts), "digest": identity_of(result), "parts": parts, "result": result}
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder)
        write_atomically(self.path(name), json.dumps(entry, indent=1) + "\n")

    def get(self, name: str, parts: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """The result that was kept for these parts, or the one that `make` gives, which is kept; as JSON has it."""
        result = self.find(name, parts)
        if result is None:
            result = json.loads(json.dumps(make()))
            self.keep(name, parts, result)
        return result
