"""Measures a training step of ShortZip against what a user would write with plain transformers, in one process.

    python scripts/benchmarks/step.py --shape cpu
    python scripts/benchmarks/step.py --shape llava-1.5-7b --device cuda --global_batch_size 128 --micro_batch_size 16
    python scripts/benchmarks/step.py --shape llava-1.5-7b --device cuda --memory_limit 24GiB --micro_batch_size 8

Random weights, lengths drawn like the instruction mix's (scripts/benchmarks/shapes.py). Sides, alternating:

    plain, recomputed   transformers' LLaVA as a careful user writes it: all tokens, SDPA, batches of similar length,
                        padded, labels given to the model (logits at every position), gradient checkpointing; no
                        gradient asked of the tower, no backward pass of a micro-batch without an image
    plain               the same without gradient checkpointing
    zip, recomputed     VisionZip with our tower, otherwise the same
    zip                 the same without gradient checkpointing
    shortzip            VisionZip and ShortV through train/step/objective.py, as the loop runs it
    shortzip, cached    the same with the features of data.cache_features in place of pixels
    shortzip, all       VisionZip and ShortV, every token through every layer, logits at supervised positions only

The limit, on paper. A sample with t text tokens (p of them before the image, s supervised), v visual tokens, in a
language model of L layers, width h, FFN m, vocabulary V, F of the layers frozen; a layer costs 2(4h + 3m)h per token
and 4kh per query and its k keys. The projector's gradient and the loss need

    tower               its blocks up to the selected one, forward only
    projector           forward, both weight gradients, the second layer's input gradient
    plain layers        v + t - p tokens: matrices twice (forward, gradient of the input), attention three times
    frozen layers       queries, output and FFN of t - p tokens, keys and values of v + t - p
    last layer          keys and values of v + t - p tokens, everything else of s
    logits              2hV of s positions, twice

and nothing of the text before the image, whose keys and values are constants (train/step/flops.py counts this). For
t = 200, p = 35, v = 64, s = 98 and the published or corresponding frozen layers, TFLOPs a sample (fp32 or bf16 alike):

                    needed   of it tower   plain, recomputed   plain   zip, recomputed   zip     highest ratios
    cpu              0.547      0.366            1.604         1.246        0.745       0.632   2.9  2.3  1.4  1.2
    llava-1.5-7b     5.569      0.366           32.272        21.905       10.916       7.460   5.8  3.9  2.0  1.3

With cached features the tower's part falls away: 8.9 times the plain side in shape cpu. Bytes: weights are read once
for forward and once for backward in each micro-batch, 2 x 13.5 GB at 7B in bfloat16, 6 ms at 4.8 TB/s, against 125 ms
for the FLOPs of 16 samples at 700 TFLOP/s: compute decides, down to micro-batches of one sample on such a card. On two
CPU cores (about 0.1 TFLOP/s in fp32, 10 GB/s) 3.6 GB of weights are 0.4 s against 5 s for each sample.

What was tried, with the gain expected on paper and measured, is listed in NOTES below and printed by `--notes true`.
Layer contribution has a benchmark of its own, scripts/benchmarks/lc.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from shortzip.data.errors import UserError
from shortzip.data.files import refuse_to_replace
from shortzip.reduction.flops import llm_prefill_flops, vision_tower_flops
from shortzip.reduction.parsing import parse_bytes
from shortzip.reduction.shortv import active_rows
from shortzip.scripts.benchmarks.notes import NOTES
from shortzip.scripts.benchmarks.savings import sides_without
from shortzip.scripts.benchmarks.shapes import (
    BEFORE,
    SHAPES,
    ConversationLengths,
    ModelShape,
    SharedModels,
    build_models,
    draw_conversations,
    make_batch,
)
from shortzip.scripts.benchmarks.sides import StepInputs, cut, step_flops, step_sides, with_features
from shortzip.scripts.benchmarks.timing import Clock, Stopwatch, as_dicts, ratio, show, write_figures
from shortzip.train.settings.command_line import parse_config, run_command

PREFILL_RATIOS = (
    ("shortzip", "plain"),
    ("zip", "plain"),
    ("shortzip", "zip"),
    ("shortzip, with tower", "plain, with tower"),
)


@dataclass
class StepBenchmarkConfig:
    """What `scripts/benchmarks/step.py` takes."""

    shape: Literal["demo", "cpu", "llava-1.5-7b", "llava-1.5-13b", "llava-next-7b", "next-cpu", "video-cpu"] = "cpu"
    """Sizes of the model: a release's, `cpu` (CLIP-L/14-336 and a 16-layer, 1024-wide Llama), `next-cpu`
    (LLaVA-NeXT-7B's tokens and depth at a quarter of its width), or `video-cpu` (8 frames of 224 pixels a row)."""
    parts: list[Literal["step", "savings", "prefill", "generation", "tower"]] = field(default_factory=lambda: ["step"])
    """What to measure; savings: ShortZip's step without each of its savings in turn
    (scripts/benchmarks/savings.py)."""
    sides: list[str] = field(default_factory=list)
    """Only these sides of the step; empty means all."""
    device: str = "cpu"
    """cpu or cuda."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of everything but the projector; null: float32 on the CPU, bfloat16 on CUDA."""
    global_batch_size: int = 8
    """Samples in a step."""
    micro_batch_size: int = 4
    """Samples in a micro-batch at most."""
    images_only: bool = False
    """Leave out text-only conversations."""
    rounds: int = 3
    """Rounds, of which the median counts."""
    warm_up: int = 1
    """Rounds before them that are not counted."""
    clock: Clock = "wall"
    """wall time; or the process's CPU time, for one thread (OMP_NUM_THREADS=1) on a machine that others use too."""
    tensor_memory: bool = True
    """Also run each side once with its tensors counted, for the bytes that it holds at its peak."""
    new_tokens: int = 16
    """Tokens generated per prompt."""
    memory_limit: str | None = None
    """Caps the device's memory (24GiB), to test a smaller card's recipe on a larger one."""
    notes: bool = False
    """Print what was tried, with the gain expected and measured, and stop."""
    output: Path | None = None
    """A JSON file to write the figures to."""
    overwrite: bool = False
    """Replace the file that is there already."""


def visual_tokens(config: Any, shape: ModelShape) -> tuple[int, int]:
    """Of an image: all, and those of the budget."""
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    return patches * shape.tiles, (shape.dominant + shape.contextual) * shape.tiles


def stopwatch(settings: StepBenchmarkConfig, device: torch.device) -> Stopwatch:
    return Stopwatch(device, settings.rounds, settings.warm_up, settings.clock, settings.tensor_memory)


def asked_for(sides: Mapping[str, Callable[[], None]], settings: StepBenchmarkConfig) -> dict[str, Callable[[], None]]:
    return {name: side for name, side in sides.items() if not settings.sides or name in settings.sides}


def measure_step(
    models: SharedModels, shape: ModelShape, settings: StepBenchmarkConfig, device: torch.device
) -> dict[str, Any]:
    """The training step of every side: forward, backward, no optimizer (it is the same and takes a millisecond)."""
    config = models.plain.config
    conversations = draw_conversations(settings.global_batch_size, images_only=settings.images_only)
    every, budget = visual_tokens(config, shape)
    plain, reduced = (
        cut(conversations, visual, shape.tiles, settings.micro_batch_size, config, device)
        for visual in (every, budget)
    )
    inputs = StepInputs(plain, reduced, with_features(models.both, reduced.batches, shape.tiles))
    watch = stopwatch(settings, device)
    timings = watch.alternate(asked_for(step_sides(models, inputs), settings), len(conversations))
    for name, timing in timings.items():
        timing.tokens_per_second = inputs.of(name).tokens / timing.seconds
    flops = step_flops(config, shape, inputs)
    # MFU counts what a side has to compute, without what it computes twice.
    once = {name: flops[name.removesuffix(", recomputed")] for name in flops}
    peak = watch.hold_against_flops(timings, once, models.both.dtype)
    ratios: dict[str, Any] = {}
    ours = ("shortzip", "shortzip, cached")
    for name in ours:
        for other in timings:
            if name in timings and other not in ours:
                ratios |= ratio(timings, name, other, flops[other] / flops[name])
    padding = {"plain": plain.padding, "reduced": reduced.padding}
    return {"matmul_flops": peak, "padding": padding, "timings": as_dicts(timings), "ratios": ratios}


def measure_savings(
    models: SharedModels, shape: ModelShape, settings: StepBenchmarkConfig, device: torch.device
) -> dict[str, Any]:
    """ShortZip's step, and the step without each of its savings."""
    config = models.both.config
    conversations = draw_conversations(settings.global_batch_size, images_only=settings.images_only)
    _, budget = visual_tokens(config, shape)
    reduced = cut(conversations, budget, shape.tiles, settings.micro_batch_size, config, device)
    sides, flops = sides_without(models.both, shape, reduced)
    watch = stopwatch(settings, device)
    timings = watch.alternate(asked_for(sides, settings), len(conversations))
    peak = watch.hold_against_flops(timings, flops, models.both.dtype)
    ratios: dict[str, Any] = {}
    for name in timings:
        if name != "shortzip" and "shortzip" in timings:
            ratios |= ratio(timings, "shortzip", name, flops[name] / flops["shortzip"])
    return {"matmul_flops": peak, "timings": as_dicts(timings), "ratios": ratios}


@torch.no_grad()
def measure_prefill(
    models: SharedModels, shape: ModelShape, settings: StepBenchmarkConfig, device: torch.device
) -> dict[str, Any]:
    """One prompt of 64 text tokens, as in the papers: the language model alone, and with tower and projector."""
    config = models.plain.config
    every, budget = visual_tokens(config, shape)
    side, hidden = config.vision_config.image_size, config.text_config.hidden_size
    pixels = torch.randn(shape.tiles, 3, side, side, device=device, dtype=models.plain.dtype)

    def language_model(model: Any, visual: int, features: Tensor | None = None) -> Tensor:
        embeds = torch.randn(1, visual + 64, hidden, device=device, dtype=models.plain.dtype)
        is_visual = torch.zeros(1, visual + 64, dtype=torch.bool, device=device)
        is_visual[:, BEFORE : BEFORE + visual] = True
        if features is not None:
            embeds[:, BEFORE : BEFORE + visual] = features.flatten(0, -2)
        frozen = {} if model is not models.both else {"active_rows": active_rows(is_visual)}
        states = model.model.language_model(inputs_embeds=embeds, use_cache=True, **frozen).last_hidden_state
        return model.lm_head(states[:, -1])

    def whole(model: Any, visual: int) -> Tensor:
        features = model.model.get_image_features(pixel_values=pixels).pooler_output
        return language_model(model, visual, torch.cat(list(features)))

    sides = {
        "plain": partial(language_model, models.plain, every),
        "zip": partial(language_model, models.visionzip, budget),
        "shortzip": partial(language_model, models.both, budget),
        "plain, with tower": partial(whole, models.plain, every),
        "zip, with tower": partial(whole, models.visionzip, budget),
        "shortzip, with tower": partial(whole, models.both, budget),
    }
    timings = stopwatch(settings, device).alternate(sides, 1)
    for name, timing in timings.items():
        visual = every if name.startswith("plain") else budget
        frozen = shape.frozen if name.startswith("shortzip") else []
        tower = vision_tower_flops(config, shape.tiles) if "tower" in name else 0
        timing.flops = llm_prefill_flops(config.text_config, 64, visual, frozen) + tower
    ratios: dict[str, Any] = {}
    for name, other in PREFILL_RATIOS:
        ratios |= ratio(timings, name, other, timings[other].flops / timings[name].flops)
    return {"visual_tokens": [every, budget], "timings": as_dicts(timings), "ratios": ratios}


@torch.no_grad()
def measure_generation(
    models: SharedModels, shape: ModelShape, settings: StepBenchmarkConfig, device: torch.device
) -> dict[str, Any]:
    """Greedy generation of `new_tokens`, batches of 1 and 8 prompts with an image each (one tile)."""
    config = models.plain.config
    every = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    budget = shape.dominant + shape.contextual
    results: dict[str, Any] = {}
    for size in (1, 8):
        prompts = [ConversationLengths(True, ((20, 1),))] * size
        batches = [make_batch(prompts, visual, 1, config, device) for visual in (every, budget)]
        for batch in batches:
            del batch["labels"]
        limit = {"max_new_tokens": settings.new_tokens, "min_new_tokens": settings.new_tokens, "do_sample": False}
        sides = {
            "plain": partial(models.plain.generate, **batches[0], **limit, pad_token_id=0),
            "zip": partial(models.visionzip.generate, **batches[1], **limit, pad_token_id=0),
            "shortzip": partial(models.both.generate, **batches[1], **limit, pad_token_id=0),
        }
        timings = stopwatch(settings, device).alternate(sides, size)
        ratios = ratio(timings, "shortzip", "plain") | ratio(timings, "shortzip", "zip")
        results[f"batch {size}"] = {"timings": as_dicts(timings), "ratios": ratios}
    return results


@torch.no_grad()
def measure_tower(
    models: SharedModels, shape: ModelShape, settings: StepBenchmarkConfig, device: torch.device
) -> dict[str, Any]:
    """The tower alone: transformers' whole one, and ours with VisionZip's choice and merging, the same images."""
    side, count = models.plain.config.vision_config.image_size, settings.micro_batch_size
    pixels = torch.randn(count, 3, side, side, device=device, dtype=models.plain.dtype)
    sides = {
        "plain tower": partial(models.plain.model.vision_tower, pixels, output_hidden_states=True),
        "tower and VisionZip": partial(models.visionzip.model.get_visual_tokens, pixels),
    }
    timings = stopwatch(settings, device).alternate(sides, count)
    blocks = models.plain.config.vision_config.num_hidden_layers
    ratios = ratio(timings, "tower and VisionZip", "plain tower", blocks / (blocks - 1))
    return {"timings": as_dicts(timings), "ratios": ratios}


def main(argv: Sequence[str]) -> None:
    """Measures, prints tables, and writes `output` when given."""
    settings = parse_config(StepBenchmarkConfig, argv, program="benchmark.py")
    if settings.output is not None:
        refuse_to_replace(settings.output, overwrite=settings.overwrite)
    if settings.notes:
        print(NOTES)
        return
    device = torch.device(settings.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if settings.memory_limit is not None:
        if device.type != "cuda":
            raise UserError(f"memory_limit {settings.memory_limit}: only a CUDA device can be capped")
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, parse_bytes(settings.memory_limit) / total), device)
    name = settings.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    shape = SHAPES[settings.shape]
    models = build_models(shape, device, getattr(torch, name))
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console.width = 140  # a log file has no edge
    measures = {
        "step": measure_step,
        "savings": measure_savings,
        "prefill": measure_prefill,
        "generation": measure_generation,
        "tower": measure_tower,
    }
    results: dict[str, Any] = {"settings": {**asdict(settings), "output": str(settings.output), "dtype": name}}
    for part in settings.parts:
        results[part] = measures[part](models, shape, settings, device)
        show(results[part], f"{settings.shape}, {part}", console)
    if settings.output is not None:
        write_figures(settings.output, results)


if __name__ == "__main__":
    run_command(main)
