"""The vision tower taken apart: what its first block reads, and the queries and keys of the block that scores."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, SiglipVisionModel

from .errors import ReductionError
from .tensors import at_least_float32


def embed_patches(tower: Any, pixel_values: Tensor, interpolate: bool = False) -> Tensor:
    """What the tower's first block reads: [N, T, H] of images [N, 3, S, S].

    With `interpolate`, images may be of another size, and the position embeddings are interpolated.

    Raises:
        ValueError: a tower of an unsupported family.
    """
    if isinstance(tower, CLIPVisionModel):
        return tower.pre_layrnorm(tower.embeddings(pixel_values, interpolate_pos_encoding=interpolate))
    if isinstance(tower, SiglipVisionModel):
        return tower.embeddings(pixel_values, interpolate_pos_encoding=interpolate)
    raise ReductionError(
        f"visionzip: the tower is a {type(tower).__name__}, not a CLIPVisionModel or SiglipVisionModel"
    )


@torch.no_grad()
def queries_and_keys(block: Any, hidden: Tensor, has_cls: bool) -> tuple[Tensor, Tensor]:
    """Queries [N, heads, Q, d] (Q = 1 with CLS: its own, else T) and keys [N, heads, T, d] of a block.

    In float32 or better, so that a tower in bfloat16 or float16 keeps the patches that float32 keeps.
    """
    attention, norm = block.self_attn, block.layer_norm1
    linears = (attention.q_proj, attention.k_proj)
    # Without autocast, as in reduce_tokens.
    with torch.autocast(hidden.device.type, enabled=False):
        if all(type(linear) is nn.Linear for linear in linears) and not norm.weight.is_meta:
            weight, bias = at_least_float32(norm.weight), at_least_float32(norm.bias)
            normed = nn.functional.layer_norm(at_least_float32(hidden), norm.normalized_shape, weight, bias, norm.eps)
            project = _project_in_float32
        else:  # Quantised, adapted or offloaded weights are not to be had: the modules run as they are.
            normed = norm(hidden)
            project = nn.Module.__call__
        queries = project(linears[0], normed[:, :1] if has_cls else normed)
        keys = project(linears[1], normed)

    def split_heads(states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    return split_heads(queries), split_heads(keys)


def _project_in_float32(linear: nn.Linear, states: Tensor) -> Tensor:
    return nn.functional.linear(states, at_least_float32(linear.weight), at_least_float32(linear.bias))
