"""Layer contribution (LC): how much the answer changes when visual or text tokens are frozen in one LLM layer.

ShortV (arXiv 2504.00502, §3.1): LC_i = KL(p_full || p_i), p being the next-token distribution at the last token of the
prompt, with all tokens of one kind (visual, or text) frozen in layer i and in no other. Layers whose LC for visual
tokens is low are the ones to freeze them in.

The naive way runs the whole model once per layer. Here the layers of all variants are walked through together:

- Variant i equals the full model below layer i, and leaves layer i with nothing new to compute: its frozen tokens keep
  the full model's input of that layer, and the others see the same keys and values as in the full model, so they have
  its output. Only the layers above i are computed for it, for all variants so far as rows of one batch.
- What stands before the first visual token is the same in the full model and in every variant with frozen visual
  tokens; its keys and values are computed once for as many prompts as begin with it. Frozen text changes it, the same
  way for every such prompt, so its variants are kept as well.
- In the last layer only the last token has an output that anyone reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shortzip.reduction.calibration_prompts import CalibrationSample, EmbeddedPrompt, embed_prompt, plan_batches

from .errors import ReductionError
from .layer_choice import DIRECTIONS, Direction
from .shortv import FROZEN_LAYERS, SUPPORTED_ATTENTION, ActiveRows, forward_active, windows_of


@dataclass(frozen=True)
class Contributions:
    """LC of N prompts in L layers, for both directions in the order of `DIRECTIONS`."""

    visual: Tensor  # [N, 2, L] float64: visual tokens frozen
    text: Tensor | None  # [N, 2, L] float64: text tokens frozen; None when it was not asked for

    def mean(self, direction: Direction = "full_to_frozen") -> list[float]:
        """Mean LC of the visual tokens per layer."""
        return self.visual[:, DIRECTIONS.index(direction)].mean(dim=0).tolist()


@torch.no_grad()
def measure_layer_contributions(
    model: Any,
    samples: Sequence[CalibrationSample],
    *,
    text_tokens: bool = False,
    samples_per_batch: int = 8,
    tokens_per_pass: int | None = None,
) -> Contributions:
    """LC of every layer for every sample, in the order of `samples`. See :class:`LayerContributionMeter`."""
    meter = LayerContributionMeter(
        model.model.language_model, model.lm_head, text_tokens=text_tokens, tokens_per_pass=tokens_per_pass
    )
    order: list[int] = []
    parts: list[Contributions] = []
    for batch in plan_batches(
        [sample.input_ids for sample in samples], model.config.image_token_id, samples_per_batch
    ):
        order += batch
        parts.append(meter.measure([embed_prompt(model, samples[index]) for index in batch]))
    back = torch.tensor(order).argsort()
    texts = [part.text for part in parts if part.text is not None]
    return Contributions(torch.cat([part.visual for part in parts])[back], torch.cat(texts)[back] if texts else None)


class LayerContributionMeter:
    """Measures LC on prompts, keeping what prompts that begin alike share.

    Args:
        decoder: a Llama, Mistral or Qwen2 decoder (`model.model.language_model` of a LLaVA). Frozen layers that it may
            have count as plain ones.
        lm_head: the LM head; it and the softmax are computed in float32, whatever the model's dtype.
        text_tokens: whether LC is measured for text tokens too, which doubles the work.
        tokens_per_pass: how many tokens go through a layer at once, at least one row; halved when a CUDA device runs
            out of memory. None: 1024 on a CPU, where more falls out of its caches, 8192 elsewhere.

    Raises:
        ValueError: a decoder that ShortV does not support, or tokens_per_pass below 1.
    """

    def __init__(
        self, decoder: Any, lm_head: nn.Module, *, text_tokens: bool = False, tokens_per_pass: int | None = None
    ) -> None:
        bad = {type(layer).__name__ for layer in decoder.layers if not isinstance(layer, tuple(FROZEN_LAYERS))}
        if bad:
            names = ", ".join(layer.__name__ for layer in FROZEN_LAYERS)
            raise ReductionError(
                f"LC of layers of type {', '.join(sorted(bad))} cannot be measured: known are {names}."
            )
        if decoder.config._attn_implementation not in SUPPORTED_ATTENTION:
            raise ReductionError(
                f"attn_implementation={decoder.config._attn_implementation!r}: LC is measured with "
                f"{' or '.join(SUPPORTED_ATTENTION)}; load the model with one of them."
            )
        if tokens_per_pass is not None and tokens_per_pass < 1:
            raise ReductionError(f"tokens_per_pass={tokens_per_pass}: must be at least 1.")
        self.decoder, self.lm_head = decoder, lm_head
        self.text_tokens = text_tokens
        self.tokens_per_pass = tokens_per_pass or (1024 if decoder.device.type == "cpu" else 8192)
        self._beginning: _Beginning | None = None

    @torch.no_grad()
    def measure(self, prompts: Sequence[EmbeddedPrompt]) -> Contributions:
        """LC for every prompt; neighbours that begin with the same text are computed together.

        Raises ValueError for a prompt without visual tokens.
        """
        visual, text = [], []
        for group in _begin_alike(prompts):
            part = self._measure_group(group)
            visual.append(part.visual)
            if part.text is not None:
                text.append(part.text)
        return Contributions(torch.cat(visual), torch.cat(text) if text else None)

    def _measure_group(self, prompts: list[EmbeddedPrompt]) -> Contributions:
        """Prompts with the same text before the image, as one batch padded on the right, which no token sees."""
        start = int(prompts[0].visual.nonzero()[0])
        was_training = [module for module in self.decoder.modules() if module.training]
        self.decoder.eval()
        try:
            beginning = self._begin(prompts[0].embeds[:start])
            embeds = nn.utils.rnn.pad_sequence([prompt.embeds[start:] for prompt in prompts], batch_first=True)
            visual = nn.utils.rnn.pad_sequence([prompt.visual[start:] for prompt in prompts], batch_first=True)
            last = torch.tensor([len(prompt.embeds) - start - 1 for prompt in prompts], device=embeds.device)
            kept = [prompt.positions[start:] for prompt in prompts if prompt.positions is not None]
            positions = nn.utils.rnn.pad_sequence(kept, batch_first=True) if kept else None
            places = _Places(self.decoder, start, embeds, positions)
            full, visual_frozen, text_frozen = self._walk(beginning, embeds, visual[..., None], last, places)
        finally:
            for module in was_training:
                module.training = True
        full_log = self._log_probabilities(full)
        return Contributions(
            self._divergences(full_log, visual_frozen),
            self._divergences(full_log, text_frozen) if text_frozen is not None else None,
        )

    def _walk(
        self, beginning: _Beginning, embeds: Tensor, visual: Tensor, last: Tensor, places: _Places
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states at the last token: full [S, H], with frozen visual and with frozen text tokens [L, S, H] each.

        `embeds` [S, n, H] begins with a visual token, `visual` is [S, n, 1] bool, `last` [S] the last token's place.
        """
        depth, samples = len(self.decoder.layers), torch.arange(len(embeds), device=embeds.device)
        # Row 0 is the full model, row i + 1 its variant with visual tokens frozen in layer i; of the variants with
        # frozen text, row i is variant i.
        states = embeds.new_empty(depth, *embeds.shape)
        states[0] = embeds
        frozen_text = torch.empty_like(states) if self.text_tokens else None
        for index in range(depth - 1):
            before = states[0].clone()
            self._run(index, states[: index + 1], places, beginning.of_full(index))
            states[index + 1] = torch.where(visual, before, states[0])
            if frozen_text is not None:
                self._run(index, frozen_text[:index], places, beginning.of_variants(index))
                frozen_text[index] = torch.where(visual, states[0], before)

        before_end, ends_visual = states[0, samples, last], visual[samples, last]
        self._run(depth - 1, states, places, beginning.of_full(depth - 1), last)
        ends = states[:, samples, last]
        visual_ends = torch.cat([ends[1:], torch.where(ends_visual, before_end, ends[0])[None]])
        if frozen_text is None:
            return ends[0], visual_ends, None
        self._run(depth - 1, frozen_text[:-1], places, beginning.of_variants(depth - 1), last)
        frozen_text[-1, samples, last] = torch.where(ends_visual, ends[0], before_end)
        return ends[0], visual_ends, frozen_text[:, samples, last]

    def _begin(self, embeds: Tensor) -> _Beginning:
        """Keys and values of the text before the image [p, H], from the last call if it was the same text."""
        if self._beginning is not None and torch.equal(self._beginning.embeds, embeds):
            return self._beginning
        beginning = _Beginning(embeds, [])
        if len(embeds):
            depth = len(self.decoder.layers)
            rows = depth if self.text_tokens else 1
            states = embeds.new_empty(rows, 1, *embeds.shape)
            states[0, 0] = embeds
            places = _Places(self.decoder, 0, embeds[None])
            for index in range(depth):
                before, reached = states[0].clone(), min(index + 1, rows)
                beginning.keys_values.append(_join(self._run(index, states[:reached], places, None)))
                if reached < rows:
                    # In variant `index` all of this text keeps the layer's input.
                    states[reached] = before
        self._beginning = beginning
        return beginning

    def _run(
        self, index: int, states: Tensor, places: _Places, before: KeysValues | None, last: Tensor | None = None
    ) -> list[KeysValues]:
        """Puts `states` [R, S, n, H] through a layer, in place; with `last` [S], only these places of them.

        `before` are the keys and values [R or 1, heads, p, d] of what stands before. Returns those of `states` when
        nothing does, in as many parts as went through the layer at once.
        """
        layer = self.decoder.layers[index]
        flat = states.flatten(0, 1)
        new: list[KeysValues] = []
        start = 0
        while start < len(flat):
            rows = slice(start, start + max(1, self.tokens_per_pass // flat.shape[1]))
            chunk = flat[rows]
            cache = _Before(before, torch.arange(start, start + len(chunk)) // states.shape[1])
            arguments: dict[str, Any] = {
                "attention_mask": places.mask(index),
                "past_key_values": cache,
                "position_embeddings": places.rotary(torch.arange(start, start + len(chunk)) % states.shape[1]),
            }
            try:
                if last is None:
                    result = layer(chunk, position_ids=places.position_ids, use_cache=True, **arguments)
                else:
                    ends = last.repeat(len(states))[rows, None]
                    result = forward_active(layer, chunk, ActiveRows(ends, torch.ones_like(ends).bool()), **arguments)
            except torch.OutOfMemoryError:
                if len(chunk) == 1:
                    raise
                self.tokens_per_pass = flat.shape[1] * (len(chunk) // 2)
                continue
            flat[rows] = result
            if before is None and cache.new is not None:
                new.append(cache.new)
            start += len(chunk)
        return new

    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V] float64 on the CPU; final norm, LM head and softmax in float32 or better."""
        normed = self.decoder.norm(hidden.float())
        if type(self.lm_head) is nn.Linear and self.lm_head.weight.is_floating_point():
            logits = nn.functional.linear(normed, self.lm_head.weight.float())
        else:
            logits = self.lm_head(normed.to(hidden.dtype)).float()
        return logits.cpu().double().log_softmax(dim=-1)

    def _divergences(self, full: Tensor, ends: Tensor) -> Tensor:
        """[S, 2, L]: both KL divergences between the full model's log probabilities [S, V] and each variant's end
        [L, S, H]."""
        each = [torch.stack([_kl(full, frozen), _kl(frozen, full)]) for frozen in map(self._log_probabilities, ends)]
        return torch.stack(each, dim=-1).transpose(0, 1)


KeysValues = tuple[Tensor, Tensor]


class _Before:
    """Stands in for a KV cache in one layer: puts given keys and values before the new ones, and remembers these."""

    def __init__(self, before: KeysValues | None, rows: Tensor) -> None:
        self._before, self._rows = before, rows
        self.new: KeysValues | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> KeysValues:
        self.new = (keys, values)
        if self._before is None:
            return keys, values
        joined = [
            torch.cat([self._of_rows(old).to(new.device), new], dim=2)
            for old, new in zip(self._before, self.new, strict=True)
        ]
        return joined[0], joined[1]

    def _of_rows(self, old: Tensor) -> Tensor:
        return old.expand(len(self._rows), -1, -1, -1) if len(old) == 1 else old[self._rows.to(old.device)]


@dataclass
class _Beginning:
    """The text before the image [p, H], and per layer its keys and values [R, heads, p, d]: row 0 those of the full
    model, row i + 1 those of its variant with text frozen in layer i (only variants of lower layers)."""

    embeds: Tensor
    keys_values: list[KeysValues]

    def of_full(self, layer: int) -> KeysValues | None:
        if not self.keys_values:
            return None
        keys, values = self.keys_values[layer]
        return keys[:1], values[:1]

    def of_variants(self, layer: int) -> KeysValues | None:
        if not self.keys_values:
            return None
        keys, values = self.keys_values[layer]
        return keys[1:], values[1:]


class _Places:
    """Positions and attention masks of n tokens that follow `before` others; `embeds` is [S, n, H].

    `positions` [S, n] int64: where the language model is told that they stand; None: as they are counted.
    """

    def __init__(self, decoder: Any, before: int, embeds: Tensor, positions: Tensor | None = None) -> None:
        length = embeds.shape[1]
        self.position_ids = torch.arange(before, before + length, device=embeds.device)[None]
        self._rotary = decoder.rotary_emb(embeds, self.position_ids if positions is None else positions)
        self._windows, self._dtype = windows_of(decoder), embeds.dtype
        self._eager = decoder.config._attn_implementation == "eager"
        self._masks: dict[int | None, Tensor | None] = {}

    def rotary(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine for rows that are these `samples` [r], [r or 1, n, d] each."""
        cos, sin = self._rotary
        return (cos, sin) if len(cos) == 1 else (cos[samples], sin[samples])

    def mask(self, layer: int) -> Tensor | None:
        """[1, 1, n, before + n]: causal, within the layer's window; bool, for eager attention additive; None where
        SDPA's own causal mask is the same."""
        window = self._windows[layer]
        if window not in self._masks:
            self._masks[window] = self._build(window)
        return self._masks[window]

    def _build(self, window: int | None) -> Tensor | None:
        queries = self.position_ids[0][:, None]
        keys = torch.arange(int(queries[-1]) + 1, device=queries.device)
        starts_at_zero, fits = int(queries[0]) == 0, window is None or len(keys) <= window
        if starts_at_zero and fits and not self._eager:
            return None
        seen = keys <= queries
        if window is not None:
            seen = seen & (keys > queries - window)
        seen = seen[None, None]
        if not self._eager:
            return seen
        return torch.zeros_like(seen, dtype=self._dtype).masked_fill(~seen, torch.finfo(self._dtype).min)


def _begin_alike(prompts: Sequence[EmbeddedPrompt]) -> Iterator[list[EmbeddedPrompt]]:
    """Runs of neighbours with the same text before the first visual token."""
    group: list[EmbeddedPrompt] = []
    for number, prompt in enumerate(prompts):
        if not bool(prompt.visual.any()):
            raise ReductionError(f"prompt {number} has no visual tokens: LC needs prompts with an image.")
        start = int(prompt.visual.nonzero()[0])
        if group:
            first = int(group[0].visual.nonzero()[0])
            if first != start or not torch.equal(prompt.embeds[:start], group[0].embeds[:start]):
                yield group
                group = []
        group.append(prompt)
    if group:
        yield group


def _join(parts: list[KeysValues]) -> KeysValues:
    return torch.cat([keys for keys, _ in parts]), torch.cat([values for _, values in parts])


def _kl(of: Tensor, against: Tensor) -> Tensor:
    """KL(of || against) over the last axis of log probabilities; rounding below zero is cut off."""
    return (of.exp() * (of - against)).sum(dim=-1).clamp(min=0)


# ------------------------------------------------------------------------------------------------- choosing layers
