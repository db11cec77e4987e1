"""A tiny LLaVA-1.5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
)

from shortzip.scripts.tiny import original
from shortzip.scripts.tiny.words import build_tokenizer

IMAGE_SIZE, PATCH_SIZE = 24, 4
PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
LLM_LAYERS = 4


def write_release(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a plain transformers LLaVA: CLIP with CLS (36 patches), projector, Llama (4 layers, width 32)."""
    tokenizer: Any = build_tokenizer()
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=24, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, projection_dim=24,
            image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, initializer_range=0.3, initializer_factor=1.0,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=LLM_LAYERS,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projector_hidden_act="gelu", vision_feature_layer=-2, vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # the default initialisation lets an image move the logits by next to nothing
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.normal_(0, 0.3)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(dtype).save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    LlavaProcessor(
        image_processor, tokenizer, patch_size=PATCH_SIZE, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_original(folder: Path, seed: int = 0) -> Path:
    """The same release in LLaVA's own layout, whose tower is a release of its own."""
    return original.write(folder, seed, write_release, LlavaConfig, build_tokenizer(), inside=False)
