"""VisPruner (ICCV 2025, arXiv 2412.01818), and FasterVLM, as its first version was called.

FasterVLM keeps the patches that CLS attends to most. VisPruner gives them a share of the budget only, and the rest to
patches that are unlike each other: the others, in falling attention, are parted into those at even and at odd places;
of the evens, the 8 (or as many as are too many) that are most like any odd one are dropped, the remaining ones
put in the order of that likeness, the odds behind them; and so on until the budget is met.

So the authors' code; the paper speaks of removing duplicates only. Theirs fails where the number left is odd or fewer
than 8 are even; here the evens are then one more, or all that are dropped. O(P² H) once, then about (P - n) / 8 rounds
of O(R²) for R patches left. Every swap is carried on by the rounds: noise of 1e-6 in the features changes a third of
the unlike ones. What is chosen is therefore only the same for the same features.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .selectors import Selection, TowerStates
from .tensors import by_score, check_count, check_number, unit_rows

DROPPED_A_ROUND = 8
ROWS = 192  # of float64 held at once


@torch.no_grad()
def prune_alike(features: Tensor, attention: Tensor, count: int, important: float = 0.5) -> Tensor:
    """int(`count` * `important`) patches by attention, then unlike ones: [B, P, H], [B, P] → [B, count] int64.

    In the order of the authors' code: the important ones by falling attention, the others as the last round left them.

    Raises:
        ReductionError: `count` outside 0 to P.
    """
    check_count(count, attention.shape[-1])
    order = by_score(attention)
    first = int(count * important)
    most, rest = order[:, :first], order[:, first:]
    unlike = count - first
    if unlike == 0:
        return most
    likeness = _likeness(features)
    images = torch.arange(len(order), device=order.device)[:, None, None]
    while rest.shape[1] > unlike:
        evens, odds = rest[:, 0::2], rest[:, 1::2]
        dropped = min(DROPPED_A_ROUND, rest.shape[1] - unlike, evens.shape[1])
        nearest = likeness[images, evens.unsqueeze(-1), odds.unsqueeze(1)].amax(dim=-1)
        rest = torch.cat([evens.gather(1, by_score(nearest)[:, dropped:]), odds], dim=1)
    return torch.cat([most, rest], dim=1)


def _likeness(features: Tensor) -> Tensor:
    """Cosines [B, P, P] as int32 in units of 2**-30, of float64: at 576 patches, the next best differ by 1e-7.

    In the bytes of float32, with thirty times its precision; and equal patches are exactly equal.
    """
    finest = torch.float32 if features.device.type == "mps" else torch.float64  # which has nothing finer
    result = torch.empty(*features.shape[:2], features.shape[1], dtype=torch.int32, device=features.device)
    for rows, out in zip(features, result, strict=True):
        unit = unit_rows(rows.to(finest))
        for some, integers in zip((unit * 2**30).split(ROWS), out.split(ROWS), strict=True):
            integers.copy_((some @ unit.T).round_())
    return result


@dataclass(frozen=True)
class VisPruner:
    """VisPruner: the share `important` of the patches by attention, the others unlike each other."""

    title: ClassVar[str] = "VisPruner"
    paper: ClassVar[str] = "2412.01818"
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})
    keeps_cls: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    important: float = 0.5

    def __post_init__(self) -> None:
        check_number("vispruner", "important", self.important, 1)

    def select(self, states: TowerStates, dominant: int, contextual: int) -> Selection:
        """See `Selector.select`. Raises ReductionError for a budget that the grid cannot fill."""
        assert states.attention is not None
        return Selection(prune_alike(states.patches, states.attention, dominant, self.important))


@dataclass(frozen=True)
class FasterVLM:
    """FasterVLM: the patches that CLS attends to most, without CLS. O(P log P)."""

    title: ClassVar[str] = "FasterVLM"
    paper: ClassVar[str] = "2412.01818"
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})
    keeps_cls: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    def select(self, states: TowerStates, dominant: int, contextual: int) -> Selection:
        """See `Selector.select`. Raises ReductionError for a budget that the grid cannot fill."""
        assert states.attention is not None
        check_count(dominant, states.attention.shape[-1])
        return Selection(by_score(states.attention)[:, :dominant])
