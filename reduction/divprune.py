"""DivPrune (CVPR 2025, arXiv 2503.02175): keep the patches that are farthest from each other.

With d_ij = 1 - cos(x_i, x_j): the first choice is argmax_i min_{j != i} d_ij, every later one the patch whose nearest
chosen one is farthest away. Written from the paper's formula; a chosen patch is never chosen again (in the authors'
code an exact duplicate may be). Greedy: the choice of a smaller budget is the beginning of a larger one's.

x is the tower's output, or (the authors') the patches after the projector: a choice that moves while the projector is
tuned, and that no feature cache can hold. O(P² H + n P) for n of P patches.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .errors import ReductionError
from .selectors import Selection, TowerStates
from .tensors import check_count, cosines

SPACES = ("features", "projected")


@torch.no_grad()
def spread_patches(states: Tensor, count: int) -> Tensor:
    """`count` patches that are far from each other: [B, P, H] of any float dtype → [B, count] int64, as chosen.

    Raises:
        ReductionError: `count` outside 0 to P.
    """
    batch, patches = states.shape[:2]
    check_count(count, patches)
    order = torch.empty(batch, count, dtype=torch.long, device=states.device)
    if count == 0:
        return order
    nearness = cosines(states)
    nearness.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    closest = nearness.amax(dim=-1)
    # Two patches that are each other's nearest tie, but for rounding.
    ties = closest <= closest.amin(dim=-1, keepdim=True) + 8 * torch.finfo(closest.dtype).eps
    pick = ties.to(torch.uint8).argmax(dim=-1, keepdim=True)
    chosen = torch.zeros(batch, patches, dtype=torch.bool, device=states.device)
    nearest = nearness.new_full((batch, patches), -torch.inf)  # the cosine to the nearest chosen patch
    for step in range(count):
        order[:, step : step + 1] = pick
        chosen.scatter_(1, pick, True)
        row = nearness.gather(1, pick.unsqueeze(-1).expand(-1, -1, patches)).squeeze(1)
        nearest = torch.maximum(nearest, row)
        pick = nearest.masked_fill(chosen, torch.inf).argmin(dim=-1, keepdim=True)
    return order


@dataclass(frozen=True)
class DivPrune:
    """DivPrune: the patches farthest from each other, by `space`: features (the tower's), or projected ones."""

    title: ClassVar[str] = "DivPrune"
    paper: ClassVar[str] = "2503.02175"
    keeps_cls: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    space: str = "features"

    def __post_init__(self) -> None:
        if self.space not in SPACES:
            raise ReductionError(
                f"visionzip: method divprune: space is {self.space!r}; it must be one of {list(SPACES)}"
            )

    @property
    def reads(self) -> frozenset[str]:
        """Projected patches only where they are compared: they cost a pass through the projector."""
        return frozenset({"projected"} if self.space == "projected" else ())

    def select(self, states: TowerStates, dominant: int, contextual: int) -> Selection:
        """See `Selector.select`. Raises ReductionError for a budget that the grid cannot fill."""
        compared = states.patches
        if self.space == "projected":
            assert states.projected is not None
            compared = states.projected
        return Selection(spread_patches(compared, dominant))
