"""Operations of the training step that keep less for the backward pass than autograd's own would.

Indices and weights take no gradient: a training step has none that is trained in the language model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Put(torch.autograd.Function):
    """Packed [N, …] written to distinct places [N] of rows [B, K, …], which are overwritten; keeps the places only."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, index: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.mark_dirty(rows)
        rows.flatten(0, 1).index_copy_(0, index, packed)
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return gradient.flatten(0, 1).index_select(0, index), None, None


class Take(torch.autograd.Function):
    """states [N, …] at distinct index [M]; the gradient is written, not added, to its places."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = len(states)
        return states.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.count, *gradient.shape[1:]).index_copy_(0, index, gradient), None


class LeanRmsNorm(torch.autograd.Function):
    """transformers' RMSNorm of an untrained weight, keeping its input as it came and one number per token.

    torch's own `rms_norm` rounds differently in bfloat16 (by up to 1/32), and keeps a float32 copy there on CPUs.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = states.float() if states.dtype.itemsize < 4 else states
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(states, weight, scale)
        return weight * (wide * scale).to(states.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        states, weight, scale = ctx.saved_tensors
        wide = (weight * gradient).to(scale.dtype)
        normed = states.to(scale.dtype) * scale
        wide = (wide - normed * (wide * normed).mean(-1, keepdim=True)) * scale
        return wide.to(states.dtype), None, None


class GatedSilu(torch.autograd.Function):
    """silu(gate) * up, keeping the two and nothing else."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        activated = nn.functional.silu(gate)
        by_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return by_gate, activated.mul_(gradient)
