"""Image files to the RGB a person sees, and to the pixels LLaVA was trained on."""

import errno
import io
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from data.errors import UserError

# Twice a 24-megapixel photograph. Pillow refuses at 179 megapixels only: half a gigabyte in every worker.
MAX_PIXELS = 50_000_000
_EXIF_ORIENTATION = 0x0112

ImageProblem = Literal["missing_image", "unreadable_image", "outside_image_root"]


class BadImage(UserError):
    """An image that cannot be used, with the file and the reason."""

    def __init__(self, problem: ImageProblem, file: str, detail: str) -> None:
        super().__init__(problem, file, detail)
        self.problem, self.file, self.detail = problem, file, detail

    def __str__(self) -> str:
        return f"{self.file}: {self.detail}"


@runtime_checkable
class EmbeddedImage(Protocol):
    """An image that is not a file of its own, such as a cell of a parquet table."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def read(self) -> bytes:
        """The encoded image (JPEG, PNG, …)."""


ImageSource = str | bytes | EmbeddedImage


def image_name(source: ImageSource) -> str:
    """What messages call an image."""
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    return source if isinstance(source, str) else source.name


def resolve_image_path(path: str, image_root: str | os.PathLike[str] | None) -> Path:
    """Where an image of the instruction file lies.

    A path may not name anything outside the image root, neither by `..` nor by being absolute: instruction files
    come from others. A link inside the image root may lead out of it: the user put it there.

    Raises:
        BadImage: the path leaves the image root.
    """
    if image_root is None:
        return Path(path)
    root = os.path.abspath(image_root)
    full = os.path.normpath(os.path.join(root, path))
    if not full.startswith(root.rstrip(os.sep) + os.sep):
        raise BadImage(
            "outside_image_root",
            path,
            f"leaves the image root {root}; image paths are relative to it (data.image_root)",
        )
    return Path(full)


def check_image_file(file: Path) -> None:
    """Refuse a path that cannot be an image, without opening it: a named pipe would block for ever.

    Raises:
        BadImage: missing, empty, a loop of links, or not a regular file.
    """
    try:
        status = os.stat(file)
    except ValueError:
        raise BadImage("unreadable_image", repr(str(file)), "the path contains a NUL character") from None
    except FileNotFoundError:
        raise BadImage("missing_image", str(file), "there is no such file" + _hint(file)) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BadImage("unreadable_image", str(file), "the symbolic links form a loop") from None
        raise BadImage("unreadable_image", str(file), f"cannot be read: {error.strerror or error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise BadImage("unreadable_image", str(file), "is not a regular file")
    if status.st_size == 0:
        raise BadImage("unreadable_image", str(file), "the file is empty (0 bytes); fetch it again")


def _hint(file: Path) -> str:
    """OCR-VQA's images are often saved under their true suffix, .gif or .png, where the JSON says .jpg."""
    try:
        others = sorted(entry.name for entry in file.parent.glob(f"{file.stem}.*"))
    except (OSError, ValueError, NotImplementedError):
        return ""
    return f" (but there is {others[0]}: rename it, the content decides)" if others else ""


