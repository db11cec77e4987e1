"""Bytes that the layers of a training step keep for its backward pass, and hold while they work.

Counted from the tensors that the code makes: train/rehearsal/ runs that code at full size, and
tests/train/test_rehearsal_matrix.py holds the two against each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from shortzip.reduction.families import family_of
from shortzip.reduction.flops import attention_widths, projector_input, visual_grid

LOG_SUMS = 32  # attention's kernel rounds the number of its log-sums up to a multiple of it


def needed_activation_bytes(text_config: PreTrainedConfig, queries: int, keys: int, bytes_per_value: int) -> int:
    """Bytes that one untrained LLM layer keeps in :func:`shortzip.train.step.supervised_states.supervised_states`.

    ``queries`` of its ``keys`` tokens are updated. Kept are each norm's input as it came with one number per token,
    keys and values, queries, attention's output and log-sum, and the two wide inputs of the FFN's product. Visual
    tokens that are frozen in one layer after another are kept once; counted here is the first time.
    """
    q_width, kv_width = attention_widths(text_config)
    h, m, b = text_config.hidden_size, text_config.intermediate_size, bytes_per_value
    per_key = h * b + 4 + 2 * kv_width * b
    per_query = h * b + 4 + 2 * q_width * b + 4 * text_config.num_attention_heads + 2 * m * b
    return keys * per_key + queries * per_query


def layer_activation_bytes(text_config: PreTrainedConfig, queries: int, keys: int, bytes_per_value: int) -> int:
    """Bytes that one untrained LLM layer of transformers keeps for the backward pass.

    ``queries`` of its ``keys`` tokens are updated.

    Linear layers without weight gradients keep nothing. What is left: the input of each norm in fp32 with its inverse
    root mean square, keys and values, queries, attention's output and log-sum, and three FFN-wide tensors.
    """
    q_width, kv_width = attention_widths(text_config)
    h, m, b = text_config.hidden_size, text_config.intermediate_size, bytes_per_value
    per_key = 4 * h + 4 + 2 * kv_width * b
    per_query = 4 * h + 4 + 2 * q_width * b + 4 * text_config.num_attention_heads + 3 * m * b
    return keys * per_key + queries * per_query


def tower_activation_bytes(config: PreTrainedConfig, images: int, bytes_per_value: int) -> int:
    """Bytes that the tower holds at once for ``images`` images or tiles beside their pixels: the selected block at
    work, its input, and in float32 its keys (without a CLS token queries, too)."""
    vision = config.vision_config
    side, special = visual_grid(config)
    block = 3 * (vision.hidden_size + vision.intermediate_size) * bytes_per_value
    scored = 4 * vision.hidden_size * (1 if special else 2)
    more = family_of(config.model_type).more_tower_bytes(config, bytes_per_value)
    return images * (side * side + special) * (block + scored) + more


@dataclass(frozen=True)
class Tokens:
    """Tokens of a micro-batch of ``rows`` alike, per row."""

    rows: int
    shared: int
    """Text that is not computed, its keys and values being known; 0 where every token is."""
    text: int
    """The other text."""
    visual: int
    supervised: int

    @property
    def each(self) -> int:
        """Computed of a row."""
        return self.text + self.visual


@dataclass(frozen=True)
class LayerBytes:
    """What one layer keeps, what of it is its input as it came, and what is held while its gradient is computed."""

    kept: int
    as_it_came: int
    output: int
    working: int


class Layers:
    """The layers of a language model in one training step.

    ``frozen``: for each layer, whether visual tokens are. ``every_token``: transformers' own modules. ``widened``:
    4-bit weights, of which the largest matrix is there in ``bytes_per_value`` when it is needed.
    """

    def __init__(
        self,
        config: Any,
        tokens: Tokens,
        frozen: list[bool],
        bytes_per_value: int,
        *,
        every_token: bool,
        widened: bool,
    ) -> None:
        text = config.text_config
        self.tokens, self.frozen, self.b = tokens, frozen, bytes_per_value
        self.every_token, self.heads = every_token, text.num_attention_heads
        self.h, self.m = text.hidden_size, text.intermediate_size
        self.q_width, kv_width = attention_widths(text)
        self.grouped = kv_width < self.q_width
        # With a mask transformers repeats grouped key heads: what attention keeps is as wide as its queries.
        self.kv_width = self.q_width if self.grouped else kv_width
        self.wide_weight = self.h * self.m * bytes_per_value + self.h * self.m // 8 if widened else 0
        self.projector_input = projector_input(config)

    def of(self, number: int) -> LayerBytes:
        """The layer of this number, from 0."""
        return (self._of_modules if self.every_token else self._of_walk)(number)

    @property
    def projector(self) -> int:
        """What the projector keeps, in float32."""
        return self.tokens.rows * self.tokens.visual * 4 * (self.projector_input + 2 * self.h)

    @property
    def masks(self) -> int:
        """The walk's masks, one for every kind of query; else the one of bools that modules share, and rotations."""
        tokens = self.tokens
        if self.every_token:
            return tokens.rows * tokens.each**2 + 2 * tokens.each * self.q_width // self.heads * self.b
        middle, width = self.frozen[:-1], (tokens.shared + tokens.each + 7) // 8 * 8
        asking = tokens.supervised + tokens.each * (not all(middle)) + tokens.text * any(middle)
        return tokens.rows * asking * width * self.b

    def _attention(self, queries: int, keys: int) -> int:
        """Kept by the attention of ``queries`` and ``keys`` of each row."""
        rounded = -(-queries // LOG_SUMS) * LOG_SUMS
        kept = 2 * keys * self.kv_width * self.b + 2 * queries * self.q_width * self.b + rounded * self.heads * 4
        return self.tokens.rows * kept

    def _of_walk(self, number: int) -> LayerBytes:
        """As :func:`shortzip.train.step.supervised_states.supervised_states` computes it."""
        tokens, h, b = self.tokens, self.h, self.b
        every, visual, text = (tokens.rows * count for count in (tokens.each, tokens.visual, tokens.text))
        last, is_frozen = number == len(self.frozen) - 1, self.frozen[number]
        is_first_frozen = is_frozen and (number == 0 or not self.frozen[number - 1])
        if last:
            asking, each, normed, output = tokens.rows * tokens.supervised, tokens.supervised, every, 0
            kept, as_it_came = every * (h * b + 4), 0
        elif is_frozen:
            asking, each, normed, output = text, tokens.text, text, text
            as_it_came = text * h * b + visual * h * b * is_first_frozen
            kept = as_it_came + 4 * every
        else:
            asking, each, normed, output = every, tokens.each, every, every
            kept, as_it_came = every * (h * b + 4), 0
        behind_norm = self._attention(each, tokens.shared + tokens.each) + asking * (h * b + 4 + 2 * self.m * b)
        kept += behind_norm
        wide = asking * self.m * b
        of_ffn = max(4 * wide, 2 * wide + self.wide_weight) + (2 * normed + asking) * h * b
        # The first norm's gradient is computed in float32, when what came after it is free again.
        of_norm = normed * h * (20 + b) - behind_norm
        return LayerBytes(kept, as_it_came, output * h * b, max(of_ffn, of_norm))

    def _of_modules(self, number: int) -> LayerBytes:
        """As transformers' modules compute it: norms in float32, and a mask for each layer."""
        tokens, h, b = self.tokens, self.h, self.b
        each = tokens.text if self.frozen[number] else tokens.each
        every, asking = tokens.rows * tokens.each, tokens.rows * each
        behind_norm = self._attention(each, tokens.each) + asking * (4 * h + 4 + 3 * self.m * b)
        behind_norm += asking * (-(-tokens.each // 8) * 8) * b + 2 * asking * self.q_width // self.heads * b
        kept = every * (4 * h + 4) + behind_norm
        wide = asking * self.m * b
        # Most is there when the FFN's product passes its gradient on: that, and of both its factors.
        of_ffn = max(3 * wide, 2 * wide + self.wide_weight) + every * h * b
        if self.frozen[number]:  # what it puts back among the visual tokens, and these rows together
            of_ffn += (every + asking) * h * b
        of_norm = every * h * (20 + b) - behind_norm
        return LayerBytes(kept, 0, every * h * b, max(of_ffn, of_norm))
