"""The frontier's rows, table and picture: exact match against what it costs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

GRID_OF_POINTS = "VisionZip + ShortV"


@dataclass(frozen=True)
class Summary:
    """Points that differ in their seed alone: a row of the table, a mark of the picture."""

    series: str
    budget: str
    frozen: int
    tuned: bool
    exact_match: list[float]
    """One per seed."""
    llm_flops: float
    prefill_ms: float
    visual_tokens: float

    @property
    def mean(self) -> float:
        """Mean exact match."""
        return statistics.fmean(self.exact_match)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 for one."""
        return statistics.stdev(self.exact_match) if len(self.exact_match) > 1 else 0.0


def summarise(entries: Sequence[Mapping[str, Any]]) -> list[Summary]:
    """Rows in the order of their first points."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for entry in entries:
        point = entry["point"]
        fastv = json.dumps(point["fastv"])
        groups.setdefault((point["series"], point["budget"], point["frozen"], fastv, point["tuned"]), []).append(entry)
    rows = []
    for (series, budget, frozen, fastv, tuned), group in groups.items():
        values = [entry["evaluation"] for entry in group]
        if fastv != "null":
            settings = json.loads(fastv)
            series = f"FastV, K = {settings['layer']}, {settings['keep']:.0%} kept"
        rows.append(
            Summary(
                series,
                budget,
                frozen,
                tuned,
                [value["exact_match"] for value in values],
                values[0]["llm_flops"],
                statistics.median(value["prefill_ms"] for value in values),
                values[0]["visual_tokens"],
            )
        )
    return rows


def show(rows: Sequence[Summary]) -> str:
    """The table as Markdown; it is printed too."""
    headings = ["method", "visual tokens", "frozen layers", "LLM FLOPs", "prefill", "untuned", "tuned"]
    tuned = {(row.series, row.budget, row.frozen): row for row in rows if row.tuned}
    first = rows[0]
    cells = []
    for row in rows:
        if row.tuned:
            continue
        then = tuned.get((row.series, row.budget, row.frozen))
        cells.append(
            [
                row.series,
                f"{row.visual_tokens:g}",
                str(row.frozen),
                f"{row.llm_flops / first.llm_flops:.0%}",
                f"{row.prefill_ms / first.prefill_ms:.0%}",
                _percent(row),
                _percent(then) if then else "",
            ]
        )
    table = Table(title="exact match on held-out conversations")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place == 0 else "right")
    for line in cells:
        table.add_row(*line)
    Console().print(table)
    ruler = ["---", *["---:"] * (len(headings) - 1)]
    return "".join("| " + " | ".join(line) + " |\n" for line in [headings, ruler, *cells])


def _percent(row: Summary) -> str:
    spread = f" ± {100 * row.spread:.1f}" if len(row.exact_match) > 1 else ""
    return f"{100 * row.mean:.1f}{spread} %"


def draw(rows: Sequence[Summary], path: Path) -> None:
    """One picture: exact match against LLM FLOPs, and against prefill time; hollow untuned, filled tuned."""
    names = list(dict.fromkeys(row.series for row in rows))
    marks = dict(zip(names, "*osD^vP<>Xhpd8H" * 3, strict=False))
    colours = {name: f"C{place % 10}" for place, name in enumerate(names)}
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, cost, label in (
        (axes[0], "llm_flops", "LLM FLOPs of a prompt's prefill"),
        (axes[1], "prefill_ms", "measured prefill of a batch, ms"),
    ):
        for row in rows:
            axis.errorbar(
                getattr(row, cost),
                100 * row.mean,
                yerr=100 * row.spread or None,
                fmt=marks[row.series],
                color=colours[row.series],
                markerfacecolor=colours[row.series] if row.tuned else "none",
                markersize=8,
                capsize=2,
            )
            if row.series == GRID_OF_POINTS:
                at = (getattr(row, cost), 100 * row.mean)
                text = f"{row.budget}, {row.frozen}"
                axis.annotate(text, at, textcoords="offset points", xytext=(6, -9), fontsize=7, color="0.35")
        for frozen in sorted({row.frozen for row in rows if row.series == GRID_OF_POINTS}):
            for tuned in (False, True):
                line = sorted(
                    (getattr(row, cost), 100 * row.mean)
                    for row in rows
                    if (row.series, row.frozen, row.tuned) == (GRID_OF_POINTS, frozen, tuned)
                )
                style = "-" if tuned else ":"
                axis.plot(*zip(*line, strict=True) if line else ([], []), style, color="0.6", linewidth=1, zorder=0)
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("exact match, %")
    handles = [axes[0].plot([], [], marks[name], color=colours[name], label=name)[0] for name in names]
    handles += [axes[0].plot([], [], "o", color="0.3", markerfacecolor=face, label=label)[0]
                for face, label in (("none", "untuned"), ("0.3", "tuned"))]  # fmt: skip
    figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
