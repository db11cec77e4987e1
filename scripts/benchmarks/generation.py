"""Times generation: plain LLaVA, VisionZip, and VisionZip with ShortV, prompt by prompt in turn in one process.

    python scripts/benchmarks/generation.py
    python scripts/benchmarks/generation.py --shape cpu --new_tokens 16 --rounds 2
    OMP_NUM_THREADS=1 python scripts/benchmarks/generation.py --clock cpu   # on a machine that others use too

Random weights in float32, greedy, prompts of 35 tokens, an image and 20 tokens. Prefill is from pixels to the first
token, a step is a further token; medians of the rounds, and how many times as fast as plain that is.

The limit, on paper, before anything was measured. A prefill is bound by its FLOPs: tower, projector, language model.
The tower is all that is left where it is large. A step computes the same matrices for one token a row whatever stands
in the cache, and reads all weights: it is bound by bytes, and what is saved is the visual tokens' keys and values.
ShortV saves nothing in a step, since it keeps them and a new token is not visual: there it may cost nothing.

                       prefill               step, batch 1 / 8
    demo               2.20, both 2.33       1.11 / 1.48
    cpu                1.61, both 1.67       1.06 / 1.42
    llava-1.5-7b       4.58, both 5.84       1.02 / 1.15

On demo's shape neither is reached by one prompt: its weights fit into a cache of the processor, and what takes the
time is starting operations (about 1 600 in a step, 3 us each). There the aim is to be no slower than plain, and a step
of a reduced model starts exactly as many as one of plain LLaVA (tests/reduction/test_decoding.py counts them).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from shortzip.data.files import refuse_to_replace
from shortzip.reduction.flops import (
    kv_cache_bytes,
    llm_prefill_flops_grouped,
    lm_head_flops,
    parameter_counts,
    projector_flops,
    vision_tower_flops,
)
from shortzip.scripts.benchmarks.shapes import BEFORE, IMAGE_TOKEN, SHAPES, ModelShape, SharedModels, build_models
from shortzip.scripts.benchmarks.timing import CLOCKS, Clock, write_figures
from shortzip.train.settings.command_line import parse_config, run_command

QUESTION = 20
SIDES = ("plain", "visionzip", "both")


@dataclass
class BenchmarkConfig:
    """What `scripts/benchmarks/generation.py` takes."""

    shape: Literal["demo", "cpu", "llava-1.5-7b", "llava-1.5-13b"] = "demo"
    """Sizes of the model."""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    """Prompts at once."""
    new_tokens: int = 128
    """Tokens of an answer."""
    rounds: int = 5
    """Rounds, of which the median counts; one more comes before them and does not."""
    cache: Literal["dynamic", "static"] = "dynamic"
    """Of keys and values. On CUDA transformers compiles a step where it is static (one graph, also where visual tokens
    are frozen; equal tokens: tests/reduction/test_decoding.py)."""
    clock: Clock = "wall"
    """wall time; or the process's CPU time, for one thread (OMP_NUM_THREADS=1) on a machine that others use too."""
    device: str = "cpu"
    """cpu or cuda (bfloat16)."""
    output: Path | None = None
    """A JSON file to write the figures to."""
    overwrite: bool = False
    """Replace the file that is there already."""


class TokenClock(BaseStreamer):
    """When it was made, and when each token came."""

    def __init__(self, clock: Clock) -> None:
        self.clock = CLOCKS[clock]
        self.times = [self.clock()]

    def put(self, value: Tensor) -> None:
        """Called with the prompt (once images are encoded), then with each token: on the CPU, so it is computed."""
        if value.dim() == 1:
            self.times.append(self.clock())

    def end(self) -> None:
        """Called after the last token."""


