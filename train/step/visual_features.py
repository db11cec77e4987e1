"""The projected visual tokens of a micro-batch, of pixels or of features that were computed before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shortzip.data.errors import UserError
from shortzip.reduction.configuration_reduced_llava import TOWER_HAS_CLS
from shortzip.reduction.image_budgets import most_tokens, placed
from shortzip.reduction.media import order_of, positions_in_order
from shortzip.reduction.positions import ImagePositions, PlacedFeatures
from shortzip.reduction.visual_tokens import VisualTokens


class Seen(NamedTuple):
    """The projected visual tokens of each image, or of each video, of a micro-batch."""

    items: list[Tensor]
    """[tokens, H] each."""
    positions: ImagePositions | None
    """Where they stand, if not where they are counted."""


def visual_features(
    inner: Any, batch: Mapping[str, Tensor], is_video: Tensor | None = None
) -> tuple[Tensor | None, ImagePositions | None]:
    """Projected visual tokens [N, H] of all images and videos of a micro-batch, in the order of their placeholders,
    and where they stand, if not where they are counted.

    Computed from pixels, or from what the tower and the selection make of them; None without either. `inner`: a model
    without its head. `is_video`: as `Layout` has it.
    """
    return in_order(image_features(inner, batch), video_features(inner, batch), is_video)


def image_features(inner: Any, batch: Mapping[str, Tensor]) -> Seen | None:
    """Those of the images, from pixel_values or visual_tokens; None without either."""
    sizes = {"image_sizes": batch["image_sizes"]} if "image_sizes" in batch else {}
    if "visual_tokens" in batch and "image_budgets" in batch:
        images: Any = placed_features(inner, batch)
        return Seen(images.pooler_output, images.positions)
    if "visual_tokens" in batch:
        features = list(inner.project(batch["visual_tokens"], batch.get("visual_kept"), **sizes))
        if "visual_targets" not in batch:
            return Seen(features, None)
        return Seen(features, inner.image_positions(batch["visual_kept"], batch["visual_targets"], **sizes))
    if "pixel_values" not in batch:
        return None
    own = {"image_budgets": batch["image_budgets"]} if "image_budgets" in batch else {}
    images = inner.get_image_features(pixel_values=batch["pixel_values"], **sizes, **own)
    return Seen(list(images.pooler_output), images.get("positions"))


def video_features(inner: Any, batch: Mapping[str, Tensor]) -> Seen | None:
    """Those of the videos, from pixel_values_videos or video_tokens; None without either.

    Videos of as many frames go as [V, F, 3, S, S], which every family with videos takes.
    """
    if "video_frames" not in batch:
        return None
    counts = batch["video_frames"].tolist()
    alike = len(set(counts)) == 1
    if "video_tokens" in batch:
        frames = counts[0] if alike else counts
        items = list(inner.project_videos(batch["video_tokens"], frames))
        if "video_targets" not in batch:
            return Seen(items, None)
        return Seen(items, inner.positions_of_videos(batch["video_kept"], batch["video_targets"], frames))
    pixels = batch["pixel_values_videos"]
    if alike:
        videos = inner.get_video_features(pixel_values_videos=pixels.unflatten(0, (-1, counts[0])))
    else:
        videos = inner.get_video_features(pixel_values_videos=pixels, video_frames=counts)
    return Seen(list(videos.pooler_output), videos.get("positions"))


def given_to_model(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of a micro-batch as a model's own forward takes them: videos of as many frames as [V, F, 3, S, S]."""
    if "video_frames" not in inputs:
        return dict(inputs)
    counts = set(inputs["video_frames"].tolist())
    if len(counts) > 1:
        return dict(inputs)
    alike = inputs["pixel_values_videos"].unflatten(0, (-1, counts.pop()))
    rest = {key: held for key, held in inputs.items() if key != "video_frames"}
    return {**rest, "pixel_values_videos": alike}


def in_order(
    images: Seen | None, videos: Seen | None, is_video: Tensor | None
) -> tuple[Tensor | None, ImagePositions | None]:
    """Visual tokens [N, H] of images and of videos in the order of their placeholders, and their positions.

    `is_video` [N] bool on the CPU: which placeholders are those of videos; None: none. Raises UserError where there
    are others than visual tokens.
    """
    if is_video is None or videos is None or images is None:
        found = videos if images is None else images
        return (None, None) if found is None else (torch.cat(found.items), found.positions)
    of_images, of_videos = torch.cat(images.items), torch.cat(videos.items)
    if (len(of_images), len(of_videos)) != (int((~is_video).sum()), int(is_video.sum())):
        raise UserError(
            f"the prompts hold {int((~is_video).sum())} placeholders of images and {int(is_video.sum())} of videos, "
            f"which give {len(of_images)} and {len(of_videos)} visual tokens: build the inputs with the processor "
            "that belongs to this model"
        )
    place = torch.where(is_video, len(of_images) + is_video.cumsum(0), (~is_video).cumsum(0)) - 1
    every = torch.cat([of_images, of_videos.to(of_images)])[place.to(of_images.device, non_blocking=True)]
    if images.positions is None or videos.positions is None:
        return every, None
    lengths = ([len(item) for item in found.items] for found in (images, videos))
    order = order_of(is_video.tolist(), *lengths)
    return every, positions_in_order(order, images.positions, videos.positions)


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
