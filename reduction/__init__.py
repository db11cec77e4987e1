"""What happens to visual tokens: selections, ShortV, pruning and the transformers classes that carry them.

The classes are imported when they are first asked for: a command's --help reads budgets, and needs no torch for it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_reduced_llava import ReducedLlavaConfig, ReducedLlavaNextConfig
    from .modeling_reduced_llava import ReducedLlavaForConditionalGeneration, VisualTokens
    from .modeling_reduced_llava_next import ReducedLlavaNextForConditionalGeneration
    from .processing_reduced_llava import ReducedLlavaNextProcessor, ReducedLlavaProcessor

__all__ = [
    "ReducedLlavaConfig",
    "ReducedLlavaForConditionalGeneration",
    "ReducedLlavaNextConfig",
    "ReducedLlavaNextForConditionalGeneration",
    "ReducedLlavaNextProcessor",
    "ReducedLlavaProcessor",
    "VisualTokens",
]


def __getattr__(name: str) -> Any:
    if name not in __all__ and not name.startswith("Reduced"):  # those of every family
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import auto

    return getattr(auto, name)
