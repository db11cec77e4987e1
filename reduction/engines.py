"""What inference engines ask of a model that they build themselves: the class without a head, and early refusals.

vLLM's Transformers backend (docs/models/supported_models.md, "Transformers") builds `AutoModel.from_config`, with the
language model's attention set to its own and the head its own; `get_image_features` gives it an image's tokens, and
the decoder then sees embeddings alone. Not run against an engine here.
"""

from typing import Any

from .errors import ReductionError
from .shortv import SUPPORTED_ATTENTION

OFF = "switch it off where the model is loaded ({key}=None; in vLLM --hf-overrides '{{\"{key}\": null}}')"


def refuse_attention_of_engines(config: Any, text_config: Any) -> None:
    """Refuses, before any weight is loaded, a reduction in the decoder under attention that it cannot work with.

    Raises:
        ReductionError: `shortv` or `fastv`, and the attention is another than eager or SDPA, as an engine's own.
    """
    attention = text_config._attn_implementation
    for key, value in (("shortv", config.shortv), ("fastv", config.fastv)):
        if value is not None and attention is not None and attention not in SUPPORTED_ATTENTION:
            raise ReductionError(
                f"{key}: attention {attention!r} cannot leave out the queries of visual tokens: load the language "
                f"model with attn_implementation one of {list(SUPPORTED_ATTENTION)}, or {OFF.format(key=key)}"
            )


class WithoutHeadMixin:
    """Loading for `AutoModel`; goes before the transformers class.

    `with_head`: the class of the same family with a head, set where it is defined.
    """

    with_head: Any

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As the class with a head does, whose head is then left: projector-only checkpoints find their release, and
        missing weights are refused. Raises what it raises."""
        loaded = cls.with_head.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return (loaded[0].model, loaded[1]) if isinstance(loaded, tuple) else loaded.model


class NamesItsModelMixin:
    """Saving for `AutoModel`; goes before the transformers class with a head."""

    config: Any
    model: Any

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' method; `auto_map` also names the class without a head, which engines build."""
        name_model(self.config, type(self.model))
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


def name_model(config: Any, model_class: type) -> None:
    """Enters the class without a head as AutoModel in a config's `auto_map`."""
    name = f"{model_class.__module__.rpartition('.')[2]}.{model_class.__name__}"
    config.auto_map = {**(vars(config).get("auto_map") or {}), "AutoModel": name}
