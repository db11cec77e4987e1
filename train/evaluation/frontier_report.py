"""The frontier's rows, table and picture: exact match against what it costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from shortzip.reduction.reductions import Reductions
from shortzip.train.evaluation.paired import OverSeeds
from shortzip.train.run.report import print_table

GRID_OF_POINTS = "VisionZip + ShortV"
COSTS = (
    ("llm_flops", 1e6, "LLM FLOPs of a prompt's prefill, millions"),
    ("prefill_ms", 1.0, "measured prefill of a batch, ms"),
)
# Dark and light: what lies side by side differs without its hue, too.
COLOURS = [
    "#000000",
    "#1f4e9c",
    "#e0803a",
    "#7a1f1f",
    "#a58bd6",
    "#6b4a3a",
    "#e58bc4",
    "#4d4d4d",
    "#b5a62a",
    "#3ea7b5",
    "#2e7d32",
    "#c2185b",
    "#8d9db6",
]
STROKES = {False: {True: "-", False: ":"}, True: {True: "--", False: "-."}}
"""By whether layers are frozen, then by whether it is tuned."""
MARK = 9.0  # points
POINTER = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 5}
LABEL: dict[str, Any] = {
    "textcoords": "offset points", "fontsize": 10, "fontweight": "bold", "ha": "center", "va": "center",
}  # fmt: skip


@dataclass(frozen=True)
class Summary(OverSeeds):
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
            named = "layer" in settings and f"FastV, K = {settings['layer']}, {100 * settings['keep']:g} % kept"
            series = named or Reductions(fastv=settings).pruning_described
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
    """One picture as a PNG: exact match against LLM FLOPs, and against prefill time; hollow untuned, filled tuned, and
    a thin line from one to the other."""
    figure = picture(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def picture(rows: Sequence[Summary]) -> Figure:
    """What `draw` writes. Shapes and strokes tell the series apart where colours do not."""
    names = list(dict.fromkeys(_legend(row) for row in rows))
    marks = dict(zip(names, "*oHsD^vPX<>phd8" * 3, strict=False))
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    strokes = {name: STROKES["frozen" in name] for name in names}
    has_tuned = any(row.tuned for row in rows)
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    labels: list[list[Annotation]] = [[], []]
    places: list[list[tuple[float, float]]] = [[], []]
    for place, (cost, unit, words) in enumerate(COSTS):
        axis = axes[place]
        untuned = {(row.series, row.budget, row.frozen): 100 * row.mean for row in rows if not row.tuned}
        for row in rows:
            name, x, y = _legend(row), getattr(row, cost) / unit, 100 * row.mean
            places[place] += [(x, y + 100 * row.spread * end) for end in (-1, 0, 1)]
            axis.errorbar(
                x,
                y,
                yerr=100 * row.spread or None,
                fmt=marks[name],
                color=colours[name],
                markerfacecolor=colours[name] if row.tuned else "white",
                markersize=MARK,
                capsize=3,
            )
            before = untuned.get((row.series, row.budget, row.frozen))
            if row.tuned and before is not None:
                axis.plot([x, x], [before, y], color=colours[name], linewidth=0.8, alpha=0.6, zorder=0)
            if row.series == GRID_OF_POINTS and row.tuned is has_tuned:
                label = axis.annotate(row.budget, (x, y), (0, 0), arrowprops=POINTER, color=colours[name], **LABEL)
                labels[place].append(label)
        for name in names:
            for tuned in (False, True):
                line = sorted(
                    (getattr(row, cost) / unit, 100 * row.mean)
                    for row in rows
                    if row.series == GRID_OF_POINTS and (_legend(row), row.tuned) == (name, tuned)
                )
                places[place] += _along(line)
                points = zip(*line, strict=True) if line else ([], [])
                axis.plot(*points, strokes[name][tuned], color=colours[name], alpha=0.8, zorder=1)
        axis.set_xlabel(words, fontsize=11)
        axis.tick_params(labelsize=10)
        axis.margins(0.08)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("exact match, %", fontsize=11)
    handles = [
        axes[0].plot(
            [], [], marks[name] + (strokes[name][True] if "budgets" in name else ""), color=colours[name], label=name
        )[0]
        for name in names
    ]
    handles += [
        axes[0].plot([], [], "o", color="0.3", markerfacecolor=face, label=label)[0]
        for face, label in (("white", "untuned"), ("0.3", "tuned"))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=10, frameon=False)
    figure.draw_without_rendering()  # now everything has its place, and the labels can be put where room is
    for axis, own, points in zip(axes, labels, places, strict=True):
        _part(axis, own, points)
    return figure


def _along(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points close to each other on a line through the given ones."""
    shares = [step / 16 for step in range(16)]
    return [(x + s * (u - x), y + s * (v - y)) for (x, y), (u, v) in pairwise(line) for s in shares]


def _part(axis: Axes, labels: Sequence[Annotation], points: Sequence[tuple[float, float]]) -> None:
    """Moves each label to the nearest place around its point that is free of marks, lines and earlier labels."""
    half = MARK / 72 * axis.figure.dpi / 2

    def around(x: float, y: float, half: float = half) -> Bbox:
        return Bbox.from_extents(x - half, y - half, x + half, y + half)

    taken = [around(x, y) for x, y in axis.transData.transform(points)]
    for label in labels:
        size = Text.get_window_extent(label)  # without its pointer, which begins at the mark
        wide, high = (length * 72 / axis.figure.dpi / 2 for length in (size.width, size.height))
        choices = []
        for distance, turn in product((9, 14, 20, 28, 38, 50), range(12)):
            x, y = math.cos(math.pi * turn / 6), math.sin(math.pi * turn / 6)
            label.set_position((x * (distance + wide), y * (distance + high)))
            box = Text.get_window_extent(label)
            covered = sum(Bbox.intersection(box, other) is not None for other in taken)
            choices.append((covered + (axis.bbox.count_contains(box.corners()) < 4), label.get_position(), box))
            if not choices[-1][0]:
                break
        _, position, box = min(choices, key=lambda choice: choice[0])
        label.set_position(position)
        mark = axis.transData.transform(label.xy)
        pointer = _along([tuple(mark), ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)])
        taken += [box, *(around(x, y, half / 4) for x, y in pointer)]


def _legend(row: Summary) -> str:
    """A row's name in the legend: the grid of budgets and frozen layers is one line per number of frozen layers, and
    ends at all visual tokens."""
    if row.series != GRID_OF_POINTS:
        return row.series
    return f"VisionZip's budgets, {row.frozen} frozen layers" if row.frozen else "VisionZip's budgets"
