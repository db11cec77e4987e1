"""A determinantal point process over patches: CDPruner's choice (NeurIPS 2025, arXiv 2506.10967) without its text.

A set of patches weighs the determinant of K_ij = q_i cos(x_i, x_j) q_j: patches of high quality q that are unlike each
other. The heaviest set is approached greedily, by Chen et al.'s fast MAP inference (arXiv 1709.05135):

    e_i = K_ii at the start; n times: j = argmax e;  row = (K_j - sum of earlier rows_t[j] rows_t) / sqrt(e_j)
                                      e <- e - row ** 2

CDPruner's quality is the relevance to the question (cdpruner.py). Method `dpp` takes the attention from CLS in its
place, scaled in the same way, and compares the tower's output: it depends on the image alone, and can be cached. This
is ours, not a method of the authors. O(n P H + n² P) for n of P patches; greedy: the choice of a smaller budget is the
beginning of a larger one's.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .selectors import Selection, TowerStates
from .tensors import at_least_float32, by_score, check_count, take, unit_rows

NOTHING_LEFT = 1e-20  # of a patch that earlier ones make up: last, by quality


@torch.no_grad()
def scale_quality(scores: Tensor) -> Tensor:
    """Scores [B, P] as qualities above 0: (s - min + 1e-6) / (max - min) of each image, 1 at most (and a trifle).

    The authors take min and max over the whole batch, which in their evaluation is one image.
    """
    scores = at_least_float32(scores)
    low, high = scores.aminmax(dim=-1, keepdim=True)
    return (scores - low + 1e-6) / (high - low).clamp(min=1e-12)


@torch.no_grad()
def choose_determinant(states: Tensor, quality: Tensor, count: int) -> Tensor:
    """`count` patches of high quality unlike each other: [B, P, H] and [B, P] → [B, count] int64, as chosen.

    As above with q taken out of the rows, so that what is left of a patch is compared with 1 and not with its quality:
    e_i = q_i² left_i. Where nothing but rounding is left (of duplicates; of all, once there are as many as the width,
    whose determinant is 0 with any other) the authors' code divides by it; here these patches follow by falling
    quality, of equals the lowest index.

    Raises:
        ReductionError: `count` outside 0 to P.
    """
    batch, patches, width = states.shape
    check_count(count, patches)
    unit = unit_rows(states)
    weights = at_least_float32(quality) ** 2
    # Rounding adds up with the steps: after 128 of them 20 to 120 eps are left of what is nothing.
    least = max(8, 2 * min(patches, width)) * torch.finfo(unit.dtype).eps
    order = torch.empty(batch, count, dtype=torch.long, device=states.device)
    rows = unit.new_zeros(batch, min(count, width), patches)
    left = unit.new_ones(batch, patches)
    chosen = torch.zeros(batch, patches, dtype=torch.bool, device=states.device)
    for step in range(rows.shape[1]):
        gains = weights * torch.where(left > least, left, NOTHING_LEFT)
        pick = gains.masked_fill(chosen, -torch.inf).argmax(dim=-1, keepdim=True)
        order[:, step : step + 1] = pick
        chosen.scatter_(1, pick, True)
        alike = (unit @ take(unit, pick).transpose(-1, -2)).squeeze(-1)
        past = rows[:, :step]
        known = (past.gather(2, pick.unsqueeze(1).expand(-1, step, -1)).transpose(-1, -2) @ past).squeeze(1)
        rest = left.gather(1, pick)
        row = (alike - known) * torch.where(rest > least, rest.clamp(min=least).rsqrt(), 0)
        rows[:, step] = row
        left = left - row.square()
    others = at_least_float32(quality).masked_fill(chosen, -torch.inf)
    order[:, rows.shape[1] :] = by_score(others)[:, : count - rows.shape[1]]
    return order


@dataclass(frozen=True)
class DeterminantalPoints:
    """CDPruner's determinant over the tower's output, with the attention from CLS as quality."""

    title: ClassVar[str] = "DPP by attention"
    paper: ClassVar[str] = "2506.10967"
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})
    keeps_cls: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    def select(self, states: TowerStates, dominant: int, contextual: int) -> Selection:
        """See `Selector.select`. Raises ReductionError for a budget that the grid cannot fill."""
        assert states.attention is not None
        return Selection(choose_determinant(states.patches, scale_quality(states.attention), dominant))
