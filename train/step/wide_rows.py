"""Rows whose images and videos stand with another number of visual tokens, as a teacher reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shortzip.data.supervision import IGNORE_INDEX
from shortzip.reduction.errors import ReductionError


def expand_images(
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    counts: Sequence[tuple[int, int]],
    *,
    image_token_id: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows [B, L], padded on the right, with other numbers of placeholders: [B, L'] each.

    Args:
        counts: of each image, in the order of the rows: the placeholders it has, and those it is to have.

    Raises ReductionError where the rows hold other numbers of placeholders.
    """
    images = iter(counts)
    wide: list[tuple[Tensor, ...]] = []
    for ids, mask, targets in zip(input_ids, attention_mask, labels, strict=True):
        length = int(mask.sum())
        repeats, at = torch.ones(length, dtype=torch.int64), 0
        visual = (ids[:length] == image_token_id).nonzero()[:, 0]
        while at < len(visual):
            there, wanted = next(images, (0, 0))
            if not 0 < there <= len(visual) - at:
                raise ReductionError(f"{len(visual) - at} placeholders are left in a row, of an image with {there}")
            repeats[visual[at : at + there]] = 0
            repeats[visual[at]] = wanted
            at += there
        wide.append(tuple(part[:length].repeat_interleave(repeats) for part in (ids, mask, targets)))
    fill = (int(input_ids[attention_mask == 0][0]) if bool((attention_mask == 0).any()) else 0, 0, IGNORE_INDEX)
    ids, mask, targets = (
        torch.nn.utils.rnn.pad_sequence([row[part] for row in wide], batch_first=True, padding_value=fill[part])
        for part in range(3)
    )
    return ids, mask, targets
