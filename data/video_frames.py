"""Videos to the frames that are seen: how many, which pictures, and what identifies them.

A file is decoded by `video_files.py`, which needs PyAV (the `video` extra); frames that lie there as images do not.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict

from PIL import Image

from shortzip.data.files import sha256
from shortzip.data.images import BadImage, open_image, resolve_image_path
from shortzip.data.known_images import KnownImages
from shortzip.data.video_files import decoded_frames, frame_times
from shortzip.data.videos import Root, Sampling, VideoLength, VideoSource, check_video, frame_paths, of_video

FORMAT = 1  # of what is made of a video's bytes: to be raised when the same sampling gives other frames


def video_length(source: VideoSource, root: Root) -> VideoLength:
    """How long a video is, read from its file without decoding it. Raises BadImage, and MissingExtra without PyAV."""
    paths = frame_paths(source, root)
    if paths is not None:
        return VideoLength(len(paths), None)
    check_video(source, root)
    times = frame_times(resolve_image_path(str(source), root))
    return VideoLength(len(times), times[-1] - times[0])


def frames_seen(source: VideoSource, root: Root, sampling: Sampling, known: KnownImages) -> int:
    """How many frames of a video are seen; it is opened only where that depends on it and is not known yet.

    Raises BadImage, and MissingExtra without PyAV.
    """
    if not sampling.reads_length:
        return sampling.frames
    if isinstance(source, tuple) or frame_paths(source, root) is not None:
        return sampling.count(video_length(source, root))
    frames, seconds = known.get("length", source, root, lambda *video: list(video_length(*video)))
    return sampling.count(VideoLength(frames, seconds))


def read_frames(source: VideoSource, root: Root, sampling: Sampling) -> Iterator[Image.Image]:
    """The frames of a video that are seen, RGB and upright, one after another: no more than one is held here.

    Raises BadImage for what cannot be read, whenever that shows, and MissingExtra without PyAV.
    """
    paths = frame_paths(source, root)
    if paths is None:
        check_video(source, root)
        yield from decoded_frames(resolve_image_path(str(source), root), sampling)
        return
    for number in sampling.numbers(len(paths)):
        try:
            yield open_image(paths[number], root)
        except BadImage as error:
            raise of_video(error) from error


def video_key(source: VideoSource, root: Root, sampling: Sampling, known: KnownImages) -> str:
    """SHA-256 of all that a video's frames depend on: its file's bytes, or those of its frames, and the sampling.

    A file that has not changed since it was read is not opened. Raises BadImage if it cannot be read.
    """
    paths = frame_paths(source, root)
    check_video(source, root)
    held = [str(source)] if paths is None else [paths[number] for number in sampling.numbers(len(paths))]
    content = [known.get("video key", path, root, _file_key) for path in held]
    kind = "file" if paths is None else "frames"
    return hashlib.sha256(json.dumps([FORMAT, kind, asdict(sampling), content]).encode()).hexdigest()


def _file_key(path: object, root: Root) -> str:
    file = resolve_image_path(str(path), root)
    try:
        return sha256(file)
    except OSError as error:
        raise BadImage("unreadable_video", str(file), f"cannot be read: {error.strerror or error}") from error
