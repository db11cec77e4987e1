"""The config of a reduced Mini-Gemini (MGM): a LLaVA with a second tower for detail (arXiv 2403.18814)."""

from typing import Any

from transformers import ConvNextConfig

from .configuration_pruning import is_whole
from .configuration_reduced_llava import ReducedLlavaConfig
from .errors import ReductionError


def tiles_of(config: Any) -> int:
    """How many views of an image go through CLIP: one, or a grid's tiles, and with `image_global` the whole image."""
    return int(config.image_grid) ** 2 + (config.image_grid > 1 and config.image_global)


def validate_mini_gemini(config: Any) -> None:
    """Refuses sizes between which no patch has a window of its own, and what Mini-Gemini has no such thing of.

    Raises:
        ReductionError: with the key, its value and what is needed.
    """
    vision, aux = config.vision_config, config.aux_config
    if vision.model_type != "clip_vision_model":
        raise ReductionError(
            f"vision_config: the tower is a {vision.model_type}; Mini-Gemini's is a clip_vision_model"
        )
    if not isinstance(aux, ConvNextConfig):
        raise ReductionError(f"aux_config is {aux!r}; needed is the config of the ConvNeXt (model_type convnext)")
    for key, least in (("image_grid", 1), ("image_size_aux", 1)):
        value = getattr(config, key)
        if not is_whole(value) or value < least:
            raise ReductionError(f"{key} is {value!r}; it must be a whole number from {least}")
    if not is_whole(config.vision_feature_layer) or config.vision_feature_select_strategy != "default":
        raise ReductionError(
            f"vision_feature_layer is {config.vision_feature_layer!r} and vision_feature_select_strategy "
            f"{config.vision_feature_select_strategy!r}; Mini-Gemini mines for the patches of one layer, without CLS: "
            "needed are a whole number and 'default'"
        )
    side, stride = vision.image_size // vision.patch_size, aux.patch_size * config.image_grid
    if config.image_size_aux % (stride * side):
        raise ReductionError(
            f"image_size_aux is {config.image_size_aux}; every patch needs a window of its own in the "
            f"ConvNeXt's features: a multiple of {stride * side} is needed ({side} patches in a row of a tile, "
            f"{config.image_grid} tiles in a row, a feature every {aux.patch_size} pixels)"
        )
    if config.visionzip is not None and config.visionzip.get("method") == "downsample":
        raise ReductionError(
            "visionzip: method downsample makes the image smaller before the tower, and Mini-Gemini's patches would "
            "lose their windows in the high resolution: choose another method, such as pool"
        )


class ReducedMiniGeminiConfig(ReducedLlavaConfig):
    """ReducedLlavaConfig and Mini-Gemini's own keys; the budget is per tile (one, unless `image_grid` is above 1).

    Args:
        aux_config: of the ConvNeXt.
        image_size_aux: pixels of a side of the image that the ConvNeXt sees, from which CLIP's view is made.
        image_grid: CLIP sees the image as so many tiles in a row and a column (2 in the HD releases).
        image_global: with tiles, CLIP sees the whole image too.

    Raises:
        ReductionError: see `validate` and `validate_mini_gemini`.
    """

    model_type = "reduced_mini_gemini"

    aux_config: Any = None
    image_size_aux: Any = 768
    image_grid: Any = 1
    image_global: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.aux_config is None:
            # ConvNeXt-L, which every release has.
            self.aux_config = ConvNextConfig(hidden_sizes=[192, 384, 768, 1536], depths=[3, 3, 27, 3])
        elif isinstance(self.aux_config, dict):
            self.aux_config = ConvNextConfig(**self.aux_config)
        super().__post_init__(**kwargs)
        validate_mini_gemini(self)


ReducedMiniGeminiConfig.register_for_auto_class()
