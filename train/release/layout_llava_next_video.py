"""LLaVA-NeXT-Video's original layout: LLaVA-NeXT's with `mm_resampler_type: spatial_pool` for videos.

Names of tensors are those of transformers' conversion of the authors' releases. Keys of config.json are those of the
authors' training code: no release was at hand, so that a release may say less than is read here (unconfirmed).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import LlavaNextImageProcessorPil, LlavaNextVideoConfig

from shortzip.data.errors import UserError
from shortzip.train.release.conversion_plan import Plan
from shortzip.train.release.layout_llava import LlavaLayout, plan_own_tower
from shortzip.train.release.layout_llava_next import LlavaNextLayout, pinpoints, plan_newline
from shortzip.train.release.layouts import Parts
from shortzip.train.release.original_layout import IMAGE_TOKEN, VIDEO_TOKEN, Vocabulary, read_vocabulary
from shortzip.train.release.plain_processor import PlainProcessor

POOLED = "spatial_pool"
MODES = ("average", "max")  # a third one, conv, has weights of its own
STRIDE = 2  # transformers' processor writes a quarter of a frame's patches, whatever the config says


class LlavaNextVideoLayout(LlavaNextLayout):
    """As LLaVA-NeXT's, with frames that are pooled, and the tower in the release."""

    config_class: Any = LlavaNextVideoConfig
    architecture = "LlavaNextVideoForConditionalGeneration"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return LlavaLayout.recognises(self, config) and config.get("mm_resampler_type") == POOLED

    def check(self, config: Mapping[str, Any], where: str) -> None:
        super().check({**config, "mm_resampler_type": None}, where)
        mode, stride = config.get("mm_spatial_pool_mode", MODES[0]), config.get("mm_spatial_pool_stride", STRIDE)
        if mode not in MODES:
            raise UserError(f"{where}: mm_spatial_pool_mode is {mode!r}, known are {', '.join(MODES)}")
        if stride != STRIDE:
            raise UserError(
                f"{where}: mm_spatial_pool_stride is {stride!r}, needed is {STRIDE}: transformers' LLaVA-NeXT-Video "
                "counts a quarter of a frame's patches"
            )

    def vocabulary(self, folder: Path, rows: int) -> Vocabulary:
        """The video's placeholder comes first, as in transformers' releases."""
        return read_vocabulary(folder, rows, (VIDEO_TOKEN, IMAGE_TOKEN))

    def more_config(self, parts: Parts) -> dict[str, Any]:
        return {
            **super().more_config(parts),
            "video_token_index": parts.vocabulary.tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
            "spatial_pool_mode": parts.original.get("mm_spatial_pool_mode", MODES[0]),
            "spatial_pool_stride": STRIDE,
        }

    def build_processor(self, parts: Parts, pixels: dict[str, Any], arguments: dict[str, Any]) -> Any:
        images = LlavaNextImageProcessorPil(**pixels, image_grid_pinpoints=pinpoints(parts.original, parts.where))
        own = {**arguments, "image_token": IMAGE_TOKEN, "video_token": VIDEO_TOKEN}
        tokenizer, template = own.pop("tokenizer"), own.pop("chat_template")
        return PlainProcessor("LlavaNextVideo", tokenizer, images, own, template, image_stem="LlavaNext")

    def plan_rest(self, plan: Plan, parts: Parts) -> None:
        """The newline, and the tower: the release's own, as transformers' conversion takes it, else its folder's."""
        plan_newline(plan, parts)
        plan_own_tower(plan, parts, self.tower_inside)

    def image_keys(self, config: Any) -> dict[str, Any]:
        return {
            **super().image_keys(config),
            "mm_resampler_type": POOLED,
            "mm_spatial_pool_mode": config.spatial_pool_mode,
            "mm_spatial_pool_out_channels": config.vision_config.hidden_size,
            "mm_spatial_pool_stride": config.spatial_pool_stride,
        }

    def to_original(self, config: Any, vision_tower: str | None, where: str) -> dict[str, Any]:
        original = super().to_original(config, vision_tower, where)
        return {**original, "vocab_size": min(original["vocab_size"], config.video_token_index)}


LAYOUT = LlavaNextVideoLayout()
