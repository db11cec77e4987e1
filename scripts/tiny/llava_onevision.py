"""A tiny LLaVA-OneVision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    Qwen2Config,
    SiglipVisionConfig,
)

from shortzip.data.supervision import load_template
from shortzip.scripts.tiny.words import build_tokenizer
from shortzip.train.release.layout_llava_onevision import LAYOUT
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
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    with torch.no_grad():  # the default initialisation lets an image move the logits by next to nothing
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.normal_(0, 0.3)
    return model


def onevision_tokenizer(marks: bool = True) -> Any:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    if marks:
        tokenizer.add_tokens(["<video>"], special_tokens=True)
    return tokenizer


def write_onevision(folder: Path, side: int = SIDE, layers: int = 4) -> Path:
    """A release in transformers' layout, of tiles of `side` pixels and so many decoder layers."""
    tokenizer = onevision_tokenizer()
    ids = tokenizer.get_vocab()
    text = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "num_hidden_layers": layers,
    }
    config = onevision_config(len(tokenizer), ids["<image>"], ids["<video>"], side, **text)
    plain_onevision(config).save_pretrained(folder)
    size = {"height": side, "width": side}
    images = LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=grid_of(side))
    own = {
        "num_image_tokens": (side // PATCH) ** 2, "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_4", "image_token": "<image>", "video_token": "<video>",
    }  # fmt: skip
    PlainProcessor("LlavaOnevision", tokenizer, images, own, load_template("chatml")).save_pretrained(folder)
    return folder


def write_original_onevision(folder: Path, release: Path) -> Path:
    """The same release in its authors' layout: `folder/llava-onevision-tiny`, and its tower beside it."""
    target, tower = folder / "llava-onevision-tiny", folder / "siglip-tiny"
    target.mkdir(parents=True)
    config = LlavaOnevisionConfig.from_pretrained(release)
    original = LAYOUT.to_original(config, tower.name, "tiny")
    (target / "config.json").write_text(json.dumps(original, indent=1))
    names = {"model.multi_modal_projector.linear_1": "model.mm_projector.0",
             "model.multi_modal_projector.linear_2": "model.mm_projector.2", "model.language_model.": "model.",
             "model.vision_tower.": "model.vision_tower.vision_tower.vision_model."}  # fmt: skip
    tensors = {}
    for name, tensor in load_file(release / "model.safetensors").items():
        plain = name.replace("vision_tower.vision_model.", "vision_tower.").replace(
            "language_model.lm_head", "lm_head"
        )
        plain = plain.replace("language_model.model.", "language_model.")
        plain = plain if plain.startswith(("model.", "lm_head")) else f"model.{plain}"
        for ours, theirs in names.items():
            plain = plain.replace(ours, theirs)
        tensors[plain] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    onevision_tokenizer().save_pretrained(target)
    tower.mkdir()
    full = {**VISION, "num_hidden_layers": VISION["num_hidden_layers"] + 1}
    (tower / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": full}))
    settings = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    (tower / "preprocessor_config.json").write_text(json.dumps(settings))
    return target
