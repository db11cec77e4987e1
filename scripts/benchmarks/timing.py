"""Times the sides of a comparison in turn, for scripts/benchmarks/step.py, and holds them against their FLOPs."""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from shortzip.data.files import write_atomically, writing
from shortzip.scripts.benchmarks.memory import peak_tensor_bytes
from shortzip.train.run.report import matmul_speed, synchronise

Clock = Literal["wall", "cpu"]
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


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


@dataclass(frozen=True)
class Stopwatch:
    """How sides are timed: `warm_up` rounds that do not count, then `rounds`, of which the median does."""

    device: torch.device
    rounds: int
    warm_up: int
    clock: Clock
    tensor_memory: bool
    """Whether each side also runs once with its tensors counted."""

    def alternate(
        self,
        sides: Mapping[str, Callable[[], Any]],
        samples: int,
        prepare: Callable[[str], None] = lambda name: None,
    ) -> dict[str, Timing]:
        """Times every side once per round, in turn. `samples`: what a side works on in a round; `prepare`: what is
        done for it before the clock starts."""
        clock = CLOCKS[self.clock]
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        peaks = dict.fromkeys(sides, 0)
        for turn in range(self.warm_up + self.rounds):
            for name, run in sides.items():
                prepare(name)
                _reset_peak_memory(self.device)
                synchronise(self.device)
                started = clock()
                run()
                synchronise(self.device)
                if turn >= self.warm_up:
                    seconds[name].append(clock() - started)
                peaks[name] = max(peaks[name], _peak_memory(self.device))
        timings = {
            name: Timing(name, statistics.median(rounds), rounds, peaks[name], samples / statistics.median(rounds))
            for name, rounds in seconds.items()
        }
        if self.tensor_memory:
            for name, run in sides.items():
                timings[name].tensor_memory = peak_tensor_bytes(run, self.device)
        return timings

    def hold_against_flops(
        self, timings: Mapping[str, Timing], flops: Mapping[str, float], dtype: torch.dtype
    ) -> float:
        """Fills in what every side computes and its MFU; returns the FLOP/s of a matrix product."""
        peak = matmul_speed(self.device, dtype, clock=CLOCKS[self.clock])
        for name, timing in timings.items():
            timing.flops = flops[name]
            timing.mfu = timing.flops / timing.seconds / peak
        return peak


def ratio(timings: Mapping[str, Timing], name: str, other: str, highest: float | None = None) -> dict[str, Any]:
    """How many times as fast `name` is as `other`, under what a table calls it; `highest`: what FLOPs allow."""
    measured = timings[other].seconds / timings[name].seconds
    return {f"{name} against {other}": {"measured": measured, "highest": highest}}


def _reset_peak_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":  # what the allocator keeps stays: a loop's steps do not ask the device for memory either
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what a side before freed is not this one's
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform != "linux":
        return 0
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def write_figures(path: Path, figures: Mapping[str, Any]) -> None:
    """Writes measurements as JSON. Raises `CannotWrite`."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(figures, indent=1, default=str) + "\n")


def as_dicts(timings: Mapping[str, Timing]) -> dict[str, Any]:
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
            name,
            f"{timing['seconds']:.3f}",
            f"{timing['samples_per_second']:.3f}",
            f"{timing['tokens_per_second']:,.0f}" if timing["tokens_per_second"] else "",
            f"{timing['peak_memory'] / 2**20:,.0f}",
            f"{timing['tensor_memory'] / 2**20:,.1f}" if timing["tensor_memory"] else "",
            f"{timing['flops'] / 1e12:.3f}" if timing["flops"] else "",
            f"{timing['mfu']:.0%}" if timing["mfu"] else "",
        )
    console.print(table)
    for name, values in results["ratios"].items():
        highest = values["highest"]
        share = f", {values['measured'] / highest:.0%} of the {highest:.2f} that FLOPs allow" if highest else ""
        console.print(f"{name}: {values['measured']:.2f} times as fast{share}", highlight=False)
