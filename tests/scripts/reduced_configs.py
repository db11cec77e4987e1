"""A tiny LLaVA config, plain or reduced."""

from typing import Any

from transformers import PreTrainedConfig

from shortzip.reduction import ReducedLlavaConfig, ReducedLlavaNextConfig


def tiny_config(family: str, **reductions: Any) -> PreTrainedConfig:
    """`family` is llava or llava_next: 16 patches, 3 LLM layers."""
    parts = {
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3,
            "num_attention_heads": 4, "image_size": 16, "patch_size": 4,
        },
        "text_config": {
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "vocab_size": 91,
        },
    }  # fmt: skip
    if family == "llava":
        return ReducedLlavaConfig(**parts, **reductions)
    return ReducedLlavaNextConfig(**parts, image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]], **reductions)
