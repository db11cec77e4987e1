"""LLaVA-PruMerge+ (arXiv 2403.15388) at a fixed budget: important patches and evenly spaced ones, each of which takes
in its neighbours.

Half of the budget, rounded up, goes to the patches that CLS attends to most; the other half to patches evenly spaced,
in row-major order, over those that are left. Each kept patch p, with k neighbours N(p) by the cosine of keys (among
all other patches, kept or not) and w the attention from CLS, becomes

    f_p + sum over j in N(p) of w_j f_j

which in the authors' code is no average: w is a share of 1. k is 32 of 576 patches, the same share of other grids.

What differs from the authors' code (42Shawn/LLaVA-PruMerge, `token_prune_merge_advanced_plus`), which has no fixed
budget: theirs takes as many important patches as the attention has outliers (interquartile range), and of the evenly
spaced ones drops those that are important already; it adds one more token, the weighted sum of what is not kept; and
its attention and keys are the last block's, of the concatenated heads, where here they are those that all methods use:
the selected block's, w summed over heads and divided by its sum over patches (CLS attending to itself left out).

O(n P d + n P log P) for n of P patches.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .selectors import Selection, TowerStates
from .tensors import at_least_float32, by_score, check_count, take, unit_rows

SHARE_OF_NEIGHBOURS = 32 / 576
ROWS = 64


@torch.no_grad()
def important_and_spaced(attention: Tensor, count: int) -> Tensor:
    """Half by attention, half evenly spaced: attention [B, P] → [B, count] int64, the important ones first, falling.

    Raises:
        ReductionError: `count` outside 0 to P.
    """
    patches = attention.shape[-1]
    check_count(count, patches)
    spaced = count // 2
    ranked = by_score(attention)
    important, others = ranked[:, : count - spaced], ranked[:, count - spaced :].sort(dim=-1).values
    middles = (2 * torch.arange(spaced, device=attention.device) + 1) * others.shape[1] // max(1, 2 * spaced)
    return torch.cat([important, others[:, middles]], dim=1)


def take_in_neighbours(patches: Tensor, keys: Tensor, attention: Tensor, order: Tensor) -> Tensor:
    """The patches `order` with their neighbours added: [B, P, H], [B, P, d], [B, P], [B, D] → [B, D, H]."""
    count = patches.shape[1]
    neighbours = min(max(1, round(SHARE_OF_NEIGHBOURS * count)), count - 1)
    with torch.no_grad():
        shares = at_least_float32(attention)
        shares = shares / shares.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)
        weights = shares.new_zeros(*order.shape, count)
        for unit, share, kept, out in zip(unit_rows(keys), shares, order, weights, strict=True):
            # A few rows at a time: a sort holds their values, and their order in 64 bits.
            for rows, some in zip(kept.split(ROWS), out.split(ROWS), strict=True):
                alike = (unit[rows] @ unit.T).scatter_(1, rows.unsqueeze(-1), -torch.inf)
                nearest = by_score(alike)[:, :neighbours]
                some.scatter_(1, nearest, share[nearest])
    whole = at_least_float32(patches)
    return (take(whole, order) + weights.to(whole.dtype) @ whole).to(patches.dtype)


@dataclass(frozen=True)
class PruMergePlus:
    """LLaVA-PruMerge+: important and evenly spaced patches, each with its neighbours by key added to it."""

    title: ClassVar[str] = "PruMerge+"
    paper: ClassVar[str] = "2403.15388"
    reads: ClassVar[frozenset[str]] = frozenset({"attention", "keys"})
    keeps_cls: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    def select(self, states: TowerStates, dominant: int, contextual: int) -> Selection:
        """See `Selector.select`. Raises ReductionError for a budget that the grid cannot fill."""
        assert states.attention is not None
        assert states.keys is not None
        order = important_and_spaced(states.attention, dominant)
        return Selection(order, kept=take_in_neighbours(states.content, states.keys, states.attention, order))
