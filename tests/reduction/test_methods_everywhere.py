"""Any way of choosing visual tokens, wherever a reduced model works: batches, towers, tiles, generation, training."""

from typing import Any

import pytest
import torch
from reduced_models import METHODS, build, make_batch, make_row, rows_of
from test_families import SIZES, next_inputs
from test_layer_contribution import naive_lc, sample_of

from shortzip.reduction.configuration_reduced_llava import TOWER_HAS_CLS
from shortzip.reduction.errors import ReductionError
from shortzip.reduction.layer_contribution import measure_layer_contributions
from shortzip.reduction.selectors import selector_of

LAYOUTS = ["tItt", "tttttt", "ItttI"]
TOLERANCE = 1e-5
methods = pytest.mark.parametrize("method", list(METHODS))
towers = pytest.mark.parametrize("tower", ["clip", "siglip"])


def built(method: str, **options: Any) -> Any:
    return build(visionzip=METHODS[method], **options)


@torch.no_grad()
def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    found: torch.Tensor = model(**inputs).logits
    return found


@methods
@towers
def test_rows_with_one_two_and_no_images_are_in_a_batch_what_they_are_alone(method: str, tower: str) -> None:
    model = built(method, tower=tower)
    alone = [make_row(model, layout, seed) for seed, layout in enumerate(LAYOUTS)]
    for side in ("left", "right"):
        batch = make_batch(alone, side)
        for ours, row in zip(rows_of(logits(model, batch), batch), alone, strict=True):
            torch.testing.assert_close(ours, logits(model, row)[0], rtol=0, atol=TOLERANCE)
    visual = model.model.get_visual_tokens(alone[2]["pixel_values"])
    keeps_cls = TOWER_HAS_CLS[model.config.vision_config.model_type] and selector_of(METHODS[method]).keeps_cls
    assert visual.kept.shape[1] == METHODS[method]["dominant"] - keeps_cls
    assert visual.tokens.shape[1] == METHODS[method]["dominant"] + METHODS[method]["contextual"]
    assert (visual.kept.diff() > 0).all(), "in spatial order"


@methods
def test_batches_generate_greedily_and_by_beams_what_their_rows_do(method: str) -> None:
    model = built(method)
    alone = [make_row(model, layout, seed) for seed, layout in enumerate(LAYOUTS)]
    for search in ({"num_beams": 1}, {"num_beams": 2}):
        how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **search}
        found = model.generate(**make_batch(alone, "left"), **how)[:, -4:]
        for ours, row in zip(found, alone, strict=True):
            assert torch.equal(ours, model.generate(**row, **how)[0, -4:])


@methods
@towers
def test_every_tile_has_the_budget_in_the_order_of_the_picture(method: str, tower: str) -> None:
    model = built(method, tower=tower, next_=True)
    batch, alone = next_inputs(model)
    mask = batch["attention_mask"].bool()
    for ours, keep, row in zip(logits(model, batch), mask, alone, strict=True):
        torch.testing.assert_close(ours[keep], logits(model, row)[0], rtol=0, atol=TOLERANCE)
    assert_in_order(model)


@pytest.mark.parametrize(
    "visionzip",
    [{"dominant": 1, "contextual": 0}, {"dominant": 1, "contextual": 3, "method": "duet"},
     {"dominant": 16, "contextual": 0, "method": "scope"}],
    ids=str,
)  # fmt: skip
def test_tiles_of_cls_alone_and_of_all_patches_are_in_order_too(visionzip: dict[str, Any]) -> None:
    assert_in_order(build(visionzip=visionzip, next_=True))


def assert_in_order(model: Any) -> None:
    """The base tile, the other tiles' patches row by row over the whole picture, their CLS, what is merged in them."""
    pixels = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        visual = model.model.get_visual_tokens(pixels)
        packed = model.get_image_features(pixels, SIZES[1:2]).pooler_output[0]
        projected = model.model.multi_modal_projector(visual.tokens)
    cls = model.config.visionzip["dominant"] - visual.kept.shape[1]
    last = projected.shape[1] - model.config.visionzip["contextual"]
    places = [
        (tile // 2 * 4 + patch // 4, tile % 2 * 4 + patch % 4, projected[tile + 1, cls + rank])
        for tile in range(4)
        for rank, patch in enumerate(visual.kept[tile + 1].tolist())
    ]
    expected = [*projected[0], *(token for _, _, token in sorted(places, key=lambda place: place[:2]))]
    expected += [token for tile in range(4) for token in projected[tile + 1, :cls]]
    expected += [token for tile in range(4) for token in projected[tile + 1, last:]]
    assert torch.equal(packed, torch.stack(expected))


@pytest.mark.parametrize(
    ("visionzip", "message"),
    [({"dominant": 17, "contextual": 0, "method": "scope"}, "method scope: dominant 17 .* exceeds the 16 tokens"),
     ({"dominant": 15, "contextual": 3, "method": "duet"}, "method duet: dominant 15 .* exceeds the 17 tokens .* CLS"),
     ({"dominant": 4, "contextual": 1, "method": "scope"}, "method scope merges nothing: give all 5"),
     ({"dominant": 4, "contextual": 0, "method": "scope", "beta": 1}, "no parameter 'beta': it takes alpha"),
     ({"dominant": 4, "contextual": 0, "method": "cdpruner"}, "method cdpruner chooses by each question")],
    ids=str,
)  # fmt: skip
def test_what_a_model_cannot_take_is_refused_by_name(visionzip: dict[str, Any], message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        build(visionzip=visionzip)


@methods
def test_checkpointing_and_bfloat16_train_the_projector(method: str) -> None:
    model = built(method)
    batch = make_batch([make_row(model, layout, seed) for seed, layout in enumerate(LAYOUTS)], "right")
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        if recompute:
            model.gradient_checkpointing_enable()
        model.train()(**batch).logits.square().mean().backward()
        gradients.append(model.model.multi_modal_projector.linear_1.weight.grad.clone())
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-8)
    with torch.no_grad():
        coarse = logits(model.eval().to(torch.bfloat16), {**batch, "pixel_values": batch["pixel_values"].bfloat16()})
    assert coarse.isfinite().all()


@methods
def test_layer_contributions_are_of_the_tokens_that_the_method_leaves(method: str) -> None:
    model = built(method, reduction="none")
    sample = sample_of(make_row(model, "ttItt"))
    found = measure_layer_contributions(model, [sample]).visual[0]
    torch.testing.assert_close(found, naive_lc(model, sample), rtol=1e-3, atol=1e-6)
