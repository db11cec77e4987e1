"""Video files to single frames, by PyAV: when each frame is shown, and some of them decoded.

Frames are counted as they are shown, from 0, whatever a file's header says of their number. A file is looked through
once, without decoding, for their times; then it is decoded from the key frame before each one that is wanted. So there
is never more than one frame in memory, and a long video costs what its wanted frames cost.
"""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from shortzip.data import images
from shortzip.data.errors import MissingExtra
from shortzip.data.images import BadImage
from shortzip.data.videos import Sampling

# Files that are lists of other files, or of addresses (HLS, DASH, concat), would have FFmpeg read those.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,gif,mjpeg,h264,hevc"
_TURNED = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


class _Shown(NamedTuple):
    """A file's frames in the order that they are shown in."""

    at: list[int]
    """Of each, when: in units of the stream."""
    seconds: list[float]
    keys: list[int]
    """When those are shown that decoding can begin at."""


def require_pyav() -> Any:
    """PyAV. Raises MissingExtra, naming the extra, where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise MissingExtra("reading video files needs PyAV: pip install 'shortzip[video]'") from error
    return av


def frame_times(file: Path) -> list[float]:
    """When each frame of a file is shown, in seconds, rising; at least one.

    Raises:
        BadImage: no video, without a frame, damaged where its packets are listed, or too large a picture.
        MissingExtra: PyAV is not installed.
    """
    with _read(file):
        return _shown(file).seconds


def decoded_frames(file: Path, sampling: Sampling) -> Iterator[Image.Image]:
    """The frames that a sampling sees of a file, RGB and upright as its rotation says, one after another.

    Raises as `frame_times`, and where a frame cannot be decoded.
    """
    with _read(file):
        shown = _shown(file)
        numbers = sampling.numbers(len(shown.at), shown.seconds)
        yield from _decoded(file, shown, [shown.at[number] for number in numbers])


@contextmanager
def _read(file: Path) -> Iterator[None]:
    """What goes wrong with a file in the block is a BadImage. Raises MissingExtra."""
    av = require_pyav()
    try:
        yield
    except (BadImage, GeneratorExit):
        raise
    except av.FFmpegError as error:
        words = f"cannot be decoded as a video: {error.strerror}"
        raise BadImage("unreadable_video", str(file), words) from error
    except Exception as error:  # a damaged file brings decoders to any
        words = f"cannot be decoded as a video: {type(error).__name__}: {error}"
        raise BadImage("unreadable_video", str(file), words) from error


@contextmanager
def _opened(file: Path) -> Iterator[tuple[Any, Any]]:
    """A file's container and its first stream of pictures, to be decoded in this thread."""
    av = require_pyav()
    with av.open(str(file), container_options={"format_whitelist": _FORMATS}, metadata_errors="replace") as container:
        streams = [stream for stream in container.streams.video if not _is_cover(stream)]
        if not streams:
            kinds = sorted({stream.type for stream in container.streams})
            words = f"holds no moving picture, but {', '.join(kinds) or 'nothing'}: a sound file?"
            raise BadImage("unreadable_video", str(file), words)
        stream = streams[0]
        stream.codec_context.thread_count = 1
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > images.MAX_PIXELS or max(width, height) > images.MAX_ASPECT * max(1, min(width, height)):
            words = f"{width} x {height} pixels, more than {images.MAX_PIXELS}, or too thin: decompression bomb?"
            raise BadImage("unreadable_video", str(file), words)
        yield container, stream


def _is_cover(stream: Any) -> bool:
    """Whether it is the picture on the sleeve of a sound file."""
    return "attached_pic" in str(stream.disposition)


def _shown(file: Path) -> _Shown:
    at: list[int] = []
    keys: list[int] = []
    with _opened(file) as (container, stream):
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                moment = packet.pts if packet.pts is not None else packet.dts
                if moment is None:
                    raise BadImage("unreadable_video", str(file), "its frames have no times: write it anew as MP4")
                at.append(moment)
                keys += [moment] if packet.is_keyframe else []
        unit = stream.time_base
    if not at:
        raise BadImage("unreadable_video", str(file), "holds no frame: its length is zero")
    at.sort()
    return _Shown(at, [float(moment * unit) for moment in at], sorted(keys))


def _decoded(file: Path, shown: _Shown, wanted: list[int]) -> Iterator[Image.Image]:
    """The frames that are shown at these moments, which do not fall."""
    done = 0
    for seeks in (True, False):
        for image in _one_pass(file, shown, wanted[done:], seeks):
            if image is None:
                break
            done += 1
            yield image
        if done == len(wanted):
            return


def _one_pass(file: Path, shown: _Shown, wanted: list[int], seeks: bool) -> Iterator[Image.Image | None]:
    """As `_decoded`; None, and no more, where a jump to a key frame went too far, as in files without an index.

    `seeks`: whether to jump at all.
    """
    frame: Any = None
    image: Image.Image | None = None
    with _opened(file) as (container, stream):
        frames = container.decode(stream)
        for moment in wanted:
            if frame is None or frame.pts < moment:
                key = shown.keys[max(0, bisect_right(shown.keys, moment) - 1)] if shown.keys else shown.at[0]
                jumps = seeks and key > (shown.at[0] if frame is None else frame.pts)
                if jumps:
                    container.seek(key, stream=stream)
                    frames = container.decode(stream)
                frame, image = _next_at(frames, moment), None
            if frame is None or frame.pts > moment:
                if seeks:
                    yield None
                    return
                where = f"the frame at {float(moment * stream.time_base):.3f} s"
                words = f"{where} cannot be decoded: the file is damaged, or was cut off"
                raise BadImage("unreadable_video", str(file), words)
            image = _upright(frame) if image is None else image
            yield image


def _next_at(frames: Iterator[Any], moment: int) -> Any:
    """The first frame that is not shown before a moment; None if there is none."""
    return next((frame for frame in frames if frame.pts is not None and frame.pts >= moment), None)


def _upright(frame: Any) -> Image.Image:
    image = frame.to_image()
    turn = _TURNED.get(round(frame.rotation / 90) * 90 % 360)
    return image if turn is None else image.transpose(turn)
