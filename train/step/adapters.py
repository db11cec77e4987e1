"""Tuning the projector through PEFT: LoRA and its kin, saved as a standard adapter, merged when published.

Full tuning is the loop's own: PEFT refuses `modules_to_save` without a tuner.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from shortzip.data.errors import MissingExtra, UserError

if TYPE_CHECKING:
    from peft import PeftConfig

Tuning = Literal["full", "lora", "rslora", "dora", "loha", "lokr"]
TUNINGS: tuple[Tuning, ...] = get_args(Tuning)
ADAPTER_FOLDER = "adapter"
_TARGETS = r".*multi_modal_projector\.linear_[12]"


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingExtra("tuning other than full needs PEFT: pip install 'shortzip[peft]'") from error
    return peft


def adapter_config(tuning: Tuning, *, r: int, lora_alpha: float) -> PeftConfig:
    """PEFT's config for the two layers of the projector.

    Raises ValueError for an unknown `tuning` (or `full`, which needs none) and for values out of range, and
    ImportError where PEFT is not installed.
    """
    if tuning not in TUNINGS or tuning == "full":
        raise UserError(f"tuning is {tuning!r}, through PEFT there are {', '.join(TUNINGS[1:])}")
    if r < 1 or lora_alpha <= 0:
        raise UserError(f"lora_r is {r} and lora_alpha {lora_alpha}: needed are at least 1, and more than 0")
    peft = _peft()
    if tuning == "loha":
        return peft.LoHaConfig(target_modules=_TARGETS, r=r, alpha=lora_alpha)
    if tuning == "lokr":
        return peft.LoKrConfig(target_modules=_TARGETS, r=r, alpha=lora_alpha)
    return peft.LoraConfig(
        target_modules=_TARGETS,
        r=r,
        lora_alpha=lora_alpha,
        use_dora=tuning == "dora",
        use_rslora=tuning == "rslora",
    )


class ProjectorAdapter:
    """A fresh adapter put into a model's projector, in place.

    The model stays the object it was: its forward runs through the adapter, and only the adapter's tensors require a
    gradient. `parameters` are named as PEFT saves them (`base_model.model.model.multi_modal_projector.…`).
    """

    def __init__(self, model: Any, config: PeftConfig) -> None:
        """`model`: a LLaVA whose projector is in float32. Raises ValueError for one that is not."""
        projector: nn.Module = model.model.multi_modal_projector
        dtypes = {parameter.dtype for parameter in projector.parameters()}
        if dtypes != {torch.float32}:
            raise UserError(f"the projector is in {dtypes}, needed is float32: what is tuned is kept in float32")
        self._model = _peft().get_peft_model(model, config)
        self._projector = projector

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by PEFT's names."""
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}

    def merged(self) -> dict[str, Tensor]:
        """The projector with the adapter merged into its weights, `linear_1.weight` …, float32 on the CPU.

        The model itself stays as it is. Merging comes before any cast: the projector is float32 here.
        """
        return merged_projector(self._projector)

    def save(self, folder: Path, base: str) -> None:
        """Writes the adapter to `folder` as PEFT does: `PeftModel.from_pretrained(release, folder)` loads it.

        `base`: what adapter_config.json names as the base model.
        """
        state = {name: parameter.detach() for name, parameter in self.parameters.items()}
        self._model.peft_config["default"].base_model_name_or_path = base
        self._model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's template of a card; the checkpoint has its own


def merged_projector(projector: nn.Module) -> dict[str, Tensor]:
    """A projector's own tensors, with whatever adapter it carries merged into a copy; float32 on the CPU."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    tensors: dict[str, Tensor] = {}
    for name, layer in copy.deepcopy(projector).float().cpu().named_children():
        plain = layer
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            plain = layer.get_base_layer()
        for key, parameter in plain.named_parameters():
            tensors[f"{name}.{key}"] = parameter.detach()
    return tensors
