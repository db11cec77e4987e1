"""LLaVA-NeXT's original layout: LLaVA's with `image_aspect_ratio: anyres`, a grid and a newline."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from transformers import LlavaNextConfig, LlavaNextImageProcessorPil, LlavaNextProcessor

from shortzip.data.errors import UserError
from shortzip.train.release.conversion_plan import Plan
from shortzip.train.release.layout_llava import NEWLINE, LlavaLayout
from shortzip.train.release.layouts import Parts


class LlavaNextLayout(LlavaLayout):
    """As LLaVA-1.5's, with tiles."""

    config_class: Any = LlavaNextConfig
    architecture = "LlavaNextForConditionalGeneration"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return super().recognises(config) and config.get("image_aspect_ratio") == "anyres"

    def more_config(self, parts: Parts) -> dict[str, Any]:
        return {"image_grid_pinpoints": pinpoints(parts.original, parts.where)}

    def build_processor(self, parts: Parts, pixels: dict[str, Any], arguments: dict[str, Any]) -> Any:
        grid = pinpoints(parts.original, parts.where)
        return LlavaNextProcessor(LlavaNextImageProcessorPil(**pixels, image_grid_pinpoints=grid), **arguments)

    def plan_rest(self, plan: Plan, parts: Parts) -> None:
        plan_newline(plan, parts)
        super().plan_rest(plan, parts)

    def image_keys(self, config: Any) -> dict[str, Any]:
        return {
            "image_aspect_ratio": "anyres",
            "mm_patch_merge_type": "spatial_unpad",
            "image_grid_pinpoints": config.image_grid_pinpoints,
        }


def plan_newline(plan: Plan, parts: Parts) -> None:
    """Takes image_newline. Raises UserError for a release without it."""
    tensors = parts.tensors
    if NEWLINE not in tensors.specs:
        raise UserError(f"{parts.where}: image_aspect_ratio is anyres, but {NEWLINE} is missing")
    plan.take(tensors.origin[NEWLINE], NEWLINE, "image_newline", tensors.specs[NEWLINE])


def pinpoints(config: Mapping[str, Any], where: str) -> list[list[int]]:
    """The grids of an original config, which may be written as text."""
    pinpoints = config.get("image_grid_pinpoints")
    if isinstance(pinpoints, str):
        try:
            pinpoints = ast.literal_eval(pinpoints)
        except (ValueError, SyntaxError) as error:
            raise UserError(f"{where}: image_grid_pinpoints {pinpoints!r} is no list of sizes") from error
    if not pinpoints:
        raise UserError(f"{where}: image_aspect_ratio is anyres, but image_grid_pinpoints is missing")
    return [[int(side) for side in size] for size in pinpoints]


LAYOUT = LlavaNextLayout()
