"""The memory of a teacher that is asked in every step, beside the student's, and of a student that teaches itself
(`sandwich`). Lessons that are kept cost a step the tensors of its rows: 512 bytes for each supervised position."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shortzip.reduction.flops import attention_widths, parameter_counts
from shortzip.train.step.activations import tower_activation_bytes
from shortzip.train.step.memory import LOGITS_AT_ONCE, TrainingStep, training_step_memory


def sandwich_bytes(config: Any, step: TrainingStep, narrower: int) -> int:
    """Bytes that narrower readings (`sandwich`) add to the peak of a step in the widest one: an estimate from above.

    What it said, hidden states, is there while they are computed. Their own peak counts as far as it is more than the
    widest one's: they compare logits with logits, of which more exist at once.

    Args:
        step: of the widest reading.
        narrower: visual tokens of a row in the widest of the others.
    """
    text = config.text_config
    supervised = step.text_tokens if step.supervised_tokens is None else step.supervised_tokens
    ends = step.micro_batch_size * supervised
    values = ends * text.vocab_size
    parts = training_step_memory(config, replace(step, visual_tokens=narrower))
    states = ends * text.hidden_size * step.bytes_per_value
    if step.every_token:
        own = parts.total + 24 * values
    else:  # a chunk at a time, when no layer is at work
        own = parts.total - parts.working - parts.logits + 32 * min(values, LOGITS_AT_ONCE // 2)
        own += 2 * states + 4 * step.micro_batch_size * narrower * text.hidden_size
    return int(states + max(0, own - training_step_memory(config, step).total))


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
    states = rows * step.text_tokens * text.hidden_size * b
    logits = min(rows * step.text_tokens * text.vocab_size, LOGITS_AT_ONCE // 2) * (b + 8)
    projector = parameter_counts(config).projector * b
    return projector + states + logits + max(0, layer + masks + features + tower - student)
