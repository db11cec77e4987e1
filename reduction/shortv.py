"""ShortV: decoder layers in which visual tokens are frozen (arXiv 2504.00502, §4).

In a frozen layer a visual token has no query and no FFN: its hidden state leaves the layer as it came. It still gives
a key and a value, which the text attends to. One mechanism for every decoder built like Llama's: the layer's own
modules run on the active positions, so there is no copy of a decoder per family.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, eager_attention_forward, rotate_half
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from .errors import ReductionError

SUPPORTED_ATTENTION = ("eager", "sdpa")


class ActiveRows(NamedTuple):
    """The positions that a layer updates; every other position is frozen in it.

    Attributes:
        positions: [B, A] int64, A the largest number of active positions in a row: its active positions, ascending,
            then (to fill up) as many of its frozen ones.
        is_active: [B, A] bool, False where `positions` fills up.
        fills_up: whether `is_active` may be False anywhere.
    """

    positions: Tensor
    is_active: Tensor
    fills_up: bool = True


def active_rows(frozen: Tensor) -> ActiveRows:
    """The complement of `frozen` [B, L] bool, in the form that `forward_active` takes. Waits for the device once."""
    active = ~frozen
    least, count = torch.stack(active.sum(dim=1).aminmax()).tolist()
    # Filling up with the row's own frozen positions keeps the indices of a row distinct, so that writing back needs no
    # mask and no row count but the largest.
    index = frozen.to(torch.uint8).sort(dim=1, stable=True).indices[:, :count]
    return ActiveRows(index, active.gather(1, index), fills_up=least < count)


def forward_active(
    layer: Any,
    hidden_states: Tensor,
    rows: ActiveRows,
    attention_mask: Tensor | None = None,
    past_key_values: Cache | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """A decoder layer that updates the active positions only.

    Args:
        layer: an instance of one of SUPPORTED_LAYERS; its weights are used as they are.
        hidden_states: [B, L, H].
        rows: which positions are active.
        attention_mask: what the decoder gives its layers: None (causal), bool or additive [B or 1, 1, L, K].
        past_key_values: cache; keys and values of all L positions are appended.
        position_embeddings: cos and sin, [B or 1, L, d] each.
        kwargs: passed on to the attention function.

    Returns:
        [B, L, H]; frozen positions bit for bit as they came.
    """
    if position_embeddings is None:
        raise ReductionError("a frozen layer needs position_embeddings (cos, sin), as every decoder passes them")
    attention = layer.self_attn
    batch, length, _ = hidden_states.shape
    normed = layer.input_layernorm(hidden_states)
    cos, sin = position_embeddings

    def split_heads(states: Tensor) -> Tensor:
        return states.view(batch, states.shape[1], -1, attention.head_dim).transpose(1, 2)

    keys = rotate(split_heads(attention.k_proj(normed)), cos, sin)
    values = split_heads(attention.v_proj(normed))
    if past_key_values is not None:
        keys, values = past_key_values.update(keys, values, attention.layer_idx)
    if rows.positions.shape[1] == 0:
        return hidden_states

    cos, sin = (take(part, rows.positions) for part in (cos, sin))
    queries = rotate(split_heads(attention.q_proj(take(normed, rows.positions))), cos, sin)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    attended, _ = attend(
        attention,
        queries,
        keys,
        values,
        _mask_of_rows(attention_mask, rows.positions, length, keys.shape[-2]),
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scaling,
        **kwargs,
    )
    before = take(hidden_states, rows.positions)
    states = before + attention.o_proj(attended.reshape(batch, rows.positions.shape[1], -1))
    states = states + layer.mlp(layer.post_attention_layernorm(states))
    if rows.fills_up:
        states = torch.where(rows.is_active.unsqueeze(-1), states, before)
    # Not index_copy, which keeps what is put there for a backward pass.
    flat = hidden_states.flatten(0, 1).index_put((_flat(rows.positions, batch, length),), states.flatten(0, 1))
    return flat.view(hidden_states.shape)


class FrozenVisualTokens:
    """Mixin that makes a decoder layer a frozen one: `active_rows`, where given, says which positions it updates."""

    def forward(
        self, hidden_states: Tensor, *args: Any, active_rows: ActiveRows | None = None, **kwargs: Any
    ) -> Tensor:
        if active_rows is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        return forward_active(self, hidden_states, active_rows, *args, **kwargs)


class FrozenLlamaDecoderLayer(FrozenVisualTokens, LlamaDecoderLayer):
    """Llama's decoder layer, visual tokens frozen."""


