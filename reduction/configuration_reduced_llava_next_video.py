"""The config of the reduced LLaVA-NeXT-Video."""

from typing import Any

from transformers import LlavaNextVideoConfig

from .configuration_reduced_llava import as_reduced, validate
from .positions import COMPACT
from .weight_files import check_json


class ReducedLlavaNextVideoConfig(LlavaNextVideoConfig):
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

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        check_json(pretrained_model_name_or_path, ("config.json",), kwargs.get("subfolder"))
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return as_reduced(config_dict, pretrained_model_name_or_path, cls.model_type, "llava_next_video"), kwargs


ReducedLlavaNextVideoConfig.register_for_auto_class()
