"""Every family: CLIP and SigLIP towers, Llama, Mistral and Qwen2 decoders, LLaVA and LLaVA-NeXT."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reduced_models import (
    DECODERS,
    IMAGE_TOKEN,
    PAD,
    REDUCTIONS,
    VISIONZIP,
    build,
    freeze_naively,
    make_batch,
    make_row,
)
from safetensors.torch import load_file

from shortzip.reduction import ReducedLlavaNextConfig, ReducedLlavaNextForConditionalGeneration

GOLDEN = Path(__file__).parents[1] / "golden" / "llava_next"
decoders = pytest.mark.parametrize("decoder", list(DECODERS))
towers = pytest.mark.parametrize("tower", ["clip", "siglip"])
SIZES = torch.tensor([[16, 40], [30, 30], [40, 10]])  # grids of 1 by 2, 2 by 2 and 2 by 1 tiles, and the base tile
TILES = [3, 5, 3]


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@decoders
@towers
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_reductions_logits_equal_plain_llava_bit_for_bit(decoder, tower, attention):
    model, plain = (build(decoder, tower, "none", attention, plain=plain) for plain in (False, True))
    batch = make_batch([make_row(model, layout) for layout in ("ttItt", "tt", "tII")], "left")
    assert torch.equal(logits(model, batch), logits(plain, batch))
    assert list(model.state_dict()) == list(plain.state_dict())


@decoders
@towers
@pytest.mark.parametrize("reduction", ["visionzip", "both"])
def test_reduced_logits_equal_a_plain_model_given_the_reduced_tokens(decoder, tower, reduction):
    model, plain = build(decoder, tower, reduction), build(decoder, tower, plain=True)
    if reduction == "both":
        freeze_naively(plain, REDUCTIONS[reduction]["shortv"]["layers"])
    batch = make_batch([make_row(model, layout) for layout in ("ttItt", "tt", "tII")], "right")
    tokens = model.model.get_visual_tokens(batch["pixel_values"]).tokens
    assert tokens.shape == (3, sum(VISIONZIP.values()), 24)
    features = plain.model.multi_modal_projector(tokens)
    # Features of images that are encoded already are how transformers' own model takes another number of them.
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    encoded = BaseModelOutputWithPooling(pooler_output=list(features))
    inputs = {key: value for key, value in batch.items() if key != "pixel_values"}
    expected = logits(plain, {**inputs, "mm_encoder_outputs": {"image": encoded}})
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(logits(model, batch)[mask], expected[mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("reduction", ["none", "visionzip"])
def test_the_select_strategy_matters_only_without_visionzip(strategy, reduction):
    model = build(reduction=reduction, vision_feature_select_strategy=strategy)
    features = model.get_image_features(torch.randn(2, 3, 16, 16)).pooler_output
    expected = {"none": 16 + (strategy == "full"), "visionzip": 6}[reduction]
    assert [len(image) for image in features] == [expected] * 2


def next_inputs(model, order=(0, 1, 2), side="left", stacked=True):
    """A batch of two rows, two images and one, and its rows alone."""
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.randn(count, 3, 16, 16, generator=generator) for count in TILES]
    visionzip = model.config.visionzip
    counts = (
        [count * (visionzip["dominant"] + visionzip["contextual"]) for count in TILES]
        if visionzip
        else [len(f) for f in model.get_image_features(torch.cat(pixels), SIZES).pooler_output]
    )
    rows = [([3, 4], [order[0], order[1]], [5, 6]), ([], [order[2]], [7, 8, 9])]
    alone = []
    for before, images, after in rows:
        ids = before + [IMAGE_TOKEN for image in images for _ in range(counts[image])] + after
        alone.append(
            {
                "input_ids": torch.tensor([ids]),
                "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
                "pixel_values": torch.cat([pixels[image] for image in images]),
                "image_sizes": SIZES[images],
            }
        )
    batch = make_batch(alone, side)
    batch["image_sizes"] = SIZES[list(order)]
    if stacked:
        most = max(TILES)
        batch["pixel_values"] = torch.stack(
            [torch.cat([pixels[i], torch.zeros(most - TILES[i], 3, 16, 16)]) for i in order]
        )
    return batch, alone


@pytest.mark.parametrize("reduction", list(REDUCTIONS))
@pytest.mark.parametrize("decoder", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("stacked", [True, False], ids=["tiles stacked", "tiles flat"])
def test_next_rows_in_a_batch_equal_rows_alone(reduction, decoder, stacked):
    model = build(decoder, reduction=reduction, next_=True)
    batch, alone = next_inputs(model, stacked=stacked)
    mask = batch["attention_mask"].bool()
    for ours, keep, row in zip(logits(model, batch), mask, alone, strict=True):
        torch.testing.assert_close(ours[keep], logits(model, row)[0], rtol=0, atol=1e-5)
    tokens = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)[:, -4:]
    for ours, row in zip(tokens, alone, strict=True):
        assert torch.equal(model.generate(**row, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, -4:], ours)


@decoders
def test_next_without_reductions_equals_plain_bit_for_bit(decoder):
    model, plain = (build(decoder, reduction="none", next_=True, plain=plain) for plain in (False, True))
    batch, _ = next_inputs(model)
    assert torch.equal(logits(model, batch), logits(plain, batch))


def test_next_shortv_equals_the_definition():
    model, plain = build(reduction="shortv", next_=True), build(next_=True, plain=True)
    freeze_naively(plain, REDUCTIONS["shortv"]["shortv"]["layers"])
    for row in next_inputs(model)[1]:
        torch.testing.assert_close(logits(model, row), logits(plain, row), rtol=0, atol=1e-5)


def test_next_orders_tokens_of_any_tower():
    """Without CLS too; by sorting, patch for patch, where it stands in the picture."""
    model = build(tower="siglip", reduction="visionzip", next_=True)
    pixels = torch.randn(5, 3, 16, 16)
    visual = model.model.get_visual_tokens(pixels)
    packed = model.get_image_features(pixels, SIZES[1:2]).pooler_output[0]
    projected = model.model.multi_modal_projector(visual.tokens)
    places = []
    for tile in range(4):
        for rank, patch in enumerate(visual.kept[tile + 1].tolist()):
            row, column = tile // 2 * 4 + patch // 4, tile % 2 * 4 + patch % 4
            places.append((row, column, projected[tile + 1, rank]))
    expected = [*projected[0], *(token for _, _, token in sorted(places, key=lambda place: place[:2]))]
    expected += [token for tile in range(4) for token in projected[tile + 1, 4:]]
    assert torch.equal(packed, torch.stack(expected))


def test_next_images_of_one_tile_end_in_a_newline():
    """Not reached through image_sizes, which always add a base tile; the order is the authors' all the same."""
    model = build(reduction="visionzip", next_=True)
    tokens = torch.randn(1, 6, 32)
    packed = model.model._pack(tokens, torch.zeros(1, 3, dtype=torch.long), SIZES[0], 4)
    assert torch.equal(packed, torch.cat([tokens[0], model.model.image_newline[None]]))


