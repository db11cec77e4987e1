"""The config of the reduced Video-LLaVA-hf: transformers' VideoLlava, whose video tower is a plain CLIP."""

from typing import Any

from transformers import VideoLlavaConfig

from .configuration_reduced_llava import ReadsReleases, validate
from .errors import ReductionError
from .positions import COMPACT


def validate_video_llava(config: Any) -> None:
    """As `validate`; and refuses other towers than CLIP, whose CLS every frame keeps.

    Raises:
        ValueError: with the key, its value and what is allowed.
    """
    validate(config)
    kind = config.vision_config.model_type
    if kind != "clip_vision_model":
        raise ReductionError(f"vision_config: the tower is a {kind}; Video-LLaVA's are of clip_vision_model")


class ReducedVideoLlavaConfig(ReadsReleases, VideoLlavaConfig):
    """VideoLlavaConfig and the keys of ReducedLlavaConfig; the budget is per image, and per frame of a video.

    Raises:
        ReductionError: see `validate` and `validate_video_llava`.
    """

    model_type = "reduced_video_llava"

    visionzip: Any = None
    shortv: Any = None
    fastv: Any = None
    positions: Any = COMPACT
    base_release: Any = None
    budgets: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        validate_video_llava(self)


ReducedVideoLlavaConfig.register_for_auto_class()
