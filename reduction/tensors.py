"""What the ways of choosing patches share on tensors. B is the number of images, P of patches, H a width."""

import math

import torch
from torch import Tensor

from .errors import ReductionError


def at_least_float32(states: Tensor) -> Tensor:
    """`states` in float32, or as they are if they are finer."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def take(rows: Tensor, index: Tensor) -> Tensor:
    """rows [B, N, X] at index [B, M] → [B, M, X]."""
    return rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def unit_rows(states: Tensor) -> Tensor:
    """`states` [..., H] with rows of length 1, in float32 or finer; a row of zeros stays one."""
    return torch.nn.functional.normalize(at_least_float32(states), dim=-1)


@torch.no_grad()
def cosines(states: Tensor) -> Tensor:
    """Cosines between the patches of each image: [B, P, H] → [B, P, P] in float32 or finer.

    One image at a time: a batched product may round an image's cosines by what else is in the batch. What is 1 up to
    rounding is 1, so that equal patches tie.
    """
    unit = unit_rows(states)
    result = unit.new_empty(*unit.shape[:2], unit.shape[1])
    for rows, out in zip(unit, result, strict=True):
        torch.mm(rows, rows.T, out=out)
        out.masked_fill_(out > 1 - 8 * torch.finfo(out.dtype).eps, 1)
    return result


@torch.no_grad()
def by_score(scores: Tensor) -> Tensor:
    """[B, P] → the patches [B, P] int64 by falling score; of equal ones the lowest index first.

    topk leaves the order of equal values open; a stable sort does not.
    """
    return scores.sort(dim=-1, descending=True, stable=True).indices


def check_count(count: int, patches: int) -> None:
    """Refuses a number of patches that a grid cannot give. Raises ReductionError."""
    if not 0 <= count <= patches:
        raise ReductionError(f"cannot keep {count} dominant patches of {patches}: choose 0 to {patches}")


def check_number(method: str, key: str, value: object, most: float = math.inf) -> None:
    """Refuses a selector's parameter that is no finite number from 0 to `most`. Raises ReductionError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most or math.isinf(value):
        allowed = "a number from 0" + ("" if math.isinf(most) else f" to {most:g}")
        raise ReductionError(f"visionzip: method {method}: {key} is {value!r}; it must be {allowed}")
