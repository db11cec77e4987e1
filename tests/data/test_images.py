"""Odd and broken image files: what a person sees, or an error that names the file."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from shortzip.data.images import BadImage, image_size, open_image

LEFT, RIGHT = (200, 30, 30), (20, 60, 220)


def two_halves(mode: str = "RGB") -> Image.Image:
    """40 x 20 pixels: the left half red, the right half blue."""
    image = Image.new("RGB", (40, 20), LEFT)
    image.paste(RIGHT, (20, 0, 40, 20))
    return image.convert(mode)


def colours(image: Image.Image) -> list[tuple[int, ...]]:
    """The middle of the left and of the right half."""
    return [
        image.getpixel((image.width // 4, image.height // 2)),
        image.getpixel((image.width * 3 // 4, image.height // 2)),
    ]


def assert_close(found: tuple[int, ...], expected: tuple[int, ...], tolerance: int) -> None:
    assert np.abs(np.subtract(found, expected)).max() <= tolerance, (found, expected)


@pytest.mark.parametrize(
    "case",
    ["RGB.png", "RGBA.png", "CMYK.tiff", "RGB.bmp", "RGB.jpg", "CMYK.jpg", "YCbCr.jpg", "P.png", "P.gif", "RGB.webp"],
)
def test_every_mode_keeps_its_colours(tmp_path: Path, case: str) -> None:
    mode, suffix = case.split(".")
    # JPEG rounds; a palette of web colours and WebP at its default quality are coarser still.
    tolerance = 40 if mode == "P" or suffix == "webp" else 6 if suffix == "jpg" else 0
    two_halves(mode).save(tmp_path / f"x.{suffix}")
    image = open_image(f"x.{suffix}", tmp_path)
    assert image.mode == "RGB"
    assert image.size == (40, 20)
    for found, expected in zip(colours(image), (LEFT, RIGHT), strict=True):
        assert_close(found, expected, tolerance)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_shows_what_the_camera_saw(tmp_path: Path, orientation: int) -> None:
    upright = two_halves()
    # How the sensor stores a picture that viewers turn back: the inverse of each EXIF orientation.
    stored = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    (upright if stored is None else upright.transpose(stored)).save(tmp_path / "x.png", exif=exif)
    image = open_image("x.png", tmp_path)
    assert np.array_equal(np.asarray(image), np.asarray(upright))
    assert image_size("x.png", tmp_path) == (20, 40)


def test_transparent_pixels_show_white_not_what_lies_under_them(tmp_path: Path) -> None:
    image = two_halves("RGBA")
    image.putalpha(Image.frombytes("L", (40, 20), (b"\xff" * 20 + b"\x00" * 20) * 20))
    image.save(tmp_path / "alpha.png")
    assert colours(open_image("alpha.png", tmp_path)) == [LEFT, (255, 255, 255)]

    palette = Image.new("P", (40, 20), 0)
    palette.putpalette([*LEFT, *RIGHT])
    palette.paste(1, (20, 0, 40, 20))
    palette.save(tmp_path / "palette.png", transparency=1)
    assert colours(open_image("palette.png", tmp_path)) == [LEFT, (255, 255, 255)]

    grey = Image.new("L", (40, 20), 10)
    grey.paste(99, (20, 0, 40, 20))
    grey.save(tmp_path / "grey.png", transparency=10)
    assert colours(open_image("grey.png", tmp_path)) == [(255, 255, 255), (99, 99, 99)]

    keyed = two_halves()
    keyed.save(tmp_path / "keyed.png", transparency=RIGHT)
    assert colours(open_image("keyed.png", tmp_path)) == [LEFT, (255, 255, 255)]

    two_halves("L").convert("LA").save(tmp_path / "la.png")
    assert colours(open_image("la.png", tmp_path))[0] == (LEFT_GREY,) * 3


LEFT_GREY = two_halves("L").getpixel((10, 10))


@pytest.mark.parametrize(("mode", "suffix"), [("L", "png"), ("L", "jpg"), ("1", "png")])
def test_grey_images_become_three_equal_channels(tmp_path: Path, mode: str, suffix: str) -> None:
    two_halves("L").convert(mode).save(tmp_path / f"x.{suffix}")
    pixels = np.asarray(open_image(f"x.{suffix}", tmp_path))
    assert pixels.shape == (20, 40, 3)
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert (pixels[..., 0] == pixels[..., 2]).all()


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_keeps_its_range(tmp_path: Path, suffix: str) -> None:
    ramp = np.linspace(0, 65535, 40).astype(np.uint16)
    Image.fromarray(np.tile(ramp, (20, 1))).save(tmp_path / f"x.{suffix}")
    row = np.asarray(open_image(f"x.{suffix}", tmp_path))[0, :, 0]
    # Pillow's own convert("RGB") clips everything above 255 to white.
    assert np.abs(row.astype(int) - np.round(ramp / 257)).max() <= 1


@pytest.mark.filterwarnings("error")
def test_values_that_are_no_numbers_are_black(tmp_path: Path) -> None:
    Image.fromarray(np.array([[np.nan, 0.0, 1.0]], np.float32)).save(tmp_path / "x.tiff")
    assert np.asarray(open_image(str(tmp_path / "x.tiff")))[0, :, 0].tolist() == [0, 0, 255]


def test_floating_point_grey_from_0_to_1_keeps_its_range(tmp_path: Path) -> None:
    Image.fromarray(np.tile(np.linspace(0, 1, 40, dtype=np.float32), (20, 1))).save(tmp_path / "x.tiff")
    row = np.asarray(open_image("x.tiff", tmp_path))[0, :, 0]
    assert (row[0], row[-1]) == (0, 255)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_an_animation_shows_its_first_frame(tmp_path: Path, suffix: str) -> None:
    second = Image.new("RGB", (40, 20), "lime")
    two_halves().save(tmp_path / f"x.{suffix}", save_all=True, append_images=[second, second], duration=50)
    image = open_image(f"x.{suffix}", tmp_path)
    for found, expected in zip(colours(image), (LEFT, RIGHT), strict=True):
        assert_close(found, expected, 40)


def test_the_content_decides_not_the_suffix(tmp_path: Path) -> None:
    two_halves("P").save(tmp_path / "book.gif")
    (tmp_path / "book.gif").rename(tmp_path / "book.jpg")
    assert open_image("book.jpg", tmp_path).size == (40, 20)


def test_a_missing_image_names_the_file_and_what_lies_there_instead(tmp_path: Path) -> None:
    two_halves("P").save(tmp_path / "book.gif")
    with pytest.raises(BadImage, match=r"book\.jpg.*there is book\.gif") as caught:
        open_image("book.jpg", tmp_path)
    assert caught.value.problem == "missing_image"
    with pytest.raises(BadImage, match="no such file"):
        open_image("no/such/folder.jpg", tmp_path)


def encoded(image_format: str) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, image_format)
    return buffer.getvalue()


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_truncated_file_is_refused(tmp_path: Path, image_format: str) -> None:
    content = encoded(image_format)
    for share in (0.05, 0.5, 0.9):
        (tmp_path / "cut.jpg").write_bytes(content[: int(len(content) * share)])
        with pytest.raises(BadImage, match=r"cut\.jpg") as caught:
            open_image("cut.jpg", tmp_path)
        assert caught.value.problem == "unreadable_image"


def test_a_truncated_file_is_refused_whatever_another_library_told_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lmms-eval, once imported, has Pillow fill truncated files up with grey."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    (tmp_path / "cut.png").write_bytes(encoded("PNG")[:-200])
    with pytest.raises(BadImage, match=r"cut\.png"):
        open_image("cut.png", tmp_path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES, "others' setting stays"


def test_random_damage_gives_an_image_or_a_bad_image_and_nothing_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    outcomes = set()
    for image_format in ("JPEG", "PNG", "GIF", "WEBP", "TIFF"):
        content = np.frombuffer(encoded(image_format), np.uint8)
        for _ in range(40):
            damaged = content.copy()
            damaged[rng.integers(0, len(content), 8)] = rng.integers(0, 256, 8)
            try:
                outcomes.add(open_image(damaged.tobytes()).mode)
            except BadImage:
                outcomes.add("refused")
    assert outcomes == {"RGB", "refused"}


def test_files_without_an_image_in_them_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "page.jpg").write_text("<!DOCTYPE html><title>404</title>")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, reason in [
        ("empty.jpg", "0 bytes"),
        ("page.jpg", "a web page"),
        ("folder.jpg", "not a regular file"),
        ("pipe.jpg", "not a regular file"),
        ("nul\0.jpg", "NUL"),
    ]:
        with pytest.raises(BadImage, match=reason):
            open_image(name, tmp_path)
        with pytest.raises(BadImage, match=reason):
            image_size(name, tmp_path)


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to(tmp_path / "b.jpg")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "a.jpg")
    with pytest.raises(BadImage, match="loop"):
        open_image("a.jpg", tmp_path)


def test_no_path_leaves_the_image_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "coco").mkdir(parents=True)
    beside = tmp_path / "root-of-another"
    beside.mkdir()
    for folder in (tmp_path, beside, root):
        two_halves().save(folder / "x.png")
    for path in ("../x.png", "coco/../../x.png", str(tmp_path / "x.png"), "../root-of-another/x.png"):
        with pytest.raises(BadImage, match="leaves the image root") as caught:
            open_image(path, root)
        assert caught.value.problem == "outside_image_root"
    for path in ("coco/../x.png", "./x.png", str(root / "x.png")):
        assert open_image(path, root).size == (40, 20)


def test_a_link_that_the_user_put_into_the_image_root_is_followed(tmp_path: Path) -> None:
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "root"
    elsewhere.mkdir()
    root.mkdir()
    two_halves().save(elsewhere / "x.png")
    (root / "coco").symlink_to(elsewhere)
    assert open_image("coco/x.png", root).size == (40, 20)


def bomb(side: int) -> bytes:
    """A PNG of a few kilobytes that says it is `side` pixels wide and high."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    body = zlib.compress(b"\0" * (side + 1) * 16)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8_000, 10_000, 30_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    (tmp_path / "bomb.png").write_bytes(bomb(side))
    with pytest.raises(BadImage, match="decompression bomb"):
        open_image("bomb.png", tmp_path)


def test_the_limit_on_pixels_is_exact(tmp_path: Path) -> None:
    two_halves().save(tmp_path / "x.png")
    assert open_image("x.png", tmp_path, max_pixels=800).size == (40, 20)
    with pytest.raises(BadImage, match="40 x 20 pixels, more than 799"):
        open_image("x.png", tmp_path, max_pixels=799)
