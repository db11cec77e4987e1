"""The screen of a run on a terminal: one live display of where it stands, with its warnings kept in sight."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

WIDEST = 96  # characters
BESIDE_CURVE = 36  # characters that frame, names and the loss itself take
SHOWN_WARNINGS = 5
_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as a line of bars, at most `width` of them: each the mean of its share of the values."""
    count = min(width, len(values))
    if count < 1:
        return ""
    values = list(values)  # a deque has no slices
    edges = [place * len(values) // count for place in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


@dataclass
class RunScreen:
    """What the display shows. What is not known yet has no line."""

    warnings: dict[str, list[str]]
    """By topic, the words of all of them; the topic that was warned of last stands last."""
    step: int = 0
    total_steps: int = 0
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))
    """Of the steps so far whose loss is finite."""
    held_out_loss: str = ""
    rates: dict[str, float] = field(default_factory=dict)
    """samples_per_second, and as shares of 1 mfu and data_wait."""
    memory: int = 0
    """Bytes, at the peak."""
    seconds_left: float | None = None

    def add_loss(self, loss: float) -> None:
        if math.isfinite(loss):
            self.losses.append(loss)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(WIDEST, options.max_width)
        table = Table.grid(padding=(0, 2))
        for name, value in self._lines(max(1, width - BESIDE_CURVE)):
            table.add_row(Text(name, style="dim"), value)
        parts: list[RenderableType] = [table]
        latest = list(self.warnings.values())[-SHOWN_WARNINGS:]
        for words in latest:
            times = f" ({len(words)} times)" if len(words) > 1 else ""
            parts.append(Text(f"! {words[-1]}{times}", style="yellow"))
        if len(self.warnings) > len(latest):
            parts.append(Text(f"! and {len(self.warnings) - len(latest)} before these", style="yellow"))
        yield Panel(Group(*parts), title="tuning", title_align="left", width=width)

    def _lines(self, width: int) -> Iterator[tuple[str, RenderableType]]:
        """Name and value of what is known, the value about `width` wide at most."""
        bar = Table.grid(padding=(0, 1))
        done = Text(f"{self.step} of {self.total_steps}")
        bar.add_row(ProgressBar(total=max(1, self.total_steps), completed=self.step, width=width), done)
        yield "step", bar
        if self.losses:
            recent = list(self.losses)[-10:]
            yield "loss", Text(f"{sparkline(self.losses, width)} {sum(recent) / len(recent):.4f}")
        if self.held_out_loss:
            yield "held-out loss", Text(self.held_out_loss)
        if self.rates:
            mfu = f", MFU {self.rates['mfu']:.0%}" if "mfu" in self.rates else ""
            waiting = f"waiting for data {self.rates['data_wait']:.0%}"
            yield "speed", Text(f"{self.rates['samples_per_second']:.1f} samples/s{mfu}, {waiting}")
        if self.memory:
            yield "memory", Text(f"{self.memory / 2**30:.2f} GiB at the peak")
        if self.seconds_left is not None:
            yield "time left", Text(clock(self.seconds_left))
