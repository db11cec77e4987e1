"""Pixels equal to LLaVA's own, in size and value, for the fixtures and for any shape of image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from data.images import build_image_processor, open_image

GOLDEN = Path(__file__).parents[1] / "golden" / "llava_release"
IMAGES = ("extreme_ironing.jpg", "waterview.jpg", "llava_v1_5_radar.jpg")


def released(side: int = 112) -> CLIPImageProcessorPil:
    """What a release ships."""
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def pixels(processor: BaseImageProcessor, image: Image.Image) -> torch.Tensor:
    return processor(image, return_tensors="pt")["pixel_values"][0]


def test_pixels_equal_the_originals_exactly() -> None:
    expected = load_file(GOLDEN / "A_expected.safetensors")["pixel_values"]
    processor = build_image_processor(released())
    for name, wanted in zip(IMAGES, expected, strict=True):
        found = pixels(processor, open_image(name, GOLDEN / "images"))
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted), name


def test_what_releases_ship_differs_which_is_why_it_is_replaced() -> None:
    expected = load_file(GOLDEN / "A_expected.safetensors")["pixel_values"][0]
    image = open_image(IMAGES[0], GOLDEN / "images")
    assert not torch.allclose(pixels(released(), image), expected, atol=0.1)
    assert torch.equal(pixels(build_image_processor(released(), "release"), image), pixels(released(), image))


def original(image: Image.Image, side: int, mean: tuple[float, ...], deviation: tuple[float, ...]) -> np.ndarray:
    """LLaVA's steps written out: the mean colour around the image up to a square, bicubic resize, normalise."""
    long = max(image.size)
    square = Image.new("RGB", (long, long), tuple(int(value * 255) for value in mean))
    square.paste(image, ((long - image.width) // 2, (long - image.height) // 2))
    values = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    return ((values - np.float32(mean)) / np.float32(deviation)).transpose(2, 0, 1)


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 90), height=st.integers(1, 90), side=st.sampled_from([16, 29, 32]))
def test_any_size_equals_the_original_steps(width: int, height: int, side: int) -> None:
    noise = np.random.default_rng(width * 91 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    processor = build_image_processor(released(side))
    found = pixels(processor, Image.fromarray(noise)).numpy()
    expected = original(Image.fromarray(noise), side, processor.image_mean, processor.image_std)
    assert found.shape == (3, side, side)
    # Half a grey level would be 0.007.
    assert np.abs(found - expected).max() < 2e-6


def test_a_processor_without_a_crop_keeps_its_size() -> None:
    processor = build_image_processor(SiglipImageProcessorPil(size={"height": 48, "width": 48}))
    assert pixels(processor, Image.new("RGB", (70, 30), "white")).shape == (3, 48, 48)
    assert dict(processor.crop_size) == {"height": 48, "width": 48}


def test_the_tiles_of_llava_next_keep_their_own_processor() -> None:
    shipped = LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    built = build_image_processor(shipped)
    assert isinstance(built, LlavaNextImageProcessorPil)
    assert built.to_dict() == shipped.to_dict()


def test_building_twice_changes_nothing() -> None:
    once = build_image_processor(released())
    assert isinstance(once, LlavaImageProcessorPil)
    assert build_image_processor(once).to_dict() == once.to_dict()


def test_an_unknown_aspect_ratio_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'anyres'.*'pad' or 'release'"):
        build_image_processor(released(), "anyres")  # type: ignore[arg-type]
