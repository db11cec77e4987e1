"""A budget for every step: from a loose one down to the run's own (`budget_schedule`), or one of a list (`budgets`).

The budgets of a step are those of its global batch: model and rows have the same ones, on every process. They follow
from the position in the run alone, so that data workers know them ahead and a run that is continued goes on with
them. Rows are tokenized, and cut at data.max_length, under the loosest budget, so that every step sees the same text
of them.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from shortzip.data.batching import permutation
from shortzip.data.dataset import Collator, ConversationDataset, MicroBatch, Sample
from shortzip.data.drops import Drop
from shortzip.data.supervision import IGNORE_INDEX, Encoded, Supervision
from shortzip.reduction.configuration_budgets import tokens_of
from shortzip.reduction.image_budgets import divided
from shortzip.train.inputs.feature_cache import features_of
from shortzip.train.settings.budget import BudgetScheduleConfig
from shortzip.train.step.places import LayOut

_DRAW = 0x6275646765747331  # beside the run's seed: budgets are not drawn as the order of its samples is


def budget_of(visionzip: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """The `visionzip` key of as many tokens, dominant and contextual in the shares that they have in `visionzip`."""
    return {**visionzip, **divided(visionzip, tokens)}


def stages_of(schedule: BudgetScheduleConfig | None, visionzip: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The `visionzip` keys of a schedule's stages and of the run's own, fewest tokens first; none without stages."""
    if schedule is None or schedule.stages is None:
        return []
    last = tokens_of(visionzip)
    return [budget_of(visionzip, tokens) for tokens in (last, *reversed(schedule.falling(last, schedule.stages)))]


def with_budget(supervision: Supervision, visionzip: Mapping[str, Any]) -> Supervision:
    """The same rows under another budget."""
    processor: Any = copy.copy(supervision.processor)
    processor.visionzip = dict(visionzip)
    return Supervision(processor, supervision.template, supervision.max_length, supervision.sampling)


@dataclass(frozen=True)
class Budgets(ABC):
    """The budgets of a run's steps.

    Attributes:
        target: the run's own, the `visionzip` key of a model's config.
        global_batch_size: samples of a step.
        dataset: the rows, tokenized under the loosest budget.
    """

    target: Mapping[str, Any]
    global_batch_size: int
    dataset: ConversationDataset

    @abstractmethod
    def of_step(self, step: int) -> list[dict[str, Any]]:
        """The `visionzip` keys under which a step, counted from 0, reads its rows, that of most tokens first."""

    def at(self, step: int) -> dict[str, Any]:
        """The first of these."""
        return self.of_step(step)[0]

    def tokens(self, step: int) -> int:
        """Visual tokens of an image (a tile) under it."""
        return tokens_of(self.at(step))

    def step_at(self, position: int) -> int:
        """The step whose global batch begins at a position."""
        return position // self.global_batch_size

    @cached_property
    def _supervisions(self) -> dict[int, Supervision]:
        return {}

    def supervision_of(self, visionzip: Mapping[str, Any]) -> Supervision:
        """What counts the placeholders of rows under a budget."""
        tokens = tokens_of(visionzip)
        if tokens not in self._supervisions:
            self._supervisions[tokens] = with_budget(self.dataset.supervision, visionzip)
        return self._supervisions[tokens]

    def supervision(self, step: int) -> Supervision:
        """What counts the placeholders of a step's rows."""
        return self.supervision_of(self.at(step))

    def lengths_of(self, position: int, samples: Sequence[int]) -> np.ndarray:
        """Tokens of some rows in the global batch that begins at a position, visual ones included: [n] int64."""
        dataset, now = self.dataset, self.supervision(self.step_at(position))

        def fewer(row: int) -> int:
            images, left = dataset.conversations[row].images, int(dataset.images[row])
            sizes = [(0, 0)] * left
            if now.needs_image_sizes and left:
                every = [dataset.known_images.size(source, dataset.image_root) for source in images]
                sizes = now.sizes_in_row(every)[:left]
            return sum(dataset.supervision.placeholders(size) - now.placeholders(size) for size in sizes)

        rows = np.asarray(samples, dtype=np.int64)
        return dataset.lengths[rows] - np.asarray([fewer(row) for row in samples], dtype=np.int64)


