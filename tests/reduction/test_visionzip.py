"""VisionZip against the authors' outputs, against a plain reading of the paper and code, and at its edges."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reduced_models import build
from safetensors.torch import load_file

from shortzip.reduction import ReducedLlavaConfig, ReducedLlavaForConditionalGeneration
from shortzip.reduction.visionzip import VisionZip, merge_contextual, score_patches, select_dominant
from shortzip.reduction.visual_tokens import tokens_of_block

GOLDEN = Path(__file__).parents[1] / "golden" / "visionzip"
CASES = [(12, 4), (20, 1), (5, 3), (54, 10)]


@pytest.fixture(scope="module")
def golden():
    spec = json.loads((GOLDEN / "visionzip_tiny.json").read_text())
    model = ReducedLlavaForConditionalGeneration(
        ReducedLlavaConfig(
            vision_config=spec["config"],
            text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 10},
            image_token_index=9,
            visionzip={"dominant": 1, "contextual": 0},
        )
    ).eval()
    weights = load_file(GOLDEN / "visionzip_tiny_weights.safetensors")
    model.model.vision_tower.load_state_dict({k.removeprefix("vision_model."): v for k, v in weights.items()})
    return model, load_file(GOLDEN / "visionzip_tiny_io.safetensors")


def visual_tokens(model, pixel_values, dominant, contextual):
    model.config.visionzip = {"dominant": dominant, "contextual": contextual}
    with torch.no_grad():
        return model.model.get_visual_tokens(pixel_values)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("dominant", "contextual"), CASES, ids=[f"{d}+{c}" for d, c in CASES])
def test_kept_sets_and_outputs_equal_the_authors(golden, dominant, contextual, attention, record_property):
    model, expected = golden
    model.set_attn_implementation(attention)
    ours = visual_tokens(model, expected["pixel_values"], dominant, contextual)
    theirs = expected[f"idx_d{dominant}_c{contextual}"]
    assert [set(row) for row in (ours.kept + 1).tolist()] == [set(row) - {0} for row in theirs.tolist()]
    difference = (ours.tokens - expected[f"out_d{dominant}_c{contextual}"]).abs().max().item()
    record_property("difference", difference)
    assert difference <= 5e-5
    assert (ours.attention - expected["cls_attention_sum"]).abs().max() <= 5e-6


def test_images_alone_equal_images_together(golden):
    model, expected = golden
    together = visual_tokens(model, expected["pixel_values"], 12, 4)
    for index, image in enumerate(expected["pixel_values"]):
        alone = visual_tokens(model, image[None], 12, 4)
        assert torch.equal(alone.kept[0], together.kept[index])
        torch.testing.assert_close(alone.tokens[0], together.tokens[index], rtol=0, atol=1e-5)


def naive(hidden, queries, keys, scale, dominant, contextual, has_cls):
    """One image, in Python: the rules as the docstrings state them."""
    cls = int(has_cls)
    attention = ((queries * scale) @ keys.transpose(-1, -2)).softmax(-1)
    scores = attention.sum(0)[0, 1:] if has_cls else attention.mean(0).mean(0)
    patches = len(scores)
    kept = sorted(sorted(range(patches), key=lambda p: (-scores[p].item(), p))[: dominant - cls])
    rest = [p for p in range(patches) if p not in kept]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual] if contextual else []
    metric = torch.nn.functional.normalize(keys.mean(0)[cls:], dim=-1)
    assigned = {target: [] for target in targets}
    for p in rest:
        if targets and p not in targets:
            assigned[max(targets, key=lambda t, p=p: (metric[p] @ metric[t]).item())].append(p)
    tokens = [hidden[0]] if has_cls else []
    tokens += [hidden[cls + p] for p in kept]
    for target in targets:
        members = [hidden[cls + p] for p in assigned[target]]
        tokens.append(hidden[cls + target] + (torch.stack(members).mean(0) if members else 0))
    return torch.stack(tokens), kept, targets, assigned


def reduce_tokens(hidden, queries, keys, scale, dominant, contextual, has_cls):
    budget = {"dominant": dominant, "contextual": contextual}
    return tokens_of_block(hidden, queries, keys, scale, VisionZip(), budget, has_cls)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), side=st.integers(1, 6), heads=st.integers(1, 3), has_cls=st.booleans(), seed=st.integers(0, 99))
def test_any_grid_and_budget_equals_a_plain_reading(data, side, heads, has_cls, seed):
    cls, patches = int(has_cls), side * side
    dominant = data.draw(st.integers(1, patches + cls))
    contextual = data.draw(st.integers(0, patches + cls - dominant))
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, patches + cls, 5, generator=generator)
    keys = torch.randn(2, heads, patches + cls, 4, generator=generator)
    queries = torch.randn(2, heads, 1 if has_cls else patches, 4, generator=generator)
    ours = reduce_tokens(hidden, queries, keys, 0.5, dominant, contextual, has_cls)
    for image in range(2):
        tokens, kept, targets, assigned = naive(
            hidden[image], queries[image], keys[image], 0.5, dominant, contextual, has_cls
        )
        assert ours.kept[image].tolist() == kept
        assert ours.targets[image].tolist() == targets
        torch.testing.assert_close(ours.tokens[image], tokens, rtol=0, atol=1e-5)
        groups = [-1] * patches
        for place, target in enumerate(targets):
            for member in [target, *assigned[target]]:
                groups[member] = place
        assert ours.groups[image].tolist() == groups


def test_of_equal_scores_the_spatially_earlier_wins():
    scores = torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0, 2.0], [0.0] * 6])
    assert select_dominant(scores, 4).tolist() == [[0, 1, 3, 5], [0, 1, 2, 3]]
    assert select_dominant(torch.zeros(1, 1000), 10).tolist() == [list(range(10))]


def test_all_patches_dominant_keeps_every_token():
    hidden, keys = torch.randn(1, 10, 4), torch.randn(1, 2, 10, 3)
    result = reduce_tokens(hidden, keys[:, :, :1], keys, 1.0, 10, 0, True)
    assert torch.equal(result.tokens, hidden)
    assert result.groups.tolist() == [[-1] * 9]


def test_cls_alone_is_a_budget():
    hidden, keys = torch.randn(1, 10, 4), torch.randn(1, 2, 10, 3)
    assert torch.equal(reduce_tokens(hidden, keys[:, :, :1], keys, 1.0, 1, 0, True).tokens, hidden[:, :1])


@pytest.mark.parametrize("count", [-1, 10])
def test_a_count_that_the_patches_cannot_fill_is_refused(count):
    with pytest.raises(ValueError, match=f"cannot keep {count} dominant patches of 9: choose 0 to 9"):
        select_dominant(torch.zeros(1, 9), count)
    kept = torch.zeros(1, 0, dtype=torch.long)
    with pytest.raises(ValueError, match=f"into {count} contextual tokens: choose 0 to 9"):
        merge_contextual(torch.zeros(1, 9, 2), torch.zeros(1, 9, 2), kept, count)


def test_scores_do_not_depend_on_how_coarse_the_dtype_is():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 4, 65, 16, generator=generator).bfloat16()
    queries = torch.randn(2, 4, 1, 16, generator=generator).bfloat16()
    assert torch.equal(
        score_patches(queries, keys, 0.25, True), score_patches(queries.float(), keys.float(), 0.25, True)
    )


class Recorder:
    """What enters the blocks of a tower."""

    def __init__(self, tower):
        self.inputs = {}
        for index, block in enumerate(tower.encoder.layers):
            block.register_forward_pre_hook(
                lambda module, args, index=index: self.inputs.__setitem__(index, args[0].detach())
            )


@pytest.mark.parametrize("layer", [-1, -2, -3, 1, 2, 3])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_the_tower_runs_up_to_the_selected_layer_only(tower, layer):
    model = build(tower=tower, vision_feature_layer=layer)
    pixels = torch.randn(2, 3, 16, 16)
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    recorder = Recorder(model.model.vision_tower)
    reduced = model.model.get_visual_tokens(pixels)
    last = layer - 1 if layer > 0 else 3 + layer
    assert sorted(recorder.inputs) == list(range(last + 1))
    cls = int(tower == "clip")
    kept = hidden[layer].gather(1, (reduced.kept + cls).unsqueeze(-1).expand(-1, -1, 24))
    torch.testing.assert_close(reduced.tokens[:, cls : cls + kept.shape[1]], kept, rtol=0, atol=1e-5)
    if cls:
        torch.testing.assert_close(reduced.tokens[:, 0], hidden[layer][:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_scores_are_the_attention_of_the_selected_layer(tower):
    model = build(tower=tower, attention="eager")
    pixels = torch.randn(2, 3, 16, 16)
    attention = model.model.vision_tower(pixels, output_attentions=True).attentions[-2]
    expected = attention.sum(1)[:, 0, 1:] if tower == "clip" else attention.mean(1).mean(1)
    scores = model.model.get_visual_tokens(pixels).attention
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_coarse_dtypes_keep_what_float32_keeps_of_the_same_hidden_states(dtype, tower):
    coarse = build(tower=tower, dtype=dtype)
    recorder = Recorder(coarse.model.vision_tower)
    for seed in range(20):
        pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        kept = coarse.model.get_visual_tokens(pixels.to(dtype)).kept
        entering = recorder.inputs[1]
        fine = build(tower=tower, dtype=dtype).float()
        fine.model.vision_tower.encoder.layers[0].register_forward_hook(lambda *_, states=entering: states.float())
        assert torch.equal(fine.model.get_visual_tokens(pixels.float()).kept, kept)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(fine.model.get_visual_tokens(pixels.float()).kept, kept)


@pytest.mark.parametrize(
    ("dtype", "margin"), [(torch.bfloat16, 0.15), (torch.float16, 0.03)], ids=["bf16 margin 15%", "fp16 margin 3%"]
)
def test_end_to_end_only_tokens_within_the_margin_swap(golden, dtype, margin, record_property):
    """A patch may swap if its float32 score is within the margin of the lowest kept or highest left score."""
    model, expected = golden
    generator = torch.Generator().manual_seed(0)
    pixels = torch.cat([expected["pixel_values"], torch.randn(61, 3, 112, 112, generator=generator)])
    fine = visual_tokens(model, pixels, 20, 4)
    coarse_model = ReducedLlavaForConditionalGeneration(model.config).to(dtype).eval()
    coarse_model.load_state_dict(model.state_dict())
    coarse = visual_tokens(coarse_model, pixels.to(dtype), 20, 4)
    overlap = 0
    for ours, theirs, scores in zip(coarse.kept.tolist(), fine.kept.tolist(), fine.attention, strict=True):
        overlap += len(set(ours) & set(theirs))
        lowest_kept = scores[theirs].min()
        highest_left = scores[[patch for patch in range(64) if patch not in theirs]].max()
        for patch in set(ours) - set(theirs):
            assert scores[patch] >= lowest_kept * (1 - margin)
        for patch in set(theirs) - set(ours):
            assert scores[patch] <= highest_left * (1 + margin)
    share = overlap / coarse.kept.numel()
    print(f"{dtype}: {share:.1%} of the dominant patches are those of float32")
    record_property("overlap", share)
    assert share > 0.95
