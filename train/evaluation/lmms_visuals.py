"""What lmms-eval's tasks give to look at: images, and videos as paths or frames; and the turns that they stand in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from shortzip.data.errors import UserError
from shortzip.data.hints import SUFFIXES, VIDEO_SUFFIXES, kind_of
from shortzip.data.images import open_image
from shortzip.data.instructions import PLACEHOLDER, VIDEO_PLACEHOLDER
from shortzip.data.pixels import frames_pixels
from shortzip.data.supervision import Supervision
from shortzip.data.video_frames import read_frames
from shortzip.data.videos import Sampling


@dataclass
class Visuals:
    """The images and videos of a prompt, in the order of their placeholders: RGB, and frames' pixels [F, 3, H, W]."""

    images: list[Image.Image] = field(default_factory=list)
    videos: list[Tensor] = field(default_factory=list)

    @property
    def marks(self) -> str:
        """A placeholder for each, a line each: images before videos."""
        return "\n".join([PLACEHOLDER] * len(self.images) + [VIDEO_PLACEHOLDER] * len(self.videos))


@dataclass(frozen=True)
class Reader:
    """Reads what a task gives, for one model."""

    supervision: Supervision

    def read(self, visuals: Sequence[Any]) -> Visuals:
        """What a task of the text-and-images protocol gives: a path that is a video's, frames as an array [F, H, W, 3]
        or as a list of pictures, or images."""
        found = Visuals()
        for visual in visuals:
            self._add(visual, found)
        return found

    def _add(self, visual: Any, found: Visuals) -> None:
        is_path = isinstance(visual, str) and _is_video(visual)
        is_array = isinstance(visual, np.ndarray) and visual.ndim == 4
        is_list = isinstance(visual, list | tuple) and visual and all(isinstance(one, Image.Image) for one in visual)
        if is_path or is_array or is_list:
            found.videos.append(self.video(visual))
        else:
            found.images.append(_as_image(visual))

    def video(self, given: Any) -> Tensor:
        """A video's pixels [F, 3, H, W], of the frames that the model sees. Raises UserError."""
        sampling = self.supervision.sampling
        if sampling is None:
            raise UserError("reduced_llava: this task gives a video, and the model's family takes none")
        return frames_pixels(_frames(given, sampling), self.supervision.processor)

    def turns(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[str, str]], Visuals]:
        """lmms-eval's chat messages as (role, text with placeholders), and what they show.

        Images and videos stand where their parts do, but for a message whose text has a literal placeholder for each
        of them.
        """
        turns, found = [], Visuals()
        for message in messages:
            shown, pieces, texts = Visuals(), [], []
            for part in message["content"]:
                if part["type"] == "text":
                    texts.append(part["text"])
                    pieces.append(_without_marks(part["text"]))
                elif part["type"] == "image":
                    shown.images.append(_as_image(part["url"]))
                    pieces.append(PLACEHOLDER)
                elif part["type"] == "video":
                    _refuse_a_part(part)
                    shown.videos.append(self.video(part["url"]))
                    pieces.append(VIDEO_PLACEHOLDER)
                else:
                    raise UserError(f"reduced_llava looks at images and videos only; this task gives {part['type']}")
            text = "\n".join(texts)
            is_marked = (text.count(PLACEHOLDER), text.count(VIDEO_PLACEHOLDER)) == _counts(shown)
            turns.append((str(message["role"]), text if is_marked else "\n".join(pieces)))
            found.images += shown.images
            found.videos += shown.videos
        return turns, found


def with_marks(text: str, shown: Visuals) -> str:
    """A task's text with a placeholder per image and video: its own where it has them, else all of them before it."""
    if (text.count(PLACEHOLDER), text.count(VIDEO_PLACEHOLDER)) == _counts(shown):
        return text
    return "\n".join([*([shown.marks] if shown.marks else []), _without_marks(text).strip()])


def words(text: str) -> str:
    """A user's turn without its images and videos."""
    return _without_marks(text).strip()


def _without_marks(text: str) -> str:
    return text.replace(PLACEHOLDER, "").replace(VIDEO_PLACEHOLDER, "")


def _counts(shown: Visuals) -> tuple[int, int]:
    return len(shown.images), len(shown.videos)


def _refuse_a_part(part: Mapping[str, Any]) -> None:
    span = [part.get("start_time"), part.get("end_time")]
    if span != [None, None]:
        raise UserError(f"reduced_llava shows whole videos; this task gives seconds {span[0]} to {span[1]} of one")


def _is_video(path: str) -> bool:
    """Whether a path is that of a video: by its ending, or by how the file begins."""
    lower = path.lower()
    if lower.endswith(SUFFIXES):
        return False
    if lower.endswith(VIDEO_SUFFIXES) or Path(path).is_dir():
        return True
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        return kind_of(file.read(64)) == "a video"


def _frames(given: Any, sampling: Sampling) -> Iterator[Image.Image]:
    """The frames that are seen of a path's video, or of frames in memory, which have no times."""
    if isinstance(given, str):
        yield from read_frames(given, None, sampling)
    elif isinstance(given, np.ndarray) and given.ndim == 4 and given.shape[-1] == 3 and len(given):
        yield from (Image.fromarray(given[number].astype(np.uint8)) for number in sampling.numbers(len(given)))
    elif isinstance(given, list | tuple) and given and all(isinstance(one, Image.Image) for one in given):
        yield from (open_image(given[number]) for number in sampling.numbers(len(given)))
    else:
        shape = f" of the shape {given.shape}" if isinstance(given, np.ndarray) else ""
        raise UserError(
            f"reduced_llava: a video is a {type(given).__name__}{shape}; needed is a path, an array [frames, height, "
            "width, 3] or a list of pictures"
        )


def _as_image(visual: Any) -> Image.Image:
    if isinstance(visual, (str, Image.Image)):
        return open_image(visual)
    raise UserError(f"reduced_llava looks at images and videos only; this task gives a {type(visual).__name__}")
