"""FastV (arXiv 2403.06764), to compare with: visual tokens are pruned inside the language model, after layer K.

The attention that the prompt's last token pays in layer K (mean over heads) ranks the visual tokens; the layers after
it see the highest-ranked share of them, and all text. That is the authors' code; their paper averages over the
attention of all later tokens. Kept tokens keep their positions.

What is pruned leaves exact zeros in the cache of the later layers, which is how a later step, beam or turn knows it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward, repeat_kv

from .shortv import SUPPORTED_LAYERS, ActiveRows, active_rows


@dataclass
class Pruning:
    """What one forward pass prunes. Made for it alone: layer K fills in `rows`, the layers after it read them.

    Attributes:
        keep: share of the visual tokens that is kept, rounded to whole tokens, at least one.
        visual: [B, L] bool, where visual tokens stand; None: nowhere.
        query: [B] int64, the position whose attention ranks them; None: the last.
        rows: the positions that are left.
    """

    keep: float
    visual: Tensor | None
    query: Tensor | None
    rows: ActiveRows | None = None

    def choose(self, scores: Tensor) -> None:
        """Sets `rows` by scores [B, L] of all positions; of equal scores the earlier wins."""
        assert self.visual is not None
        order = scores.masked_fill(~self.visual, -1).sort(dim=1, descending=True, stable=True).indices
        rank = order.argsort(dim=1)
        there = self.visual.sum(dim=1, keepdim=True)
        kept = (there * self.keep).round().clamp(min=1)
        self.rows = active_rows(self.visual & (rank >= kept))


class FastVLayer(GradientCheckpointingLayer):
    """A decoder layer, of the same weight names, that ranks (layer K) or computes what is left (those after it).

    Args:
        layer: an instance of one of SUPPORTED_LAYERS, whose modules it takes over.
        ranks: whether this is layer K.
    """

    def __init__(self, layer: Any, ranks: bool) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.ranks = ranks

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        fastv: Pruning | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As the plain layer, [B, L, H] to [B, L, H]; positions that are pruned come out as they came in.

        Raises:
            ValueError: called without `fastv` or positions, which the reduced models pass.
        """
        if fastv is None or position_embeddings is None:
            raise ValueError("a FastV layer runs inside a reduced model, which tells it what is pruned")
        batch, length, width = hidden_states.shape
        normed = self.input_layernorm(hidden_states)
        if self.ranks and fastv.visual is not None:
            fastv.choose(self._attention_of_query(normed, fastv, attention_mask, position_embeddings))
        rows = None if self.ranks else fastv.rows
        if rows is None:
            every = torch.arange(length, device=hidden_states.device).expand(batch, -1)
            rows = ActiveRows(every, torch.ones_like(every, dtype=torch.bool))
        at = rows.positions.unsqueeze(-1)
        before = hidden_states.gather(1, at.expand(-1, -1, width))
        cos, sin = (part.expand(batch, -1, -1) for part in position_embeddings)
        cos, sin = (part.gather(1, at.expand(-1, -1, part.shape[-1])) for part in (cos, sin))
        queries, keys, values = self._project(normed.gather(1, at.expand(-1, -1, width)))
        queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin)
        keys, values = (_spread(part, rows, length) for part in (keys, values))
        attention = self.self_attn
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, attention.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
        attended, _ = attend(
            attention,
            queries,
            keys,
            values,
            _mask(attention_mask, rows.positions, keys, length, queries.dtype),
            dropout=attention.attention_dropout if attention.training else 0.0,
            scaling=attention.scaling,
        )
        states = before + attention.o_proj(attended.reshape(batch, rows.positions.shape[1], -1))
        states = states + self.mlp(self.post_attention_layernorm(states))
        states = torch.where(rows.is_active.unsqueeze(-1), states, before)
        return hidden_states.to(states.dtype).scatter(1, at.expand(-1, -1, width), states)

    def _project(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.self_attn
        parts = (attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed))
        queries, keys, values = (part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for part in parts)
        return queries, keys, values

    @torch.no_grad()
    def _attention_of_query(
        self, normed: Tensor, fastv: Pruning, attention_mask: Tensor | None, position_embeddings: tuple[Tensor, Tensor]
    ) -> Tensor:
        """[B, L] float32: what `fastv.query` pays to each position of this pass, mean over heads; 0 to later ones."""
        length = normed.shape[1]
        last = torch.full((normed.shape[0],), length - 1, device=normed.device)
        query = last if fastv.query is None else fastv.query
        queries, keys, _ = self._project(normed)
        queries, keys = apply_rotary_pos_emb(queries, keys, *position_embeddings)
        keys = repeat_kv(keys, queries.shape[1] // keys.shape[1])
        at = query[:, None, None, None].expand(-1, queries.shape[1], 1, queries.shape[-1])
        logits = (queries.gather(2, at).float() * self.self_attn.scaling) @ keys.float().transpose(-1, -2)
        # What earlier turns left in a cache takes no part.
        recent = None if attention_mask is None else attention_mask[..., -length:]
        return (logits + _mask(recent, query[:, None], keys, length, torch.float32)).softmax(dim=-1).mean(dim=1)[:, 0]


def prune_in_decoder(language_model: Any, layer: int) -> None:
    """Makes layer `layer` (counted from 1) of a decoder rank the visual tokens, and those after it leave them out.

    Raises:
        ValueError: a decoder of an unsupported family.
    """
    for index in range(layer - 1, len(language_model.layers)):
        plain = language_model.layers[index]
        if type(plain) not in SUPPORTED_LAYERS:
            names = ", ".join(supported.__name__ for supported in SUPPORTED_LAYERS)
            raise ValueError(f"fastv: layer {index} is a {type(plain).__name__}, not one of {names}")
        language_model.layers[index] = FastVLayer(plain, ranks=index == layer - 1)
    language_model._no_split_modules = {*language_model._no_split_modules, FastVLayer.__name__}


def last_attended(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """[B] int64, the last of this pass's `length` positions that is no padding; None without a [B, all] mask."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    places = torch.arange(length, device=attention_mask.device)
    return (attention_mask[:, -length:].bool() * places).argmax(dim=1)


def _spread(states: Tensor, rows: ActiveRows, length: int) -> Tensor:
    """[B, heads, A, d] to [B, heads, L, d], zeros where nothing is left."""
    states = states * rows.is_active[:, None, :, None]
    whole = states.new_zeros(*states.shape[:2], length, states.shape[-1])
    return whole.scatter(2, rows.positions[:, None, :, None].expand_as(states), states)


def _mask(mask: Tensor | None, positions: Tensor, keys: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """[B, 1, A, K] additive: what the queries at `positions` [B, A] of this pass may see of keys [B, heads, K, d]."""
    total = keys.shape[-2]
    if mask is None:
        past = total - length
        allowed = (positions + past)[:, None, :, None] >= torch.arange(total, device=keys.device)
    else:
        mask = mask.expand(positions.shape[0], -1, -1, -1)
        mask = mask.gather(2, positions[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1]))
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    left = (keys != 0).any(dim=-1).any(dim=1)[:, None, None, :]
    shown = torch.zeros(allowed.shape, dtype=dtype, device=keys.device)
    return shown.masked_fill(~(allowed & left), torch.finfo(dtype).min)
