"""Which layers freeze, once a measurement has ranked them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from .errors import ReductionError
from .parsing import parse_freeze

Direction = Literal["full_to_frozen", "frozen_to_full"]
DIRECTIONS: tuple[Direction, Direction] = ("full_to_frozen", "frozen_to_full")
"""KL(p_full || p_frozen), the paper's and the default; KL(p_frozen || p_full), what the authors' code computes."""


def rank_layers(mean: Sequence[float]) -> list[int]:
    """Layers by their mean LC, lowest (most ineffective) first; of equals the deeper first."""
    return sorted(range(len(mean)), key=lambda layer: (mean[layer], -layer))


def pick_layers(ranking: Sequence[int], freeze: str | int | float) -> list[int]:
    """The layers to freeze, most ineffective first: the first of `ranking`, or the list that `freeze` is.

    `freeze` is a number of layers, a share of them (a float, 0.6), or what :func:`parse_freeze` reads. Raises
    ValueError when it is out of range.
    """
    if isinstance(freeze, str):
        chosen = parse_freeze(freeze, len(ranking))
        if isinstance(chosen, list):
            return chosen
    elif isinstance(freeze, float):
        if not 0 <= freeze <= 1:
            raise ReductionError(f"freeze={freeze}: a share must be from 0 to 1.")
        chosen = round(freeze * len(ranking))
    else:
        chosen = freeze
    if not 0 <= chosen <= len(ranking):
        raise ReductionError(f"freeze={freeze}: the language model has {len(ranking)} layers.")
    return list(ranking[:chosen])
