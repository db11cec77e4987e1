"""What is asked before a run and in its first step: whether the projector can learn anything at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shortzip.data.batching import BatchPlan
from shortzip.data.dataset import ConversationDataset, MicroBatch
from shortzip.data.errors import UserError
from shortzip.data.instructions import PLACEHOLDER, VIDEO_PLACEHOLDER, Conversation
from shortzip.data.supervision import IGNORE_INDEX


class NothingToLearn(UserError):
    """A run that would end with the projector that it began with."""


def conversations_in_words(dataset: ConversationDataset) -> str:
    """How many conversations there are, how many have videos, and how many have neither image nor video."""
    without = sum(not sees(conversation) for conversation in dataset.conversations)
    aside = f", {without} of them without an image: these give the projector no gradient" if without else ""
    videos = int((dataset.videos > 0).sum())
    shown = f", {videos} with videos ({int(dataset.frames.sum())} frames)" if videos else ""
    return f"{len(dataset)} conversations{shown}{aside}"


def sees(conversation: Conversation) -> bool:
    """Whether it has an image or a video."""
    return bool(conversation.images or conversation.videos)


def check_sees_images(dataset: ConversationDataset) -> None:
    """Raises `NothingToLearn` if no conversation has an image, or none an answer after one."""
    if not any(map(sees, dataset.conversations)):
        raise NothingToLearn(
            f"none of the {len(dataset)} conversations has an image, and the projector learns from images only: "
            "data.instructions needs rows with image (or images) and an <image> in their text"
        )
    if not any(map(answers_an_image, dataset.conversations)):
        raise NothingToLearn(
            f"none of the {len(dataset)} conversations answers anything after an <image>, and the projector learns "
            "from such answers only: the <image> of a row stands in a turn before an answer"
        )


def answers_an_image(conversation: Conversation) -> bool:
    """Whether an answer stands after an image or a video."""
    marks = [PLACEHOLDER] * bool(conversation.images) + [VIDEO_PLACEHOLDER] * bool(conversation.videos)
    roles = [role for role, _ in conversation.turns]
    shown = (place for place, (_, text) in enumerate(conversation.turns) if any(mark in text for mark in marks))
    return "assistant" in roles[next(shown, len(roles)) :]


def check_learns(schedule: Any, plan: BatchPlan, dataset: ConversationDataset, total_steps: int) -> None:
    """Raises `NothingToLearn` if no step has both a learning rate above 0 and an image.

    `schedule`: a torch LambdaLR.
    """
    seen_rate = False
    for step in range(total_steps):
        if schedule.base_lrs[0] * schedule.lr_lambdas[0](step) <= 0:
            continue
        seen_rate = True
        position = step * plan.global_batch_size
        count = plan.global_batch_size
        if plan.total_samples is not None:
            count = min(count, plan.total_samples - position)
        if any(answers_an_image(dataset.conversations[sample]) for sample in plan.samples(position, count)):
            return
    steps = "the only step" if total_steps == 1 else f"each of the {total_steps} steps"
    longer = (
        "take more steps, by num_train_epochs, max_steps or a global_batch_size below "
        f"{plan.global_batch_size} ({len(dataset)} conversations)"
    )
    if not seen_rate:
        raise NothingToLearn(
            f"{steps} would have a learning rate of 0, where the warm-up begins: set warmup_ratio to 0, or {longer}"
        )
    raise NothingToLearn(
        f"no conversation with an image comes up in a step with a learning rate above 0 ({total_steps} steps): "
        f"take more steps: {longer}, or conversations with more images"
    )


def answer_images(micro_batches: Sequence[MicroBatch], *visual: int) -> bool:
    """Whether a supervised token stands after a visual token, so that the projector must get a gradient. `visual`: the
    placeholders' ids."""
    for micro_batch in micro_batches:
        ids = micro_batch.inputs["input_ids"]
        after_image = torch.isin(ids, torch.tensor(visual)).cumsum(1) > 0
        if bool((after_image & (micro_batch.inputs["labels"] != IGNORE_INDEX)).any()):
            return True
    return False


def refuse_zero_gradient(norm: float, step: int) -> bool:
    """Whether the norm of a gradient, of a step with answers to images, is above 0. Raises `NothingToLearn` for 0."""
    if norm == 0:
        raise NothingToLearn(
            f"step {step} gave the projector no gradient (its norm is 0), though there are answers to images: the run "
            "would end with the projector that it began with. Are weights of the release, or the projector, all zeros?"
        )
    return norm > 0
