"""How large a micro-batch may be, whether layers are computed again, and what is done when memory runs out.

The estimate is that of scripts/estimate_cost.py (train/step/memory.py), for the costliest micro-batch that the
limits allow: rows of about the longest conversation's length, each with one image, or as many frames of a video as
any row has, every text token supervised.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from shortzip.data.batching import BatchPlan
from shortzip.data.dataset import ConversationDataset
from shortzip.reduction.parsing import parse_budget, parse_bytes
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.config import TuneConfig
from shortzip.train.step.activations import tower_activation_bytes
from shortzip.train.step.engine import weights_share
from shortzip.train.step.flops import StepFlops
from shortzip.train.step.memory import TrainingStep, pixel_bytes, training_step_memory
from shortzip.train.step.supervised_states import can_walk
from shortzip.train.step.teaching_cost import sandwich_bytes, teacher_bytes

MARGIN = 0.1  # of a device's memory is left free: for fragments, and for what the estimate does not know
CPU_ROWS = 8
MOST_TOKENS = 32_768  # more at a time are no faster, and would trust the estimate further than it goes
# With fewer tokens at a time a GPU waits for weights and kernels: then computing layers again is cheaper.
ENOUGH_TOKENS = 1024


@dataclass(frozen=True)
class MicroBatchLimits:
    """How large a micro-batch is at most. At least one of the two limits is set."""

    rows: int | None
    """Conversations."""
    tokens: int | None
    """Tokens, padding included; one conversation that is longer stands alone."""
    gradient_checkpointing: bool
    """Whether LLM layers are computed again in the backward pass."""


@dataclass(frozen=True)
class StepEstimate:
    """What the memory of a micro-batch depends on, beside its size.

    `config`: of a LLaVA. `row`: a conversation as long as the longest, with one image; its `micro_batch_size` and
    `gradient_checkpointing` are not read. `most_rows`: conversations of a global batch on one device. `taught`: visual
    tokens of that conversation as a teacher reads it in the step; None: none does. `narrower`: with
    `sandwich`, its visual tokens under the second largest budget; None: it is read once.
    """

    config: Any
    row: TrainingStep
    most_rows: int
    taught: int | None = None
    narrower: int | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation."""
        return self.row.text_tokens + self.row.visual_tokens

    def memory(self, limits: MicroBatchLimits) -> int:
        """Bytes at the peak of a step in micro-batches as large as the limits allow."""
        tokens = self.longest * (limits.rows or self.most_rows)
        if limits.tokens is not None:
            tokens = max(self.longest, min(tokens, limits.tokens))
        rows = -(-tokens // self.longest)
        text = max(1, -(-tokens // rows) - self.row.visual_tokens)
        step = replace(
            self.row, text_tokens=text, micro_batch_size=rows, gradient_checkpointing=limits.gradient_checkpointing
        )
        parts = training_step_memory(self.config, step)
        total = parts.total + (0 if self.narrower is None else sandwich_bytes(self.config, step, self.narrower))
        if self.taught is None:
            return total
        return total + teacher_bytes(self.config, step, self.taught, parts.activations + parts.working)

    def largest(self, memory: int, gradient_checkpointing: bool) -> MicroBatchLimits | None:
        """The largest micro-batch whose estimate is within `memory` bytes; None if one row of the longest is not."""
        low, high = self.longest - 1, min(self.longest * self.most_rows, max(self.longest, MOST_TOKENS))
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.memory(MicroBatchLimits(None, middle, gradient_checkpointing)) <= memory
            low, high = (middle, high) if fits else (low, middle - 1)
        if low < self.longest:
            return None
        limits = MicroBatchLimits(None, low, gradient_checkpointing)
        # Short conversations are many, and each has its images; the tower runs while nothing of the LLM is kept.
        per_row = tower_activation_bytes(self.config, self.row.tiles, self.row.bytes_per_value)
        per_row += pixel_bytes(self.config, self.row.tiles)
        rows = self.most_rows if self.row.cached_features else (memory - self.fixed) // per_row
        return replace(limits, rows=max(1, min(self.most_rows, rows)))

    @property
    def fixed(self) -> int:
        """Bytes that are there whatever the micro-batch: weights, the projector's moments, the device's own."""
        parts = training_step_memory(self.config, self.row)
        return parts.weights + parts.projector + parts.overhead


def choose_limits(estimate: StepEstimate, memory: int, gradient_checkpointing: bool | None) -> MicroBatchLimits:
    """The largest micro-batch that is estimated to fit into `memory` bytes.

    `gradient_checkpointing` None: only where without it fewer than `ENOUGH_TOKENS` or less than the longest
    conversation would fit. Raises `ConfigError` with the cure where nothing fits.
    """
    if gradient_checkpointing is not None:
        limits = estimate.largest(memory, gradient_checkpointing)
    else:
        limits = estimate.largest(memory, False)
        if limits is None or (limits.tokens or 0) < min(ENOUGH_TOKENS, estimate.longest * estimate.most_rows):
            limits = estimate.largest(memory, True) or limits
    if limits is not None:
        return limits
    cures = ["take a smaller release"] + ([] if estimate.row.weights == "4bit" else ["set load_in_4bit to true"])
    if estimate.fixed > memory:
        raise ConfigError(
            f"weights, the projector's moments and what the device needs for itself take {_gib(estimate.fixed)}, of "
            f"{_gib(memory)} that may be filled: {', '.join(cures)}, or take a larger card"
        )
    alone = MicroBatchLimits(1, None, gradient_checkpointing is not False)
    cures.insert(0, "lower data.max_length")
    if gradient_checkpointing is False:
        cures.insert(0, "set gradient_checkpointing to null")
    raise ConfigError(
        f"one conversation of {estimate.longest} tokens takes {_gib(estimate.memory(alone))} (estimate), of "
        f"{_gib(memory)} that may be filled: {', '.join(cures)}, or take a larger card"
    )


def plan_micro_batches(
    config: TuneConfig,
    model: Any,
    dataset: ConversationDataset,
    accelerator: Accelerator,
    recorded: Mapping[str, Any],
) -> tuple[MicroBatchLimits, str]:
    """The run's limits, the same on every process, and what to say about them.

    What the config gives is taken as it is. Where it gives no limit, a CUDA device's memory decides, or
    `config.max_memory`; a CPU without that takes `CPU_ROWS` rows. `recorded`: the limits of the run that is continued,
    which are kept where they fit, or the cut into micro-batches, and with it the rounding, would change. Raises
    `ConfigError` where nothing fits.
    """
    user_limits = config.per_device_train_batch_size, config.max_tokens_per_micro_batch
    is_free = user_limits == (None, None)
    memories = [found for found in gather_object([usable_memory(accelerator.device, config.max_memory)]) if found]
    if not memories:
        limits = MicroBatchLimits(
            CPU_ROWS if is_free else user_limits[0], user_limits[1], bool(config.gradient_checkpointing)
        )
        return limits, in_words(limits.rows, limits.tokens)
    memory = min(memories)
    try:
        share = weights_share(accelerator)
        estimate = estimate_of(config, model, dataset, accelerator.num_processes, share)
    except ValueError as error:
        if is_free:
            raise ConfigError(f"a micro-batch cannot be sized: {error} Set per_device_train_batch_size") from error
        limits = MicroBatchLimits(*user_limits, bool(config.gradient_checkpointing))
        return limits, in_words(limits.rows, limits.tokens)
    if is_free:
        limits = MicroBatchLimits(**recorded) if recorded else choose_limits(estimate, memory, None)
        if config.gradient_checkpointing not in (None, limits.gradient_checkpointing) or (
            estimate.memory(limits) > memory
        ):
            limits = choose_limits(estimate, memory, config.gradient_checkpointing)
    else:
        limits = MicroBatchLimits(*user_limits, config.gradient_checkpointing is True)
        if config.gradient_checkpointing is None and estimate.memory(limits) > memory:
            limits = replace(limits, gradient_checkpointing=True)
    again = ", layers computed again in the backward pass" if limits.gradient_checkpointing else ""
    return (
        limits,
        f"{in_words(limits.rows, limits.tokens)}{again}: estimated {_gib(estimate.memory(limits))} of {_gib(memory)}",
    )


def estimate_of(
    config: TuneConfig, model: Any, dataset: ConversationDataset, num_processes: int = 1, share: float | None = None
) -> StepEstimate:
    """What the memory of a run's micro-batches depends on. Raises ValueError for a family that cannot be counted.

    `share`: what `weights_share` gives.
    """
    is_taught = config.distill is not None and config.data.cache_teacher is None
    counted = StepFlops(model, dataset, taught=is_taught)
    longest = int(dataset.lengths.max())
    visual, tiles = counted.most
    visual = min(visual, longest - 1)
    row = TrainingStep(
        text_tokens=longest - visual,
        visual_tokens=visual,
        tiles=tiles,
        frozen_layers=tuple(counted.frozen),
        micro_batch_size=1,
        weights="4bit" if config.load_in_4bit else "float32" if config.mixed_precision == "no" else "bfloat16",
        every_token=share is not None or not can_walk(model.model.language_model),
        cached_features=not counted.tower,
        weights_share=1.0 if share is None else share,
    )
    most = -(-config.global_batch_size // num_processes)
    narrower = None
    if config.sandwich:
        second, largest = (sum(parse_budget(str(budget)).values()) for budget in config.budgets[-2:])
        narrower = visual * second // largest
    estimate = StepEstimate(model.config, row, most, counted.taught, narrower)
    training_step_memory(model.config, row)  # refuses families that it does not know
    return estimate


def usable_memory(device: torch.device, max_memory: str | None) -> int | None:
    """Bytes of the device that a step may fill: `max_memory`, and on CUDA no more than is free and than leaves
    `MARGIN`; None on a CPU without `max_memory`."""
    limit = None if max_memory is None else parse_bytes(max_memory)
    if device.type != "cuda":
        return limit
    free, total = torch.cuda.mem_get_info(device)
    usable = min(free + torch.cuda.memory_reserved(device), int(total * (1 - MARGIN)))
    return usable if limit is None else min(limit, usable)


def in_words(rows: int | None, tokens: int | None) -> str:
    """How large a micro-batch is at most."""
    parts = [f"{rows} rows"] if rows is not None else []
    parts += [f"{tokens} tokens"] if tokens is not None else []
    return f"micro-batches of at most {' and '.join(parts)}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def half_the_micro_batch(plan: BatchPlan, error: torch.OutOfMemoryError, *, again: bool) -> BatchPlan:
    """The same global batches in micro-batches of half the size, after memory ran out.

    `again`: whether that has been done before. Raises torch.OutOfMemoryError with the cure if it has, with several
    processes (the others are in the middle of the step), and where one row fills the memory.
    """
    rows, tokens = plan.micro_batch_size, plan.max_tokens
    alone = rows == 1 and tokens is None
    if again or alone or plan.num_processes > 1:
        where = f"on one of {plan.num_processes} processes" if plan.num_processes > 1 else "again" if again else ""
        cure = "lower data.max_length" if alone else "lower per_device_train_batch_size or max_tokens_per_micro_batch"
        raise torch.OutOfMemoryError(
            f"out of memory {where or 'with one row at a time'}, in {in_words(rows, tokens)}: {cure}, set "
            f"gradient_checkpointing to true or lower the budget, and continue with --resume_from_checkpoint latest "
            f"({error})"
        ) from error
    smaller = copy.copy(plan)
    smaller.micro_batch_size = None if rows is None else max(1, rows // 2)
    smaller.max_tokens = None if tokens is None else max(1, tokens // 2)
    return smaller
