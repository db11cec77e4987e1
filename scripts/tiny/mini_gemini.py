"""A tiny Mini-Gemini, whose own layout is what there is first: transformers has no Mini-Gemini."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import CLIPVisionConfig, ConvNextConfig, LlamaConfig

from shortzip.reduction.configuration_reduced_mini_gemini import ReducedMiniGeminiConfig
from shortzip.reduction.modeling_reduced_mini_gemini import ReducedMiniGeminiForConditionalGeneration
from shortzip.scripts.tiny import original
from shortzip.scripts.tiny.llava import IMAGE_SIZE, PATCH_SIZE
from shortzip.scripts.tiny.parts import random_model, special_tokens
from shortzip.scripts.tiny.words import build_tokenizer
from shortzip.train.release.convert import convert_to_transformers
from shortzip.train.release.layout_mini_gemini import AUX_INSIDE, original_mining

AUX_SIZE = 96  # each of CLIP's 36 patches has a window of 4 by 4 features
_CONVNEXT = (  # transformers' part of a name, and timm's
    (r"^embeddings\.patch_embeddings\.", "stem.0."),
    (r"^embeddings\.layernorm\.", "stem.1."),
    (r"\.downsampling_layer\.", ".downsample."),
    (r"\.layers\.", ".blocks."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.layernorm\.", ".norm."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    (r"\.layer_scale_parameter$", ".gamma"),
)


def mini_gemini_config(tokenizer: Any) -> ReducedMiniGeminiConfig:
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
        **special_tokens(tokenizer),
    }  # fmt: skip
    return ReducedMiniGeminiConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=24, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE, initializer_range=0.3,
        ),
        text_config=LlamaConfig(**text),
        aux_config=ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 2, 1]),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_size_aux=AUX_SIZE,
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
    )  # fmt: skip


def write_release(folder: Path, seed: int = 0) -> Path:
    """As ShortZip converts one: transformers' layout, with the parts that transformers lacks."""
    with TemporaryDirectory() as scratch:
        made = write_original(Path(scratch) / "mgm-tiny", seed)
        convert_to_transformers(made, folder, tower=made / original.TOWER)
    return folder


def write_original(folder: Path, seed: int = 0) -> Path:
    """A release in MGM's own layout, both towers in it."""
    tokenizer = build_tokenizer()
    config = mini_gemini_config(tokenizer)
    model = random_model(ReducedMiniGeminiForConditionalGeneration, config, seed)
    tensors = {_name(name): tensor.contiguous() for name, tensor in model.state_dict().items() if "mining" not in name}
    mining = {name.split("projector.")[1]: held for name, held in model.state_dict().items() if "mining" in name}
    tensors |= {f"model.{name}": held.contiguous() for name, held in original_mining(mining).items()}
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    vision: Any = config.vision_config
    original.write_tower(folder / original.TOWER, vision.to_dict(), pixels, {})
    return original.write_parts(folder, config, tokenizer, tensors)


def _name(name: str) -> str:
    """MGM's name of a tensor."""
    clip, convnext = "model.vision_tower.clip.", "model.vision_tower.convnext."
    if name.startswith(convnext):
        short = name.removeprefix(convnext)
        for pattern, theirs in _CONVNEXT:
            short = re.sub(pattern, theirs, short)
        return f"{AUX_INSIDE}vision_{short}"
    return original.original_name(name.replace(clip, "model.vision_tower."))
