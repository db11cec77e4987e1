"""A budget for every step: from a loose one down to the run's own (`budget_schedule`).

The budget is that of the global batch: model and rows of a step have the same one, on every process. It follows from
the position in the run alone, so that data workers know it ahead and a run that is continued goes on with it. Rows are
tokenized, and cut at data.max_length, under the loosest budget, so that every step sees the same text of them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from shortzip.data.dataset import Collator, ConversationDataset, MicroBatch, Sample
from shortzip.data.drops import Drop
from shortzip.data.supervision import IGNORE_INDEX, Encoded, Supervision
from shortzip.reduction.image_budgets import divided
from shortzip.train.settings.budget import BudgetScheduleConfig


def budget_of(visionzip: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """The `visionzip` key of as many tokens, dominant and contextual in the shares that they have in `visionzip`."""
    return {**visionzip, **divided(visionzip, tokens)}


def with_budget(supervision: Supervision, visionzip: Mapping[str, Any]) -> Supervision:
    """The same rows under another budget."""
    processor: Any = copy.copy(supervision.processor)
    processor.visionzip = dict(visionzip)
    return Supervision(processor, supervision.template, supervision.max_length, supervision.sampling)


@dataclass(frozen=True)
class Budgets:
    """The budgets of a run's steps.

    Attributes:
        target: the run's own, the `visionzip` key of a model's config.
        schedule: how it is come to.
        total_steps: of the run.
        global_batch_size: samples of a step.
        dataset: the rows, tokenized under the loosest budget.
    """

    target: Mapping[str, Any]
    schedule: BudgetScheduleConfig
    total_steps: int
    global_batch_size: int
    dataset: ConversationDataset

    def tokens(self, step: int) -> int:
        """Visual tokens of an image (a tile) in a step, counted from 0."""
        last = self.target["dominant"] + self.target["contextual"]
        falling = int(self.schedule.share * self.total_steps)
        if step >= falling:
            return int(last)
        return round(self.schedule.start + (last - self.schedule.start) * step / falling)

    def at(self, step: int) -> dict[str, Any]:
        """The `visionzip` key of a step."""
        return budget_of(self.target, self.tokens(step))

    def step_at(self, position: int) -> int:
        """The step whose global batch begins at a position."""
        return position // self.global_batch_size

    @cached_property
    def _supervisions(self) -> dict[int, Supervision]:
        return {}

    def supervision(self, step: int) -> Supervision:
        """What counts the placeholders of a step's rows."""
        tokens = self.tokens(step)
        if tokens not in self._supervisions:
            self._supervisions[tokens] = with_budget(self.dataset.supervision, self.at(step))
        return self._supervisions[tokens]

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
            loose, now = self.budgets.dataset.supervision, self.budgets.supervision(step)
            counts = [(loose.placeholders(size), now.placeholders(size)) for size in sample.image_sizes]
            sample.encoded = with_placeholders(sample.encoded, counts, loose.processor.image_token_id)
        return step, sample


class CollatorInTime:
    """Rows of `RowsInTime` to a micro-batch, laid out as in their step."""

    def __init__(self, budgets: Budgets, lay_out_of: Any) -> None:
        """`lay_out_of`: what gives the collator's `lay_out` for a supervision."""
        self.budgets, self.lay_out_of = budgets, lay_out_of
        self._collators: dict[int, Collator] = {}

    def __call__(self, rows: Sequence[tuple[int, Sample | Drop]]) -> MicroBatch:
        step = rows[0][0] if rows else 0  # of no row, no budget
        tokens = self.budgets.tokens(step)
        if tokens not in self._collators:
            supervision = self.budgets.supervision(step)
            self._collators[tokens] = Collator.of(supervision, self.lay_out_of(supervision))
        return self._collators[tokens]([row for _, row in rows])


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
