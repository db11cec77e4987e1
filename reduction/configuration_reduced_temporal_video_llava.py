"""The config of the reduced Video-LLaVA, as its authors released it: the video tower attends over time."""

from typing import Any

from .configuration_pruning import is_whole
from .configuration_reduced_video_llava import ReducedVideoLlavaConfig
from .errors import ReductionError

PLAIN = "temporal_video_llava"  # without reductions; transformers has no class for it


def validate_video_frames(config: Any) -> None:
    """Refuses a number of frames that is none. Raises ReductionError."""
    if not is_whole(config.video_frames) or config.video_frames < 1:
        raise ReductionError(f"video_frames is {config.video_frames!r}; it must be a whole number from 1")


class ReducedTemporalVideoLlavaConfig(ReducedVideoLlavaConfig):
    """ReducedVideoLlavaConfig and the original's own key.

    Args:
        video_frames: frames of a video, for each of which every layer of the video tower has an embedding.

    Raises:
        ReductionError: see `validate`, `validate_video_llava` and `validate_video_frames`.
    """

    model_type = f"reduced_{PLAIN}"

    video_frames: Any = 8

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        validate_video_frames(self)


ReducedTemporalVideoLlavaConfig.register_for_auto_class()
