"""Pruning inside the language model by every method: batches, caches, turns, gradients; or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reduced_models import IMAGE_TOKEN, PAD, build, make_batch, make_row, rows_of
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from shortzip.reduction.configuration_pruning import validate_fastv
from shortzip.reduction.flops import (
    llm_prefill_flops_grouped,
    llm_prefill_flops_pruned,
    visual_tokens_by_layer,
)
from shortzip.reduction.sparsevlm import merge
from shortzip.train.step.objective import fastv_query, recompute_layers

PYRAMID = {"method": "pyramiddrop", "layers": [1, 2, 3], "keep": [0.5, 0.3, 0.2]}
METHODS: dict[str, dict[str, Any]] = {
    "fastv": {"layer": 2, "keep": 0.3},
    "pyramiddrop": PYRAMID,
    "pyramiddrop original": {**PYRAMID, "positions": "original"},
    "sparsevlm": {"method": "sparsevlm", "layers": [0, 2], "keep": [9, 4]},
    "sparsevlm+": {"method": "sparsevlm+", "layers": [0, 2], "keep": [9, 4]},
}
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def pruning(name: str, decoder: str = "llama", **more: Any) -> Any:
    return build(decoder, reduction="none", fastv=METHODS[name], **more)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_padded_batch_is_its_rows(name: str) -> None:
    for attention in ("sdpa", "eager"):
        model = pruning(name, attention=attention)
        layouts = ["ttItttt", "tIttItt", "tttt", "IIt"]
        rows = [make_row(model, layout, seed=number) for number, layout in enumerate(layouts)]
        for side in ("left", "right"):
            batch = make_batch(rows, side)
            with torch.no_grad():
                together = rows_of(model(**batch).logits, batch)
                for row, logits in zip(rows, together, strict=True):
                    text = row["input_ids"][0] != IMAGE_TOKEN  # of visual tokens only those are computed that are left
                    close(logits[text], model(**row).logits[0, text])


@pytest.mark.parametrize("name", METHODS)
def test_later_turns_see_what_was_left(name: str) -> None:
    """In a cache, of either kind, as in one pass that is ranked by the end of the first turn."""
    model = pruning(name)
    first = make_batch([make_row(model, "ttIttt", seed=1), make_row(model, "tItt", seed=2)], "left")
    length = first["input_ids"].shape[1]
    later = torch.randint(3, IMAGE_TOKEN, (2, 4), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([first["input_ids"], later], dim=1)
    mask = torch.cat([first["attention_mask"], torch.ones(2, 4, dtype=torch.long)], dim=1)
    whole = {"input_ids": ids, "attention_mask": mask, "pixel_values": first["pixel_values"]}
    with torch.no_grad():
        expected = model(**whole, fastv_query=torch.tensor([length - 1] * 2)).logits[:, length:]
        for cache in (DynamicCache(config=model.config.text_config), StaticCache(model.config.text_config, 40)):
            model(**first, past_key_values=cache)
            for start, end in ((0, 1), (1, 4)):  # a token, then several
                seen = {"attention_mask": mask[:, : length + end], "past_key_values": cache}
                close(model(input_ids=later[:, start:end], **seen).logits, expected[:, start:end])


@torch.no_grad()
def by_definition(plain: Any, turns: list[dict[str, Tensor]], stages: list[int], keep: list[float]) -> list[Tensor]:
    """PyramidDrop where what is dropped is really gone: of every turn the logits [V] of its last token."""
    decoder, cache, found = plain.model.language_model, DynamicCache(), []
    for turn in turns:
        visual, states = turn["input_ids"][0] == IMAGE_TOKEN, plain.get_input_embeddings()(turn["input_ids"])
        if "pixel_values" in turn:
            states[0, visual] = torch.cat(list(plain.model.get_image_features(turn["pixel_values"]).pooler_output))
        there = int(visual.sum())
        for number, layer in enumerate(decoder.layers):
            if number in stages and there:
                paid = attention_of_last(decoder, layer, states)
                places = visual.nonzero()[:, 0]
                best = places[paid[places].topk(int(there * keep[stages.index(number)])).indices]
                left = torch.cat([(~visual).nonzero()[:, 0], best]).sort().values
                states, visual = states[:, left], visual[left]
            past, count = cache.get_seq_length(number), states.shape[1]
            angles = decoder.rotary_emb(states, torch.arange(past, past + count)[None])
            blocked = torch.full((count, past + count), float("-inf")).triu(past + 1)[None, None]
            states = layer(states, attention_mask=blocked, position_embeddings=angles, past_key_values=cache)
        found.append(plain.lm_head(decoder.norm(states[0, -1])))
    return found


def attention_of_last(decoder: Any, layer: Any, states: Tensor) -> Tensor:
    """[L], mean over heads."""
    attention, normed = layer.self_attn, layer.input_layernorm(states)
    angles = decoder.rotary_emb(states, torch.arange(states.shape[1])[None])
    parts = (attention.q_proj(normed), attention.k_proj(normed))
    queries, keys = apply_rotary_pos_emb(
        *(part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for part in parts), *angles
    )
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    return (queries[0, :, -1:] @ keys[0].transpose(1, 2) * attention.scaling).softmax(-1)[:, 0].mean(0)


@pytest.mark.parametrize("decoder", ["llama", "qwen2"])
def test_turns_with_images_of_their_own_are_pyramiddrops(decoder: str) -> None:
    model = pruning("pyramiddrop", decoder)
    turns = [make_row(model, layout, seed=number) for number, layout in enumerate(("tttItt", "tt", "tItt", "t"))]
    expected = by_definition(build(decoder, plain=True), turns, PYRAMID["layers"], PYRAMID["keep"])
    for cache in (DynamicCache(config=model.config.text_config), StaticCache(model.config.text_config, 60)):
        for turn, logits in zip(turns, expected, strict=True):
            given = {key: value for key, value in turn.items() if key != "attention_mask"}
            with torch.no_grad():
                close(model(**given, past_key_values=cache).logits[0, -1], logits)


@pytest.mark.parametrize("name", ["pyramiddrop", "sparsevlm", "sparsevlm+"])
@pytest.mark.parametrize("beams", [1, 3])
def test_it_generates_the_same_with_every_cache(name: str, beams: int) -> None:
    model = pruning(name)
    inputs = make_batch([make_row(model, "ttItttt", seed=1), make_row(model, "tIttt", seed=2)], "left")
    with torch.no_grad():
        expected = model.generate(**inputs, **GREEDY, num_beams=beams)
        for way in ({"use_cache": False}, {"cache_implementation": "static"}):
            assert torch.equal(model.generate(**inputs, **GREEDY, num_beams=beams, **way), expected)
    assert len({tuple(row) for row in expected[:, -5:].tolist()}) == 2


@pytest.mark.parametrize("name", ["pyramiddrop", "sparsevlm", "sparsevlm+"])
@torch.no_grad()
def test_tiles_are_pruned_together(name: str) -> None:
    model, sizes = pruning(name, next_=True), torch.tensor([[32, 16], [16, 32]])
    pixels = torch.randn(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    counts = model.model._token_counts(pixels, sizes.tolist(), None)
    rows = [[5, 6, *[IMAGE_TOKEN] * counts[0], 7, 8, 9], [5, *[IMAGE_TOKEN] * counts[1], 11]]
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": pixels, "image_sizes": sizes}
    together = model(**inputs).logits[:, -1]
    for number, row in enumerate(rows):
        image = {"pixel_values": pixels[number : number + 1], "image_sizes": sizes[number : number + 1]}
        close(together[number], model(input_ids=torch.tensor([row]), **image).logits[0, -1])
    assert torch.equal(model.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY, use_cache=False))


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_leaves_as_many(name: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model, stages = pruning(name, dtype=dtype), []
        model.model.language_model.layers[-1].register_forward_hook(
            lambda module, args, kwargs, output, stages=stages: stages.append(kwargs["fastv"].stages), with_kwargs=True
        )
        with torch.no_grad():
            logits = model(**make_row(model, "ttIttttt", seed=1)).logits
        assert logits.dtype == dtype
        assert logits.isfinite().all()
        assert int(stages[0][len(stages[0])].left.sum()) - 7 == visual_tokens_by_layer(METHODS[name], 16, 4)[-1]


@pytest.mark.parametrize("name", METHODS)
def test_layers_that_are_computed_again_find_their_own_stage(name: str) -> None:
    model = pruning(name).requires_grad_(False)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    batch = make_batch([make_row(model, "ttIttttt", seed=1), make_row(model, "tIttt", seed=2)], "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :20] = labels[:, 22] = -100  # two spans in the first row
    gradients = []
    for again in (False, True):
        recompute_layers(model, again)
        model(**batch, labels=labels, **fastv_query(model, labels)).loss.backward()
        gradients.append([weight.grad.clone() for weight in projector.parameters()])
        model.zero_grad()
    for once, twice in zip(*gradients, strict=True):
        assert torch.equal(once, twice)
        assert once.abs().sum() > 0


def test_pyramiddrop_is_ranked_by_every_span_in_training() -> None:
    model = pruning("pyramiddrop")
    labels = torch.tensor([[-100, -100, 7, 8, -100, 9, -100], [5, -100, -100, -100, -100, -100, 3], [-100] * 7])
    assert fastv_query(model, labels)["fastv_query"].tolist() == [[1, 4], [5, -1], [-1, -1]]
    assert fastv_query(pruning("sparsevlm"), labels)["fastv_query"].tolist() == [1, 0, 6]


def test_merging_is_the_same_for_every_seed_and_the_lowest_index_wins() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(26, 8, generator=generator)
    distances = torch.cdist(tokens, tokens) / 8**0.5
    density = [float((-row.sort().values[:3].square().mean()).exp()) for row in distances]
    score = []
    for number, row in enumerate(distances):
        denser = [
            float(row[other]) for other in range(26)
            if (density[other], -other) > (density[number], -number)
        ]  # fmt: skip
        score.append(density[number] * min(denser, default=float(distances.max())))
    centres = sorted(range(26), key=lambda number: -score[number])[:3]
    members = [min(range(3), key=lambda centre: float(row[centres[centre]])) for row in distances]
    means = [tokens[[number for number in range(26) if members[number] == centre]].mean(0) for centre in range(3)]
    torch.testing.assert_close(merge(tokens, 3), torch.stack(means), rtol=1e-5, atol=1e-5)
    pairs = torch.tensor([[0.0], [0.1], [5.0], [5.1]])  # mutual neighbours: their densities are equal
    torch.testing.assert_close(merge(pairs, 2), torch.tensor([[0.05], [5.05]]), rtol=1e-4, atol=1e-4)


def test_the_estimate_counts_what_every_layer_sees() -> None:
    assert visual_tokens_by_layer(METHODS["fastv"], 16, 4) == [16, 16, 5, 5]
    assert visual_tokens_by_layer(PYRAMID, 16, 4) == [16, 8, 4, 3]
    assert visual_tokens_by_layer(METHODS["sparsevlm"], 16, 4) == [16, 10, 10, 5]
    assert visual_tokens_by_layer(METHODS["sparsevlm+"], 16, 4) == [16, 9, 9, 4]
    assert visual_tokens_by_layer(METHODS["sparsevlm"], 0, 4) == [0] * 4
    text = build().config.text_config
    parts = [llm_prefill_flops_grouped(text, 7, visual) for visual in (16, 8, 4, 3)]
    assert llm_prefill_flops_pruned(text, 7, 16, PYRAMID) * 4 == sum(parts)
    defaults = {"method": "pyramiddrop", "layers": [8, 16, 24], "keep": [0.5, 0.25, 0.125]}
    assert sum(visual_tokens_by_layer(defaults, 576, 32)) / 32 == 270  # as the paper says
    listed = {"method": "sparsevlm", "layers": [2, 6, 15], "keep": [300, 200, 110]}
    assert round(sum(visual_tokens_by_layer(listed, 576, 32)) / 32, 1) == 206.5


@pytest.mark.parametrize("name", METHODS)
def test_what_is_left_is_what_the_estimate_counts(name: str) -> None:
    model, stages = pruning(name), []
    model.model.language_model.layers[-1].register_forward_hook(
        lambda module, args, kwargs, output: stages.append(kwargs["fastv"].stages), with_kwargs=True
    )
    row = make_row(model, "ttIttttt", seed=1)
    with torch.no_grad():
        model(**row)
    left = [int(stage.left.sum()) - 7 for stage in stages[0].values()]
    assert [16, *left] == list(dict.fromkeys(visual_tokens_by_layer(METHODS[name], 16, 4)))


@pytest.mark.parametrize(
    ("fastv", "message"),
    [
        ({"method": "dart", "layers": [1], "keep": [1]}, r"method is 'dart'; it must be one of \['fastv', 'pyra"),
        ({"method": "pyramiddrop", "layers": [2]}, "method pyramiddrop takes .* got {'method'"),
        ({"method": "pyramiddrop", "layers": [0], "keep": [0.5]}, r"from 1, ascending.* got layers: \[0\]"),
        ({"method": "pyramiddrop", "layers": [2, 2], "keep": [0.5, 0.2]}, r"got layers: \[2, 2\], .* ascending"),
        ({"method": "pyramiddrop", "layers": [], "keep": []}, r"got layers: \[\]"),
        ({"method": "pyramiddrop", "layers": [1, 2], "keep": [0.5]}, r"got keep: \[0.5\] for layers \[1, 2\]"),
        ({"method": "pyramiddrop", "layers": [1, 2], "keep": [0.2, 0.5]}, "not rising"),
        ({"method": "pyramiddrop", "layers": [1], "keep": [66]}, r"got keep: \[66\]"),
        ({**PYRAMID, "positions": "kept"}, "got positions: 'kept'"),
        ({"method": "sparsevlm", "layers": [1], "keep": [0.5]}, r"method sparsevlm takes .* got keep: \[0.5\]"),
        ({**METHODS["sparsevlm+"], "positions": "original"}, r"method sparsevlm\+ takes"),
        ({"method": "pyramiddrop", "layer": 2, "keep": 0.5}, "method pyramiddrop takes"),
    ],
)  # fmt: skip
def test_bad_keys_are_refused(fastv: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_fastv(fastv)


def test_what_a_model_cannot_do_is_refused() -> None:
    for name in ("pyramiddrop", "sparsevlm"):
        with pytest.raises(
            ValueError, match=r"renumbers positions.*sees the last 6 positions only.*choose (pos|method)"
        ):
            pruning(name, "mistral-window")
    for name in ("pyramiddrop original", "sparsevlm+"):
        pruning(name, "mistral-window")
    deep = {**PYRAMID, "layers": [1, 2, 4]}
    with pytest.raises(ValueError, match=r"layers \[4\]: this model has layers 0 to 3, .*choose from 1 to 3"):
        build(reduction="none", fastv=deep)
    with pytest.raises(ValueError, match=r"layers \[3\]: .*choose from 0 to 2"):
        build(reduction="none", fastv={"method": "sparsevlm", "layers": [3], "keep": [4]})
    with pytest.raises(ValueError, match="fastv and shortv are both given"):
        build(reduction="shortv", fastv=PYRAMID)
    model = pruning("pyramiddrop")
    with pytest.raises(ValueError, match="fastv: output_attentions is not available"):
        model(**make_row(model, "tIt"), output_attentions=True)
    with pytest.raises(ValueError, match="fastv: prefill_chunk_size is 4"):
        model.generate(**make_row(model, "tIt"), prefill_chunk_size=4)
