"""`positions: original` against plain transformers' language model with the positions written out by hand."""

import copy
from typing import Any

import pytest
import torch
from reduced_models import (
    DECODERS,
    IMAGE_TOKEN,
    PAD,
    TOWERS,
    WAYS,
    build,
    make_batch,
    make_row,
    original,
    rows_of,
)
from torch import Tensor
from transformers import DynamicCache

from shortzip.reduction.errors import ReductionError

PATCHES = 16
LAYOUTS = {"two images": "tItttItt", "side by side": "tIIt", "first": "Itt", "last": "tttI"}


@pytest.fixture(scope="module")
def model() -> Any:
    return original()


@torch.no_grad()
def by_hand(model: Any, row: dict[str, Tensor]) -> tuple[Tensor, Tensor, int]:
    """Embeddings [1, L, H] of a row without padding, its positions [1, L], and that of the next token."""
    ids, embeds = row["input_ids"], model.get_input_embeddings()(row["input_ids"])
    positions: list[int] = []
    if "pixel_values" in row:
        features = model.model.get_image_features(row["pixel_values"]).pooler_output
        embeds = embeds.masked_scatter((ids == IMAGE_TOKEN).unsqueeze(-1), torch.cat(list(features)))
        places = places_by_hand(model, row["pixel_values"])
    column = following = image = 0
    while column < ids.shape[1]:
        if ids[0, column] == IMAGE_TOKEN:
            positions += [following + place for place in places[image]]
            column, following, image = column + len(places[image]), following + PATCHES, image + 1
        else:
            positions.append(following)
            column, following = column + 1, following + 1
    return embeds, torch.tensor([positions]), following


@torch.no_grad()
def places_by_hand(model: Any, pixels: Tensor) -> list[list[int]]:
    zipped, visual = model.config.visionzip, model.model.get_visual_tokens(pixels)
    if zipped.get("method") in ("pool", "downsample"):  # 2 rows of 3 cells on 4 by 4 patches: the middle ones
        return [[row * 4 + column for row in (1, 3) for column in (0, 2, 3)]] * len(pixels)
    rows = []
    for kept, targets in zip(visual.kept.tolist(), visual.targets.tolist(), strict=True):
        cls = [0] * (zipped["dominant"] - len(kept))
        rows.append(cls + kept + targets)
    return rows


@torch.no_grad()
def expected_logits(model: Any, row: dict[str, Tensor]) -> Tensor:
    embeds, positions, _ = by_hand(model, row)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    states = model.model.language_model(inputs_embeds=embeds, position_ids=positions, attention_mask=mask)
    return model.lm_head(states.last_hidden_state)


@torch.no_grad()
def expected_ids(model: Any, row: dict[str, Tensor], count: int) -> list[int]:
    """Greedy tokens, step by step with a cache."""
    embeds, positions, following = by_hand(model, row)
    cache, said = DynamicCache(), []
    for step in range(count):
        states = model.model.language_model(inputs_embeds=embeds, position_ids=positions, past_key_values=cache)
        logits = model.lm_head(states.last_hidden_state[:, -1])
        logits[:, model.config.text_config.eos_token_id] = -torch.inf
        said.append(int(logits.argmax()))
        embeds = model.get_input_embeddings()(torch.tensor([[said[-1]]]))
        positions = torch.tensor([[following + step]])
    return said


def greedy(model: Any, batch: dict[str, Tensor], count: int = 5, **more: Any) -> Tensor:
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": PAD, **more}
    return model.generate(**batch, **settings)


@pytest.mark.parametrize(
    ("method", "layout"),
    [
        *((method, "two images") for method in WAYS),
        *(("visionzip", layout) for layout in LAYOUTS if layout != "two images"),
    ],
)
def test_logits_and_greedy_ids(method: str, layout: str) -> None:
    model = original(method)
    row = make_row(model, LAYOUTS[layout], seed=3)
    with torch.no_grad():
        logits = model(**row).logits
        without_mask = model(**{key: row[key] for key in ("input_ids", "pixel_values")}, use_cache=False).logits
    torch.testing.assert_close(logits, expected_logits(model, row), rtol=0, atol=5e-5)
    torch.testing.assert_close(without_mask, logits, rtol=0, atol=5e-5)
    assert greedy(model, row)[0, row["input_ids"].shape[1] :].tolist() == expected_ids(model, row, 5)


