"""Image files to the RGB a person sees; pixels.py makes of it what a tower reads."""

import errno
import io
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from PIL import ExifTags, Image, ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from shortzip.data.errors import UserError, printable, shown
from shortzip.data.hints import hint_for_missing, kind_of
from shortzip.data.png import SIGNATURE, without_texts

# Twice a 24-megapixel photograph. Pillow refuses at 179 megapixels only: half a gigabyte in every worker.
MAX_PIXELS = 50_000_000
# Nothing is left of a thinner picture at a model's size, while padding makes a square of its long side.
MAX_ASPECT = 200
HINTS = 20  # missing images for which it is looked what lies there instead; for all of them that takes too long
# Pillow opens forty more, some of them by starting other programs (EPS: Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # TIFF's tags
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Seen = TypeVar("Seen")
ImageProblem = Literal["missing_image", "unreadable_image", "outside_image_root", "missing_video", "unreadable_video"]


class BadImage(UserError):
    """An image, or a video, that cannot be used, with the file and the reason."""

    def __init__(self, problem: ImageProblem, file: str, detail: str) -> None:
        super().__init__(problem, file, detail)
        self.problem, self.file, self.detail = problem, file, detail

    def __str__(self) -> str:
        return printable(f"{shown(self.file)}: {self.detail}")


@runtime_checkable
class EmbeddedImage(Protocol):
    """An image that is not a file of its own, such as a cell of a parquet table."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def read(self) -> bytes:
        """The encoded image (JPEG, PNG, …)."""


ImageSource = str | bytes | EmbeddedImage
Content = Path | bytes | Image.Image


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


def check_image_file(file: Path, hint: bool = True) -> None:
    """Refuse a path that cannot be an image, without opening it: a named pipe would block for ever.

    Args:
        file: where it should lie.
        hint: whether to look what lies there instead of a missing one; where many are missing, the first few will do.

    Raises:
        BadImage: missing, empty, a loop of links, or not a regular file.
    """
    try:
        status = os.stat(file)
    except FileNotFoundError:
        hint_words = hint_for_missing(file) if hint else ""
        raise BadImage("missing_image", str(file), "there is no such file" + hint_words) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BadImage("unreadable_image", str(file), "the symbolic links form a loop") from None
        if error.errno == errno.ENOTDIR:
            raise BadImage("missing_image", str(file), "there is no such file: a folder of it is a file") from None
        raise BadImage("unreadable_image", str(file), f"cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        encoding = sys.getfilesystemencoding()
        what = f"characters that file names in {encoding} cannot have: set PYTHONUTF8=1, or a locale of UTF-8"
        what = "a NUL character" if "\0" in str(file) else what
        raise BadImage("unreadable_image", str(file), f"the path contains {what}") from error
    if not stat.S_ISREG(status.st_mode):
        raise BadImage("unreadable_image", str(file), "is not a regular file")
    if status.st_size == 0:
        raise BadImage("unreadable_image", str(file), "the file is empty (0 bytes); fetch it again")


def open_image(
    source: ImageSource | Image.Image,
    image_root: str | os.PathLike[str] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Open an image as a person sees it.

    The content decides the format, not the suffix. EXIF rotation is applied; transparency is laid on white; CMYK,
    palette, grey and 16-bit images become RGB over their whole range; of an animation, the first frame is taken.

    Args:
        source: a path relative to `image_root`, the encoded bytes, an embedded image, or what Pillow opened.
        image_root: the folder that paths are relative to; None: the working directory.
        max_pixels: larger images are refused before they are decoded.

    Returns:
        An RGB image, 8 bits a channel.

    Raises:
        BadImage: missing, outside the image root, empty, truncated, in none of `FORMATS`, over `max_pixels`, or one
            side over `MAX_ASPECT` times the other.
    """
    return _look(source, image_root, max_pixels, _to_rgb)


def image_bytes(source: ImageSource, image_root: str | os.PathLike[str] | None = None) -> bytes:
    """An image as it is stored, encoded.

    Raises:
        BadImage: missing, outside the image root, empty, or not to be read.
    """
    if isinstance(source, bytes):
        return source
    if not isinstance(source, str):
        try:
            return source.read()
        except OSError as error:
            raise BadImage("missing_image", image_name(source), str(error)) from error
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
    return _look(source, image_root, MAX_PIXELS, _seen_size)


