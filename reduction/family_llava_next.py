"""LLaVA-NeXT: the whole image and tiles of it, a newline after each row of patches."""

from typing import Any, ClassVar

from .families import Family
from .family_llava import SIZES_7B, SIZES_13B

_NEXT = ("llava_next.image_processing_pil_llava_next", "LlavaNextImageProcessorPil")


class LlavaNext(Family):
    """A base tile and tiles of the grid that fits the image best."""

    name = "llava_next"
    title = "LLaVA-NeXT"
    model_type = "llava_next"
    stem = "LlavaNext"
    configuration = "configuration_reduced_llava"
    modeling = "modeling_reduced_llava_next"
    processing = "processing_reduced_llava"
    usual_tiles = 5
    counts_by_size = True
    releases: ClassVar = {
        "llava-next-7b": ("LlamaConfig", SIZES_7B),
        "llava-next-13b": ("LlamaConfig", SIZES_13B),
        "llava-next-mistral-7b": (
            "MistralConfig",
            {**SIZES_7B, "intermediate_size": 14336, "num_key_value_heads": 8},
        ),
    }
    image_processors: ClassVar = {"": _NEXT, "LlavaNextImageProcessor": _NEXT}

    def no_image(self, config: Any, zero: Any) -> dict[str, Any]:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        side = config.vision_config.image_size
        tiles = image_size_to_num_patches([side, side], config.image_grid_pinpoints, side)
        sizes = zero.new_tensor([[side, side]], dtype=int)
        return {"pixel_values": zero.expand(1, tiles, 3, side, side), "image_sizes": sizes}

    def own_parameters(self, config: Any) -> int:
        return config.text_config.hidden_size  # image_newline


FAMILY = LlavaNext()
