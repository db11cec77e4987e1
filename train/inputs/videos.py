"""How many frames of a video are seen: what a config says, or as the family's releases were trained."""

from __future__ import annotations

from typing import Any

from shortzip.data.supervision import takes_videos
from shortzip.data.videos import Sampling
from shortzip.reduction.families import family_of_processor
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.config import DataConfig


def sampling_of(processor: Any, frames: int | None = None, fps: float | None = None) -> Sampling | None:
    """The sampling for a processor's family; None for one that takes no videos, of which nothing is asked then.

    Raises ReductionError for a number of frames that the family does not read.
    """
    family = family_of_processor(processor)
    if not family.video_frames and frames is None and fps is None:
        return None
    sampling = Sampling(family.check_frames(frames, processor), fps)
    if fps is not None and not family.any_frames:
        raise ConfigError(
            f"data.video_fps is {fps}: a {family.title} reads {sampling.frames} frames of every video: set it to null"
        )
    return sampling


def visual_tokens_of(processor: Any) -> list[int]:
    """The ids of placeholders: of images, and of videos where the processor's family takes them."""
    image = [processor.image_token_id]
    return [*image, processor.video_token_id] if takes_videos(processor) else image


def configured_sampling(config: DataConfig, processor: Any) -> Sampling | None:
    """As `sampling_of`, of a run's data."""
    return sampling_of(processor, config.video_frames, config.video_fps)