def image_suffix(source: ImageSource) -> str:
    """The suffix of an image's format, such as "jpg", from its header alone. Raises `BadImage`, as `open_image`."""
    kind = _look(source, None, MAX_PIXELS, lambda image: str(image.format))
    return {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2"}.get(kind, kind.lower())


def _look(
    source: ImageSource | Image.Image,
    image_root: str | os.PathLike[str] | None,
    max_pixels: int,
    look: Callable[[Image.Image], Seen],
) -> Seen:
    """What `look` finds in an image whose header has been read; whatever goes wrong with it is a `BadImage`."""
    content: Content
    if isinstance(source, str):
        content = resolve_image_path(source, image_root)
        check_image_file(content)
        name = str(content)
    elif isinstance(source, (bytes, Image.Image)):
        content, name = source, "picture" if isinstance(source, Image.Image) else image_name(source)
    else:
        content, name = image_bytes(source), image_name(source)
    try:
        with _whole_files():
            if isinstance(content, Image.Image):
                return _checked(content, name, max_pixels, look)
            with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
                return _decoded(file, name, max_pixels, look)
    except BadImage:
        raise
    except OSError as error:
        raise BadImage("unreadable_image", name, f"cannot be decoded: {error.strerror or error}") from error
    except Exception as error:  # a damaged file brings Pillow's decoders to any
        raise BadImage("unreadable_image", name, f"cannot be decoded: {_words(error)}") from error


@contextmanager
def _whole_files() -> Iterator[None]:
    """Has Pillow refuse truncated files: to import lmms-eval has it fill them up with grey, in the whole process."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _decoded(file: BinaryIO, name: str, max_pixels: int, look: Callable[[Image.Image], Seen]) -> Seen:
    start = file.read(64)
    file.seek(0)
    try:
        with Image.open(file, formats=FORMATS) as image:
            return _checked(image, name, max_pixels, look)
    except Image.UnidentifiedImageError:
        kind = kind_of(start)
        read = ", ".join(FORMATS)
        aside = f", but {kind}" if kind else ""
        raise BadImage("unreadable_image", name, f"is no image that Pillow knows as one of {read}{aside}") from None
    except BadImage:
        raise
    except ValueError:
        if not start.startswith(SIGNATURE):
            raise
    file.seek(0)
    with Image.open(without_texts(file), formats=FORMATS) as image:
        return _checked(image, name, max_pixels, look)


def _checked(image: Image.Image, name: str, max_pixels: int, look: Callable[[Image.Image], Seen]) -> Seen:
    """What `look` finds in an image that is not too large."""
    if image.format not in (None, "MPO", *FORMATS):
        raise BadImage("unreadable_image", name, f"is of the format {image.format}, read are {', '.join(FORMATS)}")
    width, height = image.size
    tile = (
        (image.tag_v2.get(_TILE_WIDTH, 1), image.tag_v2.get(_TILE_LENGTH, 1))
        if isinstance(image, TiffImageFile)
        else (1, 1)
    )
    for across, down in ((width, height), tile):  # a tile is decoded whole, however little of it is seen
        if across * down > max_pixels:
            raise BadImage(
                "unreadable_image", name, f"{across} x {down} pixels, more than {max_pixels}: decompression bomb?"
            )
    if max(width, height) > MAX_ASPECT * min(width, height):
        long = max(width, height)
        raise BadImage(
            "unreadable_image",
            name,
            f"{width} x {height} pixels: one side is over {MAX_ASPECT} times the other, and padding would make "
            f"{long} x {long} of it: decompression bomb? Cut it into pieces",
        )
    return look(image)


def _words(error: Exception) -> str:
    """Pillow's words for what is wrong; those in bytes show what stands in the file."""
    words = error.args[0] if error.args and isinstance(error.args[0], str) else ""
    return words or type(error).__name__


def _orientation(image: Image.Image) -> int:
    """How the camera was held, 1 to 8 as EXIF and XMP have it; 1 where Pillow heeds it by itself."""
    if isinstance(image, TiffImageFile) and ExifTags.Base.Orientation in image.tag_v2:
        return 1  # its size is the upright one from the header on, and loading turns it
    if image.format == "PNG":
        image.load()  # its metadata may stand behind the pixels
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # metadata that cannot be read are no reason to refuse the pixels
        return 1


def _seen_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (width, height) if _orientation(image) in (5, 6, 7, 8) else (height, width)


def _to_rgb(image: Image.Image) -> Image.Image:
    """An image as the RGB a person sees. Raises ValueError for a mode that has no such reading (LAB)."""
    image.load()
    method = _UPRIGHT.get(_orientation(image))
    if method is not None:
        image = image.transpose(method)
        image.info = {key: image.info[key] for key in ("transparency",) if key in image.info}  # not turned again
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
    values = np.nan_to_num(np.asarray(image))
    if image.mode == "F":
        scaled = values * 255.0 if values.size and values.max() <= 1 else values
    else:
        scaled = values / 257.0 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else values
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