@pytest.mark.parametrize(
    ("decoder", "attention"), [*((decoder, "sdpa") for decoder in DECODERS), ("mistral-window", "eager")]
)
def test_every_decoder(decoder: str, attention: str) -> None:
    model = original(decoder=decoder, attention=attention)
    row = make_row(model, "tttItttItt", seed=5)
    with torch.no_grad():
        logits = model(**row).logits
    torch.testing.assert_close(logits, expected_logits(model, row), rtol=0, atol=5e-5)
    assert greedy(model, row)[0, row["input_ids"].shape[1] :].tolist() == expected_ids(model, row, 5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(model: Any, side: str) -> None:
    rows = [make_row(model, layout, seed) for seed, layout in enumerate(("ttItt", "tIttttItt", "tttt", "I"))]
    batch = make_batch(rows, side)
    with torch.no_grad():
        found = rows_of(model(**batch).logits, batch)
    for row, logits in zip(rows, found, strict=True):
        torch.testing.assert_close(logits, expected_logits(model, row)[0], rtol=0, atol=5e-5)
    if side == "left":
        said = greedy(model, batch)[:, batch["input_ids"].shape[1] :]
        assert said.tolist() == [expected_ids(model, row, 5) for row in rows]


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("decoder", ["llama", "mistral-window", "qwen2"])
def test_all_patches_in_order_are_plain_llava(tower: str, decoder: str) -> None:
    everything = {"dominant": PATCHES, "contextual": 0, "method": "grid"}
    plain = build(decoder, tower, plain=True)
    model = build(decoder, tower, reduction="none", visionzip=everything, positions="original")
    row = make_row(plain, "tttItttItt", seed=1)
    with torch.no_grad():
        torch.testing.assert_close(model(**row).logits, plain(**row).logits, rtol=0, atol=1e-5)
    assert torch.equal(greedy(model, row), greedy(plain, row))


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_what_the_tower_leaves_out_shifts_the_patches(strategy: str) -> None:
    """With CLS among plain LLaVA's tokens a patch stands one further on."""
    model = original("visionzip", vision_feature_select_strategy=strategy)
    pixels = torch.randn(1, 3, 16, 16)
    visual = model.model.get_visual_tokens(pixels)
    found = model.model.get_image_features(pixels).positions
    first, (kept,) = int(strategy == "full"), torch.cat([visual.kept, visual.targets], 1).tolist()
    assert found.tokens[0].tolist() == [0, *(patch + first for patch in kept)]
    assert found.lengths == [PATCHES + first]


def test_compact_is_the_default_and_numbers_tokens() -> None:
    compact, model = build(reduction="visionzip"), original()
    row = make_row(compact, "ttItt")
    assert compact.config.positions == "compact"
    assert compact.model.get_image_features(row["pixel_values"]).positions is None
    with torch.no_grad():
        before, after = compact(**row).logits, model(**row).logits
        model.config.positions = "compact"
        try:
            assert torch.equal(model(**row).logits, before)
        finally:
            model.config.positions = "original"
    torch.testing.assert_close(before[:, :2], after[:, :2])
    assert (before[:, -1] - after[:, -1]).abs().max() > 1e-2


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("side", ["left", "none"])
def test_a_conversation_goes_on_in_its_cache(model: Any, side: str, static: bool) -> None:
    layouts = ["ttIt", "tttttIttI"] if side == "left" else ["ttIt"]
    turns = [make_row(model, layout, seed) for seed, layout in enumerate(layouts)]
    batch = make_batch(turns, "left")
    more = {"cache_implementation": "static", "max_cache_len": 64} if static else {}
    first = greedy(model, batch, 3, return_dict_in_generate=True, **more)
    # The second turn asks about another image; the last answered token is not in the cache yet.
    nexts = [make_row(model, "tItt", seed + 7) for seed in range(len(layouts))]
    ids = torch.cat([first.sequences, torch.cat([row["input_ids"] for row in nexts])], 1)
    mask = torch.cat([batch["attention_mask"], ids.new_ones(len(ids), ids.shape[1] - batch["input_ids"].shape[1])], 1)
    again = {
        "input_ids": ids,
        "attention_mask": mask,
        "past_key_values": first.past_key_values,
        "pixel_values": torch.cat([row["pixel_values"] for row in nexts]),
    }
    if not static:
        copied = greedy(model, {**again, "past_key_values": copy.deepcopy(first.past_key_values)}, 3)
    said = greedy(model, again, 3)
    pixels = batch["pixel_values"].split([layout.count("I") for layout in layouts])
    for row, own in enumerate(ids):
        whole = {
            "input_ids": own[mask[row].bool()][None],
            "pixel_values": torch.cat([pixels[row], nexts[row]["pixel_values"]]),
        }
        assert said[row, ids.shape[1] :].tolist() == expected_ids(model, whole, 3)
    assert static or torch.equal(copied, said)


def test_passes_go_on_in_a_cache(model: Any) -> None:
    """forward by hand, in three pieces; the second is text alone."""
    row = make_row(model, "ttIttttttIt", seed=2)
    ids, pixels = row["input_ids"], row["pixel_values"]
    with torch.no_grad():
        whole = model(**row).logits
        first = model(input_ids=ids[:, :9], pixel_values=pixels[:1])
        cache = first.past_key_values
        second = model(input_ids=ids[:, 9:12], past_key_values=cache)
        third = model(input_ids=ids[:, 12:], pixel_values=pixels[1:], past_key_values=cache, return_dict=False)
    pieces = torch.cat([first.logits, second.logits, third[0]], 1)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=5e-5)


