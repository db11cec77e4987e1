"""The reduced models under transformers' Auto classes: where this is imported, they need no trust_remote_code."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from .configuration_reduced_llava import ReducedLlavaConfig, ReducedLlavaNextConfig
from .modeling_reduced_llava import ReducedLlavaForConditionalGeneration, VisualTokens
from .modeling_reduced_llava_next import ReducedLlavaNextForConditionalGeneration
from .processing_reduced_llava import ReducedLlavaNextProcessor, ReducedLlavaProcessor

for _config, _model, _processor in (
    (ReducedLlavaConfig, ReducedLlavaForConditionalGeneration, ReducedLlavaProcessor),
    (ReducedLlavaNextConfig, ReducedLlavaNextForConditionalGeneration, ReducedLlavaNextProcessor),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForImageTextToText.register(_config, _model, exist_ok=True)
    AutoProcessor.register(_config, _processor, exist_ok=True)

__all__ = [
    "ReducedLlavaConfig",
    "ReducedLlavaForConditionalGeneration",
    "ReducedLlavaNextConfig",
    "ReducedLlavaNextForConditionalGeneration",
    "ReducedLlavaNextProcessor",
    "ReducedLlavaProcessor",
    "VisualTokens",
]
