"""Which files are opened as pictures, whatever is wrong with them, and what is told of them."""

import io
import os
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from shortzip.data.drops import BadSample
from shortzip.data.errors import printable, shown
from shortzip.data.images import FORMATS, BadImage, image_size, image_suffix, open_image
from shortzip.train.evaluation.lmms_visuals import _as_image

ORIENTATION = 0x0112


def photograph(width: int = 30, height: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    photograph().save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "TIFF, packed", "AVIF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_told_by_the_header_is_the_size_of_the_picture(kind: str, orientation: int) -> None:
    """The planned length of a row, the loaded one and the cached one come from these two."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"compression": "tiff_lzw"} if "packed" in kind else {}
    content = encoded(kind.split(",")[0], exif=exif, **options)
    image = open_image(content)
    assert image_size(content) == (image.height, image.width)
    assert image.size == ((12, 30) if orientation >= 5 else (30, 12))
    again = open_image(image)  # as lmms-eval's tasks hand on what they opened
    assert np.array_equal(np.asarray(again), np.asarray(image))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_rotation_that_stands_in_xmp_alone(kind: str) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    if kind == "PNG":
        texts = PngImagePlugin.PngInfo()
        texts.add_itxt("XML:com.adobe.xmp", xmp.decode())
        content = encoded("PNG", pnginfo=texts)
    elif kind == "TIFF":
        content = encoded("TIFF", tiffinfo={700: xmp})
    else:
        content = encoded(kind, xmp=xmp)
    image = open_image(content)
    assert open_image(image).size == image.size == (12, 30)
    assert image_size(content) == (30, 12)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunks(*chunks: bytes, behind: bool = False) -> bytes:
    """The photograph as a PNG with chunks before or behind its pixels."""
    plain = encoded("PNG")
    place = plain.index(b"IEND") - 4 if behind else 33  # behind the header
    return plain[:place] + b"".join(chunks) + plain[place:]


LONG = b"workflow " * 300_000
BIG_CHUNKS: dict[str, list[bytes]] = {
    "text": [chunk(b"tEXt", b"Comment\0" + LONG)],
    "packed": [chunk(b"zTXt", b"Comment\0\0" + zlib.compress(LONG))],
    "international": [chunk(b"iTXt", b"Comment\0\0\0\0\0" + LONG)],
    "international and packed": [chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(LONG))],
    "profile": [chunk(b"iCCP", b"profile\0\0" + zlib.compress(LONG))],
    "many": [chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 1_000_000))] * 4,
    "packed rotation": [chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(LONG))],
}


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("case", BIG_CHUNKS)
def test_a_png_with_much_text_in_it_is_read(
    case: str, behind: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 3_000_000)  # of many texts together; in truth 64 MiB
    before = (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)
    content = with_chunks(*BIG_CHUNKS[case], behind=behind)
    (tmp_path / "x.png").write_bytes(content)
    for source in (content, "x.png"):
        assert np.array_equal(np.asarray(open_image(source, tmp_path)), np.asarray(photograph()))
        assert image_size(source, tmp_path) == (12, 30)
    assert before == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


@pytest.mark.parametrize("behind", [False, True])
def test_much_text_does_not_lose_the_rotation(behind: bool) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    hexed = exif.tobytes().hex()
    raw = f"\nexif\n{len(hexed) // 2:8}\n{hexed}".encode()
    for turned in (
        chunk(b"eXIf", exif.tobytes()[6:]),
        chunk(b"iTXt", xmp),
        chunk(b"tEXt", b"Raw profile type exif\0" + raw),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)),
    ):
        content = with_chunks(*BIG_CHUNKS["packed"], turned, behind=behind)
        assert open_image(content).size == (12, 30)
        assert image_size(content) == (30, 12)


def test_damaged_metadata_are_no_reason_to_refuse_the_pixels() -> None:
    for damage in (b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 30, b"no exif at all", b""):
        for kind in ("JPEG", "WEBP", "PNG"):
            content = (
                with_chunks(chunk(b"eXIf", damage)) if kind == "PNG" else encoded(kind, exif=b"Exif\0\0" + damage)
            )
            assert open_image(content).size == (30, 12), (kind, damage)
            assert image_size(content) == (12, 30)


FOREIGN = {
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    "wmf": b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hH", 0, 0, 10, 10, 72) + b"\0" * 40,
    "psd": b"8BPS\0\1" + b"\0" * 6 + struct.pack(">HIIHH", 3, 4, 4, 8, 3) + b"\0" * 200,
    "fits": b"SIMPLE  =                    T".ljust(80) + b"BITPIX  =                    8".ljust(80) + b" " * 2720,
    "xpm": b'/* XPM */\nstatic char *x[] = {\n"1 1 1 1",\n"a c #000000",\n"a"};\n',
    "pcx": b"\x0a\5\1\x08" + struct.pack("<4H", 0, 0, 3, 3) + b"\0" * 120,
    "ico": b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0\x68\4\0\0\x16\0\0\0" + b"\0" * 1200,
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_no_other_plugin_of_pillow_is_reached(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.init()
    called: list[str] = []

    def refuse(kind: str) -> Callable[..., Image.Image]:
        def opened(*_: object) -> Image.Image:
            called.append(kind)
            raise AssertionError(kind)

        return opened

    for kind in set(Image.OPEN) - set(FORMATS):
        monkeypatch.setitem(Image.OPEN, kind, (refuse(kind), lambda prefix: True))
    starter = tmp_path / "bin" / "gs"
    starter.parent.mkdir()
    starter.write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\nexit 1\n")
    starter.chmod(starter.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{starter.parent}:{os.environ['PATH']}")
    (tmp_path / "photo.jpg").write_bytes(FOREIGN[name])
    for look in (open_image, image_size):
        with pytest.raises(BadImage, match="no image that Pillow knows as one of"):
            look("photo.jpg", tmp_path)
    with pytest.raises(BadImage):
        image_suffix(FOREIGN[name])
    with pytest.raises(BadImage):
        _as_image(str(tmp_path / "photo.jpg"))
    assert not called
    assert not (tmp_path / "started").exists()


def test_a_picture_that_a_task_opened_itself_is_held_to_the_same_rules() -> None:
    opened = Image.open(io.BytesIO(FOREIGN["eps"]))
    assert opened.format == "EPS"
    with pytest.raises(BadImage, match="format EPS"):
        _as_image(opened)
    with pytest.raises(BadImage, match="pixels"):
        _as_image(Image.new("1", (8000, 8000)))
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    assert _as_image(Image.open(io.BytesIO(encoded("TIFF", exif=turned)))).size == (12, 30)
    assert _as_image(photograph().convert("L")).mode == "RGB"


@pytest.mark.parametrize(
    "error",
    [struct.error("unpack"), SyntaxError("broken"), zlib.error("x"), OverflowError("x"), RecursionError("x"),
     AttributeError("x"), AssertionError("x"), RuntimeError("x"), Image.DecompressionBombWarning("x")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_whatever_a_decoder_raises_is_a_bad_image(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    for kind in ("JPEG", "PNG", "WEBP"):
        content = encoded(kind)
        with Image.open(io.BytesIO(content)) as image:
            monkeypatch.setattr(type(image), "load", fail)
        with pytest.raises(BadImage, match="cannot be decoded"):
            open_image(content)


def test_a_message_shows_nothing_of_what_stands_in_the_file(tmp_path: Path) -> None:
    """A link in the image root may name any file."""
    root = tmp_path / "root"
    root.mkdir()
    for number, start in enumerate((b"", b"P6 ", b"P3\n2 2\n255\n", b"<html>", b"GIF89a", b"%PDF-1.4 ", b"II*\0")):
        secret = tmp_path / f"secret{number}"
        secret.write_bytes(start + b"hunter2-hunter2-hunter2\n" * 9)
        (root / f"{number}.jpg").symlink_to(secret)
        with pytest.raises(BadImage) as caught:
            open_image(f"{number}.jpg", root)
        assert "hunter2" not in str(caught.value), start
        assert "hunter2" not in caught.value.detail


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"%!PS-Adobe-3.0 EPSF", "PostScript"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC photograph"),
        (b"\n<HTML><head>", "web page"),
        (b"\0" * 40, "zeros"),
    ],
)
def test_a_message_says_what_the_file_is_where_that_is_known(start: bytes, words: str) -> None:
    with pytest.raises(BadImage, match=words):
        open_image(start.ljust(100, b" "))


def test_names_reach_no_terminal_as_they_are(tmp_path: Path) -> None:
    name = "a\x1b[31m\x07\n\u202egpj.\ud83d"
    error = BadImage("missing_image", name, "there is no such file")
    assert str(error) == "a\\x1b[31m\\x07\\n\\u202egpj.\\ud83d: there is no such file"
    with pytest.raises(BadImage) as caught:
        open_image("\x1b]0;owned\x07.png", tmp_path)
    assert str(caught.value).isprintable()
    with pytest.raises(BadImage, match="cannot have") as caught:
        open_image("half \ud83d.png", tmp_path)
    assert str(caught.value).isprintable()
    long = shown("x" * 100_000 + ".png")
    assert len(long) < 400
    assert long.endswith(".png (100004 characters)")
    with pytest.raises(BadImage) as caught:
        open_image("data:image/png;base64," + "iVBORw0KGgo" * 20_000, tmp_path)
    row = BadSample(caught.value.problem, "a", str(caught.value), caught.value.file)
    assert len(str(row)) < 600
    assert printable("two\nlines\x00") == "two\nlines\\x00"
