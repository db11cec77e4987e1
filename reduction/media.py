"""Images and videos of one batch as one sequence of items, in the order of their placeholders.

What follows the towers (the merge, positions, frozen layers, the training walk) then knows visual tokens alone: of
images and of videos alike, all frames' tokens are visual tokens.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .errors import ReductionError
from .positions import ImagePositions, PlacedFeatures


def in_order(is_video: Tensor, images: Any, videos: Any) -> Any:
    """The features of all images and videos of a batch, in the order of their placeholders.

    Args:
        is_video: [V] bool, of each placeholder of the batch, row after row: whether it is a video's.
        images: features of all images, `pooler_output` a list of [tokens, H].
        videos: likewise of all videos.

    Returns:
        PlacedFeatures of both; of a chunk of a prompt, which has been given its part of each in one piece, one piece.

    Raises:
        ReductionError: placeholders that are not filled by whole images and videos.
    """
    parts = [torch.cat(list(found.pooler_output)) for found in (images, videos)]
    is_video = is_video.to(parts[0].device)
    if is_video.shape != (len(parts[0]) + len(parts[1]),) or int(is_video.sum()) != len(parts[1]):
        raise ReductionError(
            f"the prompts hold {int((~is_video).sum())} image and {int(is_video.sum())} video placeholders, the "
            f"images give {len(parts[0])} visual tokens and the videos {len(parts[1])}: build the inputs with the "
            "processor saved beside this model"
        )
    merged = parts[0].new_empty(len(is_video), parts[0].shape[1])
    merged[~is_video], merged[is_video] = parts[0], parts[1].to(merged)
    if images.last_hidden_state is None and videos.last_hidden_state is None:
        return BaseModelOutputWithPooling(pooler_output=[merged])  # type: ignore[arg-type]  # parts of a prompt's chunk
    order = order_of(is_video.tolist(), *([len(item) for item in found.pooler_output] for found in (images, videos)))
    sources = (images, videos)
    lengths = [len(sources[video].pooler_output[number]) for video, number in order]
    return PlacedFeatures(
        last_hidden_state=images.last_hidden_state,
        pooler_output=list(merged.split(lengths)),  # type: ignore[arg-type]
        positions=positions_in_order(order, images.get("positions"), videos.get("positions")),
    )


def order_of(is_video: list[bool], images: list[int], videos: list[int]) -> list[tuple[int, int]]:
    """(1 for a video, its number among its kind) of each item, in the order of their placeholders.

    Args:
        is_video: of each placeholder, whether it is a video's.
        images: visual tokens of each image, in their order; `videos` likewise.

    Raises:
        ReductionError: placeholders of one kind among those of an item of the other.
    """
    counts, used, start = (images, videos), [0, 0], 0
    order: list[tuple[int, int]] = []
    while start < len(is_video):
        kind = int(is_video[start])
        if used[kind] == len(counts[kind]):
            break
        length = counts[kind][used[kind]]
        if is_video[start : start + length] != [bool(kind)] * length:
            break
        order.append((kind, used[kind]))
        used[kind] += 1
        start += length
    if start < len(is_video) or used != [len(images), len(videos)]:
        raise ReductionError(
            f"the placeholders of {len(images)} images ({images[:4]} visual tokens …) and {len(videos)} videos "
            f"({videos[:4]} …) are not whole, one after another: build the inputs with the processor saved beside "
            "this model"
        )
    return order


def positions_in_order(order: list[tuple[int, int]], *kinds: ImagePositions | None) -> ImagePositions | None:
    """The positions of images and videos, given apart, in the order that `order_of` gives."""
    images, videos = kinds
    if images is None or videos is None:
        return None
    found = (images, videos)
    if any(number >= len(found[kind].tokens) for kind, number in order):
        return None  # items that transformers has repeated for beams, whose pass is told its positions
    tokens = [found[kind].tokens[number] for kind, number in order]
    return ImagePositions(tokens, [found[kind].lengths[number] for kind, number in order])