def golden_model(name, visionzip):
    spec = json.loads((GOLDEN / f"C_anyres_{name}.json").read_text())
    expected = load_file(GOLDEN / f"C_anyres_{name}.safetensors")
    size = int(name.rpartition("_")[2])
    tower = json.loads((GOLDEN / f"tower_{size}.json").read_text())
    model = ReducedLlavaNextForConditionalGeneration(
        ReducedLlavaNextConfig(
            vision_config={"hidden_act": "quick_gelu", **tower},
            text_config={"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 10},
            image_token_index=9,
            image_grid_pinpoints=[[height, width] for width, height in spec["image_grid_pinpoints_wh"]],
            visionzip=visionzip,
        )
    ).eval()
    weights = load_file(GOLDEN / f"tower_{size}.safetensors")
    model.model.vision_tower.load_state_dict({k.removeprefix("vision_model."): v for k, v in weights.items()})
    for index, linear in ((0, "linear_1"), (2, "linear_2")):
        module = getattr(model.model.multi_modal_projector, linear)
        module.load_state_dict({k: expected[f"model.mm_projector.{index}.{k}"] for k in ("weight", "bias")})
    model.model.image_newline.data = expected["model.image_newline"]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    pixels = []
    for image in spec["images"]:
        tiles = torch.from_numpy(np.array(Image.open(GOLDEN / image["tiles_png"])))
        tiles = tiles.view(image["tiles"], size, size, 3).permute(0, 3, 1, 2).float() / 255
        pixels.append((tiles - mean) / std)
    sizes = torch.tensor([image["size_wh"][::-1] for image in spec["images"]])
    return model, expected, pixels, sizes


def test_next_visionzip_equals_the_authors(record_property):
    model, expected, pixels, sizes = golden_model("visionzip_336", {"dominant": 28, "contextual": 5})
    with torch.no_grad():
        features = model.get_image_features(torch.cat(pixels), sizes).pooler_output
        for index, (image, tiles) in enumerate(zip(features, pixels, strict=True)):
            visual = model.model.get_visual_tokens(tiles)
            theirs = expected[f"keep_idx_{index}"].tolist()
            assert [set(row) for row in (visual.kept + 1).tolist()] == [set(row) - {0} for row in theirs]
            difference = (image - expected[f"sequence_projected_{index}"]).abs().max().item()
            record_property("difference", difference)
            assert difference <= 1e-3
            assert (visual.tokens - expected[f"tower_features_{index}"]).abs().max() <= 1e-3


def test_next_without_visionzip_unpads_and_adds_newlines_as_the_original(record_property):
    model, expected, pixels, sizes = golden_model("vanilla_112", None)
    with torch.no_grad():
        features = model.get_image_features(torch.cat(pixels), sizes).pooler_output
    for index, image in enumerate(features):
        difference = (image - expected[f"sequence_projected_{index}"]).abs().max().item()
        record_property("difference", difference)
        assert difference <= 1e-3


def test_padding_is_not_visual():
    """Padding is neither text nor image: what stands in it changes nothing."""
    model = build()
    batch = make_batch([make_row(model, "tItt"), make_row(model, "t")], "left")
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, PAD + 5)}
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(logits(model, batch)[mask], logits(model, other)[mask], rtol=0, atol=1e-6)
