"""The budget of each image, where each has its own (`visionzip.per_image`): found before rows are tokenized.

By the picture alone, or by the tower: in the pass that fills the cache of features, which a run needs for it, or, for
held-out rows, in one pass over each image before the first question.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch

from shortzip.data.images import BadImage, ImageSource, image_name, open_image
from shortzip.data.kept import identity_of
from shortzip.data.known_images import KnownImages
from shortzip.data.pixels import pixel_values
from shortzip.data.row_lengths import BudgetSource
from shortzip.reduction.image_budgets import COVERAGE, IMAGE, budgets_by_detail, chooser_of, chosen_tokens, detail
from shortzip.train.inputs.feature_cache import FeatureCache

Root = str | os.PathLike[str] | None


@dataclass(frozen=True)
class BudgetsByPicture:
    """By chooser `image`: what is to be seen in a picture is known where it was read before."""

    image_processor: Any
    per_image: dict[str, Any]
    known_images: KnownImages

    def __call__(self, source: ImageSource, root: Root) -> int:
        """An image's budget. Raises BadImage."""
        read_as = identity_of({"class": type(self.image_processor).__name__, **self.image_processor.to_dict()})
        value = self.known_images.get(f"detail {read_as[:16]}", source, root, self._detail)
        return budgets_by_detail([value], self.per_image)[0]

    def _detail(self, source: ImageSource, root: Root) -> float:
        pixels = pixel_values(open_image(source, root), self.image_processor)
        return float(detail(pixels[:1] if pixels.dim() == 4 else pixels[None]))


@dataclass(frozen=True)
class BudgetsByTower:
    """By chooser `coverage`: each image goes through the model's tower once."""

    model: Any
    image_processor: Any
    found: dict[tuple[str, Any], int] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, source: ImageSource, root: Root) -> int:
        """An image's budget. Raises BadImage."""
        name = str(root), source
        if name not in self.found:
            pixels = pixel_values(open_image(source, root), self.image_processor)
            tiles = pixels if pixels.dim() == 4 else pixels[None]
            there = tiles.to(next(self.model.model.vision_tower.parameters()))
            (self.found[name],), _ = chosen_tokens(self.model.model, there, tiles=[len(tiles)])
        return self.found[name]


@dataclass(frozen=True)
class BudgetsKept:
    """Of images whose features are kept: as many tokens as these are."""

    features: FeatureCache
    found: dict[tuple[str, Any], int] = field(default_factory=dict)

    def __call__(self, source: ImageSource, root: Root) -> int:
        """An image's budget. Raises BadImage, also for one that has no features."""
        name = str(root), source
        if name not in self.found:
            stored = self.features.find(source, root)
            if stored is None:
                open_image(source, root)
                raise BadImage("unreadable_image", image_name(source), "has no features: start anew")
            self.found[name] = int(stored["visual_tokens"].shape[1])
        return self.found[name]


def budgets_by_picture(processor: Any, known_images: KnownImages) -> BudgetSource | None:
    """What gives each image its budget, where the picture alone does; else None."""
    if chooser_of(processor.visionzip) != IMAGE:
        return None
    return BudgetsByPicture(processor.image_processor, processor.visionzip["per_image"], known_images)


def budgets_by_tower(model: Any, processor: Any) -> BudgetSource | None:
    """What gives each image its budget, where the model's tower finds it; else None."""
    return BudgetsByTower(model, processor.image_processor) if chooser_of(processor.visionzip) == COVERAGE else None
