"""LLaVA-1.5's original layout, and what all layouts built on LLaVA's code have in common."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaImageProcessorPil, LlavaProcessor

import shortzip.data
from shortzip.data.errors import MissingFile, UserError
from shortzip.data.files import read_json
from shortzip.train.release.conversion_plan import Plan, Tensors, compare
from shortzip.train.release.layouts import Parts
from shortzip.train.release.original_layout import (
    LLAMA_KEYS,
    Vocabulary,
    check_original_config,
    read_vocabulary,
    text_config,
    tower_config,
)
from shortzip.train.release.tensor_files import weight_files

logger = logging.getLogger(__name__)

TEMPLATES = Path(shortzip.data.__file__).parent / "templates"
NEWLINE = "model.image_newline"


class LlavaLayout:
    """An OriginalLayout (layouts.py); other families say what is not as here."""

    language_model = "Llama"
    command = "llava.serve.cli", "--image-file IMAGE"
    config_class: Any = LlavaConfig
    architecture = "LlavaForConditionalGeneration"
    template = TEMPLATES / "vicuna_v1.jinja"
    usual_tower = (1024, 24, 336, 14), "openai/clip-vit-large-patch14-336"
    """Hidden size, blocks, image and patch size of the tower that these releases have, and its name."""
    tower_inside = "model.vision_tower.vision_tower."
    """What begins the names of a tower's tensors that lie among the release's own."""

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return str(config.get("model_type", "")).startswith("llava") or "mm_vision_tower" in config

    def check(self, config: Mapping[str, Any], where: str) -> None:
        check_original_config(config, where)

    def tower_names(self, config: Mapping[str, Any]) -> list[str]:
        return [str(config["mm_vision_tower"])] if "mm_vision_tower" in config else []

    def is_language(self, name: str) -> bool:
        return "mm_projector." not in name and not name.startswith(self.tower_inside) and name != NEWLINE

    def language_config(self, config: Mapping[str, Any], rows: int) -> LlamaConfig:
        return text_config(config, rows)

    def vocabulary(self, folder: Path, rows: int) -> Vocabulary:
        return read_vocabulary(folder, rows)

    def tower_config(self, folder: Path) -> CLIPVisionConfig:
        return tower_config(folder)

    def config(self, parts: Parts, dtype: torch.dtype) -> Any:
        vision: Any = parts.vision
        image_size, patch_size = vision.image_size, vision.patch_size
        if not isinstance(image_size, int) or not isinstance(patch_size, int) or not 0 < patch_size <= image_size:
            raise UserError(
                f"{parts.where}: the vision tower's image_size {image_size} and patch_size {patch_size} are no "
                "squares, the one in the other: needed are two whole numbers"
            )
        result = self.config_class(
            vision_config=vision,
            text_config=self.language_config(parts.original, parts.vocabulary.rows),
            image_token_index=parts.vocabulary.image_token_id,
            image_seq_length=(image_size // patch_size) ** 2,
            projector_hidden_act="gelu",
            vision_feature_layer=parts.original.get("mm_vision_select_layer", -2),
            vision_feature_select_strategy=self.strategy(parts.original),
            dtype=dtype,
            **self.more_config(parts),
        )
        result.architectures = [self.architecture]
        return result

    def strategy(self, config: Mapping[str, Any]) -> str:
        """transformers' vision_feature_select_strategy."""
        return "full" if config.get("mm_vision_select_feature") == "cls_patch" else "default"

    def more_config(self, parts: Parts) -> dict[str, Any]:
        """Keys of transformers' config that LLaVA-1.5's does not have."""
        return {}

    def processor(self, parts: Parts) -> Any:
        """At the release's sizes: padding to a square as the release was trained, PIL backend."""
        vision: Any = parts.vision
        path = parts.tower / "preprocessor_config.json"
        settings = read_json(path)
        missing = [key for key in ("image_mean", "image_std") if key not in settings]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)}: download the vision tower again")
        size, crop = settings.get("size", vision.image_size), settings.get("crop_size", vision.image_size)
        pixels: dict[str, Any] = {
            "size": {"shortest_edge": size} if isinstance(size, int) else size,
            "crop_size": {"height": crop, "width": crop} if isinstance(crop, int) else crop,
            "resample": settings.get("resample", 3),
            "image_mean": settings["image_mean"],
            "image_std": settings["image_std"],
        }
        arguments: dict[str, Any] = {
            "tokenizer": parts.vocabulary.tokenizer,
            "patch_size": vision.patch_size,
            "vision_feature_select_strategy": self.strategy(parts.original),
            "num_additional_image_tokens": 1,
            "chat_template": self.template.read_text(encoding="utf-8"),
        }
        return self.build_processor(parts, pixels, arguments)

    def build_processor(self, parts: Parts, pixels: dict[str, Any], arguments: dict[str, Any]) -> Any:
        """transformers' processor, of what its image processor takes and of what it takes itself."""
        pad = parts.original.get("image_aspect_ratio") == "pad"
        return LlavaProcessor(LlavaImageProcessorPil(**pixels, do_pad=pad), **arguments)

    def plan_rest(self, plan: Plan, parts: Parts) -> None:
        """The tower inside the release where LLaVA's config says that it was trained, else the one in its folder."""
        tensors, where, prefix = parts.tensors, parts.where, self.tower_inside
        is_inside = any(name.startswith(prefix) for name in tensors.specs)
        is_trained = bool(parts.original.get("unfreeze_mm_vision_tower"))
        if is_inside and not is_trained:
            logger.warning(
                "%s holds a vision tower, but unfreeze_mm_vision_tower is not set: as LLaVA itself does, the tower of "
                "%s is used",
                where,
                parts.tower,
            )
        if not (is_inside and is_trained):
            paths = weight_files(parts.tower)
            if not paths:
                raise MissingFile(f"{parts.tower} holds no weights of the vision tower")
            tensors, prefix, where = Tensors.of(paths), "", str(parts.tower)
        plan_tower(plan, tensors, prefix, parts.vision, where)

    def to_original(self, config: Any, vision_tower: str | None, where: str) -> dict[str, Any]:
        """Raises ValueError for a tower that is no CLIP, a language model that is no Llama, or a tower without a name:
        `vision_tower` is needed unless it is the one of LLaVA 1.5 and 1.6, which its sizes give away."""
        vision, text = config.vision_config, config.text_config
        if vision.model_type != "clip_vision_model" or text.model_type != "llama":
            raise UserError(
                f"{where}: LLaVA's own layout knows a CLIP tower and a Llama, found are {vision.model_type} and "
                f"{text.model_type}: choose --shape full or projector"
            )
        vision_tower = self.tower_name(vision, where) if vision_tower is None else vision_tower
        rope = dict(text.rope_parameters or {})
        theta, kind = rope.pop("rope_theta", 10000.0), rope.pop("rope_type", "default")
        keys = text.to_dict()
        own = {key: value for key in LLAMA_KEYS if (value := keys.get(key)) is not None and key != "head_dim"}
        return {
            **own,
            **self.image_keys(config),
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": "llava_llama",
            "mm_hidden_size": vision.hidden_size,
            "mm_projector_type": "mlp2x_gelu",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch" if config.vision_feature_select_strategy == "default" else "cls_patch",
            "mm_vision_select_layer": config.vision_feature_layer,
            "mm_vision_tower": vision_tower,
            "rope_scaling": {"type": kind, **rope} if kind != "default" else None,
            "rope_theta": theta,
            "use_mm_proj": True,
            # The placeholder was the first id added to the release's own vocabulary.
            "vocab_size": min(text.vocab_size, config.image_token_index),
        }

    def tower_name(self, vision: Any, where: str) -> str:
        """The name of `usual_tower`. Raises UserError for a tower of other sizes."""
        usual, name = self.usual_tower
        if (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size) != usual:
            raise UserError(f"{where}: the name of its vision tower is not known: give it with --vision_tower")
        return name

    def image_keys(self, config: Any) -> dict[str, Any]:
        """What LLaVA's config.json says of images, from transformers' config."""
        return {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"}


def plan_own_tower(plan: Plan, parts: Parts, inside: str) -> None:
    """Takes a release's own tower, which was trained with it, else its folder's. `inside`: what begins the names of
    its tensors among the release's."""
    tensors, prefix, where = parts.tensors, inside, parts.where
    if not any(name.startswith(prefix) for name in tensors.specs):
        paths = weight_files(parts.tower)
        if not paths:
            raise MissingFile(f"{where} holds no vision tower, and {parts.tower} no weights of it")
        tensors, prefix, where = Tensors.of(paths), "", str(parts.tower)
    plan_tower(plan, tensors, prefix, parts.vision, where)


def plan_tower(
    plan: Plan, tensors: Tensors, prefix: str, vision: Any, where: str, attribute: str = "vision_tower"
) -> None:
    """Takes a tower's tensors, whose names are transformers' after `prefix`, for the model's `attribute`."""
    names = {
        name.removeprefix(prefix).removeprefix("vision_model."): name
        for name in tensors.specs
        if name.startswith(f"{prefix}vision_model.") and not name.endswith("position_ids")
    }
    specs = {key: tensors.specs[name] for key, name in names.items()}
    with torch.device("meta"):
        model = AutoModel.from_config(vision)
    needed = {name.removeprefix("vision_model."): tensor for name, tensor in model.state_dict().items()}
    compare(specs, needed, "vision tower", where)
    plan.check_dtypes(specs, "vision tower", where)
    for key in needed:
        plan.take(tensors.origin[names[key]], names[key], f"{attribute}.vision_model.{key}", specs[key])


LAYOUT = LlavaLayout()
