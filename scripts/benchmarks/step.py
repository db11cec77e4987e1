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

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from shortzip.data.batching import BatchPlan
from shortzip.data.dataset import MicroBatch
from shortzip.data.errors import UserError
from shortzip.data.files import refuse_to_replace
from shortzip.reduction.flops import llm_prefill_flops, lm_head_flops, vision_tower_flops
from shortzip.reduction.parsing import parse_bytes
from shortzip.reduction.shortv import active_rows
from shortzip.scripts.benchmarks.notes import NOTES
from shortzip.scripts.benchmarks.savings import sides_without
from shortzip.scripts.benchmarks.shapes import (
    BEFORE,
    SHAPES,
    Conversation,
    Models,
    Shape,
    build_models,
    draw_conversations,
    make_batch,
)
from shortzip.scripts.benchmarks.timing import Clock, Stopwatch, as_dicts, ratio, show, write_figures
from shortzip.train.settings.command_line import parse_config, run_command
from shortzip.train.step.flops import RowShape, needed_flops, plain_flops
from shortzip.train.step.objective import SupervisedLoss, recompute_layers


@dataclass
class BenchmarkConfig:
    """What `scripts/benchmarks/step.py` takes."""

    shape: Literal["demo", "cpu", "llava-1.5-7b", "llava-1.5-13b", "llava-next-7b", "next-cpu"] = "cpu"
    """Sizes of the model: a release's, `cpu` (CLIP-L/14-336 and a 16-layer, 1024-wide Llama), or `next-cpu`
    (LLaVA-NeXT-7B's tokens and depth at a quarter of its width)."""
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


def stopwatch(settings: BenchmarkConfig, device: torch.device) -> Stopwatch:
    return Stopwatch(device, settings.rounds, settings.warm_up, settings.clock, settings.tensor_memory)


def measure_step(models: Models, shape: Shape, settings: BenchmarkConfig, device: torch.device) -> dict[str, Any]:
    """The training step of every side: forward, backward, no optimizer (it is the same and takes a millisecond)."""
    config = models.plain.config
    conversations = draw_conversations(settings.global_batch_size, images_only=settings.images_only)
    every = (config.vision_config.image_size // config.vision_config.patch_size) ** 2 * shape.tiles
    budget = (shape.dominant + shape.contextual) * shape.tiles
    cached = torch.zeros(0)

    def cut(visual: int) -> list[list[Conversation]]:
        lengths = [sum((row.text, row.visual)) for row in (c.shape(visual, shape.tiles) for c in conversations)]
        plan = BatchPlan(lengths, len(lengths), micro_batch_size=settings.micro_batch_size)
        return [[conversations[i] for i in rows] for rows in plan.global_batch(0).micro_batches[0]]

    plain_batches, reduced_batches = (
        [make_batch(rows, visual, shape.tiles, config, device, seed) for seed, rows in enumerate(cut(visual))]
        for visual in (every, budget)
    )
    with torch.no_grad():
        cached_batches = [dict(batch) for batch in reduced_batches]
        for batch in cached_batches:
            if "pixel_values" in batch:
                cached = models.both.model.get_visual_tokens(batch.pop("pixel_values")).tokens
                batch["visual_tokens"] = cached.unflatten(0, (-1, shape.tiles)).flatten(1, 2)
    loss_module = SupervisedLoss(models.both)
    supervised = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in reduced_batches)

    def plain_step(model: Any, batches: list[dict[str, Tensor]], checkpointing: bool) -> None:
        recompute_layers(model, checkpointing)
        for batch in batches:
            # transformers' loss is a mean; as a sum it is weighted right over the global batch.
            loss = model(**batch, num_items_in_batch=supervised, use_cache=False).loss
            if loss.requires_grad:  # without an image there is nothing to learn from a micro-batch
                loss.backward()
        model.zero_grad()

    def needed_step(batches: list[dict[str, Tensor]], plain: bool = False) -> None:
        loss_module.plain = plain
        for batch in batches:
            (loss_module(MicroBatch(batch, [])) / supervised).backward()
        models.both.zero_grad()

    sides = {
        "plain, recomputed": partial(plain_step, models.plain, plain_batches, True),
        "plain": partial(plain_step, models.plain, plain_batches, False),
        "zip, recomputed": partial(plain_step, models.visionzip, reduced_batches, True),
        "zip": partial(plain_step, models.visionzip, reduced_batches, False),
        "shortzip": partial(needed_step, reduced_batches),
        "shortzip, cached": partial(needed_step, cached_batches),
        "shortzip, all": partial(needed_step, reduced_batches, plain=True),
    }
    chosen = {name: side for name, side in sides.items() if not settings.sides or name in settings.sides}
    watch = stopwatch(settings, device)
    timings = watch.alternate(chosen, len(conversations))

    few_rows = [conversation.shape(budget, shape.tiles) for conversation in conversations]

    def plain(visual: int, **how: bool) -> int:
        cuts = [[conversation.shape(visual, shape.tiles) for conversation in rows] for rows in cut(visual)]
        return sum(
            plain_flops(config, row, backward=any(other.visual for other in rows), **how)
            for rows in cuts
            for row in rows
        )

    needed = partial(needed_flops, config, shared=BEFORE, frozen_layers=shape.frozen)

    def every_token(row: RowShape) -> int:
        queries = row.text + (0 if config.text_config.num_hidden_layers - 1 in shape.frozen else row.visual)
        unread = 2 * lm_head_flops(config.text_config, queries - row.supervised)
        return needed(replace(row, supervised=queries), shared=0) - unread

    computed = {
        "plain, recomputed": plain(every, checkpointing=True),
        "plain": plain(every, checkpointing=False),
        "zip, recomputed": plain(budget, checkpointing=True, whole_tower=False),
        "zip": plain(budget, checkpointing=False, whole_tower=False),
        "shortzip": sum(needed(row) for row in few_rows),
        "shortzip, cached": sum(needed(row, tower=False) for row in few_rows),
        "shortzip, all": sum(every_token(row) for row in few_rows),
    }
    for name, timing in timings.items():
        batches = plain_batches if name.startswith("plain") else reduced_batches
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        timing.tokens_per_second = tokens / timing.seconds
    # MFU counts what a side has to compute, without what it computes twice.
    once = {name: computed[name.removesuffix(", recomputed")] for name in computed}
    peak = watch.hold_against_flops(timings, once, models.both.dtype)
    ratios: dict[str, Any] = {}
    for name in ("shortzip", "shortzip, cached"):
        for other in sides:
            if {name, other} <= set(timings) and other not in ("shortzip", "shortzip, cached"):
                ratios |= ratio(timings, name, other, computed[other] / computed[name])
    padding = {
        side: 1 - sum(int(b["attention_mask"].sum()) for b in bs) / sum(b["attention_mask"].numel() for b in bs)
        for side, bs in (("plain", plain_batches), ("reduced", reduced_batches))
    }
    return {"matmul_flops": peak, "padding": padding, "timings": as_dicts(timings), "ratios": ratios}


