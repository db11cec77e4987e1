"""What a run shows: messages and progress on the main process, speed, the loss curve, and what to do next."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from shortzip.data.files import writing
from shortzip.train.run.foreign_words import keep_back
from shortzip.train.run.run_folder import read_metrics
from shortzip.train.run.screen import RunScreen, clock
from shortzip.train.settings.command_line import printable

LEFT_OUT = 3  # first steps, in which caches and allocators fill
REDRAWN_EVERY = 0.25  # seconds, on a terminal
LINE_EVERY = 5.0  # seconds, elsewhere


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # instead of ending the process


class Reporter:
    """Messages, tables and progress for the user; silent on every process but the main one.

    On a terminal there is one live display at a time, and messages appear above it. It has no thread of its own:
    processes that are forked meanwhile inherit no lock that is held. Once nobody can see anything any more (a terminal
    that is gone, a pipe whose reader has ended) it stops, not the run. Leaving the context gives the terminal back.
    """

    def __init__(self, is_main: bool) -> None:
        self.console = _Console(quiet=not is_main, highlight=False)
        keep_back()
        if not self.console.is_terminal:
            self.console.width = 140  # a log file has no edge
            disable_progress_bar()
        self._display: Live | Progress | None = None
        self._shown_at = 0.0
        self._screen = RunScreen(warnings={})

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        with self._unless_unseen():
            self._end_display()

    def say(self, message: str) -> None:
        with self._unless_unseen():
            self.console.print(literal(message), soft_wrap=True)

    def warn(self, message: str, topic: str = "") -> None:
        """Says it, and keeps it in a run's display; of several warnings on one topic, the last and their number."""
        topic = topic or message
        self._screen.warnings[topic] = [*self._screen.warnings.pop(topic, []), printable(message)]
        with self._unless_unseen():
            self.console.print(Text(printable(f"warning: {message}"), style="yellow"), soft_wrap=True)

    def heading(self, message: str) -> None:
        with self._unless_unseen():
            self.console.rule(literal(message))

    def table(self, table: Table) -> None:
        with self._unless_unseen():
            self.console.print(table)

    def step(self, step: int, total: int, loss: float, speed: Speed, memory: int) -> None:
        """Shows where a run stands: after `step` of `total`, with its loss (mean per supervised token; any number) and
        the peak of memory in bytes."""
        screen = self._screen
        screen.add_loss(loss)
        screen.step, screen.total_steps, screen.memory = step, total, memory
        screen.rates, screen.seconds_left = speed.averages(), speed.seconds_left(total - step)
        if not self.console.is_interactive:
            self._line(f"tuning: {step}/{total} loss {loss:.4f} {speed.text(total - step)}", step == total)
            return
        with self._unless_unseen():
            if not isinstance(self._display, Live):
                self._end_display()
                self._display = Live(screen, console=self.console, auto_refresh=False, redirect_stderr=_stderr_shown())
                self._display.start()
            if self._is_time(REDRAWN_EVERY, step == total):
                self._display.refresh()

    def held_out(self, step: int, loss: float) -> None:
        """Says the held-out loss after `step`, and keeps it in the run's display."""
        self._screen.held_out_loss = f"{loss:.4f} after step {step}"
        self.say(f"step {step}: held-out loss {loss:.4f}")

    def progress(self, what: str, done: int, total: int, details: str = "") -> None:
        """Shows how far `what` is: a bar on a terminal, else a line now and then."""
        what = printable(what)
        if not self.console.is_interactive:
            self._line(f"{what}: {done}/{total} {details}", done == total)
            return
        with self._unless_unseen():
            if not isinstance(self._display, Progress):
                self._end_display()
                words = [TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[details]")]
                bar = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
                self._display = Progress(
                    words[0], *bar, words[1], console=self.console, auto_refresh=False, redirect_stderr=_stderr_shown()
                )
                self._display.start()
            tasks = {task.description: task.id for task in self._display.tasks}
            if what not in tasks:
                self._fill_bars()
                tasks[what] = self._display.add_task(what, total=total, details=details)
            self._display.update(tasks[what], completed=done, total=total, details=details)
            if self._is_time(REDRAWN_EVERY, done == total):
                self._display.refresh()

    def end_progress(self) -> None:
        """What was displayed is done, and stays in sight; what comes next is another run, or other bars."""
        with self._unless_unseen():
            self._fill_bars()
            self._end_display()
        self._screen = RunScreen(self._screen.warnings)

    def _fill_bars(self) -> None:
        """Bars are told of what is begun: the last piece of each is done when something else is begun."""
        if isinstance(self._display, Progress):
            for task in self._display.tasks:
                self._display.update(task.id, completed=task.total)

    def _end_display(self) -> None:
        display, self._display = self._display, None
        if display is not None:
            display.stop()

    def _line(self, line: str, is_last: bool) -> None:
        if self._is_time(LINE_EVERY, is_last):
            self.say(line.rstrip())

    def _is_time(self, seconds: float, is_last: bool) -> bool:
        """Whether so much time has passed since it last was."""
        now = time.monotonic()
        if not is_last and now - self._shown_at < seconds:
            return False
        self._shown_at = now
        return True

    @contextmanager
    def _unless_unseen(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.console.quiet = True
            with suppress(OSError, ValueError):  # or what is left in its buffer fails again when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.console.file.fileno())


def _stderr_shown() -> bool:
    """Whether what goes to stderr appears on a terminal, and has to be put above a live display."""
    return sys.stderr.isatty()


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
        left = clock(self.seconds_left(steps_left) or 0)
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
        axes.plot(*zip(*held_out, strict=True), "s--", color="black", label="held-out loss")  # told apart in grey, too
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
