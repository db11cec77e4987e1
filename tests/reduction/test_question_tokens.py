"""A reduced model is given the tokens that CDPruner chooses for each image's question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reduced_models import IMAGE_TOKEN, build
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from shortzip.reduction.cdpruner import choose_for_question, cut_text, embed_patches_with_text, embed_text
from shortzip.reduction.errors import ReductionError
from shortzip.reduction.question_tokens import QuestionReader

TEXT = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 60,
    "projection_dim": 12, "max_position_embeddings": 8, "bos_token_id": 58, "eos_token_id": 59, "pad_token_id": 0,
    "initializer_range": 1.0,
}  # fmt: skip
QUESTIONS = ["what is it", "is there anything at all that is red in the picture"]


def token_ids(text: str) -> list[int]:
    return [58, *(1 + len(word) for word in text.split()), 59]


@pytest.fixture(scope="module")
def reader() -> QuestionReader:
    torch.manual_seed(0)
    text_tower = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT)).eval()
    return QuestionReader("some/clip", text_tower, torch.nn.Linear(24, 12, bias=False), token_ids)


@pytest.fixture(scope="module")
def model() -> Any:
    return build(reduction="visionzip")


def test_each_image_keeps_what_its_question_asks_for(reader: QuestionReader, model: Any) -> None:
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    features = reader.image_features(model, pixels, QUESTIONS)
    tower = model.model.vision_tower
    for image, question in enumerate(QUESTIONS):
        patches = tower(pixels[image : image + 1], output_hidden_states=True).hidden_states[-2][:, 1:]
        projected = model.model.multi_modal_projector(patches)
        texts = embed_text(reader.text_tower, *cut_text(token_ids(question), 8))
        embeds = embed_patches_with_text(patches, tower.post_layernorm, reader.visual_projection)
        kept = choose_for_question(projected, embeds, texts, 6)[0].sort().values
        torch.testing.assert_close(features.pooler_output[image], projected[0, kept], rtol=0, atol=1e-5)
    other = reader.image_features(model, pixels, QUESTIONS[::-1])
    assert not torch.equal(other.pooler_output[0], features.pooler_output[0])


def test_a_model_generates_with_them(reader: QuestionReader, model: Any) -> None:
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    prompts = torch.tensor([[1, *[IMAGE_TOKEN] * 6, 5, 6], [1, *[IMAGE_TOKEN] * 6, 7, 8]])
    given = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts), "max_new_tokens": 3, "do_sample": False}
    features = reader.image_features(model, pixels, QUESTIONS)
    together = model.generate(**given, mm_encoder_outputs={"image": features})
    assert together.shape == (2, 12)
    for row in range(2):
        alone = reader.image_features(model, pixels[row : row + 1], [QUESTIONS[row]])
        one = {key: value[row : row + 1] if isinstance(value, torch.Tensor) else value for key, value in given.items()}
        assert torch.equal(model.generate(**one, mm_encoder_outputs={"image": alone})[0], together[row])


@torch.no_grad()
@pytest.mark.parametrize("method", [{}, {"method": "pool", "contextual": 0}])
def test_what_it_keeps_stands_where_it_would_with_all_tokens(reader: QuestionReader, method: dict[str, Any]) -> None:
    """Against plain LLaVA's pass over these patches at their own positions; the model's own method plays no part."""
    budget = {"dominant": 4, "contextual": 2, **method}
    budget["dominant"] = 6 - budget["contextual"]
    model, plain = build(reduction="none", visionzip=budget, positions="original"), build(plain=True)
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    features = reader.image_features(model, pixels, QUESTIONS[:1])
    every = plain.model.get_image_features(pixels).pooler_output[0]
    kept = (features.pooler_output[0][:, None] - every[None]).abs().sum(-1).argmin(-1)
    assert torch.equal(kept, kept.unique())
    ids = torch.tensor([[1, *[IMAGE_TOKEN] * 6, 5, 6]])
    embeds = plain.get_input_embeddings()(ids).masked_scatter((ids == IMAGE_TOKEN)[..., None], every[kept])
    places = torch.cat([torch.tensor([0]), 1 + kept, torch.tensor([17, 18])])[None]
    mask = torch.ones_like(ids)
    expected = plain(inputs_embeds=embeds, position_ids=places, attention_mask=mask).logits
    found = model(input_ids=ids, mm_encoder_outputs={"image": features}).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
    given = {"attention_mask": mask, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    first = model.generate(ids, mm_encoder_outputs={"image": features}, **given)
    assert first[0, len(ids[0])] == expected[0, -1].argmax()


def test_a_reader_is_loaded_from_a_clip_release(tmp_path: Path, model: Any) -> None:
    vision = {"hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 4, "projection_dim": 12}  # fmt: skip
    clip = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=12))
    clip.save_pretrained(tmp_path)
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefgh", *(f"{letter}</w>" for letter in "abcdefgh")]
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(tmp_path)
    reader = QuestionReader.from_pretrained(str(tmp_path))
    assert torch.equal(reader.visual_projection.weight, clip.visual_projection.weight)
    assert torch.equal(reader.text_tower.text_projection.weight, clip.text_projection.weight)
    texts, present = reader.embed_questions(["a b", "a b c d e f g h a b c"], torch.device("cpu"))
    assert texts.shape == (2, 2, 12)
    assert present.tolist() == [[True, False], [True, True]]


def test_what_does_not_fit_is_refused(reader: QuestionReader, model: Any) -> None:
    pixels = torch.zeros(1, 3, 16, 16)
    for other, message in (
        (build(reduction="none"), "visionzip is null: load the model with a budget"),
        (build(next_=True, reduction="visionzip"), "the model is a reduced_llava_next; it must be a reduced_llava"),
        (build(tower="siglip", reduction="visionzip"), "the tower is a siglip_vision_model; it must be CLIP's"),
    ):
        with pytest.raises(ReductionError, match=message):
            reader.image_features(other, pixels, ["what"])
    narrow = QuestionReader("some/clip", reader.text_tower, torch.nn.Linear(20, 12, bias=False), token_ids)
    with pytest.raises(ReductionError, match="some/clip projects patches of width 20, the model's tower gives 24"):
        narrow.image_features(model, pixels, ["what"])
    with pytest.raises(ReductionError, match="1 images and 2 questions"):
        reader.image_features(model, pixels, QUESTIONS)


def test_a_transformers_that_would_swallow_its_tokens_is_refused(
    reader: QuestionReader, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shortzip.reduction.question_tokens.takes_encoded_images", lambda: False)
    with pytest.raises(ReductionError, match=r"version 5\.18 or later is needed"):
        reader.image_features(model, torch.zeros(1, 3, 16, 16), ["what is it"])
