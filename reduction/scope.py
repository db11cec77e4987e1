"""SCOPE (NeurIPS 2025, arXiv 2510.24214): keep the patches that cover all others, weighted by their attention.

With S_ij = cos(f_i, f_j) of the tower's output, a the attention from CLS and c_i = 0 at the start, n times:

    gain_j = sum over all i of max(0, S_ij - c_i);  score_j = gain_j * a_j ** alpha
    j* = argmax of score over the patches not yet chosen;  c_i <- max(c_i, S_ij*)

The authors' code does the same. Greedy: the choice of a smaller budget is the beginning of a larger one's. A factor
of the attention changes nothing; alpha = 0 is coverage alone, in which two patches that cover each other best have
equal gains. O(P² H + n P²) for n of P patches.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .selectors import Selection, TowerStates
from .tensors import at_least_float32, check_count, check_number, cosines


@torch.no_grad()
def cover_patches(features: Tensor, attention: Tensor, count: int, alpha: float = 1.0) -> Tensor:
    """`count` patches that cover an image: [B, P, H] and attention [B, P] → [B, count] int64, as chosen.

    Raises:
        ReductionError: `count` outside 0 to P.
    """
    batch, patches = features.shape[:2]
    check_count(count, patches)
    order = torch.empty(batch, count, dtype=torch.long, device=features.device)
    weights = at_least_float32(attention)
    # Of the largest, so that a power of small numbers does not underflow.
    weights = (weights / weights.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)) ** alpha
    # Row j: max(0, S_ij - c_i) for every i. Raising c_i by what a choice adds there lowers the rest in place, so that
    # there is never a second matrix.
    uncovered = cosines(features).clamp_(min=0)
    chosen = torch.zeros(batch, patches, dtype=torch.bool, device=features.device)
    for step in range(count):
        scores = (uncovered.sum(dim=-1) * weights).masked_fill(chosen, -torch.inf)
        pick = scores.argmax(dim=-1, keepdim=True)
        order[:, step : step + 1] = pick
        chosen.scatter_(1, pick, True)
        added = uncovered.gather(1, pick.unsqueeze(-1).expand(-1, -1, patches))
        uncovered.sub_(added).clamp_(min=0)
    return order


@dataclass(frozen=True)
class Scope:
    """SCOPE: the patches that cover all others; `alpha` is the power of attention in the score."""

    title: ClassVar[str] = "SCOPE"
    paper: ClassVar[str] = "2510.24214"
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})
    keeps_cls: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_number("scope", "alpha", self.alpha)

    def select(self, states: TowerStates, dominant: int, contextual: int) -> Selection:
        """See `Selector.select`. Raises ReductionError for a budget that the grid cannot fill."""
        assert states.attention is not None
        return Selection(cover_patches(states.patches, states.attention, dominant, self.alpha))
