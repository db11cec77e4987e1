"""A tiny LLaVA-NeXT-Video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextImageProcessorPil,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
)

from shortzip.data.supervision import load_template
from shortzip.scripts.tiny import original
from shortzip.scripts.tiny.parts import random_model, special_tokens
from shortzip.scripts.tiny.words import build_tokenizer
from shortzip.train.release.plain_processor import PlainProcessor

SIDE, PATCH = 24, 4  # 36 patches a tile, 9 of a frame once it is pooled
VISION: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": SIDE,
    "patch_size": PATCH, "initializer_range": 0.3,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip


def grid_of(side: int) -> list[list[int]]:
    return [[side * rows, side * columns] for rows, columns in ((1, 2), (2, 1), (2, 2))]


def next_video_config(rows: int, image: int, video: int, side: int = SIDE, **text: Any) -> LlavaNextVideoConfig:
    return LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**{**VISION, "image_size": side}),
        text_config=LlamaConfig(**{**TEXT, "vocab_size": rows, **text}),
        image_token_index=image, video_token_index=video, image_grid_pinpoints=grid_of(side),
    )  # fmt: skip


def plain_next_video(config: LlavaNextVideoConfig, seed: int = 0) -> Any:
    return random_model(LlavaNextVideoForConditionalGeneration, config, seed)


def next_video_tokenizer() -> Any:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    return tokenizer


def write_release(folder: Path, seed: int = 0, *, side: int = SIDE, layers: int = 4) -> Path:
    """A release in transformers' layout, of tiles of `side` pixels and so many decoder layers."""
    tokenizer = next_video_tokenizer()
    ids = tokenizer.get_vocab()
    text = {**special_tokens(tokenizer), "num_hidden_layers": layers}
    config = next_video_config(len(tokenizer), ids["<image>"], ids["<video>"], side, **text)
    plain_next_video(config, seed).save_pretrained(folder)
    size = {"height": side, "width": side}
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": side}, crop_size=size, image_grid_pinpoints=grid_of(side)
    )
    own = {
        "patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
        "image_token": "<image>", "video_token": "<video>",
    }  # fmt: skip
    template = load_template("vicuna_v1")
    PlainProcessor("LlavaNextVideo", tokenizer, images, own, template, image_stem="LlavaNext").save_pretrained(folder)
    return folder


def write_original(folder: Path, seed: int = 0) -> Path:
    """The same release in its authors' layout, its tower in it."""
    return original.write(folder, seed, write_release, LlavaNextVideoConfig, next_video_tokenizer(), inside=True)
