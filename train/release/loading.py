"""Loading the reduced model of a release, with its processor."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from shortzip.data.errors import MissingExtra
from shortzip.reduction.configuration_reduced_llava import validate
from shortzip.reduction.families import Family, family_of
from shortzip.reduction.reductions import Reductions
from shortzip.train.release.opening import Release, model_classes, open_release, release_projector, understood
from shortzip.train.release.processors import release_processor
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.release.tensor_files import weight_files
from shortzip.train.release.towers import leave_out_towers, load_tower, towerless

LONG_LOAD = 1_000_000_000  # bytes of weights


def load_release(
    release: str | ReleaseSpec | Release, reductions: Reductions | None = None, *, with_tower: bool = True
) -> tuple[Any, Any]:
    """The reduced model of any release, with its processor.

    `reductions`: None takes what a reduced checkpoint was saved with, which is nothing for other releases.
    `with_tower` False: for cached features, without reading the tower's weights. Raises ImportError for 4 bits without
    bitsandbytes, and what `open_release` raises.

    The processor writes as many placeholders as the model fills, pads images as the release was trained (PIL backend),
    and carries the chat template to train with.
    """
    if not isinstance(release, Release):
        release = open_release(release)
    spec = release.spec
    if reductions is None:
        reductions = release.saved_reductions
    _, model_class, _ = model_classes(release.config["model_type"])
    with _bar_if_long(release.folder), understood(release.folder):
        model = (model_class if with_tower else towerless(model_class)).from_pretrained(
            release.folder,
            dtype=spec.dtype,
            attn_implementation=spec.attn_implementation,
            trust_remote_code=False,
            **reductions.as_config(),
            **(
                {"quantization_config": _four_bit(spec.dtype, family_of(release.config["model_type"]))}
                if spec.load_in_4bit
                else {}
            ),
        )
    lay_projector(model, release_projector(release))
    return model.eval(), release_processor(release, model.config)


def share_weights(model: Any, reductions: Reductions, projector: Mapping[str, torch.Tensor] | None = None) -> Any:
    """A model with the weights of a loaded one and other `reductions`, in eval mode; no weight is read or copied.

    `projector`: tensors as `lay_projector` takes them, for a projector of its own. Raises ReductionError for
    reductions that the model cannot take.
    """
    config = copy.deepcopy(model.config)
    for key, value in reductions.as_config().items():
        setattr(config, key, value)
    with torch.device("meta"):
        other = type(model)(config)
    for name, module in model.named_modules(remove_duplicate=False):
        if next(module.children(), None) is None:
            other.set_submodule(name, module)  # itself, for in 4 bits it is of another class
        else:
            counterpart = other.get_submodule(name)
            counterpart._parameters.update(module._parameters)
            counterpart._buffers.update(module._buffers)
    other.generation_config = model.generation_config
    if projector is not None:
        other.model.multi_modal_projector = copy.deepcopy(model.model.multi_modal_projector)
        lay_projector(other, projector)
    return other.eval()


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


def load_viewer(release: Release, reductions: Reductions | None = None) -> tuple[Any, Any]:
    """A model that chooses visual tokens and can do nothing else, with its processor: of its weights, only the tower's
    are read, in float32. `reductions`: as of `load_release`, and as it refuses; those inside the LLM are left out."""
    reductions = (release.saved_reductions if reductions is None else reductions).before_the_llm
    if not weight_files(release.folder):  # a projector alone, whose release transformers finds
        return load_release(release, reductions)
    _, model_class, _ = model_classes(release.config["model_type"])
    config = reduced_config(release, reductions)
    with torch.device("meta"):
        model = model_class(config)
    leave_out_towers(model)  # of several the others too: the model's first weights, which tell its device, are there
    model.model.vision_tower = load_tower(release.folder, config, torch.float32)
    if family_of(config.model_type).untuned_parts("projector"):  # which its visual tokens pass through
        model.model.multi_modal_projector.to_empty(device="cpu")
        lay_projector(model, release_projector(release))
    return model.eval(), release_processor(release, config)


@contextmanager
def _bar_if_long(folder: Path) -> Iterator[None]:
    """Keeps transformers' bar for the loading of weights where it would only flash by."""
    was_enabled = is_progress_bar_enabled()
    if sum(path.stat().st_size for path in weight_files(folder)) < LONG_LOAD:
        disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            enable_progress_bar()


def _four_bit(dtype: torch.dtype, family: Family) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra("load_in_4bit needs bitsandbytes: pip install 'shortzip[4bit]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # Named from the root: the projector is trained, and the tower and the head are small beside the layers.
        llm_int8_skip_modules=["model.multi_modal_projector", *(f"model.{name}" for name in family.towers), "lm_head"],
    )


def lay_projector(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts `linear_1.weight` … into the model's projector, in float32 whatever the rest is in."""
    projector = model.model.multi_modal_projector
    projector.to(torch.float32)
    projector.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})


def load_processor(release: Release, reductions: Reductions | None = None) -> Any:
    """The processor that `load_release` gives with the model for these arguments, without reading weights."""
    return release_processor(release, reduced_config(release, reductions))
