"""Where a release comes from and how it is loaded, as one object."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch

from shortzip.train.settings.config import TuneConfig


@dataclass(frozen=True)
class ReleaseSpec:
    """What `open_release` opens and `load_release` loads.

    ReleaseSpec("llava-hf/llava-1.5-7b-hf", dtype=torch.bfloat16)
    """

    name: str
    """A folder or a Hub id: a transformers LLaVA, LLaVA's own layout, a reduced checkpoint or a run's folder."""
    revision: str | None = None
    """Of a Hub id: branch, tag or commit."""
    mm_projector: str | None = None
    """A projector to lay over it: mm_projector.bin, its folder, or projector.safetensors."""
    vision_tower: str | None = None
    """Where the tower of a release in LLaVA's own layout is, when not where its config says."""
    chat_template: str = "auto"
    """As data.chat_template of a run."""
    dtype: torch.dtype = torch.float32
    """Of everything but the projector, which is float32: it is what gets tuned."""
    load_in_4bit: bool = False
    """The language model's layers in NF4."""
    attn_implementation: str = "sdpa"
    """eager or sdpa."""

    @classmethod
    def of(cls, config: TuneConfig) -> Self:
        """The release that a run starts from, as the run loads it."""
        return cls(
            config.model,
            config.revision,
            config.mm_projector,
            config.vision_tower,
            config.data.chat_template,
            dtype_of(config.mixed_precision),
            config.load_in_4bit,
        )

    def tuned(self, folder: str) -> Self:
        """A checkpoint in `folder` that was tuned from this release, loaded as this one is."""
        return replace(self, name=folder, revision=None, mm_projector=None, vision_tower=None)

    def precision(self) -> dict[str, Any]:
        """What the weights are held in, as values of a JSON file."""
        return {"dtype": str(self.dtype).removeprefix("torch."), "load_in_4bit": self.load_in_4bit}

    def as_config(self) -> dict[str, Any]:
        """Everything in it, as values of a JSON file."""
        return {**asdict(self), **self.precision()}


def dtype_of(mixed_precision: str) -> torch.dtype:
    """What `mixed_precision` ("no" or "bf16") has everything but the projector computed in."""
    return torch.bfloat16 if mixed_precision == "bf16" else torch.float32
