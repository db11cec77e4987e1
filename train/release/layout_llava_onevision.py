"""LLaVA-OneVision's original layout: LLaVA-NeXT's on Qwen2 with a trained SigLIP, whose last block is left out.

By the code of LLaVA-NeXT's repository and transformers' conversion; no release was at hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer, LlavaOnevisionConfig, LlavaOnevisionImageProcessorPil, Qwen2Config
from transformers import SiglipVisionConfig as VisionConfig

from shortzip.data.errors import UserError
from shortzip.data.files import read_json
from shortzip.data.supervision import load_template
from shortzip.train.release.conversion_plan import Plan
from shortzip.train.release.layout_llava import TEMPLATES, LlavaLayout, plan_own_tower
from shortzip.train.release.layout_llava_next import pinpoints, plan_newline
from shortzip.train.release.layouts import Parts
from shortzip.train.release.original_layout import (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    Vocabulary,
    check_projector_keys,
    check_sizes,
)
from shortzip.train.release.plain_processor import PlainProcessor

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_TOWER_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_QWEN_KEYS = (
    *_SIZES,
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "initializer_range",
    "max_position_embeddings",
    "max_window_layers",
    "rms_norm_eps",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
)


class LlavaOnevisionLayout(LlavaLayout):
    """As LLaVA-NeXT's, with `image_aspect_ratio: anyres_max_N`."""

    language_model = "Qwen2"
    template = TEMPLATES / "chatml.jinja"
    usual_tower = (1152, 26, 384, 14), "google/siglip-so400m-patch14-384"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        ratio = str(config.get("image_aspect_ratio", ""))
        return (
            super().recognises(config) and ratio.startswith("anyres_max_") and "Qwen" in str(config["architectures"])
        )

    def check(self, config: Mapping[str, Any], where: str) -> None:
        missing = [key for key in (*_SIZES, "rms_norm_eps", "mm_vision_tower") if config.get(key) is None]
        if missing:
            raise UserError(f"{where}: config.json lacks {', '.join(missing)}; sizes are never guessed")
        check_sizes(config, _SIZES, f"{where}: config.json")
        check_projector_keys(config, where)
        ratio = str(config["image_aspect_ratio"])
        if not ratio.removeprefix("anyres_max_").isdigit():
            raise UserError(f"{where}: image_aspect_ratio is {ratio!r}; needed is anyres_max_ and a number of tiles")

    def language_config(self, config: Mapping[str, Any], rows: int) -> Any:
        values = {key: config[key] for key in _QWEN_KEYS if key in config}
        rope = {"rope_type": "default", "rope_theta": config.get("rope_theta", 1000000.0)}
        return Qwen2Config(**values, rope_parameters=rope, vocab_size=rows)

    def vocabulary(self, folder: Path, rows: int) -> Vocabulary:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if len(tokenizer) > rows:
            raise UserError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the embeddings only {rows} rows")
        tokenizer.padding_side = "left"
        marks = [AddedToken(mark, special=True, normalized=False) for mark in (IMAGE_TOKEN, VIDEO_TOKEN)]
        tokenizer.add_tokens(marks, special_tokens=True)
        ids = tokenizer.get_vocab()
        needed = max(ids[IMAGE_TOKEN], ids[VIDEO_TOKEN]) + 1
        return Vocabulary(tokenizer, ids[IMAGE_TOKEN], rows if rows >= needed else math.ceil(needed / 64) * 64)

    def tower_config(self, folder: Path) -> Any:
        """SigLIP's without its last block and its pooling head, which LLaVA deletes. Raises ValueError for others."""
        config = read_json(folder / "config.json")
        part = config.get("vision_config") if config.get("model_type") == "siglip" else config
        kind = config.get("model_type")
        if kind not in ("siglip", "siglip_vision_model") or not isinstance(part, dict):
            raise UserError(f"{folder}: the vision tower is a {kind!r}, LLaVA-OneVision's layout knows SigLIP only")
        check_sizes(part, _TOWER_SIZES, f"{folder}: config.json")
        full = VisionConfig.from_dict(part)
        return VisionConfig.from_dict(
            {**full.to_dict(), "num_hidden_layers": full.num_hidden_layers - 1, "vision_use_head": False}
        )

    def config(self, parts: Parts, dtype: torch.dtype) -> Any:
        result = LlavaOnevisionConfig(
            vision_config=parts.vision,
            text_config=self.language_config(parts.original, parts.vocabulary.rows),
            image_token_index=parts.vocabulary.image_token_id,
            video_token_index=parts.vocabulary.tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
            image_grid_pinpoints=pinpoints(parts.original, parts.where),
            vision_aspect_ratio=parts.original["image_aspect_ratio"],
            dtype=dtype,
        )
        result.architectures = ["LlavaOnevisionForConditionalGeneration"]
        return result

    def processor(self, parts: Parts) -> Any:
        vision: Any = parts.vision
        path = parts.tower / "preprocessor_config.json"
        settings = read_json(path)
        missing = [key for key in ("image_mean", "image_std") if key not in settings]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)}: download the vision tower again")
        images = LlavaOnevisionImageProcessorPil(
            size={"height": vision.image_size, "width": vision.image_size},
            resample=settings.get("resample", 3),
            image_mean=settings["image_mean"],
            image_std=settings["image_std"],
            image_grid_pinpoints=pinpoints(parts.original, parts.where),
        )
        own = {
            "num_image_tokens": (vision.image_size // vision.patch_size) ** 2,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": parts.original["image_aspect_ratio"],
            "image_token": IMAGE_TOKEN,
            "video_token": VIDEO_TOKEN,
        }
        return PlainProcessor("LlavaOnevision", parts.vocabulary.tokenizer, images, own, load_template("chatml"))

    def plan_rest(self, plan: Plan, parts: Parts) -> None:
        """The newline, and the tower: the release's own, which was trained with it, else its folder's."""
        plan_newline(plan, parts)
        plan_own_tower(plan, parts, self.tower_inside)

    def to_original(self, config: Any, vision_tower: str | None, where: str) -> dict[str, Any]:
        """Raises ValueError for a tower that is no SigLIP, a language model that is no Qwen2, or a tower without a
        name: `vision_tower` is needed unless it is SigLIP so400m at 384, which its sizes give away."""
        vision, text = config.vision_config, config.text_config
        if vision.model_type != "siglip_vision_model" or text.model_type != "qwen2":
            raise UserError(
                f"{where}: LLaVA-OneVision's own layout knows a SigLIP tower and a Qwen2, found are "
                f"{vision.model_type} and {text.model_type}: choose --shape full or projector"
            )
        vision_tower = self.tower_name(vision, where) if vision_tower is None else vision_tower
        keys = text.to_dict()
        return {
            **{key: keys[key] for key in _QWEN_KEYS if keys.get(key) is not None},
            "architectures": ["LlavaQwenForCausalLM"],
            "model_type": "llava",
            "image_aspect_ratio": config.vision_aspect_ratio,
            "image_grid_pinpoints": config.image_grid_pinpoints,
            "mm_hidden_size": vision.hidden_size,
            "mm_patch_merge_type": "spatial_unpad",
            "mm_projector_type": "mlp2x_gelu",
            "mm_spatial_pool_mode": "bilinear",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,  # the one before the last is the last that LLaVA's SigLIP has
            "mm_vision_tower": vision_tower,
            "rope_theta": dict(text.rope_parameters or {}).get("rope_theta", 1000000.0),
            "use_mm_proj": True,
            "vocab_size": text.vocab_size,
        }


LAYOUT = LlavaOnevisionLayout()
