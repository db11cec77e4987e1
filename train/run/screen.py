"""The screen of a run on a terminal: one live display of where it stands, with its warnings kept in sight."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

CURVE = 60  # characters of the loss curve
SHOWN_WARNINGS = 5
_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = CURVE) -> str:
    """The values as a line of bars, at most `width` of them: each the mean of its share of the values."""
    if not values:
        return ""
    values = list(values)  # a deque has no slices
    count = min(width, len(values))
    edges = [place * len(values) // count for place in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def clock(seconds: float | None) -> str:
    """Hours, minutes and seconds; empty where they are not known."""
    if seconds is None:
        return ""
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


@dataclass
class RunScreen:
    """What the display shows."""

    total_steps: int
    step: int = 0
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))
    """Of the steps so far whose loss is finite."""
    held_out_loss: float | None = None
    samples_per_second: float | None = None
    mfu: float | None = None
    """0 to 1."""
    data_wait: float | None = None
    """0 to 1: share of the time spent waiting for data."""
    memory: int = 0
    """Bytes, at the peak."""
    seconds_left: float | None = None
    warnings: list[str] = field(default_factory=list)

    def __rich__(self) -> RenderableType:
        figures = Table.grid(padding=(0, 2))
        for name, value in self.figures().items():
            figures.add_row(Text(name, style="dim"), Text(value))
        bar = ProgressBar(total=max(1, self.total_steps), completed=self.step, width=CURVE)
        parts: list[RenderableType] = [bar, figures]
        for warning in self.warnings[-SHOWN_WARNINGS:]:
            parts.append(Text(f"! {warning}", style="yellow"))
        if len(self.warnings) > SHOWN_WARNINGS:
            parts.append(Text(f"! and {len(self.warnings) - SHOWN_WARNINGS} before them", style="yellow"))
        return Panel(Group(*parts), title="tuning", title_align="left", width=CURVE + 24)

    def figures(self) -> dict[str, str]:
        """What is known so far, by its name."""
        recent = list(self.losses)[-10:]
        shown = {
            "step": f"{self.step} of {self.total_steps}",
            "loss": f"{sparkline(self.losses)} {sum(recent) / len(recent):.4f}" if recent else "",
            "held-out loss": f"{self.held_out_loss:.4f}" if self.held_out_loss is not None else "",
            "samples/s": f"{self.samples_per_second:.1f}" if self.samples_per_second is not None else "",
            "MFU": f"{self.mfu:.0%}" if self.mfu is not None else "",
            "waiting for data": f"{self.data_wait:.0%}" if self.data_wait is not None else "",
            "memory": f"{self.memory / 2**30:.2f} GiB" if self.memory else "",
            "time left": clock(self.seconds_left),
        }
        return {name: value for name, value in shown.items() if value}
