"""Videos of instruction data: one file, or its frames as image files; where they lie, and which frames are seen."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shortzip.data.errors import UserError
from shortzip.data.hints import SUFFIXES
from shortzip.data.images import BadImage, check_image_file, resolve_image_path

VideoSource = str | tuple[str, ...]
"""A file or a folder of frames, by its path relative to the image root; or the paths of its frames, in order."""
Root = str | os.PathLike[str] | None
MOST_FRAMES = 4096


class VideoLength(NamedTuple):
    """How long a video is: its frames, and the seconds from the first to the last one; None where they have no times,
    as images have none."""

    frames: int
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which frames of a video are seen.

    Attributes:
        frames: how many, 1 to `MOST_FRAMES`: spread evenly from the first frame to the last, some of them twice where
            a video has fewer. With `fps`: at most so many.
        fps: one frame for every 1 / fps seconds instead: what is on screen then. Of a video that has more than
            `frames` of these, `frames` are spread evenly. Frames that are images have no times: all are seen.
    """

    frames: int
    fps: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.frames <= MOST_FRAMES:
            raise UserError(f"frames of a video is {self.frames}: 1 to {MOST_FRAMES} are needed")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise UserError(f"fps is {self.fps}: frames per second, above 0 and up to 1000, are needed")

    @property
    def reads_length(self) -> bool:
        """Whether the number of frames that are seen depends on the video."""
        return self.fps is not None

    def count(self, length: VideoLength) -> int:
        """How many frames of a video of this length are seen."""
        if self.fps is None:
            return self.frames
        every = length.frames if length.seconds is None else int(length.seconds * self.fps + 1e-6) + 1
        return min(self.frames, every)

    def numbers(self, frames: int, times: Sequence[float] | None = None) -> list[int]:
        """The numbers, from 0 and not falling, of the frames that are seen of so many. `times`: when each is shown, in
        seconds, rising."""
        length = VideoLength(frames, None if times is None else times[-1] - times[0])
        count = self.count(length)
        if self.fps is None or times is None or int((length.seconds or 0) * self.fps + 1e-6) + 1 > self.frames:
            return np.linspace(0, frames - 1, count, dtype=int).tolist()
        moments = times[0] + np.arange(count) / self.fps + 1e-6
        return (np.searchsorted(times, moments, side="right") - 1).tolist()


def video_name(source: VideoSource) -> str:
    """What messages call a video."""
    return source if isinstance(source, str) else f"{source[0]} … ({len(source)} frames)"


def frame_paths(source: VideoSource, root: Root) -> tuple[str, ...] | None:
    """The paths of a video's frames, relative to the image root; None for a file. Raises BadImage."""
    if isinstance(source, tuple):
        return source
    folder = resolve_image_path(source, root)
    if not folder.is_dir():
        return None
    try:
        names = [name for name in os.listdir(folder) if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    except OSError as error:
        raise BadImage("unreadable_video", source, f"the folder cannot be read: {error.strerror}") from error
    if not names:
        raise BadImage(
            "unreadable_video", source, f"the folder holds no image ({', '.join(SUFFIXES)}) that is a frame"
        )
    return tuple(f"{source.rstrip('/')}/{name}" for name in sorted(names, key=_natural))


def _natural(name: str) -> list[tuple[int, str]]:
    """frame2 before frame10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def check_video(source: VideoSource, root: Root, hint: bool = True) -> None:
    """Refuses a video whose files are not there, without opening one.

    Raises:
        BadImage: as `check_image_file`, of its file or of a frame; a folder without frames.
    """
    for path in frame_paths(source, root) or (str(source),):
        try:
            check_image_file(resolve_image_path(path, root), hint)
        except BadImage as error:
            raise of_video(error) from error


def of_video(error: BadImage) -> BadImage:
    """What is wrong with a file or a frame, as a video's problem."""
    problem = {"missing_image": "missing_video", "unreadable_image": "unreadable_video"}.get(error.problem)
    return error if problem is None else BadImage(problem, error.file, error.detail)  # type: ignore[arg-type]


def files_of(source: VideoSource, root: Root) -> list[Path]:
    """The files that a video is in. Raises BadImage."""
    return [resolve_image_path(path, root) for path in frame_paths(source, root) or (str(source),)]
