"""Loading the reduced model of a release, with its processor."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import BitsAndBytesConfig

from shortzip.data.errors import MissingExtra
from shortzip.reduction.configuration_reduced_llava import validate
from shortzip.reduction.reductions import Reductions
from shortzip.train.release.opening import Release, model_classes, open_release, release_projector, understood
from shortzip.train.release.processors import build_processor
from shortzip.train.release.tensor_files import weight_files
from shortzip.train.release.towers import TOWERLESS, load_tower

if TYPE_CHECKING:
    from shortzip.train.release.opening import Release


def load_release(
    model: str | Release,
    reductions: Reductions | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    attn_implementation: str = "sdpa",
    mm_projector: str | None = None,
    vision_tower: str | None = None,
    load_in_4bit: bool = False,
    chat_template: str = "auto",
    with_tower: bool = True,
) -> tuple[Any, Any]:
    """The reduced model of any release, with its processor.

    `reductions`: None takes what a reduced checkpoint was saved with, which is nothing for other releases.
    `dtype` is of everything but the projector, which is float32: it is what gets tuned. `load_in_4bit`: the language
    model's layers in NF4 (ImportError without bitsandbytes). `with_tower` False: for cached features, without reading
    the tower's weights. See `open_release` for the other arguments and for what is refused.

    The processor writes as many placeholders as the model fills, pads images as the release was trained (PIL backend),
    and carries the chat template to train with.
    """
    if isinstance(model, Release):
        release = model
    else:
        release = open_release(model, revision, mm_projector=mm_projector, vision_tower=vision_tower)
    config = release.config
    if reductions is None:
        reductions = release.saved_reductions
    _, model_class, processor_class = model_classes(config["model_type"])
    with understood(release.folder):
        loaded = (model_class if with_tower else TOWERLESS[model_class]).from_pretrained(
            release.folder,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=False,
            **reductions.as_config(),
            **({"quantization_config": _four_bit(dtype)} if load_in_4bit else {}),
        )
    lay_projector(loaded, release_projector(release))
    loaded.eval()
    return loaded, build_processor(release.folder, config, processor_class, loaded.config, chat_template)


def reduced_config(release: Release, reductions: Reductions | None = None) -> Any:
    """The config of the model that `load_release` would give, without reading weights.

    Raises its ValueError for reductions that the release cannot take.
    """
    config_class, _, _ = model_classes(release.config["model_type"])
    if reductions is None:
        reductions = release.saved_reductions
    with understood(release.folder):
        config = config_class.from_pretrained(release.folder, **reductions.as_config())
    validate(config)
    return config


def dtype_of(mixed_precision: str) -> torch.dtype:
    """What `mixed_precision` ("no" or "bf16") has everything but the projector computed in."""
    return torch.bfloat16 if mixed_precision == "bf16" else torch.float32


def load_viewer(release: Release, reductions: Reductions | None = None) -> tuple[Any, Any]:
    """A model that chooses visual tokens and can do nothing else, with its processor: of its weights, only the tower's
    are read, in float32. `reductions`: as of `load_release`, and as it refuses; those inside the LLM are left out."""
    reductions = (release.saved_reductions if reductions is None else reductions).before_the_llm
    if not weight_files(release.folder):  # a projector alone, whose release transformers finds
        return load_release(release, reductions)
    _, model_class, processor_class = model_classes(release.config["model_type"])
    config = reduced_config(release, reductions)
    with torch.device("meta"):
        model = model_class(config)
    model.model.vision_tower = load_tower(release.folder, config, torch.float32)
    return model.eval(), build_processor(release.folder, release.config, processor_class, config, "auto")


def _four_bit(dtype: torch.dtype) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra("load_in_4bit needs bitsandbytes: pip install 'shortzip[4bit]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # Named from the root: the projector is trained, and the tower and the head are small beside the layers.
        llm_int8_skip_modules=["model.multi_modal_projector", "model.vision_tower", "lm_head"],
    )


def lay_projector(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts `linear_1.weight` … into the model's projector, in float32 whatever the rest is in."""
    projector = model.model.multi_modal_projector
    projector.to(torch.float32)
    projector.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})


def load_processor(release: Release, reductions: Reductions | None = None, *, chat_template: str = "release") -> Any:
    """The processor that `load_release` gives with the model for these arguments, without reading weights."""
    _, _, processor_class = model_classes(release.config["model_type"])
    model_config = reduced_config(release, reductions)
    return build_processor(release.folder, release.config, processor_class, model_config, chat_template)
