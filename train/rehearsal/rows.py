"""Rows of a micro-batch as lengths, and the integers that they stand for: what of a step depends on data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shortzip.data.supervision import IGNORE_INDEX
from shortzip.train.step.places import Layout, lay_out


@dataclass(frozen=True)
class RowLengths:
    """One conversation in tokens: text, its image, text."""

    before: int
    """Text before the image, the same in all rows."""
    visual: int
    """Visual tokens; 0 without an image."""
    after: int
    """Text after it."""
    supervised: int
    """Tokens of `after`, its last ones, that are supervised."""

    @property
    def total(self) -> int:
        return self.before + self.visual + self.after


@dataclass(frozen=True)
class Integers:
    """A micro-batch's integers, [B, L] int64 on the CPU, and how they are laid out."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    layout: Layout


def integers_of(rows: Sequence[RowLengths], image_token_id: int) -> Integers:
    """Integers of rows with these lengths, padded on the right.

    Their text after the image differs from the first token on; what stands before it is the same.
    """
    text_token = image_token_id + 1 if image_token_id == 0 else image_token_id - 1
    length = max(row.total for row in rows)
    ids = torch.full((len(rows), length), text_token)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for number, row in enumerate(rows):
        ids[number, row.before : row.before + row.visual] = image_token_id
        labels[number, row.total - row.supervised : row.total] = text_token
    lengths = torch.tensor([row.total for row in rows])
    mask = (torch.arange(length) < lengths[:, None]).long()
    return integers_from(ids, mask, labels, image_token_id)


def integers_from(input_ids: Tensor, attention_mask: Tensor, labels: Tensor, image_token_id: int) -> Integers:
    """Integers of real conversations, each [B, L] as a collator gives them."""
    layout = lay_out(input_ids, attention_mask, labels, image_token_id=image_token_id)
    return Integers(input_ids, attention_mask, labels, layout)
