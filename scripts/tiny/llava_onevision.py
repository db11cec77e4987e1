"""A tiny LLaVA-OneVision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    Qwen2Config,
    SiglipVisionConfig,
)

from shortzip.data.supervision import load_template
from shortzip.scripts.tiny import original
from shortzip.scripts.tiny.parts import random_model
from shortzip.scripts.tiny.words import chatml_tokenizer
from shortzip.train.release.plain_processor import PlainProcessor

SIDE, PATCH = 20, 4  # 25 patches a tile, 9 of a frame once it is pooled
VISION: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIDE,
    "patch_size": PATCH, "vision_use_head": False,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip


def grid_of(side: int) -> list[list[int]]:
    return [[side * rows, side * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]


def onevision_config(rows: int, image: int, video: int, side: int = SIDE, **text: Any) -> LlavaOnevisionConfig:
    """More than 4 tiles' worth of patches is shrunk, where nothing is reduced."""
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**{**VISION, "image_size": side}),
        text_config=Qwen2Config(**{**TEXT, "vocab_size": rows, **text}),
        image_token_index=image, video_token_index=video, image_grid_pinpoints=grid_of(side),
        vision_aspect_ratio="anyres_max_4",
    )  # fmt: skip


def plain_onevision(config: LlavaOnevisionConfig, seed: int = 0) -> Any:
    return random_model(LlavaOnevisionForConditionalGeneration, config, seed)


def onevision_tokenizer() -> Any:
    tokenizer = chatml_tokenizer()
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    return tokenizer


def write_release(folder: Path, seed: int = 0, *, side: int = SIDE, layers: int = 4) -> Path:
    """A release in transformers' layout, of tiles of `side` pixels and so many decoder layers."""
    tokenizer = onevision_tokenizer()
    ids = tokenizer.get_vocab()
    text = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "num_hidden_layers": layers,
    }
    config = onevision_config(len(tokenizer), ids["<image>"], ids["<video>"], side, **text)
    plain_onevision(config, seed).save_pretrained(folder)
    size = {"height": side, "width": side}
    images = LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=grid_of(side))
    own = {
        "num_image_tokens": (side // PATCH) ** 2, "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_4", "image_token": "<image>", "video_token": "<video>",
    }  # fmt: skip
    PlainProcessor("LlavaOnevision", tokenizer, images, own, load_template("chatml")).save_pretrained(folder)
    return folder


def write_original(folder: Path, seed: int = 0) -> Path:
    """The same release in its authors' layout, its tower in it."""
    return original.write(
        folder, seed, write_release, LlavaOnevisionConfig, onevision_tokenizer(), inside=True, tower_of=_whole_tower
    )


def _whole_tower(config: Any) -> dict[str, Any]:
    """SigLIP's, with the block that LLaVA leaves out."""
    full = {**config.vision_config.to_dict(), "num_hidden_layers": config.vision_config.num_hidden_layers + 1}
    return {"model_type": "siglip", "vision_config": full}