def open_image(
    source: ImageSource, image_root: str | os.PathLike[str] | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Open an image as a person sees it.

    The content decides the format, not the suffix. EXIF rotation is applied; transparency is laid on white; CMYK,
    palette, grey and 16-bit images become RGB over their whole range; of an animation, the first frame is taken.

    Args:
        source: a path relative to `image_root`, the encoded bytes, or an embedded image.
        image_root: the folder that paths are relative to; None: the working directory.
        max_pixels: larger images are refused before they are decoded.

    Returns:
        An RGB image, 8 bits a channel.

    Raises:
        BadImage: missing, outside the image root, empty, truncated, no image, or over `max_pixels`.
    """
    with _opened(source, image_root, max_pixels) as image:
        image.load()
        return to_rgb(image)


def image_bytes(source: ImageSource, image_root: str | os.PathLike[str] | None = None) -> bytes:
    """An image as it is stored, encoded.

    Raises:
        BadImage: missing, outside the image root, empty, or not to be read.
    """
    if isinstance(source, bytes):
        return source
    if not isinstance(source, str):
        return source.read()
    file = resolve_image_path(source, image_root)
    check_image_file(file)
    try:
        return file.read_bytes()
    except OSError as error:
        raise BadImage("unreadable_image", str(file), f"cannot be read: {error.strerror or error}") from error


def image_size(source: ImageSource, image_root: str | os.PathLike[str] | None = None) -> tuple[int, int]:
    """(height, width) of an image as `open_image` returns it, from its header alone.

    Raises:
        BadImage: as `open_image`, for what the header shows.
    """
    with _opened(source, image_root, MAX_PIXELS) as image:
        width, height = image.size
        # 5 to 8 are the orientations that lie on their side.
        return (width, height) if image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8) else (height, width)


@contextmanager
def _opened(source: ImageSource, image_root: str | os.PathLike[str] | None, max_pixels: int) -> Iterator[Image.Image]:
    """An image whose header has been read; whatever goes wrong with it inside the block is a `BadImage`."""
    name = image_name(source)
    content: bytes | Path
    if isinstance(source, str):
        content = resolve_image_path(source, image_root)
        check_image_file(content)
        name = str(content)
    elif isinstance(source, bytes):
        content = source
    else:
        try:
            content = source.read()
        except OSError as error:
            raise BadImage("missing_image", name, str(error)) from error
    try:
        with Image.open(content if isinstance(content, Path) else io.BytesIO(content)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise BadImage(
                    "unreadable_image", name, f"{width} x {height} pixels, more than {max_pixels}: decompression bomb?"
                )
            yield image
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        start = content[:16] if isinstance(content, bytes) else _first_bytes(content)
        raise BadImage("unreadable_image", name, f"is no image that Pillow knows; it starts with {start!r}") from None
    except Image.DecompressionBombError as error:
        raise BadImage("unreadable_image", name, f"decompression bomb: {error}") from error
    # Pillow's decoders raise all of these on damaged files.
    except (OSError, ValueError, SyntaxError, TypeError, IndexError, KeyError, EOFError, ArithmeticError) as error:
        raise BadImage("unreadable_image", name, f"cannot be decoded: {error}") from error
    except (struct.error, zlib.error, MemoryError) as error:
        raise BadImage("unreadable_image", name, f"cannot be decoded: {error}") from error


def _first_bytes(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(16)


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image as the RGB a person sees.

    Raises:
        ValueError: a mode that has no such reading (LAB).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_8_bit(image)).convert("RGB")
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> np.ndarray:
    """Grey values of more than 8 bits, [H, W] uint8; Pillow's own conversion clips them to white."""
    values = np.asarray(image)
    if image.mode == "F":
        scaled = values * 255.0 if values.size and values.max() <= 1 else values
    else:
        scaled = values / 257.0 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else values
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def build_image_processor(
    image_processor: BaseImageProcessor, image_aspect_ratio: Literal["pad", "release"] = "pad"
) -> BaseImageProcessor:
    """The image processor that gives the pixels LLaVA was trained on, at a release's sizes.

    Releases in transformers' format ship `CLIPImageProcessor`, which crops the centre and ignores `do_pad` in
    silence, where LLaVA-1.5 pads to a square with the mean colour. LLaVA-NeXT's tiles need no padding: its own
    processor is kept. The backend is always Pillow: torchvision's differs from the original's in 0.12 % of values.

    Args:
        image_processor: what the release ships (its size, crop, mean and deviation are taken over).
        image_aspect_ratio: "pad", or "release" for exactly what the release's own processor does.

    Raises:
        ValueError: an unknown `image_aspect_ratio`.
    """
    if image_aspect_ratio not in ("pad", "release"):
        raise UserError(f"image_aspect_ratio is {image_aspect_ratio!r}; 'pad' or 'release'")
    settings = image_processor.to_dict()
    for key in ("image_processor_type", "processor_class", "backend"):
        settings.pop(key, None)
    if "image_grid_pinpoints" in settings:
        return LlavaNextImageProcessorPil(**settings)
    if image_aspect_ratio == "release":
        return image_processor
    if not settings.get("do_center_crop"):
        # SigLIP's processor has no crop, which this one would do to its default size.
        size = settings["size"]
        side = size.get("shortest_edge")
        settings["crop_size"] = {"height": side or size["height"], "width": side or size["width"]}
        settings["do_center_crop"] = False
    return LlavaImageProcessorPil(**{**settings, "do_pad": True})
