"""Measures a training step of ShortZip against what a user would write with plain transformers, in one process.

    python scripts/benchmark.py --shape cpu
    python scripts/benchmark.py --shape llava-1.5-7b --device cuda --global_batch_size 128 --micro_batch_size 16
    python scripts/benchmark.py --shape llava-1.5-7b --device cuda --memory_limit 24GiB --micro_batch_size 8

Random weights, lengths drawn like the instruction mix's (scripts/benchmark_shapes.py). Sides, alternating:

    plain, recomputed   transformers' LLaVA as a careful user writes it: all tokens, SDPA, batches of similar length,
                        padded, labels given to the model (logits at every position), gradient checkpointing
    plain               the same without gradient checkpointing
    zip, recomputed     VisionZip with our tower, otherwise the same
    zip                 the same without gradient checkpointing
    shortzip            VisionZip and ShortV through train/objective.py, as the loop runs it
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

and nothing of the text before the image, whose keys and values are constants (train/step_cost.py counts this). For
t = 200, p = 35, v = 64, s = 98 and the published or corresponding frozen layers, TFLOPs a sample (fp32 or bf16 alike):

                    needed   of it tower   plain, recomputed   plain   zip, recomputed   zip     highest ratios
    cpu              0.547      0.366            1.604         1.246        0.745       0.632   2.9  2.3  1.4  1.2
    llava-1.5-7b     5.569      0.366           32.272        21.905       10.916       7.460   5.8  3.9  2.0  1.3

With cached features the tower's part falls away: 8.9 times the plain side in shape cpu. Bytes: weights are read once
for forward and once for backward in each micro-batch, 2 x 13.5 GB at 7B in bfloat16, 6 ms at 4.8 TB/s, against 125 ms
for the FLOPs of 16 samples at 700 TFLOP/s: compute decides, down to micro-batches of one sample on such a card. On two
CPU cores (about 0.1 TFLOP/s in fp32, 10 GB/s) 3.6 GB of weights are 0.4 s against 5 s for each sample.

What was tried, with the gain expected on paper and measured, is listed in NOTES below and printed by `--notes true`.
Layer contribution has a benchmark of its own, scripts/benchmark_lc.py.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from benchmark_memory import peak_tensor_bytes
from benchmark_savings import sides_without
from benchmark_shapes import (
    BEFORE,
    SHAPES,
    Conversation,
    Models,
    Shape,
    build_models,
    draw_conversations,
    make_batch,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data.batching import BatchPlan
from reduction.flops import llm_prefill_flops, lm_head_flops, vision_tower_flops
from reduction.parsing import parse_bytes
from reduction.shortv import active_rows
from train.config import parse_config
from train.objective import SupervisedLoss
from train.step_cost import RowShape, matmul_speed, needed_flops, plain_flops, synchronise

NOTES = """What a step leaves out or does differently. Expected: share of the FLOPs that are left (shapes cpu /
llava-1.5-7b, lengths of the mix), which is what the step would cost more without it.

kept
  text before the image computed once for a run       5 % / 17 %
  frozen layers: text's queries and FFN only          5 % / 15 %
  last layer and logits at supervised positions       7 % /  5 %
  no backward pass for rows without an image          8 % / 18 %   6.1 % of the rows, but the longest ones
  the tower's blocks after the selected one           3 % /  0.3 %
  packed tokens: no padding outside attention         the share that the benchmark prints; grouping by length is in
                                                      data/batching.py, which the plain side is given too
  features of data.cache_features                     69 % / 7 % of the step is the tower
  a norm and a gated FFN that keep their inputs only  no FLOPs: 4h + 2m of 12h + 6m bytes per token and layer (bf16)
  rows filled without autograd's index_copy_          no FLOPs: it kept rotated queries, keys and values twice
  one additive mask for all layers                    SDPA made one of a bool mask in every layer, and kept it
  loss and gradient of the logits in one pass         no FLOPs: logits live for 2^25 values at a time

