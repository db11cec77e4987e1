"""Renumbered and original positions against transformers' Llama with positions written out: logits and greedy ids."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shortzip.reduction import ReducedLlavaConfig, ReducedLlavaForConditionalGeneration
from shortzip.reduction.positions import ImagePositions, PlacedFeatures

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "selectors_positions" / "positions.safetensors")
PATCHES, IMAGE = 64, 64  # one more token than theirs: the placeholder
MODES = {"renumbered": "compact", "original": "original"}


def build(count: int, positions: str) -> Any:
    config = ReducedLlavaConfig(
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
            "num_attention_heads": 1, "image_size": 32, "patch_size": 4,
        },
        text_config={
            "model_type": "llama", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 8,
            "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 65, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        },
        image_token_index=IMAGE,
        visionzip={"dominant": count, "contextual": 0, "method": "random"},
        positions=positions,
        attn_implementation="eager",
    )  # fmt: skip
    model = ReducedLlavaForConditionalGeneration(config).eval()
    weights = {name.removeprefix("weights."): tensor.float() for name, tensor in GOLDEN.items() if "weights." in name}
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        weights[name] = torch.cat([weights[name], torch.full((1, 48), -1.0)])
    model.lm_head.load_state_dict({"weight": weights.pop("lm_head.weight")})
    model.model.language_model.load_state_dict({name.removeprefix("model."): found for name, found in weights.items()})
    return model


def inputs_of(model: Any, count: int) -> dict[str, Any]:
    """The prompts with a placeholder for each kept patch, and the kept patches as the features of the images."""
    kept, rows, features = GOLDEN[f"n{count}.kept"].sort(dim=1).values, [], []
    placeholder = model.get_input_embeddings().weight[IMAGE].detach().expand(count, -1)
    for embeds, start, chosen in zip(GOLDEN["inputs_embeds"], GOLDEN["image_start"].tolist(), kept, strict=True):
        rows.append(torch.cat([embeds[:start], placeholder, embeds[start + PATCHES :]]))
        features.append(embeds[start + chosen])
    images = PlacedFeatures(pooler_output=features, positions=ImagePositions(list(kept), [PATCHES] * 2))  # type: ignore[arg-type]  # transformers' own is a list
    return {"inputs_embeds": torch.stack(rows), "mm_encoder_outputs": {"image": images}}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [16, 7])
def test_logits_and_greedy_ids(count: int, mode: str) -> None:
    model, seen = build(count, MODES[mode]), []

    def note(_: Any, __: Any, keys: dict[str, Tensor]) -> None:
        seen.append(keys["position_ids"])

    model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    settings = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE]}
    found = model.generate(**inputs_of(model, count), **settings, return_dict_in_generate=True, output_logits=True)
    logits = torch.stack(found.logits, dim=1)[..., :IMAGE]
    torch.testing.assert_close(logits[:, 0], GOLDEN[f"n{count}.{mode}.logits_last"], rtol=0, atol=5e-5)
    assert found.sequences[:, -6:].tolist() == GOLDEN[f"n{count}.{mode}.greedy_ids"].tolist()
    for row in range(2 if mode == "original" else 0):
        assert seen[0][row].tolist() == GOLDEN[f"n{count}.original.position_ids.{row}"].tolist()
        assert [int(ids[row]) for ids in seen[1:]] == [83, 84, 85, 86, 87]
    with torch.no_grad():
        last = model(**inputs_of(model, count)).logits[:, -1, :IMAGE]
    torch.testing.assert_close(last, logits[:, 0], rtol=0, atol=5e-5)
