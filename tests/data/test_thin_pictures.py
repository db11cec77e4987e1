"""What padding to a square makes of a picture: panoramas in little memory, and bombs refused."""

import io
import os
import resource
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import shortzip.data.images
from shortzip.data.images import BadImage, image_size, open_image
from shortzip.data.pixels import pixel_values, shrunk
from shortzip.train.release.processors import build_image_processor

CLIP = build_image_processor(
    CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).to_dict(), "llava"
)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(width: int, height: int) -> bytes:
    """A black picture in a few bytes, however large it says it is."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * ((width + 7) // 8 + 1) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(700, 40), (701, 13), (640, 639), (41, 1500), (13, 2049), (639, 640), (3, 577)])
def test_padding_without_the_square_gives_the_same_pixels(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = noise(*size)
    expected = CLIP(image, return_tensors="pt")["pixel_values"][0]
    assert shrunk(image, CLIP) is image
    assert torch.equal(pixel_values(image, CLIP), expected)
    monkeypatch.setattr(shortzip.data.images, "MAX_PIXELS", 100_000)
    assert shrunk(image, CLIP).size == (56, 56)
    found = pixel_values(image, CLIP)
    if size[0] > size[1]:
        assert torch.equal(found, expected)
    else:
        levels = (found - expected).abs() * 255 * torch.tensor(CLIP.image_std)[:, None, None]
        assert levels.max() < 1.01
        assert (levels > 0.5).float().mean() < 1e-3


def test_other_processors_and_squares_see_the_picture_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortzip.data.images, "MAX_PIXELS", 100)
    siglip = SiglipImageProcessorPil(size={"height": 48, "width": 48})
    for image, processor in ((noise(70, 30), siglip), (noise(30, 30), CLIP)):
        assert shrunk(image, processor) is image


@pytest.mark.parametrize("size", [(20_000, 1_000), (1_000, 20_000)])
def test_a_panorama_becomes_pixels_in_less_than_a_gigabyte(size: tuple[int, int]) -> None:
    content = png(*size)
    pixel_values(open_image(png(50, 40)), CLIP)
    child = os.fork()  # its peak is its own
    if not child:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = pixel_values(open_image(content), CLIP)
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os._exit(0 if found.shape == (3, 56, 56) and taken < 500_000 else 1)  # KiB
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("size", [(49_000_000, 1), (1, 49_000_000), (25_000, 2), (2, 25_000), (2_001, 10)])
def test_a_thread_of_a_picture_is_a_bad_image(size: tuple[int, int]) -> None:
    content = png(*size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for look in (open_image, image_size):
        with pytest.raises(BadImage, match=r"over 200 times the other.*decompression bomb") as caught:
            look(content)
        assert caught.value.problem == "unreadable_image"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_as_thin_as_is_allowed() -> None:
    assert open_image(png(2_000, 10)).size == (2_000, 10)
    assert open_image(png(1, 1)).size == (1, 1)


def test_an_animation_of_threads_is_refused_by_its_first_frame() -> None:
    buffer = io.BytesIO()
    Image.new("1", (3_000, 3)).save(buffer, "GIF", save_all=True, append_images=[Image.new("1", (3_000, 3), 1)])
    with pytest.raises(BadImage, match="3000 x 3 pixels"):
        open_image(buffer.getvalue())


def test_a_tile_larger_than_its_picture_is_refused_before_it_is_decoded() -> None:
    """10 x 10 grey pixels as TIFF, in one tile of 65536 x 65536."""
    packed = zlib.compress(b"\0" * 65_536)
    tags = {256: 10, 257: 10, 258: 8, 259: 8, 262: 1, 277: 1, 322: 65_536, 323: 65_536, 324: 134, 325: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    content = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + packed
    for look in (open_image, image_size):
        with pytest.raises(BadImage, match="65536 x 65536 pixels, more than"):
            look(content)
