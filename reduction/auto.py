"""The reduced models under transformers' Auto classes: where this is imported, they need no trust_remote_code."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .configuration_reduced_llava import ReducedLlavaConfig, ReducedLlavaNextConfig
from .modeling_reduced_llava import ReducedLlavaForConditionalGeneration, ReducedLlavaModel, VisualTokens
from .modeling_reduced_llava_next import ReducedLlavaNextForConditionalGeneration, ReducedLlavaNextModel
from .processing_reduced_llava import ReducedLlavaNextProcessor, ReducedLlavaProcessor

for _config, _model, _headless, _processor in (
    (ReducedLlavaConfig, ReducedLlavaForConditionalGeneration, ReducedLlavaModel, ReducedLlavaProcessor),
    (
        ReducedLlavaNextConfig,
        ReducedLlavaNextForConditionalGeneration,
        ReducedLlavaNextModel,
        ReducedLlavaNextProcessor,
    ),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _headless, exist_ok=True)
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
