"""A tiny Video-LLaVA-hf: transformers' own model, which has no layout of its authors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

from shortzip.data.errors import UserError
from shortzip.data.supervision import load_template
from shortzip.scripts.tiny.parts import special_tokens
from shortzip.scripts.tiny.words import build_tokenizer

SIDE, PATCH = 20, 4
PATCHES = (SIDE // PATCH) ** 2
VISION: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIDE,
    "patch_size": PATCH, "projection_dim": 24, "hidden_act": "gelu", "initializer_range": 0.3,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip


def config_keys(rows: int, image: int, video: int, side: int = SIDE, layers: int = 4, **text: Any) -> dict[str, Any]:
    """What both releases' configs are made of. `rows`: of the embeddings; `image` and `video`: ids of placeholders."""
    return {
        "vision_config": CLIPVisionConfig(**{**VISION, "image_size": side}).to_dict(),
        "text_config": LlamaConfig(**{**TEXT, "num_hidden_layers": layers, "vocab_size": rows, **text}).to_dict(),
        "image_token_index": image, "video_token_index": video, "image_seq_length": (side // PATCH) ** 2,
    }  # fmt: skip


def enlivened(model: Any, seed: int) -> Any:
    """Weights with which images move the logits, and what is 0 at first is not."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "projector" in name or "temporal_embedding" in name:
                parameter.normal_(0, 0.3, generator=generator)
            elif "temporal_attn" in name or name.endswith("bias"):
                parameter.normal_(0, 0.2, generator=generator)
    return model.eval()


def plain_video_llava(seed: int = 0, **keys: Any) -> Any:
    """transformers' own model."""
    torch.manual_seed(seed)
    return enlivened(VideoLlavaForConditionalGeneration(VideoLlavaConfig(**keys)), seed)


def write_release(folder: Path, seed: int = 0, side: int = SIDE, layers: int = 4) -> Path:
    """A release with the files that Video-LLaVA-hf has, for frames of `side` pixels and so many decoder layers."""
    tokenizer: Any = build_tokenizer()
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    ids, own = tokenizer.get_vocab(), special_tokens(tokenizer)
    model = plain_video_llava(seed, **config_keys(len(tokenizer), ids["<image>"], ids["<video>"], side, layers, **own))
    model.generation_config.eos_token_id = own["eos_token_id"]
    model.generation_config.pad_token_id = own["pad_token_id"]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images = {
        "image_processor_type": "VideoLlavaImageProcessor", "size": {"shortest_edge": side}, "do_center_crop": True,
        "crop_size": {"height": side, "width": side}, "resample": 3,
    }  # fmt: skip
    settings = {
        "processor_class": "VideoLlavaProcessor", "patch_size": PATCH, "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1, "image_token": "<image>", "video_token": "<video>",
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(load_template("vicuna_v1"), encoding="utf-8")
    return folder


def write_original(folder: Path, seed: int = 0) -> Path:
    """There is none. Raises UserError."""
    raise UserError(
        "video_llava is Video-LLaVA-hf, of which only transformers' is read, for there is no other layout: choose "
        "layout transformers, or family temporal_video_llava, which is what its authors released"
    )
