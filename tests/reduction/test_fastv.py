"""FastV against its definition: run to layer K, look at the last token's attention, drop, run on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import IMAGE_SIZE, LLM_LAYERS, PATCHES, build_tokenizer
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from shortzip.reduction import ReducedLlavaForConditionalGeneration
from shortzip.reduction.configuration_reduced_llava import validate_fastv
from shortzip.reduction.flops import llm_prefill_flops_fastv, llm_prefill_flops_grouped

IMAGE = build_tokenizer().convert_tokens_to_ids("<image>")
TEXT = 40  # an ordinary token id


def load(folder: Path, layer: int = 2, keep: float = 0.25, **more: Any) -> Any:
    return ReducedLlavaForConditionalGeneration.from_pretrained(
        folder, fastv={"layer": layer, "keep": keep}, **more
    ).eval()


def prompt(before: int, after: int, seed: int, image: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(10, 150, (before + after,), generator=generator)
    ids = torch.cat([text[:before], torch.full((PATCHES * image,), IMAGE), text[before:]])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if image:
        inputs["pixel_values"] = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return inputs


@torch.no_grad()
def by_definition(folder: Path, inputs: dict[str, Tensor], layer: int, keep: float) -> Tensor:
    """Logits [V] of the last token: the tokens that are dropped are really gone from the sequence."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    ids = inputs["input_ids"]
    features = model.model.get_image_features(inputs["pixel_values"]).pooler_output
    embeds = model.get_input_embeddings()(ids)
    embeds[ids == IMAGE] = torch.cat(list(features))
    decoder = model.model.language_model
    attention = decoder(inputs_embeds=embeds, output_attentions=True).attentions[layer - 1]
    paid = attention[0].mean(0)[-1]
    visual = (ids[0] == IMAGE).nonzero().flatten()
    best = visual[paid[visual].topk(round(len(visual) * keep)).indices]
    left = torch.cat([(ids[0] != IMAGE).nonzero().flatten(), best]).sort().values

    def run(hidden: Tensor, places: Tensor, layers: Any) -> Tensor:
        angles = decoder.rotary_emb(hidden, places[None])
        blocked = torch.full((len(places), len(places)), float("-inf")).triu(1)[None, None]
        for block in layers:
            hidden = block(hidden, attention_mask=blocked, position_embeddings=angles, position_ids=places[None])
        return hidden

    hidden = run(embeds, torch.arange(ids.shape[1]), decoder.layers[:layer])
    hidden = run(hidden[:, left], left, decoder.layers[layer:])
    return model.lm_head(decoder.norm(hidden[0, -1]))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("layer", "keep"), [(1, 0.25), (2, 0.5), (3, 0.1)])
def test_it_is_pruning(tiny_release: Path, attention: str, layer: int, keep: float) -> None:
    inputs = prompt(5, 7, seed=layer)
    model = load(tiny_release, layer, keep, attn_implementation=attention)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    torch.testing.assert_close(logits, by_definition(tiny_release, inputs, layer, keep), rtol=1e-4, atol=1e-4)


def test_keeping_everything_is_plain(tiny_release: Path) -> None:
    inputs = prompt(5, 7, seed=0)
    plain = ReducedLlavaForConditionalGeneration.from_pretrained(tiny_release).eval()
    with torch.no_grad():
        torch.testing.assert_close(load(tiny_release, keep=1.0)(**inputs).logits, plain(**inputs).logits)
        text = prompt(4, 4, seed=1, image=False)
        torch.testing.assert_close(load(tiny_release)(**text).logits, plain(**text).logits)


