"""Images of different budgets in one batch equal each image alone at its budget."""

import numpy as np
import pytest
import torch
from PIL import Image
from reduced_models import (
    IMAGE_TOKEN,
    METHODS,
    NEXT_SIZES,
    SHORTV,
    VISIONZIP,
    build,
    images,
    make_batch,
    rows_of,
)
from tiny import write_next_release
from tiny_onevision import write_onevision

from shortzip.reduction import (
    ReducedLlavaForConditionalGeneration,
    ReducedLlavaNextForConditionalGeneration,
    ReducedLlavaNextProcessor,
    ReducedLlavaOnevisionConfig,
    ReducedLlavaOnevisionForConditionalGeneration,
    ReducedLlavaProcessor,
)
from shortzip.reduction.errors import ReductionError
from shortzip.reduction.image_budgets import budget_of, budgets_by_detail, detail, with_budget
from shortzip.train.release.opening import open_release
from shortzip.train.release.processors import release_processor

TOLERANCE = 1e-5
BUDGETS = {"ttIt": [3], "tIttI": [9, 1], "tt": [], "Itt": [16]}
KEYS = {"visionzip": VISIONZIP, **METHODS, "random": {"dominant": 5, "contextual": 0, "method": "random"}}
COVERAGE = {"chooser": "coverage", "coverage": 0.5, "min": 2, "max": 14}


def unlike(count):
    """Images of more and less contrast."""
    pixels = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return pixels * torch.logspace(-1, 1, count).view(-1, 1, 1, 1)


def by_coverage(**options):
    """A model whose tower looks at some patches more than at others, and in each image differently."""
    model = build(reduction="none", visionzip={**VISIONZIP, "per_image": COVERAGE}, **options)
    with torch.no_grad():
        for block in model.model.vision_tower.encoder.layers:
            block.self_attn.q_proj.weight *= 60
    return model


def row_of(layout, budgets, seed):
    generator, of_images = torch.Generator().manual_seed(seed), iter(budgets)
    ids = []
    for part in layout:
        ids += (
            [IMAGE_TOKEN] * next(of_images) if part == "I" else [int(torch.randint(3, 90, (1,), generator=generator))]
        )
    row = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if budgets:
        row["pixel_values"] = torch.randn(len(budgets), 3, 16, 16, generator=generator)
    return row


def mixed(side, layouts=BUDGETS):
    """Rows alone, and as a batch."""
    rows = [row_of(layout, budgets, seed) for seed, (layout, budgets) in enumerate(layouts.items())]
    batch = make_batch(rows, side)
    budgets = torch.tensor([budget for of_row in layouts.values() for budget in of_row])
    return rows, {**batch, "image_budgets": budgets}


