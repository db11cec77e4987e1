"""The projector, the one part that is tuned: in float32, whatever the rest of the model is loaded and computed in."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import load_state_dict
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from .errors import ReductionError

PROJECTOR = "multi_modal_projector"


class DtypeProjector(LlavaMultiModalProjector):
    """LLaVA's projector in a dtype of its own: float32 where it was tuned, whatever the tower computes in."""

    def forward(self, image_features: Tensor) -> Tensor:
        dtype = self.linear_1.weight.dtype
        return super().forward(image_features.to(dtype) if dtype.is_floating_point else image_features)


def was_reduced(config: Any) -> bool:
    """Whether a checkpoint was saved by a reduced class, and not by transformers' own."""
    return any(name.startswith("Reduced") for name in config.architectures or ())


def settle_projector(model: Any) -> None:
    """Casts a projector that came in the dtype of its file to the model's, unless it is in float32, as if tuned."""
    dtype = model.config.dtype
    for parameter in model.model.multi_modal_projector.parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32 and not parameter.is_meta:
            parameter.data = parameter.data.to(dtype)


def load_projector(model: Any, path: Path) -> None:
    """Puts a projector's file into a loaded model, whose config then names no base any more: it is whole. What the
    file holds in float32 stays float32.

    Raises:
        ValueError: tensors that do not fit, or a projector that is quantised or offloaded.
    """
    projector = model.model.multi_modal_projector
    for name, parameter in projector.named_parameters():
        if parameter.is_meta or not parameter.dtype.is_floating_point:
            raise ReductionError(
                f"the projector's {name} is {'offloaded' if parameter.is_meta else parameter.dtype}: the tuned one "
                "cannot be laid over it; leave it out (llm_int8_skip_modules=['model.multi_modal_projector'], or a "
                "device_map that keeps model.multi_modal_projector on a device), or load a full checkpoint"
            )
    tensors = load_state_dict(str(path))
    if {tensor.dtype for tensor in tensors.values()} == {torch.float32}:
        projector.to(torch.float32)
    try:
        projector.load_state_dict({name.rsplit(f"{PROJECTOR}.", 1)[-1]: t for name, t in tensors.items()})
    except RuntimeError as error:
        raise ReductionError(f"{path} does not fit the release's projector: {error}") from error
    model.config.base_release = None