def test_a_padded_batch_is_its_rows(tiny_release: Path) -> None:
    model = load(tiny_release)
    rows = [prompt(5, 7, seed=0), prompt(2, 3, seed=1), prompt(6, 2, seed=2, image=False)]
    length = max(row["input_ids"].shape[1] for row in rows)
    for side in ("left", "right"):
        batch = {
            key: torch.cat(
                [
                    torch.nn.functional.pad(
                        row[key],
                        (length - row[key].shape[1], 0) if side == "left" else (0, length - row[key].shape[1]),
                    )
                    for row in rows
                ]
            )
            for key in ("input_ids", "attention_mask")
        }
        batch["pixel_values"] = torch.cat([row["pixel_values"] for row in rows if "pixel_values" in row])
        with torch.no_grad():
            together = model(**batch).logits
            for row, logits, mask in zip(rows, together, batch["attention_mask"], strict=True):
                torch.testing.assert_close(logits[mask.bool()][-1], model(**row).logits[0, -1], rtol=1e-4, atol=1e-4)


def test_the_last_position_is_exact_in_bfloat16(tiny_release: Path) -> None:
    """Of 260 positions bfloat16 knows 258 and 260: neither is the last, and one is none."""
    model, inputs = load(tiny_release, dtype=torch.bfloat16), prompt(100, 160 - PATCHES, seed=5)
    del inputs["attention_mask"]
    query = torch.tensor([inputs["input_ids"].shape[1] - 1])
    assert query == 259
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**inputs, fastv_query=query).logits)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_remembers_what_was_pruned(tiny_release: Path, beams: int) -> None:
    model = load(tiny_release)
    inputs = prompt(5, 7, seed=4)
    start = inputs["input_ids"].shape[1]
    said = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=beams)
    whole = {**inputs, "input_ids": said, "attention_mask": torch.ones_like(said)}
    with torch.no_grad():
        logits = model(**whole, fastv_query=torch.tensor([start - 1])).logits
    log = logits[0, start - 1 : -1].log_softmax(-1)
    if beams == 1:
        banned = log.clone()
        banned[:, model.generation_config.eos_token_id] = -torch.inf
        assert torch.equal(banned.argmax(-1), said[0, start:])
    else:
        scored = model.generate(
            **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=beams,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        mean = log.gather(1, said[0, start:, None]).mean()
        torch.testing.assert_close(scored.sequences_scores[0], mean, rtol=1e-4, atol=1e-4)


def test_answers_behind_the_prompt_do_not_choose(tiny_release: Path) -> None:
    model = load(tiny_release)
    inputs = prompt(5, 7, seed=6)
    end = inputs["input_ids"].shape[1] - 1
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.full((1, 4), TEXT)], dim=1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    with torch.no_grad():
        alone = model(**inputs).logits[0, -1]
        guided = model(**longer, fastv_query=torch.tensor([end])).logits[0, end]
    torch.testing.assert_close(guided, alone, rtol=1e-4, atol=1e-4)


def test_the_projector_learns_through_it(tiny_release: Path) -> None:
    model = load(tiny_release)
    inputs = prompt(5, 7, seed=0)
    model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)).loss.backward()
    gradient = model.model.multi_modal_projector.linear_1.weight.grad
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


def test_it_costs_what_is_left(tiny_release: Path) -> None:
    config = load(tiny_release).config.text_config
    full = llm_prefill_flops_grouped(config, 12, 36)
    assert llm_prefill_flops_fastv(config, 12, 36, layer=2, keep=1.0) == full
    assert llm_prefill_flops_fastv(config, 12, 36, 2, 0.25) == (full + llm_prefill_flops_grouped(config, 12, 9)) // 2


@pytest.mark.parametrize(
    ("fastv", "message"),
    [
        ({"layer": 2}, "fastv must be null or"),
        ({"layer": 0, "keep": 0.5}, "at least 1 is needed"),
        ({"layer": 2, "keep": 0}, "above 0"),
        ({"layer": 2, "keep": 1.5}, "at most 1"),
        ({"layer": True, "keep": 0.5}, "layer: True"),
        (3, "got 3"),
    ],
)
def test_bad_keys_are_refused(fastv: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_fastv(fastv)


def test_what_the_model_cannot_do_is_refused(tiny_release: Path) -> None:
    with pytest.raises(ValueError, match=f"choose 1 to {LLM_LAYERS - 1}"):
        load(tiny_release, layer=LLM_LAYERS)
    with pytest.raises(ValueError, match="fastv and shortv are both given"):
        load(tiny_release, shortv={"layers": [1]})