def alone(model, row, budgets):
    """Logits of a row by a model that knows one budget: each of its images must have that."""
    with torch.no_grad():
        if len(set(budgets)) < 2:
            single = (
                with_budget(model.model, budget_of(model.config.visionzip, budgets[0])) if budgets else model.model
            )
            return model.lm_head(single(**row).last_hidden_state)[0]
        features = [
            with_budget(model.model, budget_of(model.config.visionzip, budget)).get_image_features(pixels[None])
            for budget, pixels in zip(budgets, row["pixel_values"], strict=True)
        ]
        embeds = model.get_input_embeddings()(row["input_ids"])
        visual = row["input_ids"] == IMAGE_TOKEN
        embeds[visual] = torch.cat([image.pooler_output[0] for image in features])
        return model(inputs_embeds=embeds, mm_token_type_ids=visual.long()).logits[0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", list(KEYS))
def test_a_batch_of_budgets_equals_each_row_alone(method, side):
    model = build(reduction="none", visionzip=KEYS[method])
    rows, batch = mixed(side)
    with torch.no_grad():
        logits = model(**batch).logits
    for ours, row, budgets in zip(rows_of(logits, batch), rows, BUDGETS.values(), strict=True):
        torch.testing.assert_close(ours, alone(model, row, budgets), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "options", [{"shortv": SHORTV}, {"tower": "siglip"}, {"attention": "eager", "shortv": SHORTV}]
)
def test_with_frozen_layers_and_other_towers(options):
    model = build(reduction="none", visionzip=VISIONZIP, **options)
    rows, batch = mixed("left")
    with torch.no_grad():
        logits = model(**batch).logits
    for ours, row, budgets in zip(rows_of(logits, batch), rows, BUDGETS.values(), strict=True):
        torch.testing.assert_close(ours, alone(model, row, budgets), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("settings", "positions"),
    [
        ({}, "compact"),
        ({}, "original"),
        ({"num_beams": 2}, "compact"),
        pytest.param({"num_beams": 2}, "original", marks=pytest.mark.slow),
        pytest.param({"use_cache": False}, "compact", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_generate_gives_what_each_row_gives_alone(settings, positions):
    model = build(reduction="none", visionzip=VISIONZIP, positions=positions)
    layouts = {"ttIt": [3], "tItt": [9], "Itt": [16]}
    rows, batch = mixed("left", layouts)
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **settings}
    together = model.generate(**batch, **how)[:, batch["input_ids"].shape[1] :]
    for ours, row, (budget,) in zip(together, rows, layouts.values(), strict=True):
        single = build(reduction="none", visionzip=budget_of(VISIONZIP, budget), positions=positions)
        assert ours.tolist() == single.generate(**row, **how)[0, row["input_ids"].shape[1] :].tolist()


def test_dominant_and_contextual_tokens_keep_their_shares():
    model = build(reduction="none", visionzip=VISIONZIP)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mixed_features = model.model.get_image_features(pixels, image_budgets=[9, 3]).pooler_output
        for place, key in enumerate([{"dominant": 6, "contextual": 3}, {"dominant": 2, "contextual": 1}]):
            single = build(reduction="none", visionzip=key).model.get_image_features(pixels[place : place + 1])
            torch.testing.assert_close(mixed_features[place], single.pooler_output[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("method", ["visionzip", "scope"])
def test_tiles_of_an_image_have_its_budget(method, positions):
    options = {"next_": True, "reduction": "none", "positions": positions}
    model, sizes, budgets = build(visionzip=KEYS[method], **options), NEXT_SIZES[:4], [3, 9, 3, 14]
    given = images(model, sizes)
    with torch.no_grad():
        together = model.model.get_image_features(**given, image_budgets=torch.tensor(budgets))
    tiles, start = model.model._tiles(sizes), 0
    for place, budget in enumerate(budgets):
        single = build(visionzip=budget_of(KEYS[method], budget), **options).model
        end = start + tiles[place]
        with torch.no_grad():
            one = single.get_image_features(given["pixel_values"][start:end], given["image_sizes"][place : place + 1])
        torch.testing.assert_close(together.pooler_output[place], one.pooler_output[0], rtol=0, atol=TOLERANCE)
        if positions == "original":
            assert together.positions.tokens[place].tolist() == one.positions.tokens[0].tolist()
            assert together.positions.lengths[place] == one.positions.lengths[0]
        start = end


@pytest.mark.parametrize("next_", [False, True])
def test_coverage_runs_the_tower_once(next_):
    model = by_coverage(next_=next_)
    given = images(model, NEXT_SIZES[:4]) if next_ else {"pixel_values": unlike(4)}
    passes = []
    model.model.vision_tower.encoder.layers[0].register_forward_hook(lambda *args: passes.append(len(args[1][0])))
    with torch.no_grad():
        features = model.model.get_image_features(**given)
    assert passes == [len(given["pixel_values"])]
    counts = [len(image) for image in features.pooler_output]
    assert len(set(counts)) > 1
    prompt = {"input_ids": torch.tensor([[5, *[IMAGE_TOKEN] * sum(counts), 7]])}
    ids = model.generate(**prompt, mm_encoder_outputs={"image": features}, max_new_tokens=4, do_sample=False)
    assert passes == [len(given["pixel_values"])]
    assert ids.tolist() == model.generate(**prompt, **given, max_new_tokens=4, do_sample=False).tolist()


def test_coverage_chooses_the_budgets_that_it_then_fills():
    model = by_coverage()
    pixels = unlike(5)
    with torch.no_grad():
        found = model.model.get_image_features(pixels).pooler_output
        given = model.model.get_image_features(pixels, image_budgets=[len(image) for image in found]).pooler_output
    assert all(torch.equal(*pair) for pair in zip(found, given, strict=True))


def test_the_picture_tells_the_model_what_it_tells_the_processor():
    per_image = {"chooser": "image", "scale": 2.0, "min": 2, "max": 16}
    model = build(reduction="none", visionzip={**VISIONZIP, "per_image": per_image})
    pixels = unlike(3)
    with torch.no_grad():
        found = [len(image) for image in model.model.get_image_features(pixels).pooler_output]
    assert found == budgets_by_detail(detail(pixels).tolist(), per_image)
    assert len(set(found)) > 1


@pytest.mark.parametrize(
    ("budgets", "words"),
    [
        ([3], "1 numbers, and there are 2 images"),
        ([3, 18], r"budgets\[1\] is 18; it must be a whole number from 1 to 17"),
        ([0, 3], r"budgets\[0\] is 0"),
    ],
)
def test_a_model_refuses_budgets_out_of_range(budgets, words):
    model = build(reduction="none", visionzip=VISIONZIP)
    with pytest.raises(ReductionError, match=words):
        model.model.get_image_features(torch.randn(2, 3, 16, 16), image_budgets=budgets)


def test_what_does_not_go_together():
    with pytest.raises(ReductionError, match="max is 18; an image has 17 tokens: it must be 2 to 17"):
        build(reduction="none", visionzip={**VISIONZIP, "per_image": {**COVERAGE, "max": 18}})
    fastv = {"layer": 2, "keep": 0.5}
    with pytest.raises(ReductionError, match=r"visionzip\.per_image and fastv do not go together"):
        build(reduction="none", visionzip={**VISIONZIP, "per_image": COVERAGE}, fastv=fastv)
    model = build(reduction="none", visionzip=VISIONZIP, fastv=fastv)
    with pytest.raises(ReductionError, match="image_budgets and fastv do not go together"):
        model.model.get_image_features(torch.randn(2, 3, 16, 16), image_budgets=[3, 4])
    plain = build(reduction="none")
    with pytest.raises(ReductionError, match="visionzip is null"):
        plain.model.get_image_features(torch.randn(2, 3, 16, 16), image_budgets=[3, 4])


def test_a_prompt_of_other_counts_is_told_both_numbers():
    model = build(reduction="none", visionzip=VISIONZIP)
    _, batch = mixed("right", {"tIt": [3], "It": [9]})
    batch["image_budgets"] = torch.tensor([9, 3])
    with pytest.raises(ValueError, match="holds 3 image placeholders, its images give 9 visual tokens"):
        model(**batch)


def test_a_processor_with_the_model_writes_what_its_one_pass_finds(tiny_release):
    key = {"dominant": 6, "contextual": 2, "per_image": {**COVERAGE, "coverage": 0.4, "max": 30}}
    model = ReducedLlavaForConditionalGeneration.from_pretrained(tiny_release, visionzip=key).eval()
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[2].self_attn.q_proj.weight *= 30
    processor = ReducedLlavaProcessor.from_pretrained(tiny_release, visionzip=key)
    noise = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    pictures = [Image.new("RGB", (30, 30), (9, 90, 200)), Image.fromarray(noise)]
    passes = []
    model.model.vision_tower.encoder.layers[0].register_forward_hook(lambda *args: passes.append(1))
    asked = {"images": pictures, "text": ["<image> what is it?", "<image> hello"], "padding": True}
    inputs = processor(**asked, return_tensors="pt", model=model).to("cpu")
    assert "pixel_values" not in inputs
    counts = (inputs["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert counts == [len(image) for image in inputs["mm_encoder_outputs"]["image"].pooler_output]
    assert len(set(counts)) == 2
    how = {"max_new_tokens": 5, "do_sample": False}
    found = model.generate(**inputs, **how)
    assert len(passes) == 1
    given = processor(**asked, return_tensors="pt", budgets=counts)
    assert found.tolist() == model.generate(**given, **how).tolist()
    other = ReducedLlavaProcessor.from_pretrained(
        tiny_release, visionzip={**key, "per_image": {**COVERAGE, "coverage": 0.9}}
    )
    with pytest.raises(ReductionError, match="take the processor that belongs to the model"):
        other(**asked, model=model)


def test_a_processor_of_tiles_with_the_model(tmp_path):
    release = write_next_release(tmp_path)
    key = {"dominant": 6, "contextual": 2, "per_image": {**COVERAGE, "coverage": 0.4, "max": 30}}
    model = ReducedLlavaNextForConditionalGeneration.from_pretrained(release, visionzip=key).eval()
    processor = ReducedLlavaNextProcessor.from_pretrained(release, visionzip=key)
    pictures = [Image.new("RGB", (50, 20), (9, 90, 200)), Image.new("RGB", (24, 24))]
    asked = {"images": pictures, "text": ["<image> what is it?", "<image> hello"], "padding": True}
    inputs = processor(**asked, return_tensors="pt", model=model)
    counts = [len(image) for image in inputs["mm_encoder_outputs"]["image"].pooler_output]
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == counts
    given = processor(**asked, return_tensors="pt", budgets=[6, 6])
    with torch.no_grad():
        assert model(**inputs).logits.shape[0] == 2
        assert model(**given).logits.shape[0] == 2


def test_a_family_that_has_one_budget_for_all_says_so(tmp_path):
    release = write_onevision(tmp_path / "release")
    with pytest.raises(ReductionError, match="a reduced_llava_onevision has one budget for all images"):
        ReducedLlavaOnevisionForConditionalGeneration.from_pretrained(
            release, visionzip={**VISIONZIP, "per_image": COVERAGE}
        )
    config = ReducedLlavaOnevisionConfig.from_pretrained(release, visionzip=VISIONZIP)
    processor = release_processor(open_release(str(release)), config)
    with pytest.raises(ReductionError, match="ReducedLlavaOnevisionProcessor takes one budget for all images"):
        processor(images=[Image.new("RGB", (24, 24))], text="<image> a", budgets=[3])
