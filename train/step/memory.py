"""What a training step that tunes the projector costs: FLOPs, and memory at its peak.

Everything here needs a transformers LLaVA or LLaVA-NeXT config, never weights; FLOPs are counted as in
:mod:`shortzip.reduction.flops`. The memory is an estimate for one device that holds the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from transformers import PreTrainedConfig

from shortzip.reduction.errors import ReductionError
from shortzip.reduction.families import family_of
from shortzip.reduction.flops import (
    attention_widths,
    llm_flops,
    lm_head_flops,
    parameter_counts,
    projector_training_flops,
    refuse_negative,
    vision_tower_flops,
)
from shortzip.train.step.activations import Layers, Tokens, tower_activation_bytes

# What a CUDA process holds beside the tensors that are counted here: its context (0.3 to 0.6 GiB), cuBLAS' and cuDNN's
# workspaces, what attention's backward kernel sums up in float32, and what the allocator cannot give out again because
# it lies in pieces. Not measured on a device: a rehearsal (train/rehearsal/) knows tensors alone.
CUDA_OVERHEAD_BYTES = 1 << 30
# Logits computed at a time in a training step (supervised_states leaves them to train/step/objective.py), on a CUDA
# device.
LOGITS_AT_ONCE = 1 << 25
# NF4 with double quantisation: 4 bits per weight, 8 per block of 64 and 32 per 256 blocks.
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
INTEGERS = 200  # bytes per token: ids, labels, places and positions


@dataclass(frozen=True)
class TrainingStep:
    """One optimiser step that tunes the projector.

    ``text_tokens`` are those of one sample, ``supervised_tokens`` of them supervised (None: all after the shared ones,
    which bounds the logits from above), and ``shared_tokens`` stand before the image in every row alike.
    ``visual_tokens`` are one sample's after VisionZip, ``tiles`` the images or tiles that the tower reads for it.
    ``frozen_layers``: their indices, or their number, which is taken as the first ones: what is plain in the end takes
    most. ``weights`` is "bfloat16", "float32" or "4bit" (NF4 decoder layers, everything else bfloat16).
    ``every_token``: transformers' modules take every token through every layer, as they do where
    :func:`shortzip.train.step.supervised_states.can_walk` says no. ``cached_features``: the tower is not on the
    device. ``weights_share``: of the LLM's weights, what the device holds at rest: 1 / processes where an engine
    spreads them, 0 where they wait in the host's memory; three layers are gathered at most, and the embeddings.
    """

    text_tokens: int
    visual_tokens: int
    tiles: int = 1
    frozen_layers: int | tuple[int, ...] = 0
    global_batch_size: int = 128
    micro_batch_size: int = 16
    gradient_checkpointing: bool = True
    weights: str = "bfloat16"
    every_token: bool = False
    cached_features: bool = False
    weights_share: float = 1.0
    shared_tokens: int = 0
    supervised_tokens: int | None = None

    def __post_init__(self) -> None:
        refuse_negative(
            text_tokens=self.text_tokens, visual_tokens=self.visual_tokens, shared_tokens=self.shared_tokens
        )
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

    weights: int  # tower, LLM and embeddings as stored, and what is gathered of them
    projector: int  # fp32 weights, gradients and Adam's two moments
    activations: int  # kept for the backward pass at that moment, and the micro-batch itself
    working: int  # the layer at work, or the tower
    logits: int  # a chunk of the supervised positions' logits, its fp32 copy and gradient, and all states' gradients
    overhead: int  # CUDA context, workspaces, fragments

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


def training_step_memory(config: PreTrainedConfig, step: TrainingStep) -> TrainingMemory:
    """Bytes on one device at the peak of a training step with ``step.micro_batch_size`` samples at a time.

    The model is on one device in full (but for ``weights_share``), attention is SDPA, and gradients of a micro-batch
    before are there. An estimate from above: what exists at once is added up at the moments that may be the peak: the
    tower, the logits, and the backward pass of each layer.
    """
    b, rows, depth = step.bytes_per_value, step.micro_batch_size, config.text_config.num_hidden_layers
    counts, layer_bytes = parameter_counts(config), NF4_BYTES if step.weights == "4bit" else b
    frozen = set(range(step.frozen_layers) if isinstance(step.frozen_layers, int) else step.frozen_layers)
    layers = Layers(
        config,
        _tokens_of(step),
        [number in frozen for number in range(depth)],
        b,
        every_token=step.every_token,
        widened=step.weights == "4bit",
    )
    kept, logits, of_logits = _end_of_forward(config, step, layers)
    embedded = layers.tokens.rows * layers.tokens.each * layers.h * b
    # The tower's tensors are freed before the language model's exist.
    tower = 0 if step.cached_features else tower_activation_bytes(config, rows * step.tiles, b)
    moments = [
        _Moment(2, 0, 0, tower, 0),
        _Moment(2, 2, layers.projector + 2 * embedded, 0, 0),
        # Before the last layer keeps anything: its input and the embeddings are kept only to be recomputed from.
        _Moment(1, 3, kept + (0 if step.gradient_checkpointing else 2 * embedded - layers.of(depth - 1).kept), 0, 0),
        _Moment(1, 2, kept, 0, logits),
        _Moment(1, 1, kept, 0, of_logits),
        _Moment(1, 2, *_largest_backward(layers, step.gradient_checkpointing), 0),
    ]

    def gathered(moment: _Moment) -> int:
        of_layers = counts.llm_layers * layer_bytes * min(depth, moment.gathered_layers) / depth
        return int(counts.embeddings * b * moment.gathered_embeddings + of_layers) if step.weights_share < 1 else 0

    peak = max(moments, key=lambda moment: gathered(moment) + moment.kept + moment.working + moment.logits)
    at_rest = (counts.llm_layers * layer_bytes + counts.embeddings * b) * step.weights_share
    return TrainingMemory(
        weights=int(at_rest) + gathered(peak) + (0 if step.cached_features else counts.vision_tower * b),
        projector=16 * counts.projector,
        activations=_batch_bytes(config, step) + peak.kept,
        working=peak.working,
        logits=peak.logits,
        overhead=CUDA_OVERHEAD_BYTES,
    )


@dataclass(frozen=True)
class _Moment:
    """What exists at a moment of a step: copies of the embeddings and of layers where they are gathered, and bytes."""

    gathered_embeddings: int
    gathered_layers: int
    kept: int
    working: int
    logits: int


def _tokens_of(step: TrainingStep) -> Tokens:
    shared = 0 if step.every_token else min(step.shared_tokens, step.text_tokens)
    text = step.text_tokens - shared
    supervised = text if step.supervised_tokens is None else min(step.supervised_tokens, text)
    return Tokens(step.micro_batch_size, shared, text, step.visual_tokens, supervised)


def pixel_bytes(config: PreTrainedConfig, images: int) -> int:
    """Bytes of the pixels of ``images`` images or tiles, float32."""
    return family_of(config.model_type).pixels(config, images) * 3 * 4


def _batch_bytes(config: PreTrainedConfig, step: TrainingStep) -> int:
    """Pixels or features, integers, and the keys and values of the shared text."""
    text, rows = config.text_config, step.micro_batch_size
    tokens = rows * (step.text_tokens + step.visual_tokens)
    given = pixel_bytes(config, step.tiles)
    if step.cached_features:
        given = step.visual_tokens * config.vision_config.hidden_size * step.bytes_per_value
    _, kv_width = attention_widths(text)
    fixed = 2 * text.num_hidden_layers * step.shared_tokens * kv_width * step.bytes_per_value
    return rows * given + INTEGERS * tokens + (0 if step.every_token else fixed)


def _end_of_forward(config: PreTrainedConfig, step: TrainingStep, layers: Layers) -> tuple[int, int, int]:
    """Bytes kept for the backward pass; of the logits and what is beside them; of their backward pass, or the last
    norm's."""
    tokens, h, b, vocabulary = layers.tokens, layers.h, layers.b, config.text_config.vocab_size
    every, visual, ends = (tokens.rows * count for count in (tokens.each, tokens.visual, tokens.supervised))
    all_layers = [layers.of(number) for number in range(len(layers.frozen))]
    if step.gradient_checkpointing:
        kept = every * h * b + sum(layer.output for layer in all_layers)
        if step.every_token:
            kept -= all_layers[-1].output  # the last norm keeps it in float32
    else:
        kept = sum(layer.kept for layer in all_layers)
    kept += layers.projector + layers.masks
    if step.every_token:
        kept += every * (4 * h + 4)  # the last norm's
        # Beside the logits in float32 and their logarithms: the embeddings (kept already where layers are recomputed),
        # what the last norm gives, of it the supervised positions, and the projector's output.
        states = (every if step.gradient_checkpointing else 2 * every) + ends
        forward = states * h * b + visual * h * 4 + ends * vocabulary * 8
        return kept, forward, max(ends * vocabulary * 12 + ends * h * b, every * h * 20)
    kept += ends * (h * b + 4) + 2 * (every + ends) * h // layers.heads * b  # the last norm's, and the rotations
    at_once = min(ends, max(1, LOGITS_AT_ONCE // vocabulary))
    return kept, at_once * vocabulary * 8 + 2 * ends * h * b + visual * h * 4, 0


def _largest_backward(layers: Layers, recomputed: bool) -> tuple[int, int]:
    """Of all layers' backward passes the one with most: bytes kept up to there, and bytes at work."""
    most, before = (0, 0), layers.projector + layers.masks
    if recomputed:
        before += layers.tokens.rows * layers.tokens.each * layers.h * layers.b
    for number in range(len(layers.frozen)):
        layer = layers.of(number)
        if recomputed:
            found = before, layer.kept - layer.as_it_came + layer.working
            before += layer.output
        else:
            before += layer.kept
            found = before, layer.working
        most = max(most, found, key=sum)
    return most
