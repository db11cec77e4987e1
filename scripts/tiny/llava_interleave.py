"""A tiny LLaVA-interleave-Qwen: a LLaVA-1.5 with SigLIP for CLIP and Qwen2 for Vicuna."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from shortzip.data.supervision import load_template
from shortzip.scripts.tiny.parts import random_model, special_tokens
from shortzip.scripts.tiny.words import chatml_tokenizer

SIDE, PATCH = 24, 4


def write_release(folder: Path, seed: int = 0) -> Path:
    """A release in transformers' layout, the only one that is read of it."""
    tokenizer: Any = chatml_tokenizer()
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
        **special_tokens(tokenizer),
    }  # fmt: skip
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE,
            patch_size=PATCH, vision_use_head=False,
        ),
        text_config=Qwen2Config(**text), image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    random_model(LlavaForConditionalGeneration, config, seed).save_pretrained(folder)
    LlavaProcessor(
        SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}), tokenizer, patch_size=PATCH,
        vision_feature_select_strategy="full", chat_template=load_template("chatml"),
    ).save_pretrained(folder)  # fmt: skip
    return folder