@dataclass(frozen=True)
class ScheduledBudgets(Budgets):
    """From a loose budget down to the run's own.

    Attributes:
        schedule: how it is come to.
        total_steps: of the run.
    """

    schedule: BudgetScheduleConfig
    total_steps: int

    def of_step(self, step: int) -> list[dict[str, Any]]:
        last, falling = tokens_of(self.target), int(self.schedule.share * self.total_steps)
        if step >= falling:
            return [budget_of(self.target, last)]
        parts = self.schedule.stages or falling
        return [budget_of(self.target, self.schedule.falling(last, parts)[step * parts // falling])]


@dataclass(frozen=True)
class DrawnBudgets(Budgets):
    """One of a list for each step: of as many steps as there are budgets, each has another one, in an order that is
    drawn anew. With `sandwich` the largest, one drawn so of those between, and the smallest.

    Attributes:
        listed: their `visionzip` keys, fewest tokens first.
        seed: of what is drawn.
    """

    listed: Sequence[dict[str, Any]]
    seed: int
    sandwich: bool = False

    def of_step(self, step: int) -> list[dict[str, Any]]:
        if not self.sandwich:
            return [self._drawn(self.listed, step)]
        smallest, *between, largest = self.listed
        return [largest, *([self._drawn(between, step)] if between else []), smallest]

    def _drawn(self, among: Sequence[dict[str, Any]], step: int) -> dict[str, Any]:
        turn, place = divmod(step, len(among))
        return among[int(permutation(len(among), self.seed ^ _DRAW, turn)[place])]


class RowsInTime(Dataset[tuple[int, Sample | Drop]]):
    """The rows of a dataset under the budgets of their steps: an index is (row, step), an item (step, row)."""

    def __init__(self, budgets: Budgets) -> None:
        self.budgets = budgets

    def __len__(self) -> int:
        return len(self.budgets.dataset)

    def __getitem__(self, index: tuple[int, int]) -> tuple[int, Sample | Drop]:
        row, step = index
        sample = self.budgets.dataset[row]
        if isinstance(sample, Sample):
            sample.encoded = under(sample, self.budgets.dataset.supervision, self.budgets.supervision(step))
        return step, sample


def under(sample: Sample, before: Supervision, now: Supervision) -> Encoded:
    """The tokens of a row, which has the placeholders that `before` counts, with those that `now` does."""
    counts = [(before.placeholders(size), now.placeholders(size)) for size in sample.image_sizes]
    return with_placeholders(sample.encoded, counts, before.processor.image_token_id)


class CollatorInTime:
    """Rows of `RowsInTime` to a micro-batch, laid out as in their step."""

    def __init__(self, budgets: Budgets, lay_out_of: Any) -> None:
        """`lay_out_of`: what gives the collator's `lay_out` for a supervision."""
        self.budgets, self.lay_out_of = budgets, lay_out_of
        self._collators: dict[tuple[int, bool], Collator] = {}

    def __call__(self, rows: Sequence[tuple[int, Sample | Drop]]) -> MicroBatch:
        step = rows[0][0] if rows else 0  # of no row, no budget
        first, *narrower = self.budgets.of_step(step)
        samples = [row for _, row in rows]
        batch = self._collator(first)([under_one_budget(row, first) for row in samples])
        batch.budget = first
        for visionzip in narrower:
            batch.narrower.append(self._collator(visionzip, False)(self._narrower(samples, first, visionzip)))
            batch.narrower[-1].budget = visionzip
        return batch

    def _collator(self, visionzip: Mapping[str, Any], first: bool = True) -> Collator:
        key = tokens_of(visionzip), first
        if key not in self._collators:
            supervision = self.budgets.supervision_of(visionzip)
            plain = LayOut(supervision.processor.image_token_id)  # no teacher reads rows a second time
            self._collators[key] = Collator.of(supervision, self.lay_out_of(supervision) if first else plain)
        return self._collators[key]

    def _narrower(
        self, rows: Sequence[Sample | Drop], first: Mapping[str, Any], visionzip: Mapping[str, Any]
    ) -> list[Sample | Drop]:
        """Rows that are laid out under `first` under another budget, without what both share."""
        before, now = self.budgets.supervision_of(first), self.budgets.supervision_of(visionzip)
        return [
            replace(under_one_budget(row, visionzip), encoded=under(row, before, now), pixels=[], lesson={})
            for row in rows
            if isinstance(row, Sample)
        ]


def under_one_budget(row: Any, visionzip: Mapping[str, Any] | None) -> Any:
    """A row with the features of one budget, where it has those of several."""
    if (
        not isinstance(row, Sample)
        or visionzip is None
        or not any("." in name for each in row.features for name in each)
    ):
        return row
    return replace(row, features=[features_of(stored, tokens_of(visionzip)) for stored in row.features])


def with_placeholders(encoded: Encoded, counts: Sequence[tuple[int, int]], image_token_id: int) -> Encoded:
    """A row with other numbers of placeholders. `counts`: of each image, those it has and those it is to have."""
    images, ids, labels = iter(counts), list[int](), list[int]()
    place, moved = 0, {0: 0}  # where the row's tokens are now: what answers begin and end with
    while place < len(encoded.input_ids):
        token = encoded.input_ids[place]
        there, wanted = next(images) if token == image_token_id else (1, 1)
        ids += [token] * wanted
        labels += [encoded.labels[place]] if (there, wanted) == (1, 1) else [IGNORE_INDEX] * wanted
        place += there
        moved[place] = len(ids)
    answers = [(moved[start], moved[end]) for start, end in encoded.answers]
    return Encoded(ids, labels, answers, encoded.images, encoded.cut, encoded.videos)
