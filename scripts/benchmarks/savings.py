"""What each saving of the training step is worth alone, for scripts/benchmarks/step.py: the step with and without it.

A saving is switched off by composing what the step is made of anyway: one function replaced while it is off, or inputs
prepared otherwise. Expected is how many times the step's FLOPs are computed without it, 1 where a saving is of memory
and bandwidth only. The loss stays the same up to rounding, but for the two that compute more positions than have a
label ("last layer…" and "no padding…"): they are given labels there, because nothing else would have them computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from shortzip.data.dataset import MicroBatch
from shortzip.reduction.flops import vision_tower_flops
from shortzip.scripts.benchmarks.shapes import BEFORE, IMAGE_TOKEN, ModelShape
from shortzip.scripts.benchmarks.sides import Cut
from shortzip.train.step import objective, places
from shortzip.train.step import supervised_states as walk
from shortzip.train.step.flops import RowShape, needed_flops
from shortzip.train.step.objective import SupervisedLoss
from shortzip.train.step.places import Padded

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Saving:
    """One thing that the step leaves out or does differently, and how to do without it."""

    name: str
    off: Callable[[], AbstractContextManager[Any]] = nullcontext
    """What is in force while the step runs without it."""
    prepare: Callable[[Batch], Batch] = dict
    """A micro-batch that does without it."""
    flops: Callable[[RowShape, int], int] | None = None
    """FLOPs of a row without it, given the longest row of its micro-batch in tokens; None: as with it."""


def savings_of(model: Any, shape: ModelShape) -> list[Saving]:
    """Every saving that can be switched off in `model`, the one with both reductions."""
    config = model.config
    tower, selected = model.model.vision_tower, config.vision_feature_layer

    def needed(row: RowShape, **changes: Any) -> int:
        return needed_flops(config, row, **{"shared": BEFORE, "frozen_layers": shape.frozen, **changes})

    def whole_tower(row: RowShape, longest: int) -> int:
        blocks = vision_tower_flops(config, row.tiles) / (config.vision_config.num_hidden_layers + 1 + selected)
        return needed(row) + (round(blocks * (-1 - selected)) if row.visual else 0)

    def padded(row: RowShape, longest: int) -> int:
        return needed(replace(row, text=longest - row.visual))

    return [
        Saving("text before the image computed once", no_fixed_text, flops=lambda row, _: needed(row, shared=0)),
        Saving(
            "last layer and logits at supervised positions",
            prepare=label_all_text,
            flops=lambda row, _: needed(replace(row, supervised=row.text - BEFORE)),
        ),
        Saving(
            "frozen layers: text's queries and FFN only",
            frozen_as_plain,
            flops=lambda row, _: needed(row, frozen_layers=[]),
        ),
        Saving("no padding outside attention", prepare=pad_as_text, flops=padded),
        Saving("tower's blocks up to the selected one", partial(following_blocks, tower, selected), flops=whole_tower),
        Saving("no attention maps in the tower", partial(attention_maps, tower)),
        Saving("norms and FFNs that keep their inputs only", modules_own),
        Saving("loss and gradient of the logits in chunks", whole_logits),
    ]


@contextmanager
def following_blocks(tower: Any, selected: int) -> Iterator[None]:
    """The blocks after the selected one run too, and what they give is thrown away."""
    blocks = tower.encoder.layers
    run = blocks[selected].forward

    def then_the_others(*arguments: Any, **keywords: Any) -> Any:
        states = selected_states = run(*arguments, **keywords)
        for block in blocks[selected + 1 :]:
            states = block(states, *arguments[1:], **keywords)
        return selected_states

    with mock.patch.object(blocks[selected], "forward", then_the_others):
        yield


@contextmanager
def attention_maps(tower: Any) -> Iterator[None]:
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        yield
    finally:
        tower.set_attn_implementation(before)


@contextmanager
def no_fixed_text() -> Iterator[None]:
    with mock.patch.object(places, "shared_beginning", return_value=0):
        yield


def label_all_text(batch: Batch) -> Batch:
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    labels = ids.masked_fill(~mask | (ids == IMAGE_TOKEN), -100)
    labels[:, : BEFORE + 1] = -100  # the text that all rows share predicts nothing
    return {**batch, "labels": labels}


def pad_as_text(batch: Batch) -> Batch:
    mask, labels = batch["attention_mask"], batch["labels"].clone()
    labels[:, -1] = torch.where(mask[:, -1].bool(), labels[:, -1], 0)
    return {**batch, "attention_mask": torch.ones_like(mask), "labels": labels}


@contextmanager
def frozen_as_plain() -> Iterator[None]:
    """Every token is updated in a frozen layer, and the visual ones are then put back."""

    class Walk(walk._Walk):
        def __init__(self, decoder: Any, embeds: Tensor, positions: Tensor, every: Padded, *rest: Any) -> None:
            super().__init__(decoder, embeds, positions, every, *rest)
            self.every = self.queries(every)

        def frozen_layer(self, layer: Any, number: int, of_text: Any, visual: Tensor, text: Tensor) -> Any:
            return visual, self.plain_layer(layer, number, self.every, visual, text)[1]

    with mock.patch.object(walk, "_Walk", Walk):
        yield


@contextmanager
def modules_own() -> Iterator[None]:
    with (
        mock.patch.object(walk._Walk, "normed", lambda self, norm, states: norm(states)),
        mock.patch.object(walk._Walk, "feed_forward", lambda self, mlp, states: mlp(states)),
    ):
        yield


@contextmanager
def whole_logits() -> Iterator[None]:
    def loss(lm_head: nn.Module, states: Tensor, targets: Tensor, _: int | None = None) -> Tensor:
        return nn.functional.cross_entropy(lm_head(states).float(), targets, reduction="sum")

    with mock.patch.object(objective, "summed_cross_entropy", loss):
        yield


def sides_without(model: Any, shape: ModelShape, work: Cut) -> tuple[dict[str, Callable[[], None]], dict[str, int]]:
    """The step, and the step without each saving, as functions without arguments; and the FLOPs of each."""
    module, supervised = SupervisedLoss(model), work.supervised

    def step(saving: Saving, inputs: list[Batch]) -> None:
        with saving.off():
            for batch in inputs:
                (module(MicroBatch(batch, [])) / supervised).backward()
        model.zero_grad()

    sides: dict[str, Callable[[], None]] = {}
    flops: dict[str, int] = {}
    for saving in [Saving("shortzip"), *savings_of(model, shape)]:
        name = saving.name if saving.name == "shortzip" else f"without: {saving.name}"
        inputs = [saving.prepare(batch) for batch in work.batches]
        sides[name] = lambda saving=saving, inputs=inputs: step(saving, inputs)  # type: ignore[misc]
        count = saving.flops or (
            lambda row, _: needed_flops(model.config, row, shared=BEFORE, frozen_layers=shape.frozen)
        )
        flops[name] = sum(
            count(row, batch["input_ids"].shape[1])
            for batch, rows in zip(work.batches, work.rows, strict=True)
            for row in rows
        )
    return sides, flops
