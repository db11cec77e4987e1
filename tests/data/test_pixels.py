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

from shortzip.data.errors import UserError
from shortzip.data.images import open_image
from shortzip.train.release.processors import build_image_processor

GOLDEN = Path(__file__).parents[1] / "golden" / "llava_release"
IMAGES = ("extreme_ironing.jpg", "waterview.jpg", "llava_v1_5_radar.jpg")


def released(side: int = 112) -> CLIPImageProcessorPil:
    """What a release ships."""
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def build(shipped: BaseImageProcessor, model_type: str = "llava") -> BaseImageProcessor:
    """The image processor for a release that ships this one."""
    return build_image_processor(shipped.to_dict(), model_type)


def pixels(processor: BaseImageProcessor, image: Image.Image) -> torch.Tensor:
    return processor(image, return_tensors="pt")["pixel_values"][0]


def test_pixels_equal_the_originals_exactly() -> None:
    expected = load_file(GOLDEN / "A_expected.safetensors")["pixel_values"]
    processor = build(released())
    for name, wanted in zip(IMAGES, expected, strict=True):
        found = pixels(processor, open_image(name, GOLDEN / "images"))
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted), name


def test_what_releases_ship_differs_which_is_why_it_is_replaced() -> None:
    expected = load_file(GOLDEN / "A_expected.safetensors")["pixel_values"][0]
    image = open_image(IMAGES[0], GOLDEN / "images")
    assert not torch.allclose(pixels(released(), image), expected, atol=0.1)


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
    processor = build(released(side))
    found = pixels(processor, Image.fromarray(noise)).numpy()
    expected = original(Image.fromarray(noise), side, processor.image_mean, processor.image_std)
    assert found.shape == (3, side, side)
    # Half a grey level would be 0.007.
    assert np.abs(found - expected).max() < 2e-6


def test_siglip_is_resized_without_padding_as_its_releases_ship() -> None:
    shipped = SiglipImageProcessorPil(size={"height": 48, "width": 48})
    image = open_image(IMAGES[0], GOLDEN / "images")
    assert image.width != image.height
    assert torch.equal(pixels(build(shipped), image), pixels(shipped, image))


def test_the_tiles_of_llava_next_keep_their_own_processor() -> None:
    shipped = LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    built = build(shipped, "llava_next")
    assert isinstance(built, LlavaNextImageProcessorPil)
    assert built.to_dict() == shipped.to_dict()


@pytest.mark.parametrize("do_pad", [False, True])
def test_llavas_own_processor_pads_as_it_says(do_pad: bool) -> None:
    """Releases in the original layout with image_aspect_ratio square are not padded."""
    own = LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_pad=do_pad)
    assert build(own).to_dict() == own.to_dict()


def test_building_twice_changes_nothing() -> None:
    once = build(released())
    assert isinstance(once, LlavaImageProcessorPil)
    assert build(once).to_dict() == once.to_dict()


def test_an_unknown_processor_is_refused_and_code_of_a_release_never_run() -> None:
    settings = {"image_processor_type": "OwnImageProcessor", "auto_map": {"AutoImageProcessor": "own.OwnProcessor"}}
    for model_type in ("llava", "llava_next"):
        with pytest.raises(UserError, match="some/release: image_processor_type is 'OwnImageProcessor'"):
            build_image_processor(settings, model_type, "some/release")
