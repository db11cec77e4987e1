"""SharedModels with random weights and batches with the instruction mix's lengths, for scripts/benchmarks/step.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from shortzip.reduction import ReducedLlavaConfig, ReducedLlavaForConditionalGeneration
from shortzip.train.step.flops import RowShape

IMAGE_TOKEN, BEFORE = 3, 35  # 35 tokens stand before the image in Vicuna's prompt with Llama's tokenizer
TOKENS_PER_WORD = 1.35
TURN = 8  # tokens of "USER: … ASSISTANT: …</s>" around a question and its answer
LONGEST = 2048


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a LLaVA and how it is reduced."""

    text: dict[str, int]
    vision: dict[str, int]
    dominant: int
    contextual: int
    frozen: list[int]
    tiles: int = 1


_CLIP_L = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
# The published layers (arXiv 2504.00502), and their like in a 16-layer model: the last ones and the first.
SHAPES = {
    "demo": ModelShape(
        {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 8, "num_attention_heads": 4},
        {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 4,
         "image_size": 84, "patch_size": 7},
        14, 2, [0, 4, 5, 6, 7],
    ),
    "cpu": ModelShape(
        {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16},
        _CLIP_L, 54, 10, [0, 1, 8, 9, 10, 11, 12, 13, 14, 15],
    ),
    "llava-1.5-7b": ModelShape(
        _7B, _CLIP_L, 54, 10, [31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19]
    ),
    "llava-1.5-13b": ModelShape(
        _13B, _CLIP_L, 54, 10,
        [39, 32, 28, 36, 27, 37, 29, 30, 1, 38, 25, 31, 2, 26, 23, 34, 0, 33, 35, 22, 24, 21, 20, 17],
    ),
    "llava-next-7b": ModelShape(
        _7B, _CLIP_L, 27, 5, [31, 29, 30, 28, 26, 27, 22, 24, 21, 23, 25, 20, 19, 17, 18, 15, 12, 0, 2], tiles=5
    ),
    "video-cpu": ModelShape(  # a video: 8 frames of 224 pixels, 256 patches each, and 17 tokens of each
        {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16},
        {**_CLIP_L, "image_size": 224}, 14, 3, [0, 1, 8, 9, 10, 11, 12, 13, 14, 15], tiles=8,
    ),
    "next-cpu": ModelShape(  # LLaVA-NeXT-7B's tokens, depth and proportions at a quarter of its width
        {**_7B, "hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 16},
        _CLIP_L, 27, 5, [31, 29, 30, 28, 26, 27, 22, 24, 21, 23, 25, 20, 19, 17, 18, 15, 12, 0, 2], tiles=5,
    ),
}  # fmt: skip


@dataclass
class SharedModels:
    """The same random weights in plain transformers, with VisionZip alone, and with both reductions."""

    plain: Any
    visionzip: Any
    both: Any


def build_models(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> SharedModels:
    """Three models that share every tensor; only the projector, in float32, requires a gradient."""
    vocabulary = 2000 if shape.text["hidden_size"] < 512 else 32000
    text = {"model_type": "llama", "vocab_size": vocabulary, "max_position_embeddings": 4096, **shape.text}
    vision = {"model_type": "clip_vision_model", **shape.vision}

    def parts() -> dict[str, Any]:
        return {
            "text_config": LlamaConfig(**text),  # type: ignore[arg-type]
            "vision_config": CLIPVisionConfig(**vision),  # type: ignore[arg-type]
            "image_token_index": IMAGE_TOKEN,
            "attn_implementation": "sdpa",
            "tie_word_embeddings": False,
        }

    zip_ = {"dominant": shape.dominant, "contextual": shape.contextual}
    with _default(device, dtype):
        torch.manual_seed(0)
        plain = LlavaForConditionalGeneration(LlavaConfig(**parts()))
    plain.model.multi_modal_projector.float()
    models = [_projector_tuned(plain)]
    for shortv in (None, {"layers": shape.frozen}):
        config = ReducedLlavaConfig(**parts(), visionzip=zip_, shortv=shortv)
        models.append(share_weights(plain, partial(ReducedLlavaForConditionalGeneration, config)))
    if dtype != torch.float32:
        _cast_for_float32_projector(plain)
    return SharedModels(*models)


def share_weights(plain: Any, make: Callable[[], Any]) -> Any:
    """What `make` gives, with every tensor of `plain` as its own; only the projector requires a gradient."""
    with torch.device("meta"):
        model = make()
    model.load_state_dict(plain.state_dict(), assign=True)
    # What no state dict holds: rotary frequencies and position numbers.
    model.model.language_model.rotary_emb = plain.model.language_model.rotary_emb
    model.model.vision_tower.embeddings.position_ids = plain.model.vision_tower.embeddings.position_ids
    return _projector_tuned(model)


def _projector_tuned(model: Any) -> Any:
    model.eval().requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model


def _cast_for_float32_projector(plain: Any) -> None:
    """A careful user's lines: a float32 projector between a tower and a language model in bfloat16."""
    projector = plain.model.multi_modal_projector
    projector.register_forward_pre_hook(lambda _, arguments: (arguments[0].float(),))


@contextmanager
def _default(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class ConversationLengths:
    """Lengths in tokens: what stands before the first question, then (question, answer) turns."""

    has_image: bool
    turns: tuple[tuple[int, int], ...]

    def shape(self, visual: int, tiles: int) -> RowShape:
        text = BEFORE + sum(question + answer + TURN for question, answer in self.turns)
        supervised = sum(answer + 1 for _, answer in self.turns)
        return RowShape(text, visual if self.has_image else 0, supervised, tiles)


def draw_conversations(count: int, seed: int = 0, *, images_only: bool = False) -> list[ConversationLengths]:
    """Conversations with the lengths of llava_v1_5_mix665k, by its sources' shares.

    Lengths of LLaVA's conversations, descriptions and reasoning are log-normal, fitted to 90 real answers of its
    GPT-4 evaluation set (log mean and deviation in words: 2.72 and 0.43, 4.35 and 0.23, 4.63 and 0.21); short-answer
    sets (VQA, OCR, regions) are several turns of a few words; 6.1 % of the rows are text alone and long.
    """
    draw = np.random.default_rng(seed)
    shares = {"short": 0.704, "conversation": 0.085, "detail": 0.035, "reasoning": 0.115, "text": 0.061}

    def words(mean: float, deviation: float) -> int:
        return max(1, round(float(draw.lognormal(mean, deviation)) * TOKENS_PER_WORD))

    conversations: list[ConversationLengths] = []
    while len(conversations) < count:
        kind = str(draw.choice(list(shares), p=list(shares.values())))
        if kind == "short":
            turns = [(words(2.1, 0.4), words(0.5, 0.6)) for _ in range(int(np.clip(draw.lognormal(1.8, 0.7), 1, 20)))]
        elif kind == "conversation":
            turns = [(words(2.2, 0.3), words(2.72, 0.43)) for _ in range(int(draw.integers(3, 6)))]
        elif kind == "text":
            turns = [(words(3.5, 1.0), words(4.8, 0.7)) for _ in range(int(draw.integers(2, 7)))]
        else:
            turns = [(words(2.3, 0.3), words(*((4.35, 0.23) if kind == "detail" else (4.63, 0.21))))]
        conversation = ConversationLengths(kind != "text", tuple(turns))
        if conversation.shape(0, 1).text < LONGEST and (conversation.has_image or not images_only):
            conversations.append(conversation)
    return conversations


def make_batch(
    conversations: list[ConversationLengths], visual: int, tiles: int, config: Any, device: torch.device, seed: int = 0
) -> dict[str, Tensor]:
    """Random tokens and pixels for conversations, padded on the right, `visual` placeholders for each image."""
    draw = torch.Generator().manual_seed(seed)
    vocabulary = config.text_config.vocab_size

    def text(count: int) -> Tensor:
        return torch.randint(IMAGE_TOKEN + 1, vocabulary, (count,), generator=draw)

    beginning = torch.randint(IMAGE_TOKEN + 1, vocabulary, (BEFORE,), generator=torch.Generator().manual_seed(1))
    rows: list[tuple[Tensor, Tensor]] = []
    for conversation in conversations:
        ids = [beginning]
        if conversation.has_image:
            ids.append(torch.full((visual,), IMAGE_TOKEN))
        labels = [torch.full_like(part, -100) for part in ids]
        for question, answer in conversation.turns:
            question_ids, answer_ids = text(question + TURN - 1), text(answer + 1)
            ids += [question_ids, answer_ids]
            labels += [torch.full_like(question_ids, -100), answer_ids]
        rows.append((torch.cat(ids), torch.cat(labels)))
    pad = torch.nn.utils.rnn.pad_sequence
    input_ids = pad([ids for ids, _ in rows], batch_first=True, padding_value=0)
    labels_ = pad([labels for _, labels in rows], batch_first=True, padding_value=-100)
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    batch = {
        "input_ids": input_ids,
        "labels": labels_,
        "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
    }
    images = sum(conversation.has_image for conversation in conversations) * tiles
    if images:
        side = config.vision_config.image_size
        batch["pixel_values"] = torch.randn(images, 3, side, side, generator=draw)
    return {key: tensor.to(device) for key, tensor in batch.items()}