not done, on paper
  keys and values of a run of frozen layers at once   no FLOPs; a second copy of 2h^2 weights per layer (1.3 GB at 7B)
                                                      to make products larger that are large enough
  the selected block's second FFN matrix on merged    1.3 % of the tower, and the rounding of VisionZip's tokens moves
    tokens only (the mean goes through a matrix)
  layer 0's query, key and value gradients of text    0.4 % / 0.2 %
  attention of rows without their padding             attention is 4 % of a layer at these lengths

measured on two cores that nothing else used, all of "kept" together, against plain, recomputed; plain; zip
  demo, 16 samples, one thread, median of 5           2.97, 2.44 and 1.65 times as fast; FLOPs promise 3.11, 2.27,
                                                      1.49; tensors' peak 64 MiB against 93, 230 and 161
  cpu, 4 samples, two threads, 2 rounds               4.27, 4.26 and 1.32 times as fast; FLOPs promise 3.10, 2.42,
                                                      1.17 (plain reaches 48 % of the matrix product's speed)
  tower and VisionZip, demo                           1.17 times as fast as the whole tower; FLOPs promise 1.04
What limits the step now: the tower, most of the time in shape cpu (12.1 s a step, 3.4 s with cached features); at 7B
the plain layers' matrices.

One by one: --parts '["savings"]' (scripts/benchmark_savings.py), which takes the step without each of them.
torch.compile of the loss module (dynamic shapes, torch 2.13, CPU) ends in an assertion of dynamo's own, over the
autograd functions that keep less: not used. not measured: flash and varlen attention, Liger's kernels.
"""

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class BenchmarkConfig:
    """What `scripts/benchmark.py` takes."""

    shape: Literal["demo", "cpu", "llava-1.5-7b", "llava-1.5-13b", "llava-next-7b", "next-cpu"] = "cpu"
    """Sizes of the model: a release's, `cpu` (CLIP-L/14-336 and a 16-layer, 1024-wide Llama), or `next-cpu`
    (LLaVA-NeXT-7B's tokens and depth at a quarter of its width)."""
    parts: list[Literal["step", "savings", "prefill", "generation", "tower"]] = field(default_factory=lambda: ["step"])
    """What to measure; savings: ShortZip's step without each of its savings in turn (scripts/benchmark_savings.py)."""
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
    clock: Literal["wall", "cpu"] = "wall"
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


@dataclass
class Timing:
    """One side of a comparison."""

    name: str
    seconds: float
    """Median of the rounds."""
    all_seconds: list[float]
    peak_memory: int
    """Bytes: the device's peak on CUDA; on the CPU the process's, with weights, Python and libraries in it."""
    samples_per_second: float
    tensor_memory: int = 0
    """Bytes of tensors at the peak, beside those that were there before (weights, inputs); 0: not measured."""
    tokens_per_second: float = 0.0
    flops: float = 0.0
    """What this side has to compute, recomputation and padding left out."""
    mfu: float = 0.0
    """`flops` per second, of what a matrix product was measured to reach."""


def alternate(
    sides: Mapping[str, Callable[[], Any]], settings: BenchmarkConfig, device: torch.device, samples: int
) -> dict[str, Timing]:
    """Times every side once per round, in turn."""
    clock = CLOCKS[settings.clock]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    peaks = dict.fromkeys(sides, 0)
    for turn in range(settings.warm_up + settings.rounds):
        for name, run in sides.items():
            reset_peak_memory(device)
            synchronise(device)
            started = clock()
            run()
            synchronise(device)
            if turn >= settings.warm_up:
                seconds[name].append(clock() - started)
            peaks[name] = max(peaks[name], peak_memory(device))
    timings = {
        name: Timing(name, statistics.median(found), found, peaks[name], samples / statistics.median(found))
        for name, found in seconds.items()
    }
    if settings.tensor_memory:
        for name, run in sides.items():
            timings[name].tensor_memory = peak_tensor_bytes(run, device)
    return timings


def reset_peak_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what a side before freed is not this one's
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform != "linux":
        return 0
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def measure_step(models: Models, shape: Shape, settings: BenchmarkConfig, device: torch.device) -> dict[str, Any]:
    """The training step of every side: forward, backward, no optimizer (it is the same and takes a millisecond)."""
    config = models.plain.config
    conversations = draw_conversations(settings.global_batch_size, images_only=settings.images_only)
    every = (config.vision_config.image_size // config.vision_config.patch_size) ** 2 * shape.tiles
    budget = (shape.dominant + shape.contextual) * shape.tiles
    cached = torch.zeros(0)

    def cut(visual: int) -> list[dict[str, Tensor]]:
        lengths = [sum((row.text, row.visual)) for row in (c.shape(visual, shape.tiles) for c in conversations)]
        plan = BatchPlan(lengths, len(lengths), micro_batch_size=settings.micro_batch_size)
        chosen = plan.global_batch(0).micro_batches[0]
        return [
            make_batch([conversations[i] for i in rows], visual, shape.tiles, config, device, seed)
            for seed, rows in enumerate(chosen)
        ]

    plain_batches, reduced_batches = cut(every), cut(budget)
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
            model(**batch, num_items_in_batch=supervised, use_cache=False).loss.backward()
        model.zero_grad()

    def needed_step(batches: list[dict[str, Tensor]], plain: bool = False) -> None:
        loss_module.plain = plain
        for batch in batches:
            (loss_module(batch) / supervised).backward()
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
    timings = alternate(chosen, settings, device, len(conversations))

    def total(count: Callable[[Conversation], int]) -> int:
        return sum(map(count, conversations))

    all_rows = lambda c: c.shape(every, shape.tiles)  # noqa: E731
    few_rows = lambda c: c.shape(budget, shape.tiles)  # noqa: E731
    needed = partial(needed_flops, config, shared=BEFORE, frozen_layers=shape.frozen)

    def every_token(row: RowShape) -> int:
        queries = row.text + (0 if config.text_config.num_hidden_layers - 1 in shape.frozen else row.visual)
        unread = 2 * lm_head_flops(config.text_config, queries - row.supervised)
        return needed(replace(row, supervised=queries), shared=0) - unread

    computed = {
        "plain, recomputed": total(lambda c: plain_flops(config, all_rows(c), checkpointing=True)),
        "plain": total(lambda c: plain_flops(config, all_rows(c), checkpointing=False)),
        "zip, recomputed": total(lambda c: plain_flops(config, few_rows(c), checkpointing=True, whole_tower=False)),
        "zip": total(lambda c: plain_flops(config, few_rows(c), checkpointing=False, whole_tower=False)),
        "shortzip": total(lambda c: needed(few_rows(c))),
        "shortzip, cached": total(lambda c: needed(few_rows(c), tower=False)),
        "shortzip, all": total(lambda c: every_token(few_rows(c))),
    }
    peak = matmul_speed(device, models.both.dtype, clock=CLOCKS[settings.clock])
    for name, timing in timings.items():
        batches = plain_batches if name.startswith("plain") else reduced_batches
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        timing.tokens_per_second = tokens / timing.seconds
        timing.flops = computed[name.removesuffix(", recomputed")]
        timing.mfu = timing.flops / timing.seconds / peak
    ratios = {
        f"{name} against {other}": {
            "measured": timings[other].seconds / timings[name].seconds,
            "highest": computed[other] / computed[name],
        }
        for name in ("shortzip", "shortzip, cached")
        for other in sides
        if {name, other} <= set(timings) and other not in ("shortzip", "shortzip, cached")
    }
    padding = {
        side: 1 - sum(int(b["attention_mask"].sum()) for b in bs) / sum(b["attention_mask"].numel() for b in bs)
        for side, bs in (("plain", plain_batches), ("reduced", reduced_batches))
    }
    return {"matmul_flops": peak, "padding": padding, "timings": _as_dicts(timings), "ratios": ratios}


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
    timings = alternate(chosen_sides, settings, device, len(conversations))
    peak = matmul_speed(device, models.both.dtype, clock=CLOCKS[settings.clock])
    for name, timing in timings.items():
        timing.flops = flops[name]
        timing.mfu = timing.flops / timing.seconds / peak
    ratios = {
        f"shortzip against {name}": {
            "measured": timing.seconds / timings["shortzip"].seconds,
            "highest": flops[name] / flops["shortzip"],
        }
        for name, timing in timings.items()
        if name != "shortzip" and "shortzip" in timings
    }
    return {"matmul_flops": peak, "timings": _as_dicts(timings), "ratios": ratios}


def recompute_layers(model: Any, checkpointing: bool) -> None:
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    for layer in model.model.language_model.layers:
        layer.training = checkpointing  # transformers recomputes layers in training mode only


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
    timings = alternate(sides, settings, device, 1)
    text = config.text_config
    tower = vision_tower_flops(config, shape.tiles)
    for name, timing in timings.items():
        visual = every if name.startswith("plain") else budget
        frozen = shape.frozen if name.startswith("shortzip") else []
        timing.flops = llm_prefill_flops(text, 64, visual, frozen) + (tower if "tower" in name else 0)
    ratios = {
        f"{name} against {other}": {
            "measured": timings[other].seconds / timings[name].seconds,
            "highest": timings[other].flops / timings[name].flops,
        }
        for name, other in (
            ("shortzip", "plain"),
            ("zip", "plain"),
            ("shortzip", "zip"),
            ("shortzip, with tower", "plain, with tower"),
        )
    }
    return {"visual_tokens": [every, budget], "timings": _as_dicts(timings), "ratios": ratios}


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
        timings = alternate(sides, settings, device, size)
        ratios = {
            f"shortzip against {other}": {"measured": timings[other].seconds / timings["shortzip"].seconds}
            for other in ("plain", "zip")
        }
        results[f"batch {size}"] = {"timings": _as_dicts(timings), "ratios": ratios}
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
    timings = alternate(sides, settings, device, count)
    measured = timings["plain tower"].seconds / timings["tower and VisionZip"].seconds
    return {
        "timings": _as_dicts(timings),
        "ratios": {"tower and VisionZip against plain tower": {"measured": measured, "highest": 24 / 23}},
    }


def _as_dicts(timings: dict[str, Timing]) -> dict[str, Any]:
    return {name: asdict(timing) for name, timing in timings.items()}


def show(results: dict[str, Any], title: str, console: Console) -> None:
    """Tables of every part that was measured."""
    if "timings" not in results:
        for name, part in results.items():
            if isinstance(part, dict):
                show(part, f"{title}, {name}", console)
        return
    table = Table(title=title)
    for heading in ("", "seconds", "samples/s", "tokens/s", "peak MiB", "tensors MiB", "TFLOPs", "MFU"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, timing in results["timings"].items():
        table.add_row(
            name, f"{timing['seconds']:.3f}", f"{timing['samples_per_second']:.3f}",
            f"{timing['tokens_per_second']:,.0f}" if timing["tokens_per_second"] else "",
            f"{timing['peak_memory'] / 2**20:,.0f}",
            f"{timing['tensor_memory'] / 2**20:,.1f}" if timing["tensor_memory"] else "",
            f"{timing['flops'] / 1e12:.3f}" if timing["flops"] else "",
            f"{timing['mfu']:.0%}" if timing["mfu"] else "",
        )  # fmt: skip
    console.print(table)
    for name, ratio in results["ratios"].items():
        highest = ratio.get("highest")
        share = f", {ratio['measured'] / highest:.0%} of the {highest:.2f} that FLOPs allow" if highest else ""
        console.print(f"{name}: {ratio['measured']:.2f} times as fast{share}", highlight=False)


def main(settings: BenchmarkConfig) -> None:
    """Measures, prints tables, and writes `settings.output` when given."""
    if settings.notes:
        print(NOTES)
        return
    device = torch.device(settings.device)
    if settings.memory_limit is not None:
        if device.type != "cuda":
            raise ValueError(f"memory_limit {settings.memory_limit}: only a CUDA device can be capped")
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
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        settings.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main(parse_config(BenchmarkConfig, sys.argv[1:], default=None, program="benchmark.py"))
    except ValueError as error:
        sys.exit(f"benchmark.py: {error}")
