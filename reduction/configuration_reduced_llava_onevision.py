"""The config of the reduced LLaVA-OneVision."""

from typing import Any

from transformers import LlavaOnevisionConfig

from .configuration_reduced_llava import ReadsReleases, validate
from .errors import ReductionError
from .positions import COMPACT


def validate_onevision(config: Any) -> None:
    """As `validate`; and refuses original positions, which a video's pooled patches do not have.

    Raises:
        ValueError: with the key, its value and what is allowed.
    """
    validate(config)
    if config.positions != COMPACT:
        raise ReductionError(
            f"positions: {config.positions!r} is not known for LLaVA-OneVision, whose videos are pooled where every "
            f"token is kept: it must be {COMPACT!r}"
        )


class ReducedLlavaOnevisionConfig(ReadsReleases, LlavaOnevisionConfig):
    """LlavaOnevisionConfig and the keys of ReducedLlavaConfig; the budget is per tile, and per frame of a video.

    `positions` is "compact".
    """

    model_type = "reduced_llava_onevision"

    visionzip: Any = None
    shortv: Any = None
    fastv: Any = None
    positions: Any = COMPACT
    base_release: Any = None
    budgets: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        validate_onevision(self)


ReducedLlavaOnevisionConfig.register_for_auto_class()
