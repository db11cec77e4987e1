"""The config of the reduced LLaVA-NeXT-Video."""

from typing import Any

from transformers import LlavaNextVideoConfig

from .configuration_reduced_llava import ReadsReleases, validate
from .positions import COMPACT


class ReducedLlavaNextVideoConfig(ReadsReleases, LlavaNextVideoConfig):
    """LlavaNextVideoConfig and the keys of ReducedLlavaConfig; the budget is per tile, and per frame of a video."""

    model_type = "reduced_llava_next_video"

    visionzip: Any = None
    shortv: Any = None
    fastv: Any = None
    positions: Any = COMPACT
    base_release: Any = None
    budgets: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        validate(self)


ReducedLlavaNextVideoConfig.register_for_auto_class()
