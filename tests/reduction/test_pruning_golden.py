"""PyramidDrop and SparseVLM against what their authors' code computes (tests/golden/selectors_inside)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shortzip.reduction import ReducedLlavaConfig, ReducedLlavaForConditionalGeneration
from shortzip.train.step.objective import fastv_query

GOLDEN = Path(__file__).parents[1] / "golden" / "selectors_inside"
TOWER = {
    "model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 16, "patch_size": 4,
}  # fmt: skip
CASES = {case["case"]: case for case in json.loads((GOLDEN / "pyramiddrop.json").read_text())["cases"]}


@cache
def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")


def model_of(name: str, fastv: dict[str, Any], attention: str = "sdpa") -> Any:
    """The golden's language model in a LLaVA, for inputs whose visual tokens are embedded already."""
    facts, tensors = golden(name)
    text = {**facts["config"], "model_type": "llama", "bos_token_id": None, "eos_token_id": None}
    config = ReducedLlavaConfig(
        vision_config=TOWER, text_config=text, image_token_index=63, attn_implementation=attention, fastv=fastv
    )
    model: Any = ReducedLlavaForConditionalGeneration(config).eval()
    decoder = model.model.language_model
    weights = {key.removeprefix("weights."): value.float() for key, value in tensors.items() if "weights." in key}
    weights = {key.removeprefix("model."): value for key, value in weights.items()}
    weights.setdefault("embed_tokens.weight", decoder.embed_tokens.weight)
    model.lm_head.load_state_dict({"weight": weights.pop("lm_head.weight")})
    decoder.load_state_dict(weights)
    return model


def visual_of(name: str) -> Tensor:
    """[B, L] int64, 1 at visual tokens."""
    facts, tensors = golden(name)
    sequence, length = facts["sequence"], tensors["inputs_embeds"].shape[1]
    starts = torch.tensor(sequence["image_start"]).view(-1, 1)
    places = torch.arange(length)
    return ((places >= starts) & (places < starts + sequence["patches"])).long()


def watch(model: Any) -> list[Any]:
    """The stages of the model's next passes: of each pass, by number."""
    passes: list[Any] = []
    model.model.language_model.layers[-1].register_forward_hook(
        lambda module, args, kwargs, output: passes.append(kwargs["fastv"].stages), with_kwargs=True
    )
    return passes


def kept_of(stage: Any, visual: Tensor) -> list[list[int]]:
    """The patches that are left, of each row."""
    return [left[mask.bool()].nonzero()[:, 0].tolist() for left, mask in zip(stage.left, visual, strict=True)]


def pyramiddrop(case: str, **more: Any) -> dict[str, Any]:
    return {"method": "pyramiddrop", "layers": CASES[case]["stages"], "keep": CASES[case]["ratios"], **more}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_pyramiddrop_keeps_what_theirs_keeps(case: str, attention: str) -> None:
    _, tensors = golden("pyramiddrop")
    visual = visual_of("pyramiddrop")
    for positions in ("compact", "original"):
        prefix = case if positions == "compact" else f"{case}.keep_positions"
        model = model_of("pyramiddrop", pyramiddrop(case, positions=positions), attention)
        passes = watch(model)
        with torch.no_grad():
            logits = model(inputs_embeds=tensors["inputs_embeds"], mm_token_type_ids=visual).logits
        for stage in range(len(CASES[case]["stages"])):
            assert kept_of(passes[0][stage + 1], visual) == tensors[f"{prefix}.kept_stage{stage}"].tolist()
        torch.testing.assert_close(logits[:, -1], tensors[f"{prefix}.logits_last"], rtol=0, atol=5e-5)
        if positions == "compact":
            left = passes[0][len(CASES[case]["stages"])].left
            expected = tensors[f"{case}.logits_all"].flatten(0, 1)
            torch.testing.assert_close(logits[left], expected, rtol=0, atol=5e-5)


