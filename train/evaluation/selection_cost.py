"""What choosing visual tokens costs beside the vision tower, measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shortzip.reduction.baselines import downsample_images, grid_shape, keep_patches
from shortzip.reduction.configuration_reduced_llava import TOWER_HAS_CLS, selected_block
from shortzip.reduction.reductions import Reductions
from shortzip.reduction.selectors import BASELINES, selector_of
from shortzip.reduction.tower import embed_patches, queries_and_keys
from shortzip.reduction.visual_tokens import tokens_of_block
from shortzip.train.run.report import synchronise


@dataclass(frozen=True)
class SelectionCost:
    """Milliseconds per image, medians over rounds."""

    selection_ms: float
    """The selection alone: scores, keys, choice and merging, of what the tower gives."""
    tower_ms: float
    """The tower up to the block that LLaVA reads."""


@torch.no_grad()
def selection_costs(model: Any, reductions: Sequence[Reductions], pixels: Tensor, rounds: int) -> list[SelectionCost]:
    """The cost of each selection on a batch of images [N, 3, S, S], on the model's device and in its dtype.

    A round times the tower and every selection once: a machine that is slower for a while is so for all of them.
    """
    inner = model.model
    tower = inner.vision_tower
    blocks, selected = (
        tower.encoder.layers,
        selected_block(model.config.vision_feature_layer, len(tower.encoder.layers)),
    )

    def through_the_tower() -> tuple[Tensor, Tensor]:
        hidden = before = embed_patches(tower, pixels)
        for block in blocks[: selected + 1]:
            before, hidden = hidden, block(hidden, None)
        return before, hidden

    before, hidden = through_the_tower()
    selections = [_selection(inner, each, selected, before, hidden, pixels) for each in reductions]
    times: list[list[float]] = [[] for _ in range(len(selections) + 1)]
    for turn in range(rounds + 1):
        for number, step in enumerate([through_the_tower, *selections]):
            milliseconds = _timed(step, pixels.device) / len(pixels)
            if turn:  # the first one warms up
                times[number].append(milliseconds)
    of_tower, *of_selections = (statistics.median(found) for found in times)
    return [SelectionCost(found, of_tower) for found in of_selections]


def _selection(
    inner: Any, reductions: Reductions, selected: int, before: Tensor, hidden: Tensor, pixels: Tensor
) -> Callable[[], Any]:
    """The selection as something to be called: all that the tower alone does not do."""
    tower, zipped = inner.vision_tower, reductions.as_config()["visionzip"]
    block, has_cls = tower.encoder.layers[selected], TOWER_HAS_CLS[tower.config.model_type]
    if zipped is None:
        return lambda: None
    method, count = reductions.method, zipped["dominant"]
    if method == "downsample":  # chooses nothing of what the tower gives: its tower reads a smaller image
        side = tower.config.image_size // tower.config.patch_size
        return lambda: downsample_images(pixels, grid_shape(count, side), tower.config.patch_size)
    if method in BASELINES:
        return lambda: keep_patches(hidden[:, int(has_cls) :], pixels, method, count, zipped.get("seed", 0))
    selector, scale = selector_of(zipped), block.self_attn.scale

    def choose() -> Any:
        queries = keys = None
        if selector.reads & {"attention", "keys"}:
            queries, keys = queries_and_keys(block, before, has_cls)
        projector = inner.multi_modal_projector
        return tokens_of_block(hidden, queries, keys, scale, selector, zipped, has_cls, projector, pixels)

    return choose


def _timed(step: Callable[[], Any], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    step()
    synchronise(device)
    return 1000 * (time.perf_counter() - start)
