"""What a LLaVA costs with and without its reductions: FLOPs, KV cache, parameters.

Everything here needs a transformers LLaVA or LLaVA-NeXT config (``text_config``, ``vision_config``), never weights.
Two ways of counting the language model's prefill stand side by side:

- :func:`llm_prefill_flops` is ShortV's formula (arXiv 2504.00502, §3.3), with which the papers' figures are
  reproduced. It assumes as many key heads as query heads.
- :func:`llm_prefill_flops_grouped` counts the matrices that are really there (grouped-query attention, a head
  size that is not hidden/heads); both agree where their assumptions do.

Both count a multiply-add as two operations, attention as if it were not causal, and leave out embeddings, norms,
softmax and the LM head, as the papers do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from shortzip.reduction.configuration_reduced_llava import DECODERS, TOWER_HAS_CLS
from shortzip.reduction.errors import ReductionError
from shortzip.reduction.families import family_of
from shortzip.reduction.pruning import method_of
from shortzip.reduction.selectors import BASELINES, VISIONZIP, selector_of

# ---------------------------------------------------------------------------------------------- the papers' formulas


def shortv_layer_flops(
    text_tokens: int, visual_tokens: int, hidden_size: int, intermediate_size: int, frozen: bool
) -> int:
    """ShortV's cost of one LLM layer, plain or with the visual tokens frozen (arXiv 2504.00502, §3.3).

    Plain: 2(t+v)(4h+3m)h + 4(t+v)²h. Frozen: 2t(4h+3m)h + 4vh² + 4t(t+v)h.
    """
    t, v, h, m = text_tokens, visual_tokens, hidden_size, intermediate_size
    if frozen:
        return 2 * t * (4 * h + 3 * m) * h + 4 * v * h * h + 4 * t * (t + v) * h
    return 2 * (t + v) * (4 * h + 3 * m) * h + 4 * (t + v) ** 2 * h


def llm_prefill_flops(
    text_config: PreTrainedConfig, text_tokens: int, visual_tokens: int, frozen_layers: int | Collection[int] = 0
) -> int:
    """FLOPs of one prefill in the language model, by ShortV's formula (all heads counted as key heads).

    ``text_config`` is the LLM's config (``config.text_config`` of a LLaVA), ``frozen_layers`` their number or their
    indices. Raises ValueError for negative counts and for more or other frozen layers than there are.
    """
    frozen = _number_frozen(frozen_layers, text_config.num_hidden_layers)
    refuse_negative(text_tokens=text_tokens, visual_tokens=visual_tokens)
    h, m = text_config.hidden_size, text_config.intermediate_size
    plain_cost = shortv_layer_flops(text_tokens, visual_tokens, h, m, frozen=False)
    frozen_cost = shortv_layer_flops(text_tokens, visual_tokens, h, m, frozen=True)
    return (text_config.num_hidden_layers - frozen) * plain_cost + frozen * frozen_cost


# -------------------------------------------------------------------------------- the same, for the matrices that are


def llm_layer_flops_grouped(text_config: PreTrainedConfig, queries: int, keys: int, attended: int) -> tuple[int, int]:
    """(FLOPs of the matrices, FLOPs of attention) of one LLM layer with grouped-query attention.

    ``queries`` tokens pass through W_Q, attention, W_O and the FFN, ``keys`` tokens through W_K and W_V, and each
    query is compared with ``attended`` keys (more than ``keys`` when a cache holds the rest).
    """
    q_width, kv_width = attention_widths(text_config)
    h, m = text_config.hidden_size, text_config.intermediate_size
    matrices = 2 * queries * (2 * q_width + 3 * m) * h + 2 * keys * 2 * kv_width * h
    return matrices, 4 * queries * attended * q_width


def llm_prefill_flops_grouped(
    text_config: PreTrainedConfig, text_tokens: int, visual_tokens: int, frozen_layers: int | Collection[int] = 0
) -> int:
    """As :func:`llm_prefill_flops`, counting the key and value heads that the config really has."""
    return sum(llm_flops(text_config, text_tokens, visual_tokens, frozen_layers))


def llm_prefill_flops_fastv(
    text_config: PreTrainedConfig, text_tokens: int, visual_tokens: int, layer: int, keep: float
) -> int:
    """As :func:`llm_prefill_flops_grouped`, with FastV: ``keep`` of the visual tokens go on after ``layer`` layers."""
    return llm_prefill_flops_pruned(text_config, text_tokens, visual_tokens, {"layer": layer, "keep": keep})


def llm_prefill_flops_pruned(
    text_config: PreTrainedConfig, text_tokens: int, visual_tokens: int, fastv: Mapping[str, Any]
) -> int:
    """As :func:`llm_prefill_flops_grouped`, pruned inside as a `fastv` key says. What ranks is left out: attention of
    a few queries in a few layers."""
    depth = text_config.num_hidden_layers
    layers = visual_tokens_by_layer(fastv, visual_tokens, depth)
    return sum(llm_prefill_flops_grouped(text_config, text_tokens, visual) // depth for visual in layers)


def visual_tokens_by_layer(fastv: Mapping[str, Any], visual_tokens: int, depth: int) -> list[int]:
    """How many of a prompt's visual tokens each of `depth` layers computes, pruned as a `fastv` key says."""
    method = method_of(fastv)
    counts = [visual_tokens, *method.counts(visual_tokens)]
    done = [sum(at < layer + method.before for at in method.layers) for layer in range(depth)]
    return [counts[stages] for stages in done]


