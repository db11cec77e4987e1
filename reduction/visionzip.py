"""VisionZip on tensors (arXiv 2412.04467): score the patches, keep the dominant ones, merge the rest.

Everything here follows the authors' code, which made the published numbers; where the paper differs, a docstring
says so. B is the number of images (tiles in LLaVA-NeXT), P the number of patches, T the number of tokens the tower
works on (P, plus one when there is a CLS token), H the hidden size, D the dominant patches, C the contextual tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .errors import ReductionError
from .selectors import Selection, TowerStates
from .tensors import at_least_float32, by_score, check_count, take, unit_rows


def score_patches(queries: Tensor, keys: Tensor, scale: float, has_cls: bool) -> Tensor:
    """How much attention each patch receives in one block of the tower (paper §3.2; authors' `attentions[-2]`).

    With a CLS token: attention from CLS, softmax over all tokens, summed over heads. Without: attention received, mean
    over heads and over all queries. Computed in float32 or better whatever comes in: in bfloat16 neighbours tie.

    Args:
        queries: [B, heads, Q, d]: of CLS alone (Q = 1) when `has_cls`, else of every token (Q = T).
        keys: [B, heads, T, d], unscaled, CLS first when there is one.
        scale: factor on the dot products, usually d ** -0.5.
        has_cls: whether token 0 is CLS; it is left out of the result.

    Returns:
        [B, P] float32, float64 if that is what comes in.
    """
    queries, keys = at_least_float32(queries), at_least_float32(keys)
    if has_cls:
        logits = (queries * scale) @ keys.transpose(-1, -2)
        return logits.softmax(dim=-1).sum(dim=1)[:, 0, 1:]
    # One head at a time: all of them at once would need heads * T * T floats per image.
    heads = keys.shape[1]
    total = keys.new_zeros(keys.shape[0], keys.shape[2])
    for head in range(heads):
        logits = (queries[:, head] * scale) @ keys[:, head].transpose(-1, -2)
        total += logits.softmax(dim=-1).mean(dim=1)
    return total / heads


def select_dominant(scores: Tensor, count: int) -> Tensor:
    """The `count` patches with the highest scores; of equal scores the spatially earlier wins.

    Args:
        scores: [B, P].
        count: 0 to P.

    Returns:
        [B, count] int64, ascending (spatial order).

    Raises:
        ValueError: `count` outside 0 to P.
    """
    check_count(count, scores.shape[-1])
    return by_score(scores)[:, :count].sort(dim=-1).values


def merge_contextual(hidden: Tensor, metric: Tensor, kept: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the patches that are not dominant into `count` contextual tokens (paper §3.3).

    Of the n remaining patches in spatial order, every `max(1, n // count)`-th is a target, the first `count` of them.
    Every other one goes to the target whose key is most similar (cosine), the first of equals. A contextual token is
    the target **plus** the mean of what was assigned to it: the paper says average, the authors' code adds.

    Args:
        hidden: [B, P, H] patches after the block.
        metric: [B, P, d] keys of the block, mean over heads.
        kept: [B, D] dominant patches.
        count: C, 0 to P - D.

    Returns:
        tokens [B, C, H] in the dtype of `hidden`, targets [B, C] int64, groups [B, P] int64 (see Selection).

    Raises:
        ValueError: `count` outside 0 to P - D.
    """
    batch, patches = hidden.shape[:2]
    left = patches - kept.shape[1]
    if not 0 <= count <= left:
        raise ReductionError(
            f"cannot merge {left} remaining patches into {count} contextual tokens: choose 0 to {left}"
        )
    is_kept = torch.zeros(batch, patches, dtype=torch.bool, device=kept.device).scatter(1, kept, True)
    rest = is_kept.sort(dim=-1, stable=True).indices[:, :left]
    return merge_into(hidden, metric, rest, max(1, left // max(1, count)), count)


def merge_into(hidden: Tensor, metric: Tensor, rest: Tensor, step: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `merge_contextual`: the patches `rest` [B, R] into every `step`-th of them, the first `count`."""
    batch, patches = hidden.shape[:2]
    groups = rest.new_full((batch, patches), -1)
    if count == 0:
        return hidden[:, :0], rest[:, :0], groups
    # By slices, for the numbers alone say which are targets: a mask on a GPU would have to be read back first.
    strided = rest[:, : step * count].unflatten(1, (count, step))
    targets = strided[:, :, 0]
    others = torch.cat([strided[:, :, 1:].flatten(1), rest[:, step * count :]], dim=1)

    unit = unit_rows(metric)
    similarity = take(unit, others) @ take(unit, targets).transpose(-1, -2)
    nearest = similarity.argmax(dim=-1)
    merged = at_least_float32(take(hidden, others))
    # Not one_hot, which reads the numbers back to check them.
    assigned = merged.new_zeros(*nearest.shape, count).scatter(2, nearest.unsqueeze(-1), 1)
    sums = assigned.transpose(-1, -2) @ merged
    means = sums / assigned.sum(dim=1).clamp(min=1).unsqueeze(-1)
    tokens = (take(hidden, targets) + means).to(hidden.dtype)
    places = torch.arange(count, device=hidden.device).expand(batch, count)
    return tokens, targets, groups.scatter(1, targets, places).scatter(1, others, nearest)


@dataclass(frozen=True)
class VisionZip:
    """VisionZip's own selection: the patches that CLS attends to most, the rest merged by the similarity of keys."""

    title: ClassVar[str] = "VisionZip"
    paper: ClassVar[str] = "2412.04467"
    reads: ClassVar[frozenset[str]] = frozenset({"attention", "keys"})
    keeps_cls: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    def select(self, states: TowerStates, dominant: int, contextual: int) -> Selection:
        """See `Selector.select`. Raises ReductionError for a budget that the grid cannot fill."""
        assert states.attention is not None
        assert states.keys is not None
        order = select_dominant(states.attention, dominant)
        merged, targets, groups = merge_contextual(states.content, states.keys, order, contextual)
        return Selection(order, contextual=merged, targets=targets, groups=groups)
