"""The projected visual tokens of a micro-batch, of pixels or of features that were computed before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shortzip.reduction.positions import ImagePositions


def visual_features(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor | None, ImagePositions | None]:
    """Projected visual tokens [N, H] of all images of a micro-batch, in the order of their placeholders, and where
    they stand, if not where they are counted.

    Computed from pixel_values, or from visual_tokens (what the tower and VisionZip make of them); None without either.
    """
    inner: Any = model.model
    sizes = {"image_sizes": batch["image_sizes"]} if "image_sizes" in batch else {}
    if "visual_tokens" in batch:
        features = torch.cat(list(inner.project(batch["visual_tokens"], batch.get("visual_kept"), **sizes)))
        if "visual_targets" not in batch:
            return features, None
        return features, inner.image_positions(batch["visual_kept"], batch["visual_targets"], **sizes)
    if "pixel_values" not in batch:
        return None, None
    images = inner.get_image_features(pixel_values=batch["pixel_values"], **sizes)
    return torch.cat(list(images.pooler_output)), images.get("positions")
