"""The picture of the frontier's methods: exact match against visual tokens, untuned and tuned."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from shortzip.train.evaluation.frontier_report import COLOURS
from shortzip.train.evaluation.methods_table import MethodRow

MARKS = "*oHsD^vPX<>phd8"
GAP = 1.35  # of the labels' height: so far apart do two of them stand at least


def picture_of_methods(rows: Sequence[MethodRow], full: float | None = None) -> Figure:
    """One panel for untuned and, where there are any, one for tuned; a line per method, named at its right end.

    Lines with original positions are dashed. `full`: exact match with all tokens (untuned), drawn as a line.
    """
    states = [tuned for tuned in (False, True) if any(row.tuned is tuned for row in rows)]
    figure = Figure(figsize=(6.4 * len(states), 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(states), sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(row.method for row in rows))
    for axis, tuned in zip(axes, states, strict=True):
        _draw(axis, [row for row in rows if row.tuned is tuned], names)
        if full is not None:
            axis.axhline(100 * full, color="0.5", linewidth=0.8)
            axis.annotate("all tokens", (0, 100 * full), (4, 3), xycoords=("axes fraction", "data"),
                          textcoords="offset points", fontsize=9, color="0.4")  # fmt: skip
        axis.set_title("tuned" if tuned else "untuned", fontsize=12)
    axes[0].set_ylabel("exact match, %", fontsize=11)
    figure.draw_without_rendering()  # now everything has its place, and names can be parted
    for axis in axes:
        _part(axis)
    return figure


def _draw(axis: Axes, rows: Sequence[MethodRow], names: Sequence[str]) -> None:
    counts = sorted({row.tokens for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()
    axis.set_xlim(counts[0] / 1.15, counts[-1] * (counts[-1] / counts[0]) ** 0.45 * 1.3)  # room for the names
    axis.set_xlabel("visual tokens", fontsize=11)
    axis.grid(alpha=0.25)
    for method, positions in dict.fromkeys((row.method, row.positions) for row in rows):
        line = [row for row in rows if (row.method, row.positions) == (method, positions)]
        line.sort(key=lambda row: row.tokens)
        place = names.index(method)
        colour, is_compact = COLOURS[place % len(COLOURS)], positions == "compact"
        axis.errorbar(
            [row.tokens for row in line],
            [100 * row.mean for row in line],
            yerr=[100 * row.spread for row in line] if any(row.spread for row in line) else None,
            fmt=MARKS[place % len(MARKS)] + ("-" if is_compact else "--"),
            color=colour,
            markerfacecolor=colour if is_compact else "white",
            markersize=7,
            linewidth=1.2,
            capsize=3,
            alpha=0.9,
        )
        axis.annotate(
            method if is_compact else f"{method}, original",
            (line[-1].tokens, 100 * line[-1].mean),
            (14, 0),
            textcoords="offset points",
            fontsize=9,
            color=colour,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6, "shrinkA": 0},
        )


def _part(axis: Axes) -> None:
    """Moves the names at the lines' ends apart, keeping their order."""
    names = [text for text in axis.texts if text.get_text() != "all tokens"]
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