@pytest.mark.parametrize("beams", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams(model: Any, beams: dict[str, int]) -> None:
    rows = [make_row(model, layout, seed) for seed, layout in enumerate(("ttItt", "tIttttItt"))]
    together = greedy(model, make_batch(rows, "left"), 4, **beams)
    each = together.view(2, -1, together.shape[1])
    for row, found in zip(rows, each, strict=True):
        alone = greedy(model, row, 4, **beams)
        assert torch.equal(alone[:, -4:], found[:, -4:])
    # Without a cache every pass computes all positions anew.
    assert torch.equal(greedy(model, make_batch(rows, "left"), 4, use_cache=False, **beams), together)


def test_settings_of_generation(model: Any) -> None:
    row = make_row(model, "ttIttItt", seed=9)
    expected = greedy(model, row, 6)
    assert torch.equal(greedy(model, row, 6, use_cache=False), expected)
    assert torch.equal(greedy(model, row, 6, prefill_chunk_size=5), expected)
    assert torch.equal(greedy(model, row, 6, cache_implementation="static"), expected)
    assert torch.equal(greedy(model, row, 6, prompt_lookup_num_tokens=2), expected)
    drawn = []
    for options in ({}, {"use_cache": False}):
        torch.manual_seed(0)
        drawn.append(greedy(model, row, 6, **{"do_sample": True, "num_return_sequences": 2, **options}))
    assert torch.equal(*drawn)


def test_assisted_decoding(model: Any) -> None:
    row = make_row(model, "ttItt", seed=9)
    expected = greedy(model, row, 6)
    assert torch.equal(greedy(model, row, 6, assistant_model=build(plain=True)), expected)


def test_embeddings(model: Any) -> None:
    row = make_row(model, "ttItItt", seed=4)
    expected = greedy(model, row)[:, row["input_ids"].shape[1] :]
    placeholders = {key: value for key, value in row.items() if key != "input_ids"}
    placeholders["inputs_embeds"] = model.get_input_embeddings()(row["input_ids"]).detach()
    assert torch.equal(greedy(model, placeholders), expected)
    merged, positions, _ = by_hand(model, row)
    with torch.no_grad():
        logits = model(inputs_embeds=merged, position_ids=positions).logits
    torch.testing.assert_close(logits, expected_logits(model, row), rtol=0, atol=5e-5)
    for call in (model, lambda **inputs: greedy(model, inputs)):
        with pytest.raises(ReductionError, match="positions: inputs_embeds do not say"):
            call(inputs_embeds=merged)
    text = make_row(model, "tttt")
    embeds, no_image = model.get_input_embeddings()(text["input_ids"]).detach(), torch.zeros(1, 4, dtype=torch.long)
    assert torch.equal(
        greedy(model, {"inputs_embeds": embeds, "mm_token_type_ids": no_image}), greedy(model, text)[:, 4:]
    )


@pytest.mark.parametrize("reduction", [{"shortv": {"layers": [0, 2]}}, {"fastv": {"layer": 2, "keep": 0.5}}])
def test_with_reductions_inside_the_language_model(reduction: dict[str, Any]) -> None:
    """With all patches in order they are what they are on plain LLaVA's tokens; fewer stay the same in every form."""
    everything = {"dominant": PATCHES, "contextual": 0, "method": "grid"}
    keys: dict[str, Any] = {"shortv": None, "fastv": None, **reduction}
    inside, model = build(**keys, visionzip=None), build(**keys, visionzip=everything, positions="original")
    row = make_row(inside, "tttItttItt", seed=1)
    with torch.no_grad():
        torch.testing.assert_close(model(**row).logits, inside(**row).logits, rtol=0, atol=1e-5)
    assert torch.equal(greedy(model, row), greedy(inside, row))
    both = build(**keys, visionzip=WAYS["visionzip"], positions="original")
    rows = [make_row(both, layout, seed) for seed, layout in enumerate(("ttItt", "tIttttItt"))]
    batch = make_batch(rows, "left")
    said = greedy(both, batch)
    assert torch.equal(greedy(both, batch, use_cache=False), said)
    for row, found in zip(rows, said, strict=True):
        assert torch.equal(greedy(both, row)[0, -5:], found[-5:])


def test_what_cannot_be_is_refused(model: Any) -> None:
    with pytest.raises(ReductionError, match=r"positions is 'kept'; it must be one of \['compact', 'original'\]"):
        build(reduction="visionzip", positions="kept")
    row = make_row(model, "ttItt")
    ids, features = row["input_ids"], build(reduction="visionzip").model.get_image_features(row["pixel_values"])
    with pytest.raises(ReductionError, match="mm_encoder_outputs do not say where"):
        model(input_ids=ids, mm_encoder_outputs={"image": features})
    flash = original()
    flash.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ReductionError, match="positions: attention 'flash_attention_2' takes positions with gaps"):
        flash(**row)
    with torch.no_grad():
        cache = model(**make_batch([row, row, row], "left")).past_key_values
        with pytest.raises(ReductionError, match="filled by 3 rows, and 2 go on with it"):
            model(input_ids=ids[:, -1:].expand(2, -1), past_key_values=cache)


def test_gradients_reach_the_projector_alike(model: Any) -> None:
    """bfloat16 too: positions are integers whatever the rest is."""
    everything = {"dominant": PATCHES, "contextual": 0, "method": "grid"}
    found = []
    for built in (build(plain=True), build(reduction="none", visionzip=everything, positions="original")):
        row = make_row(built if "Reduced" not in type(built).__name__ else build(plain=True), "ttItt")
        built(**row, labels=row["input_ids"].masked_fill(row["input_ids"] == IMAGE_TOKEN, -100)).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in built.model.multi_modal_projector.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    coarse = original(dtype=torch.bfloat16)
    row = make_row(coarse, "ttIttttItt")
    with torch.no_grad():
        torch.testing.assert_close(coarse(**row).logits, expected_logits(coarse, row), rtol=0, atol=0.05)
