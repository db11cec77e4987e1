"""Video-LLaVA's own release layout: LLaVA's with two towers of LanguageBind in the release itself.

Their sizes are in the folders that the release names, under LanguageBind's config; their weights have CLIP's names,
and beside them, in the video tower, those of the attention over time. No tensor of either is ever left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaImageProcessorPil
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from shortzip.data.errors import MissingFile, UserError
from shortzip.data.files import read_json
from shortzip.reduction.configuration_reduced_temporal_video_llava import ReducedTemporalVideoLlavaConfig
from shortzip.reduction.processing_reduced_temporal_video_llava import ReducedTemporalVideoLlavaProcessor
from shortzip.reduction.temporal_tower import TemporalTower
from shortzip.train.release.conversion_plan import Plan, Tensors, compare
from shortzip.train.release.layout_llava import LlavaLayout
from shortzip.train.release.layouts import Parts
from shortzip.train.release.original_layout import (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    Vocabulary,
    check_original_config,
    check_sizes,
    read_vocabulary,
)
from shortzip.train.release.tensor_files import weight_files

VIDEO_TOWER = "LanguageBind/LanguageBind_Video_merge"
IMAGE_INSIDE = "model.image_tower.image_tower."
VIDEO_INSIDE = "model.video_tower.video_tower."
_TOWER_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)
_OF_TOWERS = (*_TOWER_SIZES, "hidden_act")
_MORE_OF_TOWERS = ("layer_norm_eps", "attention_dropout", "projection_dim")


class TemporalVideoLlavaLayout(LlavaLayout):
    """As LLaVA-1.5's, with `mm_image_tower` and `mm_video_tower` for `mm_vision_tower`."""

    command = "videollava.serve.cli", "--file FILE"
    config_class = ReducedTemporalVideoLlavaConfig
    architecture = "TemporalVideoLlavaForConditionalGeneration"
    usual_tower = (1024, 24, 224, 14), "LanguageBind/LanguageBind_Image"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return "mm_video_tower" in config

    def check(self, config: Mapping[str, Any], where: str) -> None:
        for key in ("mm_image_tower", "mm_video_tower"):
            if not config.get(key):
                raise UserError(
                    f"{where}: {key} in config.json is {config.get(key)!r}; needed is a Video-LLaVA with a tower for "
                    "images and one for videos, such as LanguageBind/Video-LLaVA-7B"
                )
        check_original_config({**config, "mm_vision_tower": config["mm_image_tower"]}, where)

    def tower_names(self, config: Mapping[str, Any]) -> list[str]:
        return [str(config[key]) for key in ("mm_image_tower", "mm_video_tower") if config.get(key)]

    def is_language(self, name: str) -> bool:
        return super().is_language(name) and not name.startswith((IMAGE_INSIDE, VIDEO_INSIDE))

    def vocabulary(self, folder: Path, rows: int) -> Vocabulary:
        return read_vocabulary(folder, rows, (IMAGE_TOKEN, VIDEO_TOKEN))

    def tower_config(self, folder: Path) -> CLIPVisionConfig:
        part = _vision_part(folder)
        return CLIPVisionConfig(**{key: part[key] for key in (*_OF_TOWERS, *_MORE_OF_TOWERS) if key in part})

    def more_config(self, parts: Parts) -> dict[str, Any]:
        frames, vision = _frames(parts), parts.vision
        tokens: Any = (vision.image_size // vision.patch_size) ** 2 + 1
        return {
            "video_token_index": parts.vocabulary.tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
            "video_frames": frames,
            "video_seq_length": frames * tokens,
        }

    def processor(self, parts: Parts) -> Any:
        """CLIP's pixels at the towers' size, of images padded to a square where the release was trained so."""
        side: Any = parts.vision.image_size
        images = LlavaImageProcessorPil(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            resample=3,
            image_mean=OPENAI_CLIP_MEAN,
            image_std=OPENAI_CLIP_STD,
            do_pad=parts.original.get("image_aspect_ratio") == "pad",
        )
        return ReducedTemporalVideoLlavaProcessor(
            images,
            parts.vocabulary.tokenizer,
            patch_size=parts.vision.patch_size,
            vision_feature_select_strategy=self.strategy(parts.original),
            chat_template=self.template.read_text(encoding="utf-8"),
            video_frames=_frames(parts),
        )

    def plan_rest(self, plan: Plan, parts: Parts) -> None:
        """Both towers: those in the release, which holds them, else those in their folders."""
        vision: Any = parts.vision
        with torch.device("meta"):
            image_tower, video_tower = CLIPVisionModel(vision), TemporalTower(vision, _frames(parts))
        _plan_tower(plan, parts, IMAGE_INSIDE, parts.tower, image_tower, "image_tower")
        _plan_tower(plan, parts, VIDEO_INSIDE, parts.more_towers[0], video_tower, "video_tower")

    def to_original(self, config: Any, vision_tower: str | None, where: str) -> dict[str, Any]:
        found = super().to_original(config, vision_tower, where)
        return {
            **{key: value for key, value in found.items() if key != "mm_vision_tower"},
            "model_type": "llava",
            "mm_image_tower": found["mm_vision_tower"],
            "mm_video_tower": VIDEO_TOWER,
        }

    def image_keys(self, config: Any) -> dict[str, Any]:
        return {"image_aspect_ratio": "pad"}


def _vision_part(folder: Path) -> dict[str, Any]:
    """What a tower's config.json says of its vision. Raises UserError where sizes are not there."""
    path = folder / "config.json"
    config = read_json(path)
    part = config.get("vision_config", config)
    if not isinstance(part, dict):
        raise UserError(f"{path}: vision_config is {part!r}, needed is an object")
    missing = [key for key in _OF_TOWERS if part.get(key) is None]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)} (in vision_config); sizes are never guessed")
    check_sizes(part, _TOWER_SIZES, str(path))
    return part


