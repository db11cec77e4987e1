"""What a run shows: messages and progress on the main process, speed, the loss curve, and what to do next."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from shortzip.data.files import writing
from shortzip.train.run.run_folder import read_metrics
from shortzip.train.settings.command_line import printable

LEFT_OUT = 3  # first steps, in which caches and allocators fill


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # instead of ending the process


class Reporter:
    """Messages, tables and progress for the user; silent on every process but the main one.

    Once nobody can see them any more (a terminal that is gone, a pipe whose reader has ended) they stop, not the run.
    """

    def __init__(self, is_main: bool) -> None:
        self.console = _Console(quiet=not is_main, highlight=False)
        if not self.console.is_terminal:
            self.console.width = 140  # a log file has no edge
            disable_progress_bar()
        self._progress: Progress | None = None
        self._line_shown = 0.0

    def say(self, message: str) -> None:
        with self._unless_unseen():
            self.console.print(literal(message), soft_wrap=True)

    def heading(self, message: str) -> None:
        with self._unless_unseen():
            self.console.rule(literal(message))

    def table(self, table: Table) -> None:
        with self._unless_unseen():
            self.console.print(table)

    def progress(self, what: str, done: int, total: int, details: str = "") -> None:
        """Shows how far `what` is: a bar on a terminal, else a line now and then."""
        what = printable(what)
        if not self.console.is_terminal:
            now = time.monotonic()
            if done == total or now - self._line_shown >= 10:
                self._line_shown = now
                self.say(f"{what}: {done}/{total} {details}".rstrip())
            return
        with self._unless_unseen():
            if self._progress is None:
                words = [TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[details]")]
                bar = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
                self._progress = Progress(words[0], *bar, words[1], console=self.console)
                self._progress.start()
            tasks = {task.description: task.id for task in self._progress.tasks}
            if what not in tasks:
                tasks[what] = self._progress.add_task(what, total=total, details=details)
            self._progress.update(tasks[what], completed=done, total=total, details=details)

    def end_progress(self) -> None:
        if self._progress is not None:
            with self._unless_unseen():
                self._progress.stop()
            self._progress = None

    @contextmanager
    def _unless_unseen(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.console.quiet = True
            with suppress(OSError, ValueError):  # or what is left in its buffer fails again when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.console.file.fileno())


def literal(words: str) -> Text:
    """Words for rich's tables and headings, of which nothing is markup or an escape sequence: names hold anything."""
    return Text(printable(words))


class Speed:
    """Samples and tokens per second, MFU, share of time spent waiting for data; the first steps are left out.

    `peak`: FLOP/s of all processes together in a matrix product; MFU is the share of it that useful FLOPs reach.
    """

    def __init__(self, peak: float | None = None) -> None:
        self.steps = 0
        self._peak = peak
        self._seconds = self._waited = self._flops = 0.0
        self._samples = self._tokens = 0

    def add(self, samples: int, tokens: int, seconds: float, waited: float, flops: float = 0.0) -> None:
        """One step, over all processes: its samples, tokens (no padding), seconds, seconds without data, FLOPs."""
        self.steps += 1
        if self.steps > LEFT_OUT:
            self._seconds, self._waited = self._seconds + seconds, self._waited + waited
            self._samples, self._tokens = self._samples + samples, self._tokens + tokens
            self._flops += flops

    def averages(self) -> dict[str, float]:
        """samples_per_second, tokens_per_second, data_wait and mfu (0 to 1); empty until a step counts."""
        if not self._seconds:
            return {}
        rates = {
            "samples_per_second": self._samples / self._seconds,
            "tokens_per_second": self._tokens / self._seconds,
            "data_wait": self._waited / self._seconds,
        }
        return {**rates, "mfu": self._flops / self._seconds / self._peak} if self._peak else rates

    def seconds_left(self, steps_left: int) -> float | None:
        """The time that so many more steps take; None until a step counts."""
        return steps_left * self._seconds / (self.steps - LEFT_OUT) if self._seconds else None

    def text(self, steps_left: int) -> str:
        """Speed and the time that so many more steps take, in words; empty until a step counts."""
        if not self._seconds:
            return ""
        rates = self.averages()
        seconds = round(self.seconds_left(steps_left) or 0)
        left = f"{seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"
        mfu = f"MFU {rates['mfu']:.0%} " if "mfu" in rates else ""
        return (
            f"{rates['samples_per_second']:.1f} samples/s {rates['tokens_per_second']:,.0f} tokens/s {mfu}"
            f"waiting for data {rates['data_wait']:.0%}, {left} left"
        )


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's peak on CUDA, else this process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Lets `peak_memory` count anew, where it can: on CUDA."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def print_table(title: str, headings: Sequence[str], cells: Sequence[Sequence[str]], caption: str = "") -> str:
    """Prints a table whose first column is words and whose others are numbers; returns it as Markdown."""
    table = Table(title=literal(title), caption=literal(caption) if caption else None)
    for place, heading in enumerate(headings):
        table.add_column(literal(heading), justify="left" if place == 0 else "right")
    for line in cells:
        table.add_row(*map(literal, line))
    Console().print(table)
    ruler = ["---", *["---:"] * (len(headings) - 1)]
    return "".join("| " + " | ".join(line) + " |\n" for line in [headings, ruler, *cells])


def component_table(rows: Sequence[tuple[str, int, str, bool]]) -> Table:
    """What is trained and what is not: (component, parameters, dtypes, trained)."""
    table = Table(title="What is trained")
    for heading in ("component", "parameters", "dtype", ""):
        table.add_column(heading, justify="right" if heading == "parameters" else "left")
    for name, count, dtype, trained in rows:
        table.add_row(literal(name), f"{count:,}", dtype, "trained" if trained else "untrained")
    trained_count = sum(count for _, count, _, trained in rows if trained)
    total = sum(count for _, count, _, _ in rows)
    table.caption = f"{trained_count:,} of {total:,} parameters are trained ({trained_count / total:.2%})"
    return table


def draw_loss_curve(metrics: Path, target: Path) -> None:
    """The training loss per step, its running mean, and the held-out loss where it was measured, as a PNG."""
    from matplotlib.figure import Figure

    lines = read_metrics(metrics)
    train = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train" and line["loss"] is not None]
    held_out = [(line["step"], line["loss"]) for line in lines if line["kind"] == "eval"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        window = max(1, len(losses) // 20)
        smooth = [
            sum(losses[max(0, i - window) : i + 1]) / len(losses[max(0, i - window) : i + 1])
            for i in range(len(losses))
        ]
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training loss")
        axes.plot(steps, smooth, color="tab:blue", label="running mean")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held-out loss")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy per supervised token")
    axes.grid(alpha=0.3)
    axes.legend()
    with writing(target):
        figure.savefig(target, dpi=120)


def matmul_speed(
    device: torch.device, dtype: torch.dtype, seconds: float = 0.5, clock: Callable[[], float] = time.perf_counter
) -> float:
    """FLOP/s of this device in a matrix product of this dtype, measured: the peak that MFU is held against."""
    side = 8192 if device.type == "cuda" else 1536
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best, started = float("inf"), clock()
    while best == float("inf") or clock() - started < seconds:
        synchronise(device)
        begun = clock()
        torch.mm(left, right)
        synchronise(device)
        best = min(best, clock() - begun)
    return 2 * side**3 / best


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
