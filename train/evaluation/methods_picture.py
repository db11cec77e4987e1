"""The picture of the frontier's methods: exact match against visual tokens, untuned and tuned."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from shortzip.train.evaluation.frontier_report import COLOURS
from shortzip.train.evaluation.methods_table import MethodRow

MARKS = "*oHsD^vPX<>phd8"
ALL_TOKENS = "all tokens"
GAP = 1.35  # of the labels' height: so far apart do two of them stand at least


def picture_of_methods(rows: Sequence[MethodRow], full: float | None = None) -> Figure:
    """A panel for untuned and, where there are any, for tuned, of compact and of original positions.

    A line per method is named at its right end. `full`: exact match with all tokens (untuned), drawn as a line.
    """
    panels = list(dict.fromkeys((row.tuned, row.positions) for row in sorted(rows, key=_panel)))
    down = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(6.4 * min(len(panels), 2), 6 * down), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, min(len(panels), 2), sharey=True, squeeze=False).flatten()
    names = list(dict.fromkeys(row.method for row in rows))
    for axis, (tuned, positions) in zip(axes, panels, strict=False):
        _draw(axis, [row for row in rows if (row.tuned, row.positions) == (tuned, positions)], names)
        if full is not None:
            axis.axhline(100 * full, color="0.5", linewidth=0.8)
            axis.annotate(ALL_TOKENS, (0, 100 * full), (4, 3), xycoords=("axes fraction", "data"),
                          textcoords="offset points", fontsize=9, color="0.4")  # fmt: skip
        axis.set_title(f"{'tuned' if tuned else 'untuned'}, {positions} positions", fontsize=12)
        axis.set_ylabel("exact match, %", fontsize=11)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.draw_without_rendering()  # now everything has its place, and names can be parted
    for axis in axes[: len(panels)]:
        _part(axis)
    return figure


def _panel(row: MethodRow) -> tuple[bool, str]:
    return row.tuned, row.positions


def _draw(axis: Axes, rows: Sequence[MethodRow], names: Sequence[str]) -> None:
    counts = sorted({row.tokens for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()
    axis.set_xlim(counts[0] / 1.15, counts[-1] * (counts[-1] / counts[0]) ** 0.45 * 1.3)  # room for the names
    axis.set_xlabel("visual tokens", fontsize=11)
    axis.grid(alpha=0.25)
    for method in dict.fromkeys(row.method for row in rows):
        line = sorted((row for row in rows if row.method == method), key=lambda row: row.tokens)
        place = names.index(method)
        colour = COLOURS[place % len(COLOURS)]
        axis.errorbar(
            [row.tokens for row in line],
            [100 * row.mean for row in line],
            yerr=[100 * row.spread for row in line] if any(row.spread for row in line) else None,
            fmt=MARKS[place % len(MARKS)] + "-",
            color=colour,
            markerfacecolor=colour if rows[0].tuned else "white",
            markersize=7,
            linewidth=1.2,
            capsize=3,
            alpha=0.9,
        )
        axis.annotate(
            method,
            (line[-1].tokens, 100 * line[-1].mean),
            (18, 0),
            textcoords="offset points",
            fontsize=9,
            color=colour,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6, "shrinkA": 0},
        )


def _part(axis: Axes) -> None:
    """Moves the names at the lines' ends apart, keeping their order."""
    names = [text for text in axis.texts if text.get_text() != ALL_TOKENS]
    names.sort(key=lambda text: text.xy[1])  # type: ignore[attr-defined]  # annotations all
    if not names:
        return
    points = 72 / axis.figure.dpi
    heights = [axis.transData.transform(text.xy)[1] * points for text in names]  # type: ignore[attr-defined]
    apart = GAP * 9
    places = list(heights)
    for number in range(1, len(places)):
        places[number] = max(places[number], places[number - 1] + apart)
    shift = sum(places) / len(places) - sum(heights) / len(heights)  # as many are moved down as up
    low, high = (edge * points for edge in (axis.bbox.y0, axis.bbox.y1))
    shift = min(max(shift, places[-1] + apart / 2 - high), places[0] - apart / 2 - low)
    for text, height, place in zip(names, heights, places, strict=True):
        text.set_position((text.get_position()[0], place - shift - height))
