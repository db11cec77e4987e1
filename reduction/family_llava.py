"""LLaVA-1.5, and what is built like it: llava-interleave-qwen has SigLIP for CLIP and Qwen2 for Vicuna."""

from collections.abc import Mapping
from typing import Any, ClassVar

from .families import Family

SIZES_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
SIZES_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
_LLAVA = ("llava.image_processing_pil_llava", "LlavaImageProcessorPil")
_SIGLIP = ("siglip.image_processing_pil_siglip", "SiglipImageProcessorPil")


class Llava(Family):
    """One tile per image, one projected token per patch."""

    name = "llava"
    title = "LLaVA-1.5"
    model_type = "llava"
    stem = "Llava"
    configuration = "configuration_reduced_llava"
    modeling = "modeling_reduced_llava"
    processing = "processing_reduced_llava"
    releases: ClassVar = {"llava-1.5-7b": ("LlamaConfig", SIZES_7B), "llava-1.5-13b": ("LlamaConfig", SIZES_13B)}
    image_processors: ClassVar = {
        "": _LLAVA,
        "LlavaImageProcessor": _LLAVA,
        "CLIPImageProcessor": _LLAVA,
        "CLIPFeatureExtractor": _LLAVA,
        "SiglipImageProcessor": _SIGLIP,
        "SiglipFeatureExtractor": _SIGLIP,
    }

    def image_processor(self, kind: str, settings: Mapping[str, Any]) -> Any:
        """LLaVA-1.5 releases in transformers' format ship `CLIPImageProcessor`, which crops the centre and ignores
        `do_pad` in silence, where LLaVA pads to a square with the mean colour."""
        if kind.startswith("CLIP"):
            settings = {**settings, "do_pad": True}
        elif not kind.startswith("Siglip"):
            settings = {"do_pad": kind == "", **settings}
        return super().image_processor(kind, settings)


FAMILY = Llava()
