"""FastV under every way to generate: as with the dynamic cache in one pass, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reduced_models import build, make_batch, make_row
from torch import Tensor
from transformers import DynamicCache, StaticCache

FASTV = {"layer": 2, "keep": 0.3}
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def pruning(decoder: str = "llama", **more: Any) -> Any:
    return build(decoder, reduction="none", fastv=FASTV, **more)


def two_rows(model: Any) -> dict[str, Tensor]:
    return make_batch([make_row(model, "ttItttt", seed=1), make_row(model, "tIttt", seed=2)], "left")


@pytest.mark.parametrize("decoder", ["llama", "mistral-window", "qwen2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_static_cache_gives_the_logits_of_a_dynamic_one(decoder: str, attention: str) -> None:
    model = pruning(decoder, attention=attention)
    row = make_row(model, "tttItt", seed=3)
    unmasked = {key: value for key, value in row.items() if key != "attention_mask"}
    for inputs in (two_rows(model), unmasked, row):
        static = StaticCache(model.config.text_config, max_cache_len=60)
        dynamic = DynamicCache(config=model.config.text_config)
        said = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        compare(model, inputs, said, static, dynamic)
    second = make_row(model, "ttIt", seed=5)  # a turn with an image of its own, in the same caches
    second["attention_mask"] = torch.ones(1, row["input_ids"].shape[1] + second["input_ids"].shape[1])
    compare(model, second, torch.ones_like(second["input_ids"]).bool(), static, dynamic)


@torch.no_grad()
def compare(model: Any, inputs: dict[str, Tensor], said: Tensor, static: Any, dynamic: Any) -> None:
    expected = model(**inputs, past_key_values=dynamic).logits[said]
    torch.testing.assert_close(model(**inputs, past_key_values=static).logits[said], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("decoder", ["llama", "mistral-window"])
@pytest.mark.parametrize("how", ["static", "static beams", "no cache", "no cache beams", "prompt lookup", "assistant"])
def test_it_generates_the_same(decoder: str, how: str) -> None:
    model = pruning(decoder)
    inputs = make_row(model, "ttIttttt", seed=4) if how in ("prompt lookup", "assistant") else two_rows(model)
    beams = {"num_beams": 3} if "beams" in how else {}
    ways: dict[str, Any] = {
        "static": {"cache_implementation": "static"},
        "no cache": {"use_cache": False},
        "prompt lookup": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
        "assistant": {"assistant_model": build(decoder, plain=True, seed=0)},
    }
    with torch.no_grad():
        if how == "prompt lookup":  # let the text repeat itself, so that there are guesses
            inputs["input_ids"][:, -4:] = inputs["input_ids"][:, -5:-4]
        expected = model.generate(**inputs, **GREEDY, **beams)
        assert torch.equal(model.generate(**inputs, **GREEDY, **beams, **ways[how.removesuffix(" beams")]), expected)
    assert len({tuple(row) for row in expected[:, -6:].tolist()}) == len(expected)


def test_guesses_behind_the_prompt_do_not_rank() -> None:
    """Assisted decoding appends them before the first pass; what they attend to is not what the prompt's end does."""
    model = pruning()
    asked = []
    model.model.language_model.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs["fastv"].query.tolist()), with_kwargs=True
    )
    inputs = make_row(model, "ttIttttt", seed=4)
    end = inputs["input_ids"].shape[1] - 1
    with torch.no_grad():
        model.generate(**inputs, **GREEDY, assistant_model=build(plain=True, seed=0))
        assert asked[0] == [end]
        asked.clear()
        model.generate(**{**inputs, "use_cache": False}, **GREEDY)
        assert asked == [[end]] * 6
        asked.clear()
        padded = {key: torch.nn.functional.pad(inputs[key], (0, 3)) for key in ("input_ids", "attention_mask")}
        model.generate(**padded, pixel_values=inputs["pixel_values"], **GREEDY, use_cache=False)
        assert asked == [[end]] * 6


def test_what_it_cannot_be_is_refused_by_name() -> None:
    model = pruning()
    inputs = make_row(model, "ttItt")
    with pytest.raises(ValueError, match=r"fastv: prefill_chunk_size is 4, .* leave it out"):
        model.generate(**inputs, prefill_chunk_size=4)
    model.generation_config.prefill_chunk_size = 7
    with pytest.raises(ValueError, match=r"fastv: prefill_chunk_size is 7"):
        model.generate(**inputs)

    class Rounded(DynamicCache):
        def update(self, *args: Any, **kwargs: Any) -> Any:
            return tuple(part + 1e-3 for part in super().update(*args, **kwargs))

    with pytest.raises(ValueError, match=r"fastv: a Rounded may change the zeros"):
        model(**inputs, past_key_values=Rounded())
    cache = DynamicCache()
    cache.layers.append(object())
    with pytest.raises(ValueError, match=r"fastv: a object may change"):
        model(**inputs, past_key_values=cache)
    build(reduction="none")(**inputs, past_key_values=Rounded())
