"""The training step at full size on random weights: how fast, and how much memory."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from shortzip.data.batching import BatchPlan
from shortzip.data.dataset import MicroBatch
from shortzip.scripts.benchmarks.shapes import (
    BEFORE,
    IMAGE_TOKEN,
    SHAPES,
    ModelShape,
    build_models,
    draw_conversations,
    make_batch,
)
from shortzip.scripts.proofs.agreement import gradient_of
from shortzip.scripts.proofs.section import Proof, Skipped
from shortzip.train.run.report import matmul_speed, synchronise
from shortzip.train.settings.checks import ConfigError
from shortzip.train.step.engine_choice import start_engine
from shortzip.train.step.flops import RowShape, needed_flops
from shortzip.train.step.memory import CUDA_OVERHEAD_BYTES, TrainingStep, training_step_memory
from shortzip.train.step.micro_batch import (
    MARGIN,
    MicroBatchLimits,
    StepEstimate,
    choose_limits,
    in_words,
    usable_memory,
)
from shortzip.train.step.objective import SupervisedLoss, count_supervised, projector_parameters, recompute_layers
from shortzip.train.step.places import LayOut

TINY = ModelShape(
    {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4},
    {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
     "image_size": 56, "patch_size": 7},
    12, 4, [0, 2],
)  # fmt: skip
GLOBAL_BATCH, TINY_BATCH = 128, 8
ROUNDS = 5  # steps that are timed, at most: those that the section's time allows
REHEARSAL_S = 60  # of a section are to be left for a rehearsal
A_TENTH = 66_530  # conversations of llava_v1_5_mix665k (665 298)


def step_7b(proof: Proof) -> None:
    _measure(proof, "llava-1.5-7b")


def step_13b(proof: Proof) -> None:
    _measure(proof, "llava-1.5-13b")


def step_next_7b(proof: Proof) -> None:
    _measure(proof, "llava-next-7b")


@dataclass(frozen=True)
class Work:
    """A global batch as a shape's model takes it.

    Attributes:
        rows: of each conversation, in tokens.
        batches: made by the place of each conversation, as data workers make them.
    """

    shape: ModelShape
    rows: list[RowShape]
    batches: Callable[[Sequence[Sequence[int]]], list[MicroBatch]]

    @property
    def lengths(self) -> list[int]:
        return [row.text + row.visual for row in self.rows]


def shape_of(proof: Proof, name: str) -> ModelShape:
    return TINY if proof.settings.tiny else SHAPES[name]


def _measure(proof: Proof, name: str) -> None:
    """The recipe's own micro-batches, for the smaller card and for all of this device's memory."""
    device, shape = torch.device(proof.settings.device), shape_of(proof, name)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    needed = _weights_bytes(shape, dtype)
    if device.type == "cuda" and needed > total * (1 - MARGIN):
        raise Skipped(f"its weights in bfloat16 take {_gib(needed)}, and the device has {_gib(total)}")
    model = build_models(shape, device, dtype).both
    work = work_of(model.config, shape, TINY_BATCH if proof.settings.tiny else GLOBAL_BATCH, device)
    peak = matmul_speed(device, dtype, 0.5 if device.type == "cuda" else 0.02)
    limit, rows = proof.settings.memory_limit, []
    for memory in sorted({min(limit, total), total}) if total else [limit]:
        with proof.part(_gib(memory)):
            try:
                rows.append([_gib(memory), *_one_memory(proof, name, model, work, memory, total, peak)])
            except ConfigError as error:  # a smaller card's recipe would say so too
                rows.append([_gib(memory), f"does not fit: {error}", *[""] * 7])
    headings = [
        "memory", "micro-batches of at most", "seconds a step", "samples/s", "MFU", "peak", "estimate",
        "rehearsal", "a tenth of the mix",
    ]  # fmt: skip
    named = f"{len(work.rows)} conversations, {str(dtype).removeprefix('torch.')}, random weights"
    proof.table(f"The step, {named}", headings, rows)
    with proof.part("the walk against every token"):
        _walk_against_every_token(proof, model, work, device)


def _weights_bytes(shape: ModelShape, dtype: torch.dtype) -> int:
    text = shape.text
    layer = 4 * text["hidden_size"] ** 2 + 3 * text["hidden_size"] * text["intermediate_size"]
    return (text["num_hidden_layers"] * layer + 2 * 32000 * text["hidden_size"]) * dtype.itemsize


def work_of(config: Any, shape: ModelShape, count: int, device: torch.device) -> Work:
    """Conversations with the mix's lengths, text-only ones among them."""
    conversations = draw_conversations(count)
    visual = (shape.dominant + shape.contextual) * shape.tiles
    rows = [conversation.shape(visual, shape.tiles) for conversation in conversations]
    lay_out = LayOut(IMAGE_TOKEN)

    def batches(places: Sequence[Sequence[int]]) -> list[MicroBatch]:
        made = []
        for seed, chosen in enumerate(places):
            chosen_ones = [conversations[place] for place in chosen]
            inputs = make_batch(chosen_ones, visual, shape.tiles, config, torch.device("cpu"), seed)
            micro = MicroBatch(inputs, [], layout=lay_out(inputs))
            made.append(micro.pin_memory() if device.type == "cuda" else micro)
        return made

    return Work(shape, rows, batches)


