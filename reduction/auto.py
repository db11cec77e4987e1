"""The reduced models under transformers' Auto classes: where this is imported, they need no trust_remote_code."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .families import all_families
from .modeling_reduced_llava import VisualTokens  # noqa: F401

for _family in all_families():
    AutoConfig.register(_family.config_class.model_type, _family.config_class, exist_ok=True)
    AutoModel.register(_family.config_class, _family.headless_class, exist_ok=True)
    AutoModelForImageTextToText.register(_family.config_class, _family.model_class, exist_ok=True)
    AutoProcessor.register(_family.config_class, _family.processor_class, exist_ok=True)
    for _class in (_family.config_class, _family.model_class, _family.processor_class):
        globals()[_class.__name__] = _class
