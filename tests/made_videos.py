"""Video files made on the spot by PyAV: each frame has a grey level of its own below, and a white bar at its top."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

STEP = 8  # grey levels between two frames


def write_video(
    file: Path,
    frames: int = 12,
    rate: int = 4,
    *,
    codec: str = "libx264",
    size: tuple[int, int] = (48, 32),
    seconds: Sequence[float] | None = None,
    rotation: int = 0,
    key_every: int = 5,
    first: int = 0,
) -> Path:
    """Writes a video of (width, height) pixels; the suffix decides the container.

    `seconds`: when each frame is shown, instead of `rate` a second. `rotation`: degrees, against the clock. `first`:
    grey level of the first frame.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size, stream.bit_rate = key_every, 4_000_000
        if seconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        if not frames:
            container.start_encoding()
        for number in range(frames):
            frame = av.VideoFrame.from_image(picture(number, size, first))
            moment = Fraction(number, rate) if seconds is None else Fraction(seconds[number]).limit_denominator(1000)
            frame.time_base = Fraction(1, 1000)
            frame.pts = int(moment * 1000)
            container.mux(stream.encode(frame))
        if frames:
            container.mux(stream.encode())
    return file


def write_sound(file: Path) -> Path:
    """Writes a second of silence."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        for number in range(16):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, number * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file


def picture(number: int, size: tuple[int, int] = (48, 32), first: int = 0) -> Image.Image:
    """A frame as it is before it is encoded: no two of its patches are alike."""
    pixels = np.full((size[1], size[0], 3), (first + number * STEP) % 256, np.uint8)
    down, across = np.mgrid[size[1] // 4 : size[1] * 3 // 4, : size[0]]
    waves = np.sin(across / 7 + number) + np.cos(down / 5 - across / 11) + across / size[0]
    pixels[size[1] // 4 : size[1] * 3 // 4] = (128 + 30 * waves)[..., None].astype(np.uint8)
    pixels[: size[1] // 4] = 255
    return Image.fromarray(pixels)


def write_frames(folder: Path, count: int, name: str = "frame{}.png") -> list[str]:
    """Writes frames as images; gives their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(number).save(folder / name.format(number))
    return [name.format(number) for number in range(count)]


def number_of(frame: Image.Image) -> int:
    """Which frame of `write_video` this one is, by the grey level of its lowest rows."""
    grey = np.asarray(frame.convert("L"))[-4:].mean()
    return round(float(grey) / STEP)
