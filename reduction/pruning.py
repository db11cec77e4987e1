"""Visual tokens are pruned inside the language model, at one or several layers: what all methods of it share.

A method (fastv.py, pyramiddrop.py, sparsevlm.py) says at which layers the visual tokens are ranked, by whose
attention, and how many are left. Here is the decoder layer that ranks or computes what is left, in sequences of the
full length: what is pruned leaves a layer as it came, and exact zeros in its cache (pruned_caches.py), which is how a
later step, beam or turn knows it. So visual tokens and what ranks them must come in one pass.

**Positions.** `original`: a token that is left keeps its own. `compact`: tokens move up, each by as many as were
pruned before it, in this pass and in what the cache holds; so a new token stands right behind the last in every layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward, repeat_kv

from .configuration_pruning import PRUNING_METHODS, pruning_method
from .errors import ReductionError
from .extras import extra
from .pruned_caches import first_key, gone_before, refuse_cache
from .shortv import SUPPORTED_LAYERS, ActiveRows, active_rows, rotate, take, windows_of

Rotation = tuple[Tensor, Tensor]  # cos and sin, [B, L, d] each


class Stage(NamedTuple):
    """What is left after a pruning.

    Attributes:
        left: [B, L] bool, all positions but those that are pruned.
        rows: the same in the form in which a layer computes them.
    """

    left: Tensor
    rows: ActiveRows


@dataclass
class Pruning:
    """What one forward pass prunes. Made for it alone: a layer that ranks fills in a stage, the layers after read it.

    Attributes:
        visual: [B, L] bool, where visual tokens stand; None: nowhere.
        query: the positions whose attention ranks them, [B] int64, or several per row, [B, S], with -1 for none; None:
            the last one.
        rotary: the decoder's rotary embedding, for positions that are renumbered.
        stages: what is left after so many prunings. By number: a layer that is computed again in the backward pass
            must find what it found in the forward pass.
        raters: what the method has found out from the embeddings (SparseVLM).
    """

    visual: Tensor | None
    query: Tensor | None
    rotary: Any
    stages: dict[int, Stage] = field(default_factory=dict)
    raters: ActiveRows | None = None

    @cached_property
    def there(self) -> list[int]:
        """Visual tokens of each row, [B]. Waits for the device once."""
        assert self.visual is not None
        return list(map(int, self.visual.sum(dim=1).tolist()))


class Ranking(NamedTuple):
    """The attention that ranks.

    Attributes:
        paid: [B, heads, S, L] float32, what S queries pay to each position that is left, exact zeros to others.
        queries: [B, S] int64, the positions of the queries.
        rotation: cos and sin of all positions as they are numbered here.
    """

    paid: Tensor
    queries: Tensor
    rotation: Rotation


class PruningMethod:
    """A way to prune, made of a valid `fastv` key.

    Attributes:
        layers: indices of the layers by whose attention visual tokens are ranked, ascending: one stage each.
        before: whether such a layer itself computes only what its own ranking leaves, instead of the layers after it.
        compact: whether what is left is renumbered.
        opens: whether the method looks at the embeddings first.
    """

    layers: Sequence[int]
    before: bool = False
    compact: bool = False
    opens: ClassVar[bool] = False

    def counts(self, there: int) -> list[int]:
        """Of `there` visual tokens in a row, how many are left after each stage."""
        raise NotImplementedError

    def open(self, pruning: Pruning, embeds: Tensor) -> None:
        """Looks at the embeddings [B, L, H] of a pass that holds visual tokens."""

    def queries(self, pruning: Pruning) -> Tensor | None:
        """[B, S] int64, the positions whose attention ranks; None: the last one."""
        query = pruning.query
        return query if query is None or query.dim() == 2 else query[:, None]

    def choose(self, stage: int, pruning: Pruning, ranking: Ranking, states: Tensor) -> tuple[Tensor, Tensor]:
        """What stage `stage` (from 0) leaves.

        Args:
            states: [B, L, H], what the stage's layer gives (with `before`: what it gets).

        Returns:
            [B, L] bool, the positions that are left, and the states with what has been merged into them.
        """
        raise NotImplementedError


def method_of(fastv: Any) -> PruningMethod:
    """The method of a valid `fastv` key. Raises ReductionError where a checkpoint came without its code."""
    name = pruning_method(fastv)
    module: Any = extra(PRUNING_METHODS[name].module, f"fastv: method {name}")
    method: PruningMethod = module.METHODS[name](fastv)
    return method


def top(scores: Tensor, among: Tensor, counts: Sequence[int]) -> Tensor:
    """[B, L] bool: of the positions `among` [B, L] the counts[b] with the highest scores [B, L]; of equal ones the
    earlier."""
    order = scores.masked_fill(~among, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    limit = torch.tensor(counts, device=scores.device)[:, None]
    return among & (order.argsort(dim=1) < limit)


class PrunedLayer(GradientCheckpointingLayer):
    """A decoder layer, of the same weight names, that ranks visual tokens or computes those that are left.

    Args:
        layer: an instance of one of SUPPORTED_LAYERS, whose modules it takes over.
        method: what is pruned, and how.
        index: the layer's, from 0.
    """

    def __init__(self, layer: Any, method: PruningMethod, index: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.method = method
        self.done = sum(ranking < index for ranking in method.layers)
        self.ranks, self.opens = index in method.layers, method.opens and index == 0

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: Rotation | None = None,
        position_ids: Tensor | None = None,
        fastv: Pruning | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As the plain layer, [B, L, H] to [B, L, H]; positions that are pruned come out as they came in.

        Raises:
            ValueError: called without `fastv` or positions, which the reduced models pass.
        """
        if fastv is None or position_embeddings is None or position_ids is None:
            raise ReductionError("a layer that prunes runs inside a reduced model, which tells it what is pruned")
        batch, length, _ = hidden_states.shape
        ranks, stage = self.ranks and fastv.visual is not None, fastv.stages.get(self.done)
        start = first_key(past_key_values, self.self_attn.layer_idx, length)
        if self.opens and fastv.visual is not None:
            self.method.open(fastv, hidden_states)
        normed = self.input_layernorm(hidden_states)
        plain: Rotation = tuple(part.expand(batch, -1, -1) for part in position_embeddings)  # type: ignore[assignment]
        ranking = None
        if ranks:
            # What earlier turns left in a cache takes no part, nor does what a static one has room for.
            recent = None if attention_mask is None else attention_mask[..., int(start) : int(start) + length]
            here = self._renumbered(fastv, stage, plain, hidden_states, position_ids, None)
            ranking = self._rank(normed, fastv, stage, recent, here)
        if ranking is not None and self.method.before:
            stage = self._stage(fastv, ranking, hidden_states)[0]
        gone = None
        if self.method.compact and self.done + (self.ranks and self.method.before):
            gone = gone_before(past_key_values, self.self_attn.layer_idx, start, attention_mask)
        rotation = self._renumbered(fastv, stage, plain, hidden_states, position_ids, gone)
        states = self._update(hidden_states, normed, stage, rotation, attention_mask, past_key_values, start)
        if ranking is not None and not self.method.before:
            states = self._stage(fastv, ranking, states)[1]
        return states

    def _stage(self, fastv: Pruning, ranking: Ranking, states: Tensor) -> tuple[Stage, Tensor]:
        left, states = self.method.choose(self.done, fastv, ranking, states)
        stage = fastv.stages[self.done + 1] = Stage(left, active_rows(~left))
        return stage, states

    def _renumbered(
        self,
        fastv: Pruning,
        stage: Stage | None,
        plain: Rotation,
        states: Tensor,
        position_ids: Tensor,
        gone: Tensor | None,
    ) -> Rotation:
        """cos and sin where `stage` is left and `gone` [B, 1] positions were pruned in what the cache holds."""
        if not self.method.compact or (stage is None and gone is None):
            return plain
        moved = 0 if stage is None else (~stage.left).cumsum(dim=1)
        rotation: Rotation = fastv.rotary(states, position_ids - moved - (0 if gone is None else gone))
        return rotation

    def _update(
        self,
        hidden_states: Tensor,
        normed: Tensor,
        stage: Stage | None,
        rotation: Rotation,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        start: int | Tensor,
    ) -> Tensor:
        batch, length, width = hidden_states.shape
        attention = self.self_attn
        if stage is None:
            every = torch.arange(length, device=hidden_states.device).expand(batch, -1)
            rows = ActiveRows(every, torch.ones_like(every, dtype=torch.bool))
        else:
            rows = stage.rows
        before, asked, cos, sin = (take(part, rows.positions) for part in (hidden_states, normed, *rotation))
        queries, keys, values = (
            self._heads(project(asked)) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        queries, keys = rotate(queries, cos, sin), rotate(keys, cos, sin)
        keys, values = (_spread(part, rows, length) for part in (keys, values))
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, attention.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
        attended, _ = attend(
            attention,
            queries,
            keys,
            values,
            _mask(attention_mask, rows.positions, keys, start, queries.dtype),
            dropout=attention.attention_dropout if attention.training else 0.0,
            scaling=attention.scaling,
        )
        states = before + attention.o_proj(attended.reshape(batch, rows.positions.shape[1], -1))
        states = states + self.mlp(self.post_attention_layernorm(states))
        states = torch.where(rows.is_active.unsqueeze(-1), states, before)
        return hidden_states.to(states.dtype).scatter(1, rows.positions.unsqueeze(-1).expand(-1, -1, width), states)

    def _heads(self, states: Tensor) -> Tensor:
        """[B, N, heads * d] to [B, heads, N, d]."""
        return states.unflatten(-1, (-1, self.self_attn.head_dim)).transpose(1, 2)

    @torch.no_grad()
    def _rank(
        self, normed: Tensor, fastv: Pruning, stage: Stage | None, attention_mask: Tensor | None, rotation: Rotation
    ) -> Ranking:
        """`attention_mask`: of this pass's keys alone."""
        length = normed.shape[1]
        asking = self.method.queries(fastv)
        asking = torch.full((normed.shape[0], 1), length - 1, device=normed.device) if asking is None else asking
        places = asking.clamp(min=0)
        asked, cos, sin = (take(part, places) for part in (normed, *rotation))
        queries = rotate(self._heads(self.self_attn.q_proj(asked)), cos, sin)
        keys = rotate(self._heads(self.self_attn.k_proj(normed)), *rotation)
        keys = repeat_kv(keys, queries.shape[1] // keys.shape[1])
        logits = (queries.float() * self.self_attn.scaling) @ keys.float().transpose(-1, -2)
        logits = logits + _mask(attention_mask, places, keys, 0, torch.float32)
        if stage is not None:
            logits = logits.masked_fill(~stage.left[:, None, None], torch.finfo(torch.float32).min)
        return Ranking(logits.softmax(dim=-1), asking, rotation)


def pruning_of(
    rotary: Any, visual: Tensor | None, query: Tensor | None, length: int, mask: Tensor | None, cache: Any
) -> Pruning:
    """What a pass of `length` positions prunes; `query` None: as its attention mask says. Raises as `refuse_cache`."""
    refuse_cache(cache)
    return Pruning(visual, last_attended(mask, length) if query is None else query, rotary)


def prune_in_decoder(language_model: Any, fastv: Any) -> None:
    """Makes the layers of a decoder rank visual tokens and leave them out, as a valid `fastv` key says.

    Raises:
        ValueError: a decoder of an unsupported family, or of a sliding window that renumbered positions would stretch.
    """
    method = method_of(fastv)
    windows = [window for window in windows_of(language_model) if window is not None]
    if method.compact and windows:
        cure = "positions: original" if pruning_method(fastv) == "pyramiddrop" else "method: sparsevlm+"
        raise ReductionError(
            f"fastv: method {pruning_method(fastv)} renumbers positions, and this language model sees the last "
            f"{windows[0]} positions only, counted with what is pruned: choose {cure}"
        )
    for index in range(0 if method.opens else method.layers[0], len(language_model.layers)):
        plain = language_model.layers[index]
        if type(plain) not in SUPPORTED_LAYERS:
            names = ", ".join(supported.__name__ for supported in SUPPORTED_LAYERS)
            raise ReductionError(f"fastv: layer {index} is a {type(plain).__name__}, not one of {names}")
        language_model.layers[index] = PrunedLayer(plain, method, index)
    language_model._no_split_modules = {*language_model._no_split_modules, PrunedLayer.__name__}


def last_attended(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """[B] int64, the last of this pass's `length` positions that is no padding; None without a [B, all] mask."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    places = torch.arange(length, device=attention_mask.device)
    return (attention_mask[:, -length:].bool() * places).argmax(dim=1)


def prompt_end(ids: Tensor | None, embeds: Tensor | None, mask: Tensor | None, pad: int | None) -> Tensor | None:
    """[B] int64, the last position of each prompt [B, L] or [B, L, H] that is no padding; None without a prompt."""
    prompts = ids if embeds is None else embeds
    if prompts is None:
        return None
    if mask is None and embeds is None and pad is not None:
        mask = prompts != pad
    end = last_attended(mask, prompts.shape[1])
    return prompts.new_full(prompts.shape[:1], prompts.shape[1] - 1, dtype=torch.long) if end is None else end


def refuse_chunks(size: int | None) -> None:
    """Refuses a prompt in chunks: the visual tokens of one cannot be ranked by the end of another."""
    if size is not None:
        raise ReductionError(
            f"fastv: prefill_chunk_size is {size}, but the prompt's last token ranks all visual tokens, in one pass: "
            "leave it out, or load the model with fastv=None"
        )


def _spread(states: Tensor, rows: ActiveRows, length: int) -> Tensor:
    """[B, heads, A, d] to [B, heads, L, d], zeros where nothing is left."""
    states = states * rows.is_active[:, None, :, None]
    whole = states.new_zeros(*states.shape[:2], length, states.shape[-1])
    return whole.scatter(2, rows.positions[:, None, :, None].expand_as(states), states)


def _mask(mask: Tensor | None, positions: Tensor, keys: Tensor, start: int | Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, A, K] additive: what the queries at `positions` [B, A] of this pass may see of keys [B, heads, K, d], of
    which this pass's begin at `start`."""
    if mask is None:
        allowed = (positions + start)[:, None, :, None] >= torch.arange(keys.shape[-2], device=keys.device)
    else:
        mask = mask.expand(positions.shape[0], -1, -1, -1)
        mask = mask.gather(2, positions[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1]))
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    left = (keys != 0).any(dim=-1).any(dim=1)[:, None, None, :]
    shown = torch.zeros(allowed.shape, dtype=dtype, device=keys.device)
    return shown.masked_fill(~(allowed & left), torch.finfo(dtype).min)
