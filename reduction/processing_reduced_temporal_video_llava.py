"""The processor of the reduced Video-LLaVA: images padded to a square, frames as its authors' code makes them.

What their code does to frames at random, at inference too (every other video is mirrored), is left out.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from .configuration_pruning import is_whole
from .errors import ReductionError
from .processing_reduced_video_llava import ReducedVideoLlavaProcessor


class ReducedTemporalVideoLlavaProcessor(ReducedVideoLlavaProcessor):
    """As ReducedVideoLlavaProcessor; videos have `video_frames` frames.

    Args:
        video_frames: of a video, as the config has it.

    Raises:
        ValueError: `video_frames` is no whole number from 1, or what ReducedVideoLlavaProcessor refuses.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = 14,
        vision_feature_select_strategy: str | None = "default",
        chat_template: str | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        num_additional_image_tokens: int = 1,
        visionzip: dict[str, int] | None = None,
        video_frames: int = 8,
        **kwargs: Any,
    ) -> None:
        if not is_whole(video_frames) or video_frames < 1:
            raise ReductionError(f"processor: video_frames is {video_frames!r}; it must be a whole number from 1")
        self.video_frames = video_frames
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            video_token=video_token,
            num_additional_image_tokens=num_additional_image_tokens,
            visionzip=visionzip,
            **kwargs,
        )

    def video_processor(self, videos: list[Any], **kwargs: Any) -> Tensor:
        """As ReducedVideosProcessorMixin's; other numbers of frames than `video_frames` are refused."""
        for video in videos:
            if len(video) != self.video_frames:
                raise ReductionError(
                    f"a video has {len(video)} frames, and this model reads {self.video_frames}: sample them evenly, "
                    f"such as np.linspace(0, length - 1, {self.video_frames}).astype(int)"
                )
        return super().video_processor(videos, **kwargs)

    def _frame_processor(self) -> Any:
        images = self.image_processor
        return _Frames(images.crop_size["height"], images.image_mean, images.image_std)


class _Frames:
    """Frames as the authors' code makes them of a video: normalised, then resized without antialiasing (bilinear) to a
    short side of `side`, then the middle."""

    def __init__(self, side: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.side = side
        self.mean, self.std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))

    def to_json_string(self) -> str:
        return json.dumps(
            {"side": self.side, "mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}
        )

    def __call__(self, frames: list[Image.Image], **kwargs: Any) -> dict[str, Tensor]:
        """`pixel_values` [F, 3, S, S] float32, of frames of one size."""
        pixels = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).permute(0, 3, 1, 2)
        pixels = (pixels / 255.0 - self.mean) / self.std
        height, width = pixels.shape[-2:]
        if width < height:
            size = (math.floor(height / width * self.side), self.side)
        else:
            size = (self.side, math.floor(width / height * self.side))
        pixels = interpolate(pixels, size=size, mode="bilinear", align_corners=False)
        top, left = (round((length - self.side) / 2.0) for length in size)
        return {"pixel_values": pixels[..., top : top + self.side, left : left + self.side]}


ReducedTemporalVideoLlavaProcessor.register_for_auto_class("AutoProcessor")
