"""A training step at full size on fake tensors: its real code, and every byte that it would hold."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from shortzip.data.dataset import MicroBatch
from shortzip.data.errors import UserError
from shortzip.reduction.families import family_of
from shortzip.reduction.flops import visual_grid
from shortzip.reduction.selectors import BASELINES, VISIONZIP, selector_of
from shortzip.train.rehearsal.as_cuda import AttentionAsOnCuda
from shortzip.train.rehearsal.counting import CUDA_BLOCK, Peak, StorageCounter
from shortzip.train.rehearsal.fake_models import FakeLinear4bit, fake_model
from shortzip.train.rehearsal.rows import Integers
from shortzip.train.step.engine import spread
from shortzip.train.step.memory import LOGITS_AT_ONCE
from shortzip.train.step.objective import SupervisedLoss, projector_parameters, recompute_layers
from shortzip.train.step.sandwich import readings_of

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "4bit": torch.bfloat16}


@dataclass(frozen=True)
class StepToRehearse:
    """A micro-batch and how it is computed.

    Attributes:
        config: of a reduced LLaVA or LLaVA-NeXT.
        integers: of the micro-batch.
        image_sizes: height and width of its images before tiling; for LLaVA-NeXT.
        tiles: images, or tiles of all images.
        weights: bfloat16, float32 or 4bit (the language model's layers in NF4, the rest in bfloat16).
        recomputed: LLM layers are computed again in the backward pass.
        cached_features: what the tower and the selection make of the images comes from a file.
        every_token: transformers' modules take every token through every layer, as under FSDP2 and ZeRO-3.
        processes: that FSDP2 spreads the language model over; with 1 it is whole.
        accumulates: a step has more than one micro-batch.
        on_cuda: kernels and block sizes of a CUDA device; else of a CPU.
        narrower: with `sandwich`, the smaller budgets (`visionzip` keys) under which the rows are read too, and their
            integers.
    """

    config: Any
    integers: Integers
    image_sizes: list[tuple[int, int]] = field(default_factory=list)
    tiles: int = 1
    weights: str = "bfloat16"
    recomputed: bool = False
    cached_features: bool = False
    every_token: bool = False
    processes: int = 1
    accumulates: bool = True
    on_cuda: bool = True
    narrower: tuple[tuple[dict[str, Any], Integers], ...] = ()


@dataclass(frozen=True)
class Rehearsal:
    """What a step holds, in bytes.

    Attributes:
        peak: where it is most.
        phases: where it is most in each phase, in their order.
        resting: by part, what is there between two steps.
    """

    peak: Peak
    phases: dict[str, Peak]
    resting: dict[str, int]


def rehearse(step: StepToRehearse) -> Rehearsal:
    """A run's first step and its second one, on fake tensors.

    The first makes the optimizer's moments, and computes what the rows' fixed text gives; the second has all that a
    later one has: moments, and where gradients accumulate those of the micro-batch before.
    """
    with ExitStack() as modes:
        mesh = modes.enter_context(_processes(step.processes)) if step.processes > 1 else None
        fake = modes.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model = fake_model(
            copy.deepcopy(step.config),  # whose budget changes from reading to reading
            DTYPES[step.weights],
            four_bit=step.weights == "4bit",
            cached_features=step.cached_features,
        )
        if step.on_cuda:
            modes.enter_context(AttentionAsOnCuda())
        counter = modes.enter_context(StorageCounter(CUDA_BLOCK if step.on_cuda else 1, gathers=mesh is not None))
        return _counted_steps(model, step, counter, lambda: _fake_batch(step, fake), mesh)


def _counted_steps(
    model: Any,
    step: StepToRehearse,
    counter: StorageCounter,
    micro_batch: Callable[[], MicroBatch],
    mesh: DeviceMesh | None = None,
) -> Rehearsal:
    """Two steps of a model on whatever its tensors are."""
    if step.recomputed:
        recompute_layers(model)
    trained = projector_parameters(model)
    loss = SupervisedLoss(model, plain=step.every_token, logits_at_once=LOGITS_AT_ONCE if step.on_cuda else None)
    if mesh is not None:
        spread(loss, mesh)
    counter.add(trained.values(), "projector")
    counter.add(weights_of(model, trained.values()), "weights")
    adamw = torch.optim.AdamW(trained.values(), foreach=step.on_cuda)  # as torch chooses there
    with _phases_told(model, counter):
        for micro_batches in (1, 2 if step.accumulates else 1):
            for _ in range(micro_batches):
                with counter.during("inputs", "inputs"):
                    readings = readings_of(micro_batch())
                for reading in readings:
                    with counter.during("tower", "activations"):
                        value = loss(reading)
                    with counter.during("backward", "working"):
                        value.backward()
                    del value
                    counter.add((p.grad for p in trained.values() if p.grad is not None), "gradients")
                del reading, readings
            with counter.during("optimizer", "working"):
                nn.utils.clip_grad_norm_(trained.values(), 1.0)
                adamw.step()
            counter.add((moment for state in adamw.state.values() for moment in state.values()), "moments")
            adamw.zero_grad()
    resting = {part: size for part, size in counter.held.items() if size}
    return Rehearsal(counter.peak, {name: peak for name, peak in counter.peaks.items() if name}, resting)


def weights_of(model: nn.Module, trained: Any) -> Iterator[Tensor]:
    """All that a model holds beside what is trained: weights, buffers, and what stands beside 4-bit ones."""
    others = set(map(id, trained))
    for parameter in model.parameters():
        if id(parameter) not in others:
            yield parameter.to_local() if isinstance(parameter, DTensor) else parameter
    yield from model.buffers()
    for module in model.modules():
        if isinstance(module, FakeLinear4bit):
            yield from module.beside


@contextmanager
def _processes(count: int) -> Iterator[DeviceMesh]:
    """A group of processes of which only the first is there, and whose collectives send nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if torch.distributed.is_initialized():
        raise UserError("a rehearsal of several processes is one process: start it without a launcher")
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield init_device_mesh("cpu", (count,))
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def _phases_told(model: Any, counter: StorageCounter) -> Iterator[None]:
    """Has a forward pass name its phases: tower, projector, language model, logits."""

    def enter(phase: str) -> Callable[..., None]:
        def told(*_: Any) -> None:
            if counter.phase not in ("backward", "optimizer"):
                counter.phase = phase

        return told

    projector = model.model.multi_modal_projector
    hooks = [
        projector.register_forward_pre_hook(enter("projector")),
        projector.register_forward_hook(enter("language model")),
        model.lm_head.register_forward_pre_hook(enter("logits")),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _fake_batch(step: StepToRehearse, fake: FakeTensorMode) -> MicroBatch:
    config, layout = step.config, step.integers.layout
    batch = _fake_reading(step, config.visionzip, step.integers, fake)
    if not step.cached_features and layout.placeholders:
        family = family_of(config.model_type)
        side = family.no_image(config, torch.zeros(()))["pixel_values"].shape[-1]
        batch.inputs["pixel_values"] = torch.zeros(family.pixels(config, step.tiles) // side**2, 3, side, side)
    if step.image_sizes:
        inputs: dict[str, Any] = batch.inputs
        inputs["image_sizes"] = step.image_sizes
    batch.narrower = [_fake_reading(step, key, integers, fake) for key, integers in step.narrower]
    return batch


def _fake_reading(step: StepToRehearse, visionzip: Any, integers: Integers, fake: FakeTensorMode) -> MicroBatch:
    """A micro-batch under a budget, without pixels."""
    inputs: dict[str, Any] = {"labels": integers.labels}
    if step.cached_features:
        dtype, width = DTYPES[step.weights], step.config.vision_config.hidden_size
        dominant, contextual = visionzip["dominant"], visionzip["contextual"]
        inputs["visual_tokens"] = torch.zeros(step.tiles, dominant + contextual, width, dtype=dtype)
        inputs["visual_kept"] = torch.zeros(step.tiles, dominant - _has_cls(step.config), dtype=torch.int64)
    if step.every_token:
        given = vars(integers)
        inputs |= {key: fake.from_tensor(given[key]) for key in ("input_ids", "attention_mask", "labels")}
    budget = dict(visionzip) if step.narrower else None
    return MicroBatch(inputs, [], layout=faked(integers.layout, fake), budget=budget)


def _has_cls(config: Any) -> int:
    """Whether CLS is counted among the dominant tokens."""
    method = config.visionzip.get("method", VISIONZIP)
    return visual_grid(config)[1] if method not in BASELINES and selector_of(config.visionzip).keeps_cls else 0


def faked(layout: Any, fake: FakeTensorMode) -> Any:
    """A layout whose places are fake; what rows begin with stays: the loss knows it by its content."""

    def of(rows: Any) -> Any:
        return None if rows is None else replace(rows, places=rows.places.each(fake.from_tensor))

    return replace(
        layout,
        every_token=layout.every_token.each(fake.from_tensor),
        used=None if layout.used is None else fake.from_tensor(layout.used),
        with_image=of(layout.with_image),
        text_only=of(layout.text_only),
    )
