"""The memory of a teacher that is asked in every step, beside the student's. Lessons that are kept cost a step the
tensors of its rows: 512 bytes for each supervised position."""

from __future__ import annotations

from typing import Any

from shortzip.reduction.flops import attention_widths, parameter_counts
from shortzip.train.step.activations import tower_activation_bytes
from shortzip.train.step.memory import LOGITS_AT_ONCE, TrainingStep


def lesson_bytes(config: Any, step: TrainingStep) -> int:
    """Bytes of what is said at the supervised positions of a micro-batch, and is compared there: its hidden states,
    and its half of the logits. With `sandwich` all that the narrower readings add to the widest one's step."""
    text, rows, b = config.text_config, step.micro_batch_size, step.bytes_per_value
    states = rows * step.text_tokens * text.hidden_size * b
    return int(states + min(rows * step.text_tokens * text.vocab_size, LOGITS_AT_ONCE // 2) * (b + 8))


def teacher_bytes(config: Any, step: TrainingStep, visual_tokens: int, student: int) -> int:
    """Bytes that it adds to the peak of a step: an estimate from above.

    It reads a micro-batch before the student does. What stays of that is its hidden states and, while the loss is
    computed, its half of the logits; what the pass itself takes counts as far as it is more than the `student`'s
    activations and working memory, which come later.

    Args:
        step: of the student.
        visual_tokens: of a row, all of them.
    """
    text, rows, b = config.text_config, step.micro_batch_size, step.bytes_per_value
    tokens = rows * (step.text_tokens + visual_tokens)
    q_width, kv_width = attention_widths(text)
    layer = tokens * (4 * text.hidden_size + 2 * q_width + 2 * kv_width + 3 * text.intermediate_size) * b
    masks = rows * (step.text_tokens + visual_tokens) ** 2 * b
    features = rows * visual_tokens * text.hidden_size * b
    tower = tower_activation_bytes(config, rows * step.tiles, b)
    projector = parameter_counts(config).projector * b
    return projector + lesson_bytes(config, step) + max(0, layer + masks + features + tower - student)
