"""Attention as a CUDA device computes it, for fake tensors of a CPU: another kernel, other tensors.

Where there is no mask ATen chooses flash attention there (bf16 and fp16), elsewhere the memory-efficient kernel
(aten/src/ATen/native/transformers/cuda/sdp_utils.cpp); of either, torch knows the shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class AttentionAsOnCuda(TorchDispatchMode):
    """Has the CPU's attention kernel and its backward pass take the shapes of CUDA's."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        if function is _FORWARD:
            return _forward(*arguments, **keywords)
        if function is _BACKWARD:
            return _backward(*arguments, **keywords)
        return function(*arguments, **keywords)


def _takes_flash(query: Tensor, mask: Tensor | None) -> bool:
    return mask is None and query.dtype.itemsize == 2


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, heads, L, d] and the logarithm of each softmax's sum."""
    key, value = (_for_all_heads(states, query) for states in (key, value))
    if _takes_flash(query, attn_mask):
        out, log_sum, *_ = aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )
        return out, log_sum
    mask = None if attn_mask is None else _for_all_rows(attn_mask, query, key)
    # The logarithms are computed for a backward pass alone, but their size is small beside all others'.
    out, log_sum, *_ = aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, True, dropout_p, is_causal, scale=scale
    )
    return out, log_sum


def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    seeds = torch.empty((), dtype=torch.int64), torch.empty((), dtype=torch.int64)
    if _takes_flash(query, attn_mask):
        return aten._scaled_dot_product_flash_attention_backward(
            gradient, query, key, value, out, log_sum, None, None, query.shape[2], key.shape[2], dropout_p, is_causal,
            *seeds, scale=scale,
        )  # fmt: skip
    mask = None if attn_mask is None else _for_all_rows(attn_mask, query, key)
    wanted = [True, True, True, False]
    return aten._scaled_dot_product_efficient_attention_backward(
        gradient, query, key, value, mask, out, log_sum, *seeds, dropout_p, wanted, is_causal, scale=scale
    )[:3]


def _for_all_heads(states: Tensor, query: Tensor) -> Tensor:
    """With fewer key heads than query heads: as many, without a copy."""
    return states if states.shape[1] == query.shape[1] else states[:, :1].expand(-1, query.shape[1], -1, -1)


def _for_all_rows(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
