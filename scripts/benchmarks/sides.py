"""The sides of the training step in scripts/benchmarks/step.py: their inputs, what each runs, and its FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shortzip.data.batching import BatchPlan
from shortzip.data.dataset import MicroBatch
from shortzip.reduction.flops import lm_head_flops
from shortzip.scripts.benchmarks.shapes import BEFORE, ConversationLengths, ModelShape, SharedModels, make_batch
from shortzip.train.step.flops import RowShape, needed_flops, plain_flops
from shortzip.train.step.objective import SupervisedLoss, recompute_layers


@dataclass(frozen=True)
class Cut:
    """Conversations cut to micro-batches, for one number of visual tokens per image."""

    rows: list[list[RowShape]]
    """The conversations of each micro-batch, in tokens."""
    batches: list[dict[str, Tensor]]
    """The model's inputs of each micro-batch."""

    @property
    def tokens(self) -> int:
        return sum(int(batch["attention_mask"].sum()) for batch in self.batches)

    @property
    def supervised(self) -> int:
        return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in self.batches)

    @property
    def padding(self) -> float:
        """Share of the places that hold no token."""
        return 1 - self.tokens / sum(batch["attention_mask"].numel() for batch in self.batches)


def cut(
    conversations: Sequence[ConversationLengths], visual: int, tiles: int, size: int, config: Any, device: torch.device
) -> Cut:
    """Micro-batches of at most `size` conversations of similar length, `visual` placeholders for each image."""
    shapes = [conversation.shape(visual, tiles) for conversation in conversations]
    lengths = [row.text + row.visual for row in shapes]
    micro_batches = BatchPlan(lengths, len(lengths), micro_batch_size=size).global_batch(0).micro_batches[0]
    batches = [
        make_batch([conversations[place] for place in places], visual, tiles, config, device, seed)
        for seed, places in enumerate(micro_batches)
    ]
    return Cut([[shapes[place] for place in places] for places in micro_batches], batches)


@dataclass(frozen=True)
class StepInputs:
    """The same conversations as every side takes them."""

    plain: Cut
    """All visual tokens."""
    reduced: Cut
    """The budget."""
    cached: list[dict[str, Tensor]]
    """The micro-batches of `reduced`, with features in place of pixels."""

    def of(self, side: str) -> Cut:
        return self.plain if side.startswith("plain") else self.reduced


@torch.no_grad()
def with_features(model: Any, batches: Sequence[dict[str, Tensor]], tiles: int) -> list[dict[str, Tensor]]:
    """The micro-batches with what `model` makes of their pixels, as data.cache_features keeps it."""
    cached = [dict(batch) for batch in batches]
    for batch in cached:
        if "pixel_values" in batch:
            tokens = model.model.get_visual_tokens(batch.pop("pixel_values")).tokens
            batch["visual_tokens"] = tokens.unflatten(0, (-1, tiles)).flatten(1, 2)
    return cached


def step_sides(models: SharedModels, inputs: StepInputs) -> dict[str, Callable[[], None]]:
    """Forward and backward pass of every side: no optimizer, which is the same and takes a millisecond."""
    loss_module, supervised = SupervisedLoss(models.both), inputs.reduced.supervised

    def plain_step(model: Any, batches: list[dict[str, Tensor]], checkpointing: bool) -> None:
        recompute_layers(model, checkpointing)
        for batch in batches:
            # transformers' loss is a mean; as a sum it is weighted right over the global batch.
            loss = model(**batch, num_items_in_batch=supervised, use_cache=False).loss
            if loss.requires_grad:  # without an image there is nothing to learn from a micro-batch
                loss.backward()
        model.zero_grad()

    def needed_step(batches: list[dict[str, Tensor]], plain: bool = False) -> None:
        loss_module.plain = plain
        for batch in batches:
            (loss_module(MicroBatch(batch, [])) / supervised).backward()
        models.both.zero_grad()

    return {
        "plain, recomputed": partial(plain_step, models.plain, inputs.plain.batches, True),
        "plain": partial(plain_step, models.plain, inputs.plain.batches, False),
        "zip, recomputed": partial(plain_step, models.visionzip, inputs.reduced.batches, True),
        "zip": partial(plain_step, models.visionzip, inputs.reduced.batches, False),
        "shortzip": partial(needed_step, inputs.reduced.batches),
        "shortzip, cached": partial(needed_step, inputs.cached),
        "shortzip, all": partial(needed_step, inputs.reduced.batches, plain=True),
    }


def step_flops(config: Any, shape: ModelShape, inputs: StepInputs) -> dict[str, int]:
    """What every side computes, by its name in `step_sides`."""
    needed = partial(needed_flops, config, shared=BEFORE, frozen_layers=shape.frozen)

    def plain(rows_of: Cut, **how: bool) -> int:
        return sum(
            plain_flops(config, row, backward=any(other.visual for other in rows), **how)
            for rows in rows_of.rows
            for row in rows
        )

    def every_token(row: RowShape) -> int:
        queries = row.text + (0 if config.text_config.num_hidden_layers - 1 in shape.frozen else row.visual)
        unread = 2 * lm_head_flops(config.text_config, queries - row.supervised)
        return needed(replace(row, supervised=queries), shared=0) - unread

    reduced = [row for rows in inputs.reduced.rows for row in rows]
    return {
        "plain, recomputed": plain(inputs.plain, checkpointing=True),
        "plain": plain(inputs.plain, checkpointing=False),
        "zip, recomputed": plain(inputs.reduced, checkpointing=True, whole_tower=False),
        "zip": plain(inputs.reduced, checkpointing=False, whole_tower=False),
        "shortzip": sum(needed(row) for row in reduced),
        "shortzip, cached": sum(needed(row, tower=False) for row in reduced),
        "shortzip, all": sum(every_token(row) for row in reduced),
    }
