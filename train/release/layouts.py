"""The original layouts of the families: what each is recognised by, what becomes of it in transformers', and back.

`layout_NAME.py` holds the one of a family. Most are LLaVA's own with a few keys and tensors more, so that
`layout_llava.py` is what the others begin from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig

from shortzip.reduction.families import FAMILIES, family_of
from shortzip.train.release.conversion_plan import Plan, Tensors


@dataclass(frozen=True)
class Parts:
    """An original release that is being converted."""

    original: Mapping[str, Any]
    """Its config.json."""
    where: str
    """What messages call it."""
    tower: Path
    """The folder of the (first) vision tower that it names."""
    more_towers: tuple[Path, ...]
    """Those of the others."""
    vision: PreTrainedConfig
    """The (first) tower's config."""
    vocabulary: Any
    """Its `Vocabulary` (original_layout.py): the tokenizer, the ids of placeholders, rows of the embeddings."""
    tensors: Tensors
    """All its tensors and their files."""
    projector: Path | None = None
    """An `mm_projector.bin` that takes the place of its own projector."""


class OriginalLayout(Protocol):
    """The layout in which a family's authors release. All refusals are UserErrors that name the key and the cure."""

    template: Path
    """The chat template that its releases were trained with."""
    language_model: str
    """The architecture of its language models, for messages."""
    command: tuple[str, str]
    """What its authors' code answers with on a terminal: the module, and its option for a file."""

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json is one of this layout."""

    def check(self, config: Mapping[str, Any], where: str) -> None:
        """Refuses releases of this layout that cannot be converted."""

    def tower_names(self, config: Mapping[str, Any]) -> list[str]:
        """The vision towers that a release needs, as its config.json names them; none where it names none."""

    def is_language(self, name: str) -> bool:
        """Whether a tensor is of the language model, whose names are those of transformers' own class."""

    def language_config(self, config: Mapping[str, Any], rows: int) -> PreTrainedConfig:
        """The language model's config, with so many rows of embeddings."""

    def vocabulary(self, folder: Path, rows: int) -> Any:
        """The release's tokenizer with the placeholders added; `rows`: of its embeddings."""

    def tower_config(self, folder: Path) -> Any:
        """The config of the (first) vision tower in a folder."""

    def config(self, parts: Parts, dtype: torch.dtype) -> Any:
        """transformers' config of the whole."""

    def processor(self, parts: Parts) -> Any:
        """transformers' processor, with the chat template that the release was trained with."""

    def plan_rest(self, plan: Plan, parts: Parts) -> None:
        """Takes what is neither language model nor projector: towers, newlines and so on."""

    def to_original(self, config: Any, vision_tower: str | None, where: str) -> dict[str, Any]:
        """The original config.json of a release that exists in transformers' layout only, from its config there.

        `vision_tower`: the tower's name, which transformers' layout does not hold.
        """


@cache
def _layout_named(name: str) -> OriginalLayout:
    return import_module(f"shortzip.train.release.layout_{name}").LAYOUT


def layout_for(model_type: str) -> OriginalLayout:
    """The original layout of the family that a model type in transformers' layout belongs to."""
    return _layout_named(family_of(model_type).name)


def layout_of(config: Mapping[str, Any]) -> OriginalLayout:
    """The layout of an original config.json: of those that recognise it the family added last, else LLaVA's own."""
    for name in reversed(FAMILIES):
        if _layout_named(name).recognises(config):
            return _layout_named(name)
    return _layout_named(FAMILIES[0])


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of an original layout: sizes at the top level, and no `text_config`."""
    return "text_config" not in config and layout_of(config).recognises(config)