def test_pyramiddrop_generates_what_theirs_does() -> None:
    _, tensors = golden("pyramiddrop")
    model = model_of("pyramiddrop", pyramiddrop("s246"))
    inputs = {"inputs_embeds": tensors["inputs_embeds"][:1], "mm_token_type_ids": visual_of("pyramiddrop")[:1]}
    for cache_kind in ("dynamic", "static", None):
        found = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True,
            **({"use_cache": False} if cache_kind is None else {"cache_implementation": cache_kind}),
        )  # fmt: skip
        assert found.sequences[0].tolist() == tensors["generate.ids"].tolist()
        logits = torch.cat(found.logits)
        torch.testing.assert_close(logits, tensors["generate.logits"], rtol=0, atol=5e-5)


def test_pyramiddrops_loss_is_theirs() -> None:
    """Ranked by the positions before every supervised span."""
    _, tensors = golden("pyramiddrop")
    model, labels = model_of("pyramiddrop", pyramiddrop("s246")), tensors["train.labels"]
    passes, visual = watch(model), visual_of("pyramiddrop")
    query = fastv_query(model, labels)
    with torch.no_grad():
        found = model(inputs_embeds=tensors["inputs_embeds"], mm_token_type_ids=visual, labels=labels, **query)
    for stage in range(3):
        assert kept_of(passes[0][stage + 1], visual) == tensors[f"train.kept_stage{stage}"].tolist()
    left = passes[0][3].left
    assert torch.equal(labels[left], tensors["train.labels_after"].flatten())
    torch.testing.assert_close(found.loss, tensors["train.loss"][0], rtol=0, atol=1e-5)


def test_a_row_without_supervision_is_not_pruned_in_training() -> None:
    model, visual = model_of("pyramiddrop", pyramiddrop("s246")), visual_of("pyramiddrop")
    passes, labels = watch(model), golden("pyramiddrop")[1]["train.labels"].clone()
    labels[1] = -100
    query = fastv_query(model, labels)
    with torch.no_grad():
        model(inputs_embeds=golden("pyramiddrop")[1]["inputs_embeds"], mm_token_type_ids=visual, **query)
    assert [int(row.sum()) for row in passes[0][3].left] == [27, 83]


def followed(model: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of every stage of the model's next pass: the states [L, H] before, those after, and what is left [L]."""
    stages, method = [], model.model.language_model.layers[0].method
    choose = method.choose

    def recorded(stage: int, pruning: Any, ranking: Any, states: Tensor) -> tuple[Tensor, Tensor]:
        left, after = choose(stage, pruning, ranking, states)
        stages.append((states[0], after[0], left[0]))
        return left, after

    method.choose = recorded
    return stages


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("version", "method"), [("1_0", "sparsevlm"), ("2_0", "sparsevlm+")])
def test_sparsevlm_keeps_what_theirs_keeps(version: str, method: str, attention: str) -> None:
    facts, tensors = golden("sparsevlm")
    settings = {"method": method, "layers": facts["layers"], "keep": facts["keep_lists"]}
    model, visual = model_of("sparsevlm", settings, attention), visual_of("sparsevlm")
    stages = followed(model)
    with torch.no_grad():
        found = model(inputs_embeds=tensors["inputs_embeds"], mm_token_type_ids=visual).logits[:, -1]
    present, merged = dict(enumerate(visual[0].nonzero()[:, 0].tolist())), 144
    for stage, (before, after, left) in enumerate(stages):
        names: dict[int, int] = {}
        for place in (left & visual[0].bool()).nonzero()[:, 0].tolist():
            same = [name for name, old in present.items() if torch.equal(before[old], after[place])]
            names[same[0] if same else merged] = place
            merged += not same
        present = names
        assert list(present) == tensors[f"{version}.kept_stage{stage}"].tolist()
    torch.testing.assert_close(found, tensors[f"{version}.logits_last"], rtol=0, atol=5e-5)


def test_sparsevlms_raters_are_theirs() -> None:
    facts, tensors = golden("sparsevlm")
    model = model_of("sparsevlm", {"method": "sparsevlm", "layers": facts["layers"], "keep": facts["keep_lists"]})
    asked = []
    model.model.language_model.layers[2].register_forward_hook(
        lambda module, args, kwargs, output: asked.append(kwargs["fastv"].raters.positions), with_kwargs=True
    )
    with torch.no_grad():
        model(inputs_embeds=tensors["inputs_embeds"], mm_token_type_ids=visual_of("sparsevlm"))
    assert (asked[0][0] - 149).tolist() == tensors["1_0.raters"].tolist()