def lm_head_flops(text_config: PreTrainedConfig, positions: int) -> int:
    """FLOPs of the LM head at ``positions`` tokens."""
    return 2 * positions * text_config.hidden_size * text_config.vocab_size


def kv_cache_bytes(text_config: PreTrainedConfig, tokens: int, bytes_per_value: int = 2) -> int:
    """Bytes of the KV cache for ``tokens`` tokens. A frozen layer keeps keys and values, so ShortV changes nothing."""
    refuse_negative(tokens=tokens)
    _, kv_width = attention_widths(text_config)
    return 2 * text_config.num_hidden_layers * tokens * kv_width * bytes_per_value


def visual_grid(config: PreTrainedConfig) -> tuple[int, int]:
    """(patches per side, number of special tokens such as CLS) of the vision tower."""
    vision = config.vision_config
    return vision.image_size // vision.patch_size, int(TOWER_HAS_CLS.get(vision.model_type, True))


def tower_blocks_run(config: PreTrainedConfig) -> int:
    """How many blocks of the tower run: those up to the last ``vision_feature_layer`` (hidden_states index)."""
    depth = config.vision_config.num_hidden_layers
    layers = config.vision_feature_layer
    indices = [layers] if isinstance(layers, int) else list(layers)
    return max(index if index >= 0 else depth + 1 + index for index in indices)


def vision_tower_flops(config: PreTrainedConfig, tiles: int = 1) -> int:
    """FLOPs of the vision tower (two-matrix FFN) for ``tiles`` images or tiles, up to the selected block."""
    vision = config.vision_config
    side, special = visual_grid(config)
    n, d, m = side * side + special, vision.hidden_size, vision.intermediate_size
    block = 2 * n * (4 * d + 2 * m) * d + 4 * n * n * d
    embedding = 2 * side * side * 3 * vision.patch_size**2 * d
    more = family_of(config.model_type).more_tower_flops(config, tiles)
    return tiles * (embedding + tower_blocks_run(config) * block) + more


