"""The language model's hidden states at supervised positions, with nothing computed that they do not need.

What a training step of the projector can leave out of a plain forward and backward pass, exactly:

- **Fixed text before the image.** No trained weight touches it and it sees none that is: its keys and values are
  constants of the run (:class:`FixedText`), shared by all rows.
- **Tokens after the last supervised position** of a row, and rows that have none.
- **Padding.** Tokens are packed, [tokens of all rows, H]: norms, projections and FFN see no padding. Attention alone
  works on padded rows.
- **Frozen visual tokens.** They stand first in the packed order, so a frozen layer takes its queries from one slice,
  and in a run of frozen layers nothing is gathered or scattered between layers.
- **The last layer's queries**: those of supervised positions only.
- **Activations.** A norm keeps its input as it came and one number per token, a gated FFN its two wide inputs: a third
  less than modules that save every intermediate. Weights that are not trained keep no input at all.

A causal language model reads a token's place from its position and its mask, not from where it stands in a tensor,
which is why packing changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward, rotate_half
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from shortzip.reduction.shortv import SUPPORTED_ATTENTION, SUPPORTED_LAYERS, FrozenVisualTokens, windows_of
from shortzip.train.step.lean_autograd import GatedSilu, LeanRmsNorm, Put, Take
from shortzip.train.step.places import Padded, Places

RMS_NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm)
MASK_ALIGNMENT = 8  # mem_eff_alignment in aten/src/ATen/native/transformers/attention.cpp
KeysValues = tuple[Tensor, Tensor]


def can_walk(decoder: Any) -> bool:
    """Whether `supervised_states` gives what this decoder gives.

    Its layers' family and attention must be known, its weights untrained, whole and on one device: engines that shard
    them, or spread layers over devices, count on every process calling the same layers in the same order.
    """
    known = all(isinstance(layer, SUPPORTED_LAYERS) for layer in decoder.layers)
    if not known or decoder.config._attn_implementation not in SUPPORTED_ATTENTION:
        return False
    weights = list(decoder.parameters())
    first = weights[0].device
    return all(
        weight.numel() > 0 and not weight.requires_grad and weight.device == first and not isinstance(weight, DTensor)
        for weight in weights
    )


@dataclass(frozen=True)
class FixedText:
    """Text that rows begin with.

    Attributes:
        ids: [p] int64 on the CPU.
        keys_values: of each layer, [p, key heads, d] each, rotated.
    """

    ids: Tensor
    keys_values: list[KeysValues]

    def first(self, count: int) -> list[KeysValues]:
        """Keys and values of the first `count` tokens, which see nothing of the others."""
        return [(keys[:count], values[:count]) for keys, values in self.keys_values]


@torch.no_grad()
def compute_fixed_text(decoder: Any, ids: Tensor) -> FixedText:
    """Keys and values of a text [p] int64 (p ≥ 1) that stands at the beginning of rows."""
    embeds = decoder.embed_tokens(ids.to(decoder.embed_tokens.weight.device))
    positions = torch.arange(len(ids), device=embeds.device)
    row = Padded(positions, positions[None])
    walk = _Walk(decoder, embeds, positions, row)
    every, states = walk.queries(row), embeds
    collected: list[KeysValues] = []
    for number, layer in enumerate(decoder.layers):
        normed = walk.normed(layer.input_layernorm, states)
        keys, values = walk.keys_values(layer, normed, number)
        collected.append((keys[0], values[0]))
        states = walk.update(layer, states, normed, every, keys, values)
    return FixedText(ids, collected)


def supervised_states(
    decoder: Any,
    visual: Tensor | None,
    places: Places,
    fixed: FixedText | None = None,
    checkpointing: bool = False,
    frozen: bool = True,
) -> Tensor:
    """Hidden states after the final norm at the supervised positions, [S, H], in the order of `places.targets`.

    Args:
        decoder: the language model without its head, one that `can_walk` knows.
        visual: [needed visual tokens, H] in the order of their placeholders; None when there are none.
        places: on the decoder's device.
        fixed: what rows begin with; needed where `places.shared` is above 0.
        checkpointing: compute each layer again in the backward pass instead of keeping its activations.
        frozen: whether frozen layers leave visual tokens as they come; otherwise they are layers like the others.
    """
    text = decoder.embed_tokens(places.ids)
    count = places.visual_count
    states = (text[:0] if visual is None else visual.to(text.dtype), text)
    before = fixed.first(places.shared) if fixed is not None and places.shared else None
    walk = _Walk(decoder, text, places.positions, places.every, before, count)
    every = walk.queries(places.every)
    of_text = walk.queries(places.text, slice(count, None))
    ends = walk.queries(places.ends, places.packed_ends)
    for number, layer in enumerate(decoder.layers):
        leaves = frozen and isinstance(layer, FrozenVisualTokens) and count > 0
        if number == len(decoder.layers) - 1:
            run = partial(walk.last_layer, layer, number, ends, leaves)
        elif leaves:
            run = partial(walk.frozen_layer, layer, number, of_text)
        else:
            run = partial(walk.plain_layer, layer, number, every)
        backward = torch.is_grad_enabled() and any(part.requires_grad for part in states)
        again = checkpointing and backward
        # Without dropout nothing is drawn, and no random state need be kept.
        states = checkpoint(run, *states, use_reentrant=False, preserve_rng_state=False) if again else run(*states)
    return walk.normed(decoder.norm, states[1])


@dataclass(frozen=True)
class _Queries:
    """Packed tokens that a layer updates: where they stand in padded rows [B, Q], and which they are."""

    places: Padded
    cos: Tensor  # [M, 1, d]
    sin: Tensor
    index: slice | Tensor
    masks: dict[int | None, Tensor]  # by the layer's window


class _Walk:
    """A pass of packed tokens through a decoder's layers; the arguments are named as in Places."""

    def __init__(
        self,
        decoder: Any,
        embeds: Tensor,
        positions: Tensor,
        every: Padded,
        before: list[KeysValues] | None = None,
        visual_count: int = 0,
    ) -> None:
        self.config, self.dtype, self.windows = decoder.config, embeds.dtype, windows_of(decoder)
        cos, sin = decoder.rotary_emb(embeds, positions[None])
        self.cos, self.sin = cos[0].unsqueeze(1), sin[0].unsqueeze(1)
        self.before, self.visual_count = before, visual_count
        self.shared = 0 if before is None else len(before[0][0])
        beginning = torch.arange(self.shared, device=every.rows.device).expand(len(every.rows), -1)
        self.key_positions = torch.cat([beginning, every.rows], dim=1)
        # Keys stand behind the shared ones of their row.
        self.key_slots = every.slots + (every.slots // every.rows.shape[1] + 1) * self.shared

    def queries(self, places: Padded, index: slice | Tensor = slice(None)) -> _Queries:
        return _Queries(places, self.cos[index], self.sin[index], index, {})

    def plain_layer(
        self, layer: Any, number: int, every: _Queries, visual: Tensor, text: Tensor
    ) -> tuple[Tensor, Tensor]:
        states = torch.cat([visual, text])
        normed = self.normed(layer.input_layernorm, states)
        states = self.update(layer, states, normed, every, *self.keys_values(layer, normed, number))
        visual, text = states.split([len(visual), len(text)])
        return visual, text

    def frozen_layer(
        self, layer: Any, number: int, of_text: _Queries, visual: Tensor, text: Tensor
    ) -> tuple[Tensor, Tensor]:
        normed = self.normed(layer.input_layernorm, text)
        every = torch.cat([self.normed(layer.input_layernorm, visual), normed])
        return visual, self.update(layer, text, normed, of_text, *self.keys_values(layer, every, number))

    def last_layer(
        self, layer: Any, number: int, ends: _Queries, frozen: bool, visual: Tensor, text: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gives the supervised positions in place of the text."""
        states = torch.cat([visual, text])
        normed = self.normed(layer.input_layernorm, states)
        index: Any = ends.index
        before, asking = Take.apply(states, index), Take.apply(normed, index)
        after = self.update(layer, before, asking, ends, *self.keys_values(layer, normed, number))
        if frozen:  # a visual token that predicts the next one leaves a frozen layer as it came
            after = torch.where((index < self.visual_count).unsqueeze(1), before, after)
        return visual, after

    def keys_values(self, layer: Any, normed: Tensor, number: int) -> KeysValues:
        """Of all packed tokens, normed [N, H]: [B, shared + K, key heads, d] each."""
        attention = layer.self_attn
        keys = attention.k_proj(normed).view(len(normed), -1, attention.head_dim)
        values = attention.v_proj(normed).view_as(keys)
        before = (None, None) if self.before is None else self.before[number]
        return self._padded(_rotate(keys, self.cos, self.sin), before[0]), self._padded(values, before[1])

    def _padded(self, packed: Tensor, before: Tensor | None) -> Tensor:
        # Zeros, for what a mask hides must still be finite.
        rows = packed.new_zeros(*self.key_positions.shape, *packed.shape[1:])
        if before is not None:
            rows[:, : self.shared] = before.to(rows)
        return Put.apply(packed, self.key_slots, rows)

    def update(
        self, layer: Any, states: Tensor, normed: Tensor, queries: _Queries, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Attention and FFN of the packed tokens `states` [M, H], whose normed form is `normed`."""
        attention = layer.self_attn
        asked = attention.q_proj(normed).view(len(states), -1, attention.head_dim)
        asked = _rotate(asked, queries.cos, queries.sin)
        batch, width = queries.places.rows.shape
        padded = Put.apply(asked, queries.places.slots, asked.new_zeros(batch, width, *asked.shape[1:]))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, _ = attend(
            attention,
            padded.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            self.mask(queries, attention.layer_idx),
            dropout=0.0,
            scaling=attention.scaling,
        )
        states = states + attention.o_proj(Take.apply(attended.reshape(batch * width, -1), queries.places.slots))
        return states + self.feed_forward(layer.mlp, self.normed(layer.post_attention_layernorm, states))

    def mask(self, queries: _Queries, layer: int) -> Tensor:
        """[B, 1, Q, shared + K] to be added to the scores: SDPA would make as much of a bool mask in every layer.

        Finite, for an empty slot may see nothing: a softmax over nothing is NaN, and 0 * NaN reaches gradients. Each
        row begins at a multiple of `MASK_ALIGNMENT` values: of any other mask, CUDA's kernel makes a copy per layer.
        """
        window = self.windows[layer]
        if window not in queries.masks:
            at, keys = queries.places.rows[:, None, :, None], self.key_positions[:, None, None, :]
            hidden = keys > at
            if window is not None:
                hidden = hidden | (keys <= at - window)
            width = hidden.shape[-1]
            mask = hidden.new_zeros(*hidden.shape[:-1], -(-width // MASK_ALIGNMENT) * MASK_ALIGNMENT, dtype=self.dtype)
            queries.masks[window] = mask[..., :width].masked_fill_(hidden, torch.finfo(self.dtype).min)
        return queries.masks[window]

    def normed(self, norm: Any, states: Tensor) -> Tensor:
        if type(norm) not in RMS_NORMS or norm.weight.requires_grad or not states.requires_grad:
            return norm(states)
        return LeanRmsNorm.apply(states, norm.weight, norm.variance_epsilon)

    def feed_forward(self, mlp: Any, states: Tensor) -> Tensor:
        gate, up = mlp.gate_proj(states), mlp.up_proj(states)
        if self.config.hidden_act in ("silu", "swish"):
            return mlp.down_proj(GatedSilu.apply(gate, up))
        return mlp.down_proj(mlp.act_fn(gate) * up)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: states [N, heads, d], cos and sin [N, 1, d]."""
    return states * cos + rotate_half(states) * sin
