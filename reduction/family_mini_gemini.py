"""Mini-Gemini (MGM): a LLaVA whose patches mine a second tower's features of the image in high resolution."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from .families import Family
from .family_llava import SIZES_7B, SIZES_13B

_PADDED = ("llava.image_processing_pil_llava", "LlavaImageProcessorPil")


class MiniGemini(Family):
    """The tower is CLIP and a ConvNeXt together, the projector holds the mining; pixels are high-resolution ones."""

    name = "mini_gemini"
    title = "Mini-Gemini"
    model_type = "mini_gemini"
    stem = "MiniGemini"
    configuration = "configuration_reduced_mini_gemini"
    modeling = "modeling_reduced_mini_gemini"
    processing = "processing_reduced_mini_gemini"
    tunes = ("projector", "projector+mining")
    tower_keys = ("aux_config", "image_size_aux", "image_grid", "image_global")
    releases: ClassVar = {"mgm-7b": ("LlamaConfig", SIZES_7B), "mgm-13b": ("LlamaConfig", SIZES_13B)}
    image_processors: ClassVar = {"": _PADDED, "LlavaImageProcessor": _PADDED}

    @property
    def plain_config_class(self) -> Any:
        """Its own: transformers has no Mini-Gemini."""
        return self.config_class

    def image_processor(self, kind: str, settings: Mapping[str, Any]) -> Any:
        """LLaVA's, which pads to a square; settings that name none are of a release that does."""
        return super().image_processor(kind, {"do_pad": True, **settings})

    def tiles(self, config: Any) -> int:
        return int(config.image_grid) ** 2 + (config.image_grid > 1 and config.image_global)

    def untuned_parts(self, tune: str) -> tuple[str, ...]:
        return ("mining",) if tune == "projector" else ()

    def pixels(self, config: Any, tiles: int) -> int:
        return int(tiles // self.tiles(config) * config.image_size_aux**2)

    def no_image(self, config: Any, zero: Any) -> dict[str, Any]:
        side = config.image_size_aux
        return {"pixel_values": zero.expand(1, 3, side, side)}

    def build_tower(self, config: Any, name: str) -> Any:
        """Both towers, with random weights."""
        from .mini_gemini import MiniGeminiTower

        return MiniGeminiTower(config)

    def tokens_of_budgets(self, model: Any, pixel_values: Any, budgets: Sequence[dict[str, Any]]) -> list[Any]:
        found: list[Any] = model.visual_tokens_under(budgets, pixel_values)
        return found

    def own_parameters(self, config: Any) -> int:
        """The mining's: three LayerNorms and linears."""
        width, aux = config.vision_config.hidden_size, sum(config.aux_config.hidden_sizes)
        return int(2 * width + width * width + width + 2 * (2 * aux + aux * width + width))

    def more_tower_parameters(self, config: Any) -> int:
        """The ConvNeXt's."""
        aux = config.aux_config
        widths, before = list(aux.hidden_sizes), aux.num_channels
        total = 2 * widths[0]  # the stem's norm
        for stage, (width, depth) in enumerate(zip(widths, aux.depths, strict=True)):
            kernel = aux.patch_size**2 if stage == 0 else 4
            total += kernel * before * width + width + (2 * before if stage else 0)
            total += depth * (49 * width + width + 2 * width + 8 * width * width + 5 * width + width)
            before = width
        return int(total)

    def more_tower_bytes(self, config: Any, bytes_per_value: int) -> int:
        """Of one image, as they come one by one: the features twice while they are stacked, and in float32 the windows
        that are mined, before and after their norm."""
        features = (config.image_size_aux // config.aux_config.patch_size) ** 2 * sum(config.aux_config.hidden_sizes)
        return int(features * (2 * bytes_per_value + 2 * 4))

    def more_tower_flops(self, config: Any, tiles: int) -> int:
        """The ConvNeXt, once an image and whatever the budget, and the mining of every patch, folded."""
        vision, aux = config.vision_config, config.aux_config
        patches, width = (vision.image_size // vision.patch_size) ** 2, vision.hidden_size
        side, stacked = config.image_size_aux // aux.patch_size, sum(aux.hidden_sizes)
        window = (side // config.image_grid) ** 2 // patches
        convnext, before = 0, aux.num_channels
        for stage, (channels, depth) in enumerate(zip(aux.hidden_sizes, aux.depths, strict=True)):
            positions = (side >> stage) ** 2
            kernel = aux.patch_size**2 if stage == 0 else 4
            convnext += positions * (kernel * before * channels + depth * (49 * channels + 8 * channels * channels))
            before = channels
        mining = patches * (width * width + 2 * width * stacked + 2 * window * stacked)
        return int(2 * (tiles * convnext // self.tiles(config) + tiles * mining))


FAMILY = MiniGemini()
