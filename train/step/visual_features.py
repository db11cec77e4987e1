"""The projected visual tokens of a micro-batch, of pixels or of features that were computed before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shortzip.reduction.configuration_reduced_llava import TOWER_HAS_CLS
from shortzip.reduction.image_budgets import most_tokens, placed
from shortzip.reduction.positions import ImagePositions, PlacedFeatures
from shortzip.reduction.visual_tokens import VisualTokens


def visual_features(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor | None, ImagePositions | None]:
    """Projected visual tokens [N, H] of all images of a micro-batch, in the order of their placeholders, and where
    they stand, if not where they are counted.

    Computed from pixel_values, or from visual_tokens (what the tower and VisionZip make of them); None without either.
    """
    inner: Any = model.model
    sizes = {"image_sizes": batch["image_sizes"]} if "image_sizes" in batch else {}
    if "visual_tokens" in batch and "image_budgets" in batch:
        images: Any = placed_features(inner, batch)
        return torch.cat(images.pooler_output), images.positions
    if "visual_tokens" in batch:
        features = torch.cat(list(inner.project(batch["visual_tokens"], batch.get("visual_kept"), **sizes)))
        if "visual_targets" not in batch:
            return features, None
        return features, inner.image_positions(batch["visual_kept"], batch["visual_targets"], **sizes)
    if "pixel_values" not in batch:
        return None, None
    own = {"image_budgets": batch["image_budgets"]} if "image_budgets" in batch else {}
    images = inner.get_image_features(pixel_values=batch["pixel_values"], **sizes, **own)
    return torch.cat(list(images.pooler_output)), images.get("positions")


def placed_features(inner: Any, batch: Mapping[str, Tensor]) -> PlacedFeatures:
    """Projected features of images that have a budget each, of visual tokens that are filled up to the same number."""
    zipped = inner.config.visionzip
    keeps_cls = most_tokens(zipped, 0, TOWER_HAS_CLS[inner.config.vision_config.model_type])

    def of_rows(rows: Tensor, view: Any) -> VisualTokens:
        key = view.config.visionzip
        tokens = batch["visual_tokens"][rows, : key["dominant"] + key["contextual"]]
        kept = batch["visual_kept"][rows, : key["dominant"] - keeps_cls]
        targets = batch["visual_targets"][rows, : key["contextual"]] if "visual_targets" in batch else kept[:, :0]
        return VisualTokens(tokens=tokens, kept=kept, targets=targets)

    sizes = batch["image_sizes"].tolist() if "image_sizes" in batch else None
    budgets = batch["image_budgets"].tolist()
    tiles = inner._tiles(sizes) if hasattr(inner, "_tiles") else None
    return placed(inner, budgets, of_rows, tiles, sizes)