def selection_flops(config: PreTrainedConfig, visionzip: Mapping[str, Any], tiles: int = 1) -> int:
    """FLOPs of what a method reads beside the tower's output, for ``tiles`` images or tiles: queries and keys of the
    selected block once more, and attention from CLS, or of every token where there is none; every patch through the
    projector. The choice itself is left out: at most 5 % of the tower's time (scripts/benchmarks/selection.py)."""
    side, special = visual_grid(config)
    n, d = side * side + special, config.vision_config.hidden_size
    reads = frozenset() if visionzip.get("method", VISIONZIP) in BASELINES else selector_of(visionzip).reads
    queries = 1 if special else n
    scores = 2 * (n + queries) * d * d + 2 * queries * n * d if reads & {"attention", "keys"} else 0
    return tiles * (scores + (projector_flops(config, side * side) if "projected" in reads else 0))


def projector_flops(config: PreTrainedConfig, visual_tokens: int) -> int:
    """FLOPs of the two-layer projector for ``visual_tokens`` tokens."""
    width_in, h = projector_input(config), config.text_config.hidden_size
    return 2 * visual_tokens * (width_in * h + h * h)


def projector_training_flops(config: PreTrainedConfig, visual_tokens: int) -> int:
    """FLOPs of a tuned projector: forward, weight gradients of both layers, input gradient of the second."""
    return 2 * projector_flops(config, visual_tokens) + 2 * visual_tokens * config.text_config.hidden_size**2


def usual_tiles(config: PreTrainedConfig) -> int:
    """Tiles of an image as the papers count them: five in LLaVA-NeXT and Mini-Gemini-HD, else one."""
    return family_of(config.model_type).tiles(config)


def visual_tokens_of_video(config: PreTrainedConfig, visionzip: Mapping[str, Any] | None, frames: int) -> int:
    """Visual tokens of a video of which so many frames are seen. Raises ReductionError for what the family does not
    read."""
    family = family_of(config.model_type)
    return family.video_tokens(config, visionzip, family.check_frames(frames, config))


def visual_tokens_per_image(config: PreTrainedConfig, budget: tuple[int, int] | None, tiles: int = 1) -> int:
    """Visual tokens of one image: the tower's whole grid, or ``budget`` = (dominant, contextual), times ``tiles``.

    LLaVA-NeXT's real counts vary with the photograph (unpadding, newlines); tiles x grid is how the papers count
    (5 tiles = 2880). Raises ValueError for a budget that the grid cannot fill.
    """
    side, special = visual_grid(config)
    if tiles < 1:
        raise ReductionError(f"tiles={tiles}: must be at least 1.")
    if budget is None:
        return tiles * (side * side + (special if config.vision_feature_select_strategy == "full" else 0))
    dominant, contextual = budget
    if dominant < 1 or contextual < 0 or dominant + contextual > side * side + special:
        raise ReductionError(
            f"budget {dominant}+{contextual}: dominant must be at least 1, contextual at least 0, together at most "
            f"{side * side + special} (the tower has {side}x{side} patches and {special} CLS token)."
        )
    return tiles * (dominant + contextual)


# ----------------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True)
class ParameterCounts:
    """Number of parameters of each part of a LLaVA."""

    vision_tower: int
    projector: int
    llm_layers: int  # the decoder layers, which 4-bit loading quantises
    embeddings: int  # token embeddings, final norm and the LM head (counted once when tied)

    @property
    def total(self) -> int:
        return self.vision_tower + self.projector + self.llm_layers + self.embeddings


def parameter_counts(config: PreTrainedConfig) -> ParameterCounts:
    """Parameters of a LLaVA with a CLIP or SigLIP tower and a Llama, Mistral or Qwen2 LLM, from its config alone.

    LLaVA-NeXT's ``image_newline`` is counted with the projector. Raises ValueError for other families.
    """
    text = config.text_config
    h, m = text.hidden_size, text.intermediate_size
    q_width, kv_width = attention_widths(text)
    if text.model_type not in DECODERS:
        raise ReductionError(f"text_config.model_type={text.model_type!r}: known are {', '.join(DECODERS)}.")
    layer = 2 * q_width * h + 2 * kv_width * h + 3 * m * h + 2 * h
    if text.model_type == "qwen2":
        layer += q_width + 2 * kv_width
    if text.model_type == "llama" and text.attention_bias:
        layer += q_width + 2 * kv_width + h
    if text.model_type == "llama" and text.mlp_bias:
        layer += 2 * m + h
    embeddings = text.vocab_size * h * (1 if config.tie_word_embeddings else 2) + h

    family, width_in = family_of(config.model_type), projector_input(config)
    bias = 2 * h if config.multimodal_projector_bias else 0
    projector = width_in * h + h * h + bias + family.own_parameters(config)
    towers = _tower_parameters(config) + family.more_tower_parameters(config)
    return ParameterCounts(towers, projector, text.num_hidden_layers * layer, embeddings)