def _one_memory(
    proof: Proof, name: str, model: Any, work: Work, memory: int, total: int, peak_flops: float
) -> list[str]:
    """A row of the table: the step in micro-batches that the recipe chooses for a card of `memory` bytes."""
    device, on_cuda = model.device, model.device.type == "cuda"
    if on_cuda:  # what the driver and the context take of a card of that size, the estimate counts as overhead
        torch.cuda.empty_cache()
        share = 1.0 if memory == total else (memory - CUDA_OVERHEAD_BYTES) / total
        torch.cuda.set_per_process_memory_fraction(share, device)
    estimate = StepEstimate(model.config, _longest(model, work), len(work.rows))
    fillable = int(memory * (1 - MARGIN))
    limits = choose_limits(estimate, min(fillable, usable_memory(device, None) or fillable), None)
    recompute_layers(model, limits.gradient_checkpointing)
    plan = BatchPlan(
        work.lengths, len(work.rows), micro_batch_size=limits.rows, max_tokens_per_micro_batch=limits.tokens
    )
    places = plan.global_batch(0).micro_batches[0]
    micro_batches = work.batches(places)
    seconds, most = _timed(proof, model, micro_batches)
    flops = sum(needed_flops(model.config, row, shared=BEFORE, frozen_layers=work.shape.frozen) for row in work.rows)
    speed, mfu = len(work.rows) / seconds, flops / seconds / peak_flops
    expected = max(_estimated(estimate, work, chosen, limits) for chosen in places)
    tensors = expected - CUDA_OVERHEAD_BYTES
    if on_cuda:
        proof.check(f"{_gib(memory)}: the estimate holds", most <= expected, f"peak {_gib(most)}, {_gib(expected)}")
    minutes = A_TENTH / speed / 60
    figures = {
        "seconds": seconds, "samples_per_second": speed, "mfu": mfu, "peak_bytes": most,
        "estimated_tensor_bytes": tensors, "flops": flops, "matmul_flops": peak_flops,
        "limits": in_words(limits.rows, limits.tokens), "gradient_checkpointing": limits.gradient_checkpointing,
        "micro_batches": len(places), "tenth_minutes": minutes,
    }  # fmt: skip
    key = f"step_{name}_{memory / 2**30:.0f}GiB"
    proof.figures(**{key: figures})
    rehearsed = None
    if not proof.settings.tiny and proof.seconds_left > REHEARSAL_S:
        rehearsed = _rehearsed(model, micro_batches, places, work, limits)
        proof.figures(**{key: {**figures, "rehearsed_bytes": rehearsed}})
    again = ", computed again" if limits.gradient_checkpointing else ""
    return [
        in_words(limits.rows, limits.tokens).removeprefix("micro-batches of at most ") + again,
        f"{seconds:.2f}", f"{speed:.1f}", f"{mfu:.0%}", _gib(most) if on_cuda else "not measured",
        f"{_gib(tensors)}" + (f" ({tensors / most - 1:+.1%})" if most else ""),
        "none" if rehearsed is None else f"{_gib(rehearsed)}" + (f" ({rehearsed / most - 1:+.1%})" if most else ""),
        f"{minutes:.0f} minutes",
    ]  # fmt: skip