def prompts(model: Any, visual: int, count: int, device: torch.device) -> dict[str, Tensor]:
    """`count` random prompts of one image each, in `visual` placeholders."""
    draw = torch.Generator().manual_seed(1)
    vocabulary, side = model.config.text_config.vocab_size, model.config.vision_config.image_size
    text = torch.randint(IMAGE_TOKEN + 1, vocabulary, (count, BEFORE + QUESTION), generator=draw)
    ids = torch.cat([text[:, :BEFORE], torch.full((count, visual), IMAGE_TOKEN), text[:, BEFORE:]], 1).to(device)
    pixels = torch.randn(count, 3, side, side, generator=draw)
    pixels = pixels.to(device, model.model.vision_tower.dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def measure(models: SharedModels, shape: ModelShape, count: int, settings: BenchmarkConfig) -> dict[str, Any]:
    """Seconds of every side's prefill and step, of each round, by side."""
    patches, budget = _visual_tokens(shape)
    inputs = {
        side: prompts(models.plain, patches if side == "plain" else budget, count, torch.device(settings.device))
        for side in SIDES
    }
    seconds: dict[str, Any] = {side: {"prefill": [], "step": []} for side in SIDES}
    options: dict[str, Any] = {
        "max_new_tokens": settings.new_tokens,
        "min_new_tokens": settings.new_tokens,
        "do_sample": False,
    }
    options |= {"cache_implementation": "static"} if settings.cache == "static" else {}
    for turn in range(settings.rounds + 1):
        for side in SIDES:
            watch = TokenClock(settings.clock)
            model = getattr(models, side)
            model.generate(**inputs[side], **options, pad_token_id=0, eos_token_id=2, streamer=watch)
            if turn:
                start, first, *_, last = watch.times
                seconds[side]["prefill"].append(first - start)
                seconds[side]["step"].append((last - first) / (settings.new_tokens - 1))
    return seconds


def limits(config: Any, shape: ModelShape, count: int, new_tokens: int, value_bytes: int) -> dict[str, Any]:
    """How many times as fast as plain each side can be: a prefill by FLOPs, a step (halfway through) by bytes."""
    patches, budget = _visual_tokens(shape)
    text, tower = config.text_config, vision_tower_flops(config)
    depth, prompt = config.vision_config.num_hidden_layers, BEFORE + QUESTION
    counts = parameter_counts(config)
    weights = value_bytes * (counts.llm_layers + counts.embeddings)

    def prefill(visual: int, frozen: Sequence[int], blocks: int) -> float:
        language = llm_prefill_flops_grouped(text, prompt, visual, list(frozen)) + lm_head_flops(text, 1)
        return tower * blocks / (depth - 1) + projector_flops(config, visual) + language

    def step(visual: int) -> float:
        return weights + count * kv_cache_bytes(text, prompt + visual + new_tokens // 2, value_bytes)

    plain = prefill(patches, [], depth)
    return {
        side: {"prefill": plain / prefill(budget, frozen, depth - 1), "step": step(patches) / step(budget)}
        for side, frozen in (("visionzip", []), ("both", shape.frozen))
    }


def _visual_tokens(shape: ModelShape) -> tuple[int, int]:
    """(all visual tokens of an image, the budget)."""
    return (shape.vision["image_size"] // shape.vision["patch_size"]) ** 2, shape.dominant + shape.contextual


def benchmark(settings: BenchmarkConfig) -> dict[str, Any]:
    """Seconds and limits by batch size."""
    shape, device = SHAPES[settings.shape], torch.device(settings.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    models, results = build_models(shape, device, dtype), {}
    for count in settings.batch_sizes:
        allowed = limits(models.plain.config, shape, count, settings.new_tokens, dtype.itemsize)
        results[str(count)] = {"seconds": measure(models, shape, count, settings), "limits": allowed}
    return results


def show(results: Mapping[str, Any], title: str, console: Console) -> None:
    """The table: milliseconds, how many times as fast as plain, and what FLOPs or bytes allow."""
    table = Table(title=title)
    for heading in ("batch", "model", "prefill ms", "faster", "FLOPs allow", "step ms", "faster", "bytes allow"):
        table.add_column(heading, justify="right")
    for count, result in results.items():
        median = {
            (side, part): statistics.median(rounds)
            for side, parts in result["seconds"].items()
            for part, rounds in parts.items()
        }
        for side in SIDES:
            cells = [count, side]
            for part in ("prefill", "step"):
                allowed = result["limits"].get(side, {part: 1.0})[part]
                against = median["plain", part] / median[side, part]
                cells += [f"{1000 * median[side, part]:.2f}", f"{against:.2f}", f"{allowed:.2f}"]
            table.add_row(*cells)
    console.print(table)


def main(argv: Sequence[str]) -> None:
    """Prints the table, and writes the figures to `output` when given."""
    settings = parse_config(BenchmarkConfig, argv, program="generation.py")
    if settings.output is not None:
        refuse_to_replace(settings.output, overwrite=settings.overwrite)
    results = benchmark(settings)
    title = f"{settings.shape}, {settings.new_tokens} tokens, {settings.cache} cache, {settings.clock} time"
    show(results, title, Console())
    if settings.output is not None:
        write_figures(settings.output, {"settings": asdict(settings), **results})


if __name__ == "__main__":
    run_command(main)