def _frames(parts: Parts) -> int:
    """Frames of a video, by the video tower's config, which must be the image tower's in all else.

    Raises:
        UserError: towers of different sizes, or a video tower that does not attend over time.
    """
    if not parts.more_towers:
        raise UserError(
            f"{parts.where}: the folder of its video tower (mm_video_tower) is needed beside {parts.tower}"
        )
    image, video = _vision_part(parts.tower), _vision_part(parts.more_towers[0])
    path = parts.more_towers[0] / "config.json"
    for key in (*_OF_TOWERS, "layer_norm_eps"):
        if image.get(key) != video.get(key):
            raise UserError(
                f"{path}: {key} is {video.get(key)!r}, in {parts.tower} it is {image.get(key)!r}: one projector reads "
                "both towers, and one config describes them"
            )
    check_sizes(video, ("num_frames",), str(path))
    frames = video.get("num_frames")
    if not video.get("add_time_attn") or frames is None:
        raise UserError(
            f"{path}: add_time_attn is {video.get('add_time_attn')!r} and num_frames {frames!r}; needed is "
            "Video-LLaVA's tower, which attends over time (LanguageBind/LanguageBind_Video_merge)"
        )
    return int(frames)


def _plan_tower(plan: Plan, parts: Parts, inside: str, folder: Path, module: torch.nn.Module, attribute: str) -> None:
    """Takes all tensors of a tower, and leaves none out. `inside`: before their names in the release."""
    tensors, prefix, where, part = parts.tensors, inside, parts.where, attribute.replace("_", " ")
    if not any(name.startswith(prefix) for name in tensors.specs):
        paths = weight_files(folder)
        if not paths:
            raise MissingFile(f"{where} holds no {part} ({inside}*), and {folder} no weights of it")
        tensors, prefix, where = Tensors.of(paths), "vision_model.", str(folder)
    names = {
        name.removeprefix(prefix): name
        for name in tensors.specs
        if name.startswith(prefix) and not name.endswith("position_ids")
    }
    needed = {name.removeprefix("vision_model."): tensor for name, tensor in module.state_dict().items()}
    specs = {short: tensors.specs[name] for short, name in names.items()}
    compare(specs, needed, part, where)
    extra = sorted(set(specs) - set(needed))
    if extra:
        raise UserError(
            f"{where}: the {part} has {len(extra)} tensors that its config.json ({folder}) knows no place for, such "
            f"as {', '.join(extra[:3])}, and none is ever left out: give the folder of the tower that belongs to it"
        )
    plan.check_dtypes(specs, part, where)
    for short in needed:
        plan.take(tensors.origin[names[short]], names[short], f"{attribute}.vision_model.{short}", specs[short])


LAYOUT = TemporalVideoLlavaLayout()
