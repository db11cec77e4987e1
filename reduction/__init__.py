"""What happens to visual tokens: VisionZip, ShortV and the transformers classes that carry them."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from .configuration_reduced_llava import ReducedLlavaConfig
from .modeling_reduced_llava import ReducedLlavaForConditionalGeneration, VisualTokens
from .processing_reduced_llava import ReducedLlavaProcessor

# Where ShortZip is installed, transformers' Auto classes know its models without trust_remote_code.
AutoConfig.register(ReducedLlavaConfig.model_type, ReducedLlavaConfig, exist_ok=True)
AutoModelForImageTextToText.register(ReducedLlavaConfig, ReducedLlavaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(ReducedLlavaConfig, ReducedLlavaProcessor, exist_ok=True)

__all__ = [
    "ReducedLlavaConfig",
    "ReducedLlavaForConditionalGeneration",
    "ReducedLlavaProcessor",
    "VisualTokens",
]
