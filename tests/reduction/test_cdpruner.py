"""CDPruner's relevance, its choice per image and question, and CLIP's text tower, against the authors' code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from shortzip.reduction.cdpruner import choose_for_question, cut_text, embed_patches_with_text, embed_text, relevance
from shortzip.reduction.dpp import scale_quality

GOLDEN = Path(__file__).parents[1] / "golden" / "selectors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("count", [7, 16])
def test_patches_are_chosen_as_the_authors_for_each_image(count: int, segments: int, dtype: torch.dtype) -> None:
    recorded = {name: part.to(dtype) if part.is_floating_point() else part for name, part in load("cdpruner").items()}
    images, texts = recorded["p64.image_embeds"], recorded[f"p64.text{segments}.text_embeds"]
    case = f"p64.text{segments}.n{count}"
    quality = scale_quality(relevance(images, texts))
    torch.testing.assert_close(quality, recorded[f"{case}.relevance_per_image"], rtol=0, atol=1e-5)
    chosen = choose_for_question(recorded["p64.projected"], images, texts, count)
    assert torch.equal(chosen, recorded[f"{case}.authors_per_image_order"])


def test_each_image_is_asked_its_own_question_of_any_length() -> None:
    recorded = load("cdpruner")
    images, projected = recorded["p64.image_embeds"], recorded["p64.projected"]
    short, long = recorded["p64.text1.text_embeds"], recorded["p64.text2.text_embeds"]
    texts = torch.stack([torch.cat([short, torch.full_like(short, 9.0)]), long])
    present = torch.tensor([[True, False], [True, True]])
    together = choose_for_question(projected, images, texts, 16, present)
    for image, case in enumerate(("text1", "text2")):
        assert torch.equal(together[image], recorded[f"p64.{case}.n16.authors_per_image_order"][image])


@pytest.fixture(scope="module")
def clip() -> tuple[dict[str, torch.Tensor], CLIPTextModelWithProjection]:
    recorded = load("cdpruner_clip")
    text_tower = CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=100,
            max_position_embeddings=77, projection_dim=24, hidden_act="quick_gelu",
        )
    ).eval()  # fmt: skip
    mark = "weights.text."
    weights = {name.removeprefix(mark): part.float() for name, part in recorded.items() if name.startswith(mark)}
    text_tower.load_state_dict(weights)
    return recorded, text_tower


@pytest.mark.parametrize(("case", "segments"), [("short", 1), ("long", 2)])
def test_clip_s_text_tower_reads_a_question_as_the_authors_code(clip, case: str, segments: int) -> None:
    recorded, text_tower = clip
    ids, mask = cut_text(recorded[f"{case}.input_ids"][0].tolist(), 77)
    assert ids.shape == mask.shape == (segments, 77)
    assert mask.sum() == recorded[f"{case}.input_ids"].shape[1]
    embeds = embed_text(text_tower, ids, mask)
    torch.testing.assert_close(embeds, recorded[f"{case}.text_embeds"], rtol=0, atol=1e-5)

    vision = "weights.vision."
    layer_norm = torch.nn.LayerNorm(32, eps=1e-5)
    layer_norm.load_state_dict(
        {part: recorded[f"{vision}vision_model.post_layernorm.{part}"].float() for part in ("weight", "bias")}
    )
    projection = torch.nn.Linear(32, 24, bias=False)
    projection.load_state_dict({"weight": recorded[f"{vision}visual_projection.weight"].float()})
    images = embed_patches_with_text(recorded["features"], layer_norm, projection)
    torch.testing.assert_close(images, recorded["image_embeds"], rtol=0, atol=1e-5)
    chosen = choose_for_question(recorded["projected"], images, embeds, 16)
    assert torch.equal(chosen.sort(dim=-1).values, recorded[f"{case}.kept_sorted"])


def test_an_empty_question_is_one_empty_segment() -> None:
    ids, mask = cut_text([], 77)
    assert ids.shape == (1, 77)
    assert not mask.any()


def load(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")
