"""The one object for what is reduced: made from a config and from a command's words, and what it says of itself."""

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from shortzip.reduction.errors import ReductionError
from shortzip.reduction.flops import llm_prefill_flops_fastv, llm_prefill_flops_grouped
from shortzip.reduction.reductions import Reductions

EVERY_FORM = [
    Reductions(),
    Reductions({"dominant": 5, "contextual": 3}, {"layers": [3, 1]}),
    Reductions({"dominant": 9, "contextual": 0, "method": "random", "seed": 4}),
    Reductions({"dominant": 4, "contextual": 0, "method": "grid"}, None, {"layer": 2, "keep": 0.25}),
    Reductions(fastv={"layer": 1, "keep": 0.5}),
    Reductions(fastv={"method": "pyramiddrop", "layers": [1, 3], "keep": [0.5, 0.125], "positions": "original"}),
    Reductions(fastv={"method": "sparsevlm+", "layers": [2, 6, 15], "keep": [66, 34, 20]}),
    Reductions({"dominant": 5, "contextual": 3}, {"layers": [3, 1]}, positions="original"),
]


@pytest.mark.parametrize("reductions", EVERY_FORM)
def test_config_keys_and_words_give_it_back(reductions: Reductions) -> None:
    assert Reductions.from_config({"model_type": "x", **reductions.as_config()}) == reductions
    words = (reductions.budget_words, reductions.layers_words, reductions.fastv_words)
    said = Reductions.parse(*words, method=reductions.method_words, positions=reductions.positions)
    assert {**said.as_config(), "shortv": None} == {**reductions.as_config(), "shortv": None}
    assert said.layers == sorted(reductions.layers)
    assert reductions.is_empty == (reductions == Reductions())
    inside = reductions.before_the_llm
    assert (inside.visionzip, inside.layers, inside.fastv) == (reductions.visionzip, [], None)


def test_where_no_token_is_left_out_all_stand_where_they_do() -> None:
    assert Reductions(shortv={"layers": [1]}, positions="original") == Reductions(shortv={"layers": [1]})
    with pytest.raises(ReductionError, match="positions is 'there'; it must be one of"):
        Reductions.parse("5+3", positions="there")


def test_a_release_that_knows_no_reductions_has_none() -> None:
    assert Reductions.from_config({"model_type": "llava"}).is_empty


@pytest.mark.parametrize(
    ("reductions", "words"),
    [
        (EVERY_FORM[0], "all visual tokens"),
        (EVERY_FORM[1], "5+3 visual tokens, 2 frozen layers"),
        (EVERY_FORM[2], "9+0 visual tokens (baseline random:seed=4)"),
        (EVERY_FORM[3], "4+0 visual tokens (baseline grid), FastV: 0.25 of them kept after layer 2"),
        (EVERY_FORM[4], "all visual tokens, FastV: 0.5 of them kept after layer 1"),
        (
            EVERY_FORM[5],
            "all visual tokens, PyramidDrop: 0.5, 0.125 of them kept before layers 1, 3, positions kept",
        ),
        (EVERY_FORM[6], "all visual tokens, SparseVLM+: 66, 34, 20 of them kept after layers 2, 6, 15"),
        (EVERY_FORM[7], "5+3 visual tokens, 2 frozen layers, original positions"),
    ],
)
def test_every_part_stands_in_its_words(reductions: Reductions, words: str) -> None:
    assert reductions.describe() == words


def test_parameters_left_unsaid_are_their_defaults() -> None:
    said = Reductions({"dominant": 8, "contextual": 0, "method": "scope"})
    assert said.visionzip == {"dominant": 8, "contextual": 0, "method": "scope", "alpha": 1.0}
    assert said == Reductions.parse("8+0", method="scope:alpha=1") != Reductions.parse("8+0", method="scope:alpha=2")
    assert Reductions({"dominant": 8, "contextual": 0, "method": "visionzip"}) == Reductions.parse("8+0")
    assert Reductions.parse("8+0", method="scope:alpha=2").describe() == "8+0 visual tokens (scope:alpha=2.0)"


@pytest.mark.parametrize(
    ("method", "looks"), [("visionzip", True), ("scope", True), ("divprune", False), ("pool", False)]
)
def test_a_tower_without_cls_is_said_where_attention_is_looked_at(method: str, looks: bool) -> None:
    reductions = Reductions.parse("9+0", method=method)
    siglip = {"vision_config": {"model_type": "siglip_vision_model"}}
    words = "siglip_vision_model has no CLS: patches are scored by the attention that they receive"
    assert reductions.in_place_of_cls(siglip) == (words if looks else None)
    assert reductions.in_place_of_cls({"vision_config": {"model_type": "clip_vision_model"}}) is None
    assert Reductions().in_place_of_cls(siglip) is None


def test_what_it_was_made_of_may_change_afterwards() -> None:
    budget, frozen = {"dominant": 5, "contextual": 3}, {"layers": [1]}
    reductions = Reductions(budget, frozen)
    budget["dominant"] = 6
    frozen["layers"].append(2)
    reductions.as_config()["shortv"]["layers"].append(3)
    assert reductions == Reductions.parse("5+3", "1")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"visionzip": {"dominant": 0, "contextual": 3}}, "dominant: 0"),
        ({"visionzip": {"dominant": 3, "contextual": 1, "method": "pool"}}, "pool merges nothing"),
        ({"shortv": {"layers": []}}, "set shortv to null"),
        ({"fastv": {"layer": 2, "keep": 1.5}}, "keep: 1.5"),
        ({"fastv": {"layer": 2, "keep": 0.5}, "shortv": {"layers": [1]}}, "one of them must be null"),
    ],
)
def test_what_no_model_can_take_is_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        Reductions.from_config(keys)


def test_tokens_and_flops_are_the_models() -> None:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=24, patch_size=4), text_config=LlamaConfig(num_hidden_layers=4)
    )
    assert Reductions().tokens_per_image(config) == 36
    assert Reductions.parse("5+3").tokens_per_image(config, tiles=2) == 16
    text = config.text_config
    assert Reductions.parse(layers="1").prefill_flops(text, 9, 16) == llm_prefill_flops_grouped(text, 9, 16, [1])
    assert Reductions.parse(fastv="1+0.5").prefill_flops(text, 9, 16) == llm_prefill_flops_fastv(text, 9, 16, 1, 0.5)
