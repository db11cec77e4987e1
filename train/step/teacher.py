"""The untrained model teaches: the same release, reading all visual tokens with its own projector (`distill`).

The loss of a supervised token is (1 - w) CE + w τ² KL(teacher ‖ student), both distributions at temperature τ (Hinton
et al., arXiv 1503.02531, §2): summed and normalised like cross-entropy alone, so no cut into micro-batches changes it.
The teacher shares every untrained weight with the student; only its projector, in the compute dtype, is its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shortzip.reduction.reductions import Reductions
from shortzip.train.step.memory import LOGITS_AT_ONCE
from shortzip.train.step.visual_features import visual_features


class TopTokens(NamedTuple):
    """A teacher's k most likely next tokens at S positions, fewer than there are; the rest as one mass.

    Attributes:
        log_probs: [S, k] float32, of each, at the temperature.
        ids: [S, k] int64.
    """

    log_probs: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Lesson:
    """What a teacher says at S supervised positions, and how much it counts.

    Attributes:
        outputs: its hidden states [S, H] after the final norm, which the LM head makes logits of; or its top tokens.
        weight: w, 0 to 1.
        temperature: τ, above 0.
    """

    outputs: Tensor | TopTokens
    weight: float
    temperature: float


class Teacher:
    """The model before it is trained, with all its visual tokens.

    Made while the projector is still the release's, or of that one. `projector` is a copy of it, untrained, in the
    compute dtype: whoever holds the teacher has it moved to where the model goes.
    """

    def __init__(self, model: Any, dtype: torch.dtype, projector: nn.Module | None = None) -> None:
        own = model.model.multi_modal_projector if projector is None else projector
        self.projector: nn.Module = copy.deepcopy(own).to(dtype).requires_grad_(False)
        # The model's own modules under a config that reduces nothing: no weight is held twice.
        self._view = copy.copy(model.model)
        self._view.__dict__["_modules"] = {**model.model._modules, "multi_modal_projector": self.projector}
        self._view.config = copy.deepcopy(model.config)
        for key, value in Reductions().as_config().items():
            setattr(self._view.config, key, value)
        self._view._reductions = Reductions().as_config()

    @torch.no_grad()
    def features(self, batch: Mapping[str, Tensor], is_video: Tensor | None = None) -> Tensor:
        """All projected visual tokens [N, H] of a micro-batch's images and videos, of their pixels (and image_sizes).
        `is_video`: as `Layout` has it, of all visual tokens."""
        keys = ("pixel_values", "image_sizes", "pixel_values_videos", "video_frames")
        features, _ = visual_features(self._view, {key: batch[key] for key in keys if key in batch}, is_video)
        assert features is not None
        return features


@torch.no_grad()
def top_tokens(lm_head: nn.Module, states: Tensor, temperature: float, count: int) -> TopTokens:
    """The `count` likeliest next tokens after a teacher's hidden states [S, H], the likeliest first."""
    found = []
    width = 1 if not len(states) else lm_head(states[:1]).shape[-1]
    for chunk in states.split(max(1, LOGITS_AT_ONCE // 8 // width)):
        found.append((lm_head(chunk).float() / temperature).log_softmax(-1).topk(count))
    return TopTokens(torch.cat([part.values for part in found]), torch.cat([part.indices for part in found]))


def summed_lesson_loss(
    lm_head: nn.Module, states: Tensor, targets: Tensor, lesson: Lesson, logits_at_once: int | None = None
) -> Tensor:
    """Sum over S positions of (1 - w) CE + w τ² KL; float32.

    Args:
        states: [S, H] of the student.
        targets: [S] int64, the labels.
        logits_at_once: values, of both; None takes what suits the device.
    """
    if type(lm_head) is nn.Linear and lm_head.bias is None and not lm_head.weight.requires_grad:
        values = logits_at_once or (LOGITS_AT_ONCE if states.is_cuda else LOGITS_AT_ONCE // 8)
        return _SummedLessonLoss.apply(states, lm_head, targets, lesson, values // 2)  # student and teacher
    return plain_lesson_loss(lm_head, states, targets, lesson)


def plain_lesson_loss(
    lm_head: nn.Module, states: Tensor, targets: Tensor, lesson: Lesson, taught: Tensor | None = None
) -> Tensor:
    """As `summed_lesson_loss`, by autograd, the head called once for the student and once for the teacher's states:
    as often in every process. `taught` [T] int64: the positions that the lesson is of; None: all."""
    logits = lm_head(states).float()
    loss = torch.zeros((), device=logits.device)
    if lesson.weight < 1:
        loss = (1 - lesson.weight) * nn.functional.cross_entropy(logits, targets, reduction="sum")
    with torch.no_grad():
        said = _said(lm_head, lesson, slice(None))
    divergence, _ = _divergence((logits if taught is None else logits[taught]) / lesson.temperature, said)
    return loss + lesson.weight * lesson.temperature**2 * divergence


class _SummedLessonLoss(torch.autograd.Function):
    """Loss and gradient in one pass over chunks of positions, as `_SummedCrossEntropy` (cross_entropy)."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, lm_head: nn.Linear, targets: Tensor, lesson: Lesson, values: int) -> Tensor:
        weight, part, heat = lm_head.weight, lesson.weight, lesson.temperature
        total = torch.zeros((), device=states.device)
        gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        step = max(1, values // len(weight))
        for start in range(0, len(states), step):
            chunk = slice(start, start + step)
            logits, target = lm_head(states[chunk]).float(), targets[chunk].unsqueeze(1)
            log_probs = logits.log_softmax(-1)
            total -= (1 - part) * log_probs.gather(1, target).sum()
            divergence, of_scaled = _divergence(logits / heat, _said(lm_head, lesson, chunk))
            total += part * heat**2 * divergence
            if gradient is not None:
                probs = log_probs.exp_()
                probs.scatter_add_(1, target, torch.full_like(target, -1, dtype=probs.dtype))
                of_logits = probs.mul_(1 - part).add_(of_scaled, alpha=part * heat)
                torch.matmul(of_logits.to(weight.dtype), weight, out=gradient[chunk])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (of_states,) = ctx.saved_tensors
        return of_states * gradient, None, None, None, None


def _said(lm_head: nn.Module, lesson: Lesson, chunk: slice) -> Tensor | TopTokens:
    """The teacher's log-probabilities [c, V] at some of the positions, or its top tokens."""
    if isinstance(lesson.outputs, TopTokens):
        return TopTokens(lesson.outputs.log_probs[chunk], lesson.outputs.ids[chunk])
    return (lm_head(lesson.outputs[chunk]).float() / lesson.temperature).log_softmax(-1)


def _divergence(scaled: Tensor, said: Tensor | TopTokens) -> tuple[Tensor, Tensor]:
    """KL(teacher ‖ student), summed, and its gradient for `scaled`, the student's logits / τ [c, V], float32.

    Of top tokens, the KL between distributions over k tokens and one mass for all others: never more than the whole.
    """
    log_probs = scaled.log_softmax(-1)
    if not isinstance(said, TopTokens):
        divergence = nn.functional.kl_div(log_probs, said, reduction="sum", log_target=True)
        return divergence, log_probs.detach().exp() - said.exp()
    rest = said.log_probs.exp().sum(-1, keepdim=True).neg().add(1).clamp(min=0)
    log_rest = log_probs.scatter(1, said.ids, -torch.inf).logsumexp(-1, keepdim=True)
    among = nn.functional.kl_div(log_probs.gather(1, said.ids), said.log_probs, reduction="sum", log_target=True)
    others = torch.xlogy(rest, rest) - rest * log_rest
    with torch.no_grad():
        gradient = log_probs.exp() * (1 - (rest.log() - log_rest).exp())
        gradient.scatter_(1, said.ids, log_probs.gather(1, said.ids).exp() - said.log_probs.exp())
    return among + others.sum(), gradient