def _tower_parameters(config: PreTrainedConfig) -> int:
    vision = config.vision_config
    d, m = vision.hidden_size, vision.intermediate_size
    side, special = visual_grid(config)
    block = 4 * (d * d + d) + 2 * d * m + d + m + 4 * d
    patches = 3 * vision.patch_size**2 * d
    positions = (side * side + special) * d
    if vision.model_type == "clip_vision_model":
        return vision.num_hidden_layers * block + patches + positions + d + 4 * d  # CLS, norms before and after
    if vision.model_type == "siglip_vision_model":
        total = vision.num_hidden_layers * block + patches + d + positions + 2 * d
        if getattr(vision, "vision_use_head", True):  # the pooling head, loaded though LLaVA never reads it
            total += d + (4 * d * d + 4 * d) + 2 * d * m + d + m + 2 * d
        return total
    raise ReductionError(f"vision_config.model_type={vision.model_type!r}: known are {', '.join(TOWER_HAS_CLS)}.")


# ------------------------------------------------------------------------------------------------------ internals


def llm_flops(
    text_config: PreTrainedConfig, text_tokens: int, visual_tokens: int, frozen_layers: int | Collection[int]
) -> tuple[int, int]:
    """(FLOPs of the matrices, FLOPs of attention) of one prefill through all layers."""
    frozen = _number_frozen(frozen_layers, text_config.num_hidden_layers)
    refuse_negative(text_tokens=text_tokens, visual_tokens=visual_tokens)
    tokens = text_tokens + visual_tokens
    plain_matrices, plain_attention = llm_layer_flops_grouped(text_config, tokens, tokens, tokens)
    frozen_matrices, frozen_attention = llm_layer_flops_grouped(text_config, text_tokens, tokens, tokens)
    plain = text_config.num_hidden_layers - frozen
    return plain * plain_matrices + frozen * frozen_matrices, plain * plain_attention + frozen * frozen_attention


def attention_widths(text_config: PreTrainedConfig) -> tuple[int, int]:
    """(width of all query heads, width of all key heads)."""
    heads = text_config.num_attention_heads
    # Not every family's config has head_dim, and Mistral's may hold None.
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    return heads * head_dim, (text_config.num_key_value_heads or heads) * head_dim


def projector_input(config: PreTrainedConfig) -> int:
    """Width of what the projector reads: the tower's, times the layers that are taken from it."""
    layers = config.vision_feature_layer
    return config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))


def _number_frozen(frozen_layers: int | Collection[int], num_layers: int) -> int:
    if not isinstance(frozen_layers, int):
        bad = [layer for layer in frozen_layers if not 0 <= layer < num_layers]
        if bad or len(set(frozen_layers)) != len(frozen_layers):
            raise ReductionError(
                f"frozen_layers={list(frozen_layers)}: must be distinct layers from 0 to {num_layers - 1}."
            )
        frozen_layers = len(frozen_layers)
    if not 0 <= frozen_layers <= num_layers:
        raise ReductionError(f"frozen_layers={frozen_layers}: the language model has {num_layers} layers (0 to all).")
    return frozen_layers


def refuse_negative(**counts: int) -> None:
    for name, count in counts.items():
        if count < 0:
            raise ReductionError(f"{name}={count}: must not be negative.")
