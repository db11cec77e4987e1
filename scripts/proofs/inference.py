"""Prefill and generation at full size on random weights: all visual tokens against the reduced ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from shortzip.scripts.benchmarks import step as benchmark
from shortzip.scripts.benchmarks.shapes import build_models
from shortzip.scripts.benchmarks.step import StepBenchmarkConfig
from shortzip.scripts.proofs.full_size import shape_of
from shortzip.scripts.proofs.section import Proof

NAMES = {"plain": "all tokens", "zip": "VisionZip", "shortzip": "VisionZip and ShortV"}


def inference_7b(proof: Proof) -> None:
    """As scripts/benchmarks/step.py measures them, in turn."""
    device, shape = torch.device(proof.settings.device), shape_of(proof, "llava-1.5-7b")
    on_cuda = device.type == "cuda"
    if on_cuda:
        device = torch.device("cuda", torch.cuda.current_device())
    models = build_models(shape, device, torch.bfloat16 if on_cuda else torch.float32)
    settings = StepBenchmarkConfig(
        device=str(device), rounds=5 if on_cuda else 1, warm_up=2 if on_cuda else 0, tensor_memory=False,
        new_tokens=32 if on_cuda else 4,
    )  # fmt: skip
    with proof.part("prefill"):
        found = benchmark.measure_prefill(models, shape, settings, device)
        proof.figures(prefill=found)
        milliseconds = _rows(found["timings"], lambda timing: timing["seconds"] * 1e3, "ms")
        proof.table("Prefill of one prompt of 64 text tokens", *milliseconds)
    with proof.part("generation"):
        found = benchmark.measure_generation(models, shape, settings, device)
        proof.figures(generation=found)
        tokens = settings.new_tokens
        for size, part in found.items():
            speeds = _rows(part["timings"], lambda timing: tokens * timing["samples_per_second"], "tokens/s")
            proof.table(f"Greedy generation of {tokens} tokens, {size}", *speeds)


def _rows(
    timings: Mapping[str, Any], value: Callable[[Mapping[str, Any]], float], unit: str
) -> tuple[list[str], list[list[str]]]:
    """Headings and rows; a side is so many times as fast as all tokens, measured in the same way."""
    rows = []
    for name, timing in timings.items():
        side, _, tower = name.partition(", ")
        against = timings["plain" + (f", {tower}" if tower else "")]
        faster = against["seconds"] / timing["seconds"]
        words = NAMES[side] + (f", {tower}" if tower else "")
        rows.append(
            [words, f"{value(timing):.1f} {unit}", f"{faster:.2f}", f"{timing['peak_memory'] / 2**30:.2f} GiB"]
        )
    return ["", unit, "times as fast as all tokens", "peak"], rows
