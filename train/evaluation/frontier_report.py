"""The frontier's rows, table and picture: exact match against what it costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from shortzip.reduction.reductions import Reductions
from shortzip.train.run.report import print_table

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
    """Median of the seeds. A tuned row has that of the same model untuned: tuning changes weights, not work."""
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
        reductions = Reductions(**point["reductions"])
        budget, frozen, fastv = reductions.budget_words, len(reductions.layers), reductions.fastv_words
        groups.setdefault((point["series"], budget, frozen, fastv, point["tuned"]), []).append(entry)
    rows = []
    for (series, budget, frozen, fastv, tuned), group in groups.items():
        values = [entry["evaluation"] for entry in group]
        timed = [entry["evaluation"] for entry in groups.get((series, budget, frozen, fastv, False), group)]
        settings = group[0]["point"]["reductions"]["fastv"]
        if settings is not None:
            series = f"FastV, K = {settings['layer']}, {100 * settings['keep']:g} % kept"
        rows.append(
            Summary(
                series,
                budget,
                frozen,
                tuned,
                [value["exact_match"] for value in values],
                values[0]["llm_flops"],
                statistics.median(value["prefill_ms"] for value in timed),
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
                _in_words(row),
                f"{row.visual_tokens:g}",
                str(row.frozen),
                f"{row.llm_flops / first.llm_flops:.0%}",
                f"{row.prefill_ms / first.prefill_ms:.0%}",
                _percent(row),
                _percent(then) if then else "",
            ]
        )
    return print_table("exact match on held-out conversations", headings, cells)


def _in_words(row: Summary) -> str:
    """What the table calls a row."""
    if row.series != GRID_OF_POINTS:
        return row.series
    if row.budget == "all":
        return "ShortV"
    return f"VisionZip {row.budget}" + (" and ShortV" if row.frozen else "")


def _percent(row: Summary) -> str:
    spread = f" ± {100 * row.spread:.1f}" if len(row.exact_match) > 1 else ""
    return f"{100 * row.mean:.1f}{spread} %"


def draw(rows: Sequence[Summary], path: Path) -> None:
    """One picture: exact match against LLM FLOPs, and against prefill time; hollow untuned, filled tuned, and a thin
    line from one to the other."""
    names = list(dict.fromkeys(_legend(row) for row in rows))
    marks = dict(zip(names, "*oHsD^vPX<>phd8" * 3, strict=False))
    colours = {name: f"C{place % 10}" for place, name in enumerate(names)}
    has_tuned = any(row.tuned for row in rows)
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, cost, label in (
        (axes[0], "llm_flops", "LLM FLOPs of a prompt's prefill"),
        (axes[1], "prefill_ms", "measured prefill of a batch, ms"),
    ):
        untuned = {(row.series, row.budget, row.frozen): 100 * row.mean for row in rows if not row.tuned}
        for row in rows:
            name, x, y = _legend(row), getattr(row, cost), 100 * row.mean
            axis.errorbar(
                x,
                y,
                yerr=100 * row.spread or None,
                fmt=marks[name],
                color=colours[name],
                markerfacecolor=colours[name] if row.tuned else "none",
                markersize=8,
                capsize=2,
            )
            before = untuned.get((row.series, row.budget, row.frozen))
            if row.tuned and before is not None:
                axis.plot([x, x], [before, y], color=colours[name], linewidth=0.8, alpha=0.6, zorder=0)
            if row.series == GRID_OF_POINTS and row.tuned is has_tuned:
                offset, side = ((-6, 6), "right") if row.frozen else ((6, -11), "left")
                axis.annotate(
                    row.budget, (x, y), textcoords="offset points", xytext=offset, ha=side, fontsize=8, color="0.3"
                )
        for name in names:
            for tuned in (False, True):
                line = sorted(
                    (getattr(row, cost), 100 * row.mean)
                    for row in rows
                    if row.series == GRID_OF_POINTS and (_legend(row), row.tuned) == (name, tuned)
                )
                style = "-" if tuned else ":"
                axis.plot(*zip(*line, strict=True) if line else ([], []), style, color=colours[name], alpha=0.7)
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("exact match, %")
    handles = [axes[0].plot([], [], marks[name], color=colours[name], label=name)[0] for name in names]
    handles += [axes[0].plot([], [], "o", color="0.3", markerfacecolor=face, label=label)[0]
                for face, label in (("none", "untuned"), ("0.3", "tuned"))]  # fmt: skip
    figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _legend(row: Summary) -> str:
    """A row's name in the legend: the grid of budgets and frozen layers is one line per number of frozen layers, and
    ends at all visual tokens."""
    if row.series != GRID_OF_POINTS:
        return row.series
    return f"VisionZip's budgets, {row.frozen} frozen layers" if row.frozen else "VisionZip's budgets"