class FrozenMistralDecoderLayer(FrozenVisualTokens, MistralDecoderLayer):
    """Mistral's decoder layer, visual tokens frozen."""


class FrozenQwen2DecoderLayer(FrozenVisualTokens, Qwen2DecoderLayer):
    """Qwen2's decoder layer, visual tokens frozen."""


# A new family belongs here once its layer is seen to be pre-norm attention (q, k, v and o projections, rotate-half
# rotary positions, nothing in between) and then a pre-norm FFN, each added to the residual.
FROZEN_LAYERS: dict[Any, Any] = {
    LlamaDecoderLayer: FrozenLlamaDecoderLayer,
    MistralDecoderLayer: FrozenMistralDecoderLayer,
    Qwen2DecoderLayer: FrozenQwen2DecoderLayer,
}
SUPPORTED_LAYERS = tuple(FROZEN_LAYERS)


def freeze_visual_tokens(language_model: Any, layers: list[int]) -> None:
    """Replace the layers at these indices of a decoder, before its weights are loaded, by their frozen versions.

    Raises:
        ValueError: a decoder of an unsupported family.
    """
    for index in layers:
        plain = type(language_model.layers[index])
        if plain not in FROZEN_LAYERS:
            names = ", ".join(supported.__name__ for supported in SUPPORTED_LAYERS)
            raise ReductionError(f"shortv: layer {index} is a {plain.__name__}, not one of {names}")
        frozen = FROZEN_LAYERS[plain]
        language_model.layers[index] = frozen(language_model.config, layer_idx=index)
        # device_map="auto" must not cut through a layer; it knows them by class name.
        language_model._no_split_modules = {*language_model._no_split_modules, frozen.__name__}


def _mask_of_rows(mask: Tensor | None, index: Tensor, length: int, key_length: int) -> Tensor | None:
    """The rows `index` [B, A] of a decoder's attention mask, as [B, 1, A, K]."""
    if mask is not None:
        mask = mask.expand(index.shape[0], -1, -1, -1)
        at = index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1])
        return mask.gather(2, at)
    if length == 1:
        return None
    # Without a mask SDPA is causal from the upper left, which holds for all rows together but not for some of them.
    return index[:, None, :, None] >= torch.arange(key_length, device=index.device)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: states [B, heads, N, d], cos and sin [B or 1, N, d]."""
    return states * cos.unsqueeze(1) + rotate_half(states) * sin.unsqueeze(1)


def take(states: Tensor, index: Tensor) -> Tensor:
    """states [B or 1, N, X] at index [B, A] → [B, A, X]. Row by row: gather would look up every single value."""
    rows, length = states.shape[:2]
    return states.flatten(0, 1).index_select(0, _flat(index, rows, length)).unflatten(0, index.shape)


def _flat(index: Tensor, rows: int, length: int) -> Tensor:
    """Where positions `index` [B, A] stand in rows of `length`, one after the other, or in one for all: [B * A]."""
    if rows > 1:
        index = index + length * torch.arange(rows, device=index.device)[:, None]
    return index.flatten()


def windows_of(decoder: Any) -> list[int | None]:
    """How many tokens back each layer sees, or None for all of them."""
    values, depth = decoder.config.to_dict(), len(decoder.layers)
    window = values.get("sliding_window")
    kinds = values.get("layer_types") or ["sliding_attention"] * depth
    return [window if kind == "sliding_attention" else None for kind in kinds]
