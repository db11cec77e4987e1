"""What a training step that tunes the projector costs: FLOPs, and memory at its peak.

Everything here needs a transformers LLaVA or LLaVA-NeXT config, never weights; FLOPs are counted as in
:mod:`shortzip.reduction.flops`. The memory is an estimate for one device that holds the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from transformers import PreTrainedConfig

from shortzip.reduction.errors import ReductionError
from shortzip.reduction.flops import (
    attention_widths,
    llm_flops,
    lm_head_flops,
    parameter_counts,
    projector_input,
    projector_training_flops,
    refuse_negative,
    vision_tower_flops,
    visual_grid,
)

# What a CUDA process holds beside tensors: context, cuBLAS and cuDNN workspaces, the allocator's rounding.
CUDA_OVERHEAD_BYTES = 1 << 30
# Logits computed at a time in a training step (supervised_states leaves them to train/step/objective.py), on a CUDA
# device.
LOGITS_AT_ONCE = 1 << 25
# NF4 with double quantisation: 4 bits per weight, 8 per block of 64 and 32 per 256 blocks.
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8


@dataclass(frozen=True)
class TrainingStep:
    """One optimiser step that tunes the projector.

    ``text_tokens`` are those of one sample; all are counted as supervised, which bounds the logits from above.
    ``visual_tokens`` are one sample's after VisionZip, ``tiles`` the images or tiles that the tower reads for it.
    ``weights`` is "bfloat16", "float32" or "4bit" (NF4 decoder layers, everything else bfloat16). ``every_token``:
    transformers' modules take every token through every layer, as they do where
    :func:`shortzip.train.step.supervised_states.can_walk` says no. ``cached_features``: the tower is not on the
    device.
    ``weights_share``: of the LLM's weights, what the device holds at rest: 1 / processes where an engine spreads them,
    0 where they wait in the host's memory; two layers are gathered at a time.
    """

    text_tokens: int
    visual_tokens: int
    tiles: int = 1
    frozen_layers: int = 0
    global_batch_size: int = 128
    micro_batch_size: int = 16
    gradient_checkpointing: bool = True
    weights: str = "bfloat16"
    every_token: bool = False
    cached_features: bool = False
    weights_share: float = 1.0

    def __post_init__(self) -> None:
        refuse_negative(text_tokens=self.text_tokens, visual_tokens=self.visual_tokens)
        if self.weights not in ("bfloat16", "float32", "4bit"):
            raise ReductionError(f"weights={self.weights!r}: choose bfloat16, float32 or 4bit.")
        if not 0 <= self.weights_share <= 1:
            raise ReductionError(f"weights_share={self.weights_share}: must be 0 to 1.")
        if self.micro_batch_size < 1 or self.global_batch_size < 1:
            raise ReductionError(
                f"global_batch_size={self.global_batch_size}, micro_batch_size={self.micro_batch_size}: "
                "both must be at least 1."
            )

    @property
    def bytes_per_value(self) -> int:
        """Bytes of one activation value."""
        return 4 if self.weights == "float32" else 2


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device at the peak of a training step, by part."""

    weights: int  # tower, LLM and embeddings as stored
    projector: int  # fp32 weights, gradients and Adam's two moments
    activations: int  # kept for the backward pass
    working: int  # the layer at work, recomputed, and its gradients; what the tower took before, where that is more
    logits: int  # a chunk of the supervised positions' logits, its fp32 copy and gradient, and all states' gradients
    overhead: int  # CUDA context and workspaces

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def training_step_flops(config: PreTrainedConfig, step: TrainingStep) -> int:
    """FLOPs of one optimiser step over ``step.global_batch_size`` samples: tower, projector, LLM and LM head.

    An untrained LLM's backward pass costs its matrices once (input gradients only) and its attention twice; gradient
    checkpointing costs the layers' forward once more. The projector costs its forward, its weight gradients and the
    input gradient of its second layer. The tower has no backward pass.
    """
    text, t, v = config.text_config, step.text_tokens, step.visual_tokens
    matrices, attention = llm_flops(text, t, v, step.frozen_layers)
    forwards = 2 if step.gradient_checkpointing else 1
    llm = (forwards + 1) * matrices + (forwards + 2) * attention
    llm += 2 * lm_head_flops(text, t)
    per_sample = vision_tower_flops(config, step.tiles) + projector_training_flops(config, v) + llm
    return step.global_batch_size * per_sample


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
    """Bytes that the tower holds at once for ``images`` images or tiles: their pixels, and one block at work."""
    vision = config.vision_config
    side, special = visual_grid(config)
    block = (side * side + special) * (6 * vision.hidden_size + 2 * vision.intermediate_size) * bytes_per_value
    return images * (block + 3 * vision.image_size**2 * (4 + bytes_per_value))


def training_step_memory(config: PreTrainedConfig, step: TrainingStep) -> TrainingMemory:
    """Bytes on one device at the peak of a training step with ``step.micro_batch_size`` samples at a time.

    The model is on one device in full (but for ``weights_share``), attention is SDPA. It is an estimate: activations
    follow :func:`needed_activation_bytes` (with ``every_token`` :func:`layer_activation_bytes`), the rest is counted
    from the tensors that exist at once. The tower's are freed before the language model's exist.
    """
    text, t, v, b, rows = (
        config.text_config,
        step.text_tokens,
        step.visual_tokens,
        step.bytes_per_value,
        step.micro_batch_size,
    )
    counts = parameter_counts(config)
    layer_bytes = NF4_BYTES if step.weights == "4bit" else b
    tower_weights = 0 if step.cached_features else counts.vision_tower
    llm_weights = counts.llm_layers * layer_bytes + counts.embeddings * b
    weights = int(llm_weights * step.weights_share) + tower_weights * b
    if step.weights_share < 1:
        weights += int(2 * counts.llm_layers * layer_bytes / text.num_hidden_layers)

    layer = layer_activation_bytes if step.every_token else needed_activation_bytes
    plain, frozen = rows * layer(text, t + v, t + v, b), rows * layer(text, t, t + v, b)
    plain_layers = text.num_hidden_layers - step.frozen_layers
    hidden = rows * (t + v) * text.hidden_size * b
    projector_kept = rows * v * (projector_input(config) + 2 * text.hidden_size) * 4
    if step.gradient_checkpointing:
        kept = text.num_hidden_layers * hidden
        recomputed = plain if plain_layers else frozen
    else:
        kept = plain_layers * plain + step.frozen_layers * frozen
        recomputed = 0
    # Backward through an FFN holds the gradients of its three wide tensors and of the hidden states around it.
    updated = t + v if plain_layers else t
    gradients = rows * updated * 3 * text.intermediate_size * b + 4 * hidden
    masks = 3 * rows * (t + v) ** 2 * b  # one for every kind of query
    dequantised = text.hidden_size * text.intermediate_size * 2 if step.weights == "4bit" else 0
    working = recomputed + gradients + masks + dequantised

    if step.every_token:  # and the whole softmax
        logits = rows * t * text.vocab_size * (2 * b + 8)
    else:
        logits = min(rows * t * text.vocab_size, LOGITS_AT_ONCE) * (2 * b + 4)
    logits += rows * t * text.hidden_size * 2 * b
    tower = 0 if step.cached_features else tower_activation_bytes(config, rows * step.tiles, b)
    return TrainingMemory(
        weights=weights,
        projector=16 * counts.projector,
        activations=kept + projector_kept,
        working=max(working, tower - kept - projector_kept - logits),
        logits=logits,
        overhead=CUDA_OVERHEAD_BYTES,
    )
