"""The processors write exactly as many placeholders as the models fill."""

import numpy as np
import pytest
import torch
from PIL import Image
from reduced_models import VISIONZIP, build
from tiny import build_tokenizer
from transformers import LlavaImageProcessorPil, LlavaNextImageProcessorPil, LlavaNextProcessor, LlavaProcessor

from shortzip.reduction import (
    ReducedLlavaNextConfig,
    ReducedLlavaNextForConditionalGeneration,
    ReducedLlavaNextProcessor,
    ReducedLlavaProcessor,
)

PINPOINTS = [[16, 32], [32, 16], [32, 32], [16, 48], [48, 16]]
IMAGES = [(60, 20), (20, 60), (33, 32), (16, 16), (8, 8), (500, 3)]  # width, height
budgets = pytest.mark.parametrize("visionzip", [None, VISIONZIP, {"dominant": 1, "contextual": 0}], ids=str)


@pytest.fixture(scope="module")
def next_parts():
    size = {"height": 16, "width": 16}
    image_processor = LlavaNextImageProcessorPil(
        image_grid_pinpoints=PINPOINTS, size={"shortest_edge": 16}, crop_size=size
    )
    common = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return image_processor, build_tokenizer(), common


def pictures(sizes):
    return [Image.new("RGB", size, (200, 40, 10)) for size in sizes]


@budgets
def test_llava(tiny_release, visionzip):
    processor = ReducedLlavaProcessor.from_pretrained(tiny_release, visionzip=visionzip)
    per_image = 36 if visionzip is None else sum(visionzip.values())
    texts = ["<image> hello", "hello", "<image> what <image>"]
    inputs = processor(images=pictures(IMAGES[:3]), text=texts, padding=True, return_tensors="pt")
    counts = (inputs["input_ids"] == processor.image_token_id).sum(1)
    assert counts.tolist() == [per_image, 0, 2 * per_image]
    sizes = [(height, width) for width, height in IMAGES]
    announced = processor._get_num_multimodal_tokens(image_sizes=sizes)
    assert announced["num_image_tokens"] == [per_image] * len(IMAGES)
    assert announced["num_image_patches"] == [1] * len(IMAGES)


@budgets
def test_next_with_any_picture(next_parts, visionzip):
    image_processor, tokenizer, common = next_parts
    processor = ReducedLlavaNextProcessor(image_processor, tokenizer, visionzip=visionzip, **common)
    text = build(next_=True).config
    config = ReducedLlavaNextConfig(
        vision_config=text.vision_config,
        text_config={**text.text_config.to_dict(), "vocab_size": len(tokenizer)},
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=PINPOINTS,
        visionzip=visionzip,
    )
    model = ReducedLlavaNextForConditionalGeneration(config).eval()
    sizes = [(height, width) for width, height in IMAGES]
    announced = processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
    for picture, count in zip(pictures(IMAGES), announced, strict=True):
        inputs = processor(images=picture, text="<image> hello", return_tensors="pt")
        assert int((inputs["input_ids"] == processor.image_token_id).sum()) == count
        with torch.no_grad():
            model(**inputs)
    inputs = processor(
        images=pictures(IMAGES[:3]), text=["<image> hello", "<image><image>"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        model(**inputs)


def test_without_a_budget_they_are_transformers_processors(tiny_release, next_parts):
    image_processor, tokenizer, common = next_parts
    pairs = [
        (LlavaProcessor.from_pretrained(tiny_release), ReducedLlavaProcessor.from_pretrained(tiny_release)),
        (
            LlavaNextProcessor(image_processor, tokenizer, **common),
            ReducedLlavaNextProcessor(image_processor, tokenizer, **common),
        ),
    ]
    for plain, reduced in pairs:
        for picture in pictures(IMAGES[:3]):
            theirs, ours = (
                processor(images=picture, text="<image> hello", return_tensors="pt") for processor in (plain, reduced)
            )
            assert theirs.keys() == ours.keys()
            assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_the_budget_is_saved_and_can_be_overridden(tmp_path, tiny_release, next_parts, family):
    image_processor, tokenizer, common = next_parts
    if family == "llava":
        cls = ReducedLlavaProcessor
        plain = LlavaProcessor(
            LlavaImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
            tokenizer,
            **common,
        )
    else:
        cls, plain = ReducedLlavaNextProcessor, LlavaNextProcessor(image_processor, tokenizer, **common)
    plain.save_pretrained(tmp_path / "plain")
    processor = cls.from_pretrained(tmp_path / "plain", visionzip=VISIONZIP)
    processor.save_pretrained(tmp_path / "saved")
    assert "visionzip" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()
    assert cls.from_pretrained(tmp_path / "saved").visionzip == VISIONZIP
    assert cls.from_pretrained(tmp_path / "saved", visionzip=None).visionzip is None


@pytest.mark.parametrize("square", [False, True], ids=["padded", "square"])
@pytest.mark.parametrize("given", [{}, {"do_rescale": False}, {"images_kwargs": {"do_rescale": False}}], ids=str)
def test_floats_from_0_to_1_are_the_same_picture(tiny_release, square, given):
    """As torchvision's ToTensor gives them, one by one, in a list or stacked."""
    processor = ReducedLlavaProcessor.from_pretrained(tiny_release, visionzip=VISIONZIP)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 30 if square else 40, 3), dtype=np.uint8)
    expected = processor(images=Image.fromarray(pixels), text="<image>", return_tensors="pt")["pixel_values"]
    floats = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    for images in (floats, [floats], floats[None], floats.numpy(), pixels.astype(np.float64) / 255):
        found = processor(images=images, text="<image>", return_tensors="pt", **given)["pixel_values"]
        assert torch.equal(found, expected)
    if not given:  # and what is no such picture is left as it is
        for images in (pixels, floats * 255):
            assert torch.equal(processor(images=images, text="<image>", return_tensors="pt")["pixel_values"], expected)
