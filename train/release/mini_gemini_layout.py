"""Mini-Gemini's own release layout: its config, the names of its two towers' and its mining's tensors.

Both towers lie in the release's shards, under names of CLIP and of timm's ConvNeXt. What no file of the release says
is CLIP's config: it is that of the tower's folder, which MGM names beside its working directory, or, by the shapes,
that of CLIP-L/14-336, which every release has. The ConvNeXt's sizes are read from its weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import CLIPVisionConfig, ConvNextConfig

from shortzip.data.errors import UserError
from shortzip.train.release.tensor_files import TensorSpec

CLIP_INSIDE = "model.vision_tower.vision_tower."
AUX_INSIDE = "model.vision_tower_aux."
AUX_FILE = "open_clip_pytorch_model.bin"
AUX_IN_FILE = "visual.trunk."  # of the ConvNeXt in open_clip's file, beside its head and a text tower
_MINING_KEYS = {"query": "query", "aux": "key", "val": "value"}
_AUX_NAMES = (
    (r"^stem\.0\.", "embeddings.patch_embeddings."),
    (r"^stem\.1\.", "embeddings.layernorm."),
    (r"^stages\.", "encoder.stages."),
    (r"\.downsample\.", ".downsampling_layer."),
    (r"\.blocks\.", ".layers."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.norm\.", ".layernorm."),
    (r"\.mlp\.fc(\d)\.", r".pwconv\1."),
    (r"\.gamma$", ".layer_scale_parameter"),
)


def is_mini_gemini(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is Mini-Gemini's own."""
    return "mm_vision_tower_aux" in config and "text_config" not in config


def mining_names(specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """`mining.query.0.weight` … → the names of the mining's tensors in an original file; any prefix is accepted."""
    names = {}
    for name in specs:
        match = re.search(r"vlm_uni_(query|aux|val)_projector\.(\d\.(?:weight|bias))$", name)
        if match:
            names[f"mining.{_MINING_KEYS[match[1]]}.{match[2]}"] = name
    return names


def original_mining_name(name: str) -> str:
    """`mining.query.0.weight` as MGM calls it: `vlm_uni_query_projector.0.weight`."""
    _, part, rest = name.split(".", 2)
    original = {ours: theirs for theirs, ours in _MINING_KEYS.items()}[part]
    return f"vlm_uni_{original}_projector.{rest}"


def convnext_names(specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """transformers' name of every ConvNeXt tensor → its name in a release's shards, or in open_clip's file."""
    names = {}
    for name in specs:
        if name.startswith(AUX_INSIDE):
            short = name.removeprefix(AUX_INSIDE).removeprefix("vision_")
        elif name.startswith(AUX_IN_FILE):
            short = name.removeprefix(AUX_IN_FILE)
        else:
            continue
        for pattern, new in _AUX_NAMES:
            short = re.sub(pattern, new, short)
        names[short] = name
    return names


def convnext_config(specs: Mapping[str, TensorSpec], where: str) -> ConvNextConfig:
    """The ConvNeXt's config, of its tensors under transformers' names.

    Raises:
        UserError: they are those of no ConvNeXt.
    """
    depths: dict[int, int] = {}
    for name in specs:
        if match := re.fullmatch(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.dwconv\.weight", name):
            depths[int(match[1])] = max(depths.get(int(match[1]), 0), int(match[2]) + 1)
    stem = "embeddings.patch_embeddings.weight"
    if stem not in specs or sorted(depths) != list(range(len(depths))):
        raise UserError(
            f"{where} holds no ConvNeXt ({AUX_INSIDE}* or {AUX_IN_FILE}*; found are {len(specs)} of its tensors): "
            "download the release again, or give the folder of its high-resolution tower"
        )
    widths = [specs[f"encoder.stages.{stage}.layers.0.dwconv.weight"].shape[0] for stage in sorted(depths)]
    return ConvNextConfig(
        patch_size=specs[stem].shape[-1],
        num_stages=len(widths),
        hidden_sizes=widths,
        depths=[depths[stage] for stage in sorted(depths)],
        hidden_act="gelu",
    )


def known_clip(specs: Mapping[str, TensorSpec]) -> CLIPVisionConfig | None:
    """The config of CLIP-L/14-336, if that is what a release's tower is by its shapes. None: it is another."""
    prefix = f"{CLIP_INSIDE}vision_model."
    large = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    shapes = {
        "embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        "embeddings.position_embedding.weight": (577, 1024),
        "encoder.layers.23.mlp.fc1.weight": (4096, 1024),
    }
    found = {name: specs[prefix + name].shape for name in shapes if prefix + name in specs}
    deeper = f"{prefix}encoder.layers.24.layer_norm1.weight" in specs
    return large if found == shapes and not deeper else None
