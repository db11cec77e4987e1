"""Whose attention decides what pruning inside the language model keeps, in rows that hold their answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shortzip.data.supervision import IGNORE_INDEX
from shortzip.reduction.configuration_pruning import pruning_method


def fastv_query(model: Any, labels: Tensor) -> dict[str, Tensor]:
    """With pruning inside the language model, the positions whose attention decides what is kept; nothing otherwise.

    [B], the end of the first prompt, as when it is answered (the end of the row would see the answers). Of
    PyramidDrop, as in its authors' training, [B, S]: the positions just before every supervised span, -1 filling up; a
    row without such is not pruned.
    """
    config: Any = model.config
    if config.fastv is None:
        return {}
    supervised = labels != IGNORE_INDEX
    length = labels.shape[1]
    if pruning_method(config.fastv) == "pyramiddrop":
        ends = torch.nn.functional.pad(supervised[:, 1:] & ~supervised[:, :-1], (0, 1))
        count = max(int(ends.sum(dim=1).max()), 1)
        places = ends.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]
        return {"fastv_query": places.where(ends.gather(1, places), -1)}
    first = torch.where(supervised.any(dim=1), supervised.int().argmax(dim=1), length)
    return {"fastv_query": (first - 1).clamp(min=0)}