def measure_savings(models: Models, shape: Shape, settings: BenchmarkConfig, device: torch.device) -> dict[str, Any]:
    """ShortZip's step, and the step without each of its savings."""
    config = models.both.config
    conversations = draw_conversations(settings.global_batch_size, images_only=settings.images_only)
    budget = (shape.dominant + shape.contextual) * shape.tiles
    lengths = [row.text + row.visual for row in (c.shape(budget, shape.tiles) for c in conversations)]
    plan = BatchPlan(lengths, len(lengths), micro_batch_size=settings.micro_batch_size)
    rows = [[conversations[i] for i in chosen] for chosen in plan.global_batch(0).micro_batches[0]]
    batches = [make_batch(found, budget, shape.tiles, config, device, seed) for seed, found in enumerate(rows)]
    supervised = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    sides, flops = sides_without(models.both, shape, batches, rows, supervised)
    chosen_sides = {name: side for name, side in sides.items() if not settings.sides or name in settings.sides}
    watch = stopwatch(settings, device)
    timings = watch.alternate(chosen_sides, len(conversations))
    peak = watch.hold_against_flops(timings, flops, models.both.dtype)
    ratios: dict[str, Any] = {}
    for name in timings:
        if name != "shortzip" and "shortzip" in timings:
            ratios |= ratio(timings, "shortzip", name, flops[name] / flops["shortzip"])
    return {"matmul_flops": peak, "timings": as_dicts(timings), "ratios": ratios}


@torch.no_grad()
def measure_prefill(models: Models, shape: Shape, settings: BenchmarkConfig, device: torch.device) -> dict[str, Any]:
    """One prompt of 64 text tokens, as in the papers: the language model alone, and with tower and projector."""
    config = models.plain.config
    every = (config.vision_config.image_size // config.vision_config.patch_size) ** 2 * shape.tiles
    budget = (shape.dominant + shape.contextual) * shape.tiles
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
        found = model.model.get_image_features(pixel_values=pixels).pooler_output
        return language_model(model, visual, torch.cat(list(found)))

    sides = {
        "plain": partial(language_model, models.plain, every),
        "zip": partial(language_model, models.visionzip, budget),
        "shortzip": partial(language_model, models.both, budget),
        "plain, with tower": partial(whole, models.plain, every),
        "zip, with tower": partial(whole, models.visionzip, budget),
        "shortzip, with tower": partial(whole, models.both, budget),
    }
    timings = stopwatch(settings, device).alternate(sides, 1)
    text = config.text_config
    tower = vision_tower_flops(config, shape.tiles)
    for name, timing in timings.items():
        visual = every if name.startswith("plain") else budget
        frozen = shape.frozen if name.startswith("shortzip") else []
        timing.flops = llm_prefill_flops(text, 64, visual, frozen) + (tower if "tower" in name else 0)
    ratios: dict[str, Any] = {}
    for name, other in (
        ("shortzip", "plain"),
        ("zip", "plain"),
        ("shortzip", "zip"),
        ("shortzip, with tower", "plain, with tower"),
    ):
        ratios |= ratio(timings, name, other, timings[other].flops / timings[name].flops)
    return {"visual_tokens": [every, budget], "timings": as_dicts(timings), "ratios": ratios}


@torch.no_grad()
def measure_generation(
    models: Models, shape: Shape, settings: BenchmarkConfig, device: torch.device
) -> dict[str, Any]:
    """Greedy generation of `new_tokens`, batches of 1 and 8 prompts with an image each (one tile)."""
    config = models.plain.config
    every = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    budget = shape.dominant + shape.contextual
    results: dict[str, Any] = {}
    for size in (1, 8):
        prompts = [Conversation(True, ((20, 1),))] * size
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
def measure_tower(models: Models, shape: Shape, settings: BenchmarkConfig, device: torch.device) -> dict[str, Any]:
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
    settings = parse_config(BenchmarkConfig, argv, program="benchmark.py")
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
