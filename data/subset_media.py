"""Whether the images and videos of chosen rows are there, and, where that is asked, can be decoded."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

from shortzip.data.data_uris import InlineImage
from shortzip.data.images import (
    HINTS,
    BadImage,
    ImageProblem,
    check_image_file,
    image_name,
    open_image,
    resolve_image_path,
)
from shortzip.data.instructions import Conversation
from shortzip.data.video_frames import read_frames
from shortzip.data.videos import Sampling, VideoSource, check_video, video_name

# Called with what is being done, how far it is, and how far it goes where that is known.
Progress = Callable[[str, int, int | None], None]
Problems = dict[Any, tuple[ImageProblem, str]]
VERIFIED_FRAMES = 8


@dataclass
class Media:
    """The images and videos of rows.

    Attributes:
        root: the folder that their paths are relative to; None: they are not looked for.
        verify: decode every image, and `VERIFIED_FRAMES` frames of every video.
        num_workers: processes that decode; None: one per core.
        keep_missing: whether what is not there yet is no problem.
        images: what is wrong with images, by path, and `videos`, with videos.
    """

    root: Path | None
    verify: bool
    num_workers: int | None
    keep_missing: bool
    images: Problems = field(default_factory=dict)
    videos: Problems = field(default_factory=dict)

    def look(self, rows: Sequence[Conversation], progress: Progress) -> None:
        """Finds what is wrong."""
        if self.root is None:
            return
        paths = sorted({path for row in rows for path in row.images if isinstance(path, str)})
        videos = list(dict.fromkeys(video for row in rows for video in row.videos))
        if not self.verify:
            self.images, self.videos = check_images(paths, self.root), check_videos(videos, self.root)
            return
        self.images = self._decoded(check_images, paths, 64, "decoding images", progress)
        self.videos = self._decoded(check_videos, videos, 4, "decoding videos", progress)

    def _decoded(
        self,
        check: Callable[[Sequence[Any], Path, bool], Problems],
        sources: Sequence[Any],
        at_once: int,
        what: str,
        progress: Progress,
    ) -> Problems:
        problems: Problems = {}
        chunks = [sources[start : start + at_once] for start in range(0, len(sources), at_once)]
        if not chunks:
            return problems
        with ProcessPoolExecutor(self.num_workers, initializer=_end_with, initargs=(os.getpid(),)) as pool:
            for done, of_chunk in enumerate(pool.map(check, chunks, repeat(self.root), repeat(True))):
                problems.update(of_chunk)
                progress(what, min(at_once * (done + 1), len(sources)), len(sources))
        return problems

    def missing_images(self, paths: Sequence[str]) -> list[str]:
        """Those of the paths that are not there yet; all that are not, where their rows are left out."""
        missing = sorted(path for path, (problem, _) in self.images.items() if problem == "missing_image")
        return [path for path in missing if path in set(paths)] if self.keep_missing else missing

    def missing_videos(self, videos: Sequence[VideoSource]) -> list[VideoSource]:
        """As `missing_images`."""
        missing = [video for video, (problem, _) in self.videos.items() if problem == "missing_video"]
        return [video for video in missing if video in set(videos)] if self.keep_missing else missing

    def problem_of(self, row: Conversation) -> tuple[ImageProblem, str] | None:
        """Why a row cannot be used for its images or videos, with the words for it; None if it can be."""
        named: list[tuple[str, tuple[ImageProblem, str] | None]] = [
            (image_name(source), self._of_image(source)) for source in row.images
        ]
        named += [(video_name(video), self.videos.get(video)) for video in row.videos]
        for name, found in named:
            if found is not None and not (found[0] in ("missing_image", "missing_video") and self.keep_missing):
                return found[0], f"{name}: {found[1]}"
        return None

    def _of_image(self, source: Any) -> tuple[ImageProblem, str] | None:
        if self.verify and isinstance(source, InlineImage):
            try:
                open_image(source)
            except BadImage as error:
                return error.problem, error.detail
        return self.images.get(source) if isinstance(source, str) else None


def _end_with(parent: int) -> None:
    """Ends this process soon after its parent, if that is killed: it would wait for work, and hold locks, for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def check_images(paths: Sequence[str], root: Path, decode: bool = False) -> Problems:
    """Images that are missing, no files, empty, or (with `decode`) that cannot be decoded, and why."""
    problems: Problems = {}
    for path in paths:
        try:
            if decode:
                open_image(path, root)
            else:
                check_image_file(resolve_image_path(path, root), hint=len(problems) < HINTS)
        except BadImage as error:
            problems[path] = (error.problem, error.detail)
    return problems


def check_videos(videos: Sequence[VideoSource], root: Path, decode: bool = False) -> Problems:
    """As `check_images`, of videos. Raises MissingExtra where one is to be decoded without PyAV."""
    problems: Problems = {}
    for video in videos:
        try:
            check_video(video, root, hint=len(problems) < HINTS)
            if decode:
                for _ in read_frames(video, root, Sampling(VERIFIED_FRAMES)):
                    pass
        except BadImage as error:
            problems[video] = (error.problem, error.detail)
    return problems
