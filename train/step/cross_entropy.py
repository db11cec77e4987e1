"""Cross-entropy of many positions, whose logits never exist at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shortzip.train.step.memory import LOGITS_AT_ONCE


def summed_cross_entropy(
    lm_head: nn.Module, states: Tensor, targets: Tensor, logits_at_once: int | None = None
) -> Tensor:
    """Sum of the cross-entropies of lm_head(states [S, H]) against targets [S]; float32.

    With an untrained head the logits live for a few hundred positions at a time, and their gradient with them:
    `logits_at_once` values; None takes what suits the device.
    """
    if type(lm_head) is nn.Linear and lm_head.bias is None and not lm_head.weight.requires_grad:
        values = logits_at_once or (LOGITS_AT_ONCE if states.is_cuda else LOGITS_AT_ONCE // 8)
        return _SummedCrossEntropy.apply(states, lm_head, targets, values)
    return nn.functional.cross_entropy(lm_head(states).float(), targets, reduction="sum")


class _SummedCrossEntropy(torch.autograd.Function):
    """Loss and gradient in one pass over chunks of positions: softmax - one-hot is known as soon as the logits are."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, lm_head: nn.Linear, targets: Tensor, values: int) -> Tensor:
        weight = lm_head.weight
        total = torch.zeros((), device=states.device)
        gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        for start in range(0, len(states), max(1, values // len(weight))):
            chunk = slice(start, start + max(1, values // len(weight)))
            logits = lm_head(states[chunk]).float()
            target = targets[chunk].unsqueeze(1)
            normalizer = logits.logsumexp(-1, keepdim=True)
            total += (normalizer - logits.gather(1, target)).sum()
            if gradient is not None:
                logits.sub_(normalizer).exp_()
                logits.scatter_add_(1, target, torch.full_like(normalizer, -1))
                torch.matmul(logits.to(weight.dtype), weight, out=gradient[chunk])
            del logits  # before the next ones are made
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (of_states,) = ctx.saved_tensors
        return of_states * gradient, None, None, None