def _longest(model: Any, work: Work) -> TrainingStep:
    """A conversation as long as the longest, with one image."""
    visual = (work.shape.dominant + work.shape.contextual) * work.shape.tiles
    return TrainingStep(
        text_tokens=max(work.lengths) - visual,
        visual_tokens=visual,
        tiles=work.shape.tiles,
        frozen_layers=len(work.shape.frozen),
        micro_batch_size=1,
        weights=str(model.dtype).removeprefix("torch."),
    )


def _estimated(estimate: StepEstimate, work: Work, chosen: Sequence[int], limits: MicroBatchLimits) -> int:
    """Bytes of one micro-batch."""
    length = max(work.lengths[place] for place in chosen)
    step = replace(
        estimate.row,
        text_tokens=max(1, length - estimate.row.visual_tokens),
        micro_batch_size=len(chosen),
        gradient_checkpointing=limits.gradient_checkpointing,
    )
    return training_step_memory(estimate.config, step).total


def _timed(proof: Proof, model: Any, micro_batches: list[MicroBatch]) -> tuple[float, int]:
    """Seconds of the run's own step (the median; one before it is not counted), and the device's peak in bytes."""
    device, trained = model.device, projector_parameters(model)
    adamw = torch.optim.AdamW(trained.values(), lr=2e-5)
    accelerator = Accelerator(cpu=device.type == "cpu")
    engine = start_engine(accelerator, SupervisedLoss(model), adamw, trained, 1.0)
    supervised = sum(count_supervised(micro.inputs["labels"]) for micro in micro_batches)

    def step() -> float:
        synchronise(device)
        started = time.perf_counter()
        for number, micro in enumerate(micro_batches):
            engine.backward(micro.to(device), 1 / supervised, last=number == len(micro_batches) - 1)
        norm = engine.update(finite=True)
        synchronise(device)
        if not 0 < norm < float("inf"):
            raise ValueError(f"the gradient's norm is {norm}")
        return time.perf_counter() - started

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first, seconds = step(), [step()]
    while len(seconds) < ROUNDS and proof.seconds_left > 4 * first + 20:
        seconds.append(step())
    most = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    accelerator.free_memory()
    return statistics.median(seconds), most


def _rehearsed(
    model: Any, micro_batches: list[MicroBatch], places: Sequence[Sequence[int]], work: Work, limits: MicroBatchLimits
) -> int | None:
    """Bytes at the peak of the costliest micro-batch as it is rehearsed on fake tensors; None without a rehearsal."""
    if importlib.util.find_spec("shortzip.train.rehearsal") is None:
        return None
    from shortzip.train.rehearsal.rows import Integers
    from shortzip.train.rehearsal.step import StepToRehearse, rehearse

    def tokens(number: int) -> int:
        return micro_batches[number].inputs["input_ids"].numel()

    number = max(range(len(places)), key=tokens)
    inputs, layout = micro_batches[number].inputs, micro_batches[number].layout
    integers = Integers(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], layout)
    tiles = sum(work.rows[place].tiles for place in places[number] if work.rows[place].visual)
    step = StepToRehearse(
        model.config,
        integers,
        tiles=tiles,
        weights=str(model.dtype).removeprefix("torch."),
        recomputed=limits.gradient_checkpointing,
        accumulates=len(places) > 1,
    )
    return int(rehearse(step).peak.total)


def _walk_against_every_token(proof: Proof, model: Any, work: Work, device: torch.device) -> None:
    """At size, what the step leaves out changes neither loss nor gradient."""
    place = next(place for place, row in enumerate(work.rows) if row.visual)
    batch = work.batches([[place]])[0].to(device)
    found: list[tuple[float, Tensor]] = []
    recompute_layers(model, True)
    for plain in (False, True):
        loss = SupervisedLoss(model, plain=plain)(batch)
        loss.backward()
        found.append((loss.item(), gradient_of(model)))
        model.zero_grad()
    (ours, gradient), (theirs, expected) = found
    cosine = float(torch.cosine_similarity(gradient, expected, dim=0))
    proof.check("the walk's loss", abs(ours - theirs) <= 0.01 * theirs, f"{ours:.3f}, every token {theirs:.3f}")
    proof.check("the walk's gradient", cosine > 0.99, f"cosine {cosine:.4f} with every token's")
    proof.figures(walk_cosine=cosine)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
