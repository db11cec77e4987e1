"""Measures the layer contribution (LC) of every LLM layer and picks the layers to freeze.

    python scripts/calibrate_shortv.py --model checkpoints/demo-llava --budget 12+4 --freeze 60%

Works with any release, reduced checkpoint or run's folder, and any instruction file; each conversation is read up to
the first answer after an image. LC is measured on what the budget leaves, for visual and for text tokens; with
--compare_full true also on all visual tokens. It writes layers.json (LC of every layer, mean and spread, ranking,
model, data, seed, time) and a bar chart beside it. An interrupted run goes on where it stopped when it is started
again with the same settings: what is measured is kept in layers.json.partial until it is done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image

from shortzip.data.errors import FileInTheWay, UserError
from shortzip.data.files import refuse_inputs, replace_file, write_atomically, writing
from shortzip.reduction.layer_choice import pick_layers
from shortzip.reduction.layer_contribution import DIRECTIONS
from shortzip.reduction.parsing import format_shortv
from shortzip.reduction.positions import COMPACT
from shortzip.reduction.reductions import Reductions
from shortzip.reduction.selectors import VISIONZIP
from shortzip.train.calibration.measuring import (
    ANEW_OR_ELSEWHERE,
    CalibrationSet,
    Partial,
    budget_name,
    calibration_set,
    measure,
    measured_digest,
    read_measured,
    refuse_other_content,
    refuse_other_settings,
)
from shortzip.train.settings.command_line import parse_config, run_command, say
from shortzip.train.settings.commands import CalibrateConfig

INK = "#222222"
FROZEN = "////"  # hatched: its colour alone is that of the second budget in grey
DRAWN_BY = "ShortZip, scripts/calibrate_shortv.py"


def settings_that_matter(settings: CalibrateConfig) -> dict[str, Any]:
    """The settings that a measurement depends on."""
    names = (
        "model",
        "revision",
        "instructions",
        "image_root",
        "samples",
        "seed",
        "budget",
        "method",
        "positions",
        "compare_full",
        "dtype",
        "text_tokens",
        "load_in_4bit",
        "samples_per_batch",
        "chat_template",
        "on_bad_sample",
    )
    return {name: getattr(settings, name) for name in names}


def calibrate(settings: CalibrateConfig) -> dict[str, Any]:
    """Measures, or takes a finished file of the same settings; writes layers.json and the chart; returns the former.

    Raises ValueError for settings that do not go together or another run's files, and what loading the model and the
    data raises.
    """
    matters = settings_that_matter(settings)
    partial_path = settings.output.with_name(settings.output.name + ".partial")
    is_there = settings.output.is_file() and not settings.overwrite
    result = read_measured(settings.output) if is_there else None
    check_outputs(settings, result)
    if result is not None:
        then = {"load_in_4bit": False, "method": VISIONZIP, "positions": COMPACT, **result["settings"]}
        refuse_other_settings(then, matters, settings.output)
    budget = None
    if settings.budget is not None:
        budget = Reductions.parse(settings.budget, method=settings.method, positions=settings.positions)
    calibration = calibration_set(settings, budget)
    if settings.compare_full and calibration.visionzip is None:
        raise UserError("compare_full compares a budget with all visual tokens, and the model has none: give --budget")
    if result is not None:
        check_content(result, calibration, settings.output)
    else:
        result = measure_all(settings, budget, Partial(partial_path, matters, settings.overwrite), calibration)
    ranking = result["measurements"][0]["visual"][settings.direction]["ranking"]
    # None picked is null, as in a config, which takes no empty list.
    layers = (sorted(pick_layers(ranking, settings.freeze)) or None) if settings.freeze is not None else None
    result |= {"direction": settings.direction, "ranking": ranking, "freeze": settings.freeze, "layers": layers}
    write_atomically(settings.output, json.dumps(result, indent=1) + "\n")
    draw_contributions(result, chart_of(settings.output))
    partial_path.unlink(missing_ok=True)
    return result


def check_content(result: Mapping[str, Any], calibration: CalibrationSet, output: Path) -> None:
    """Refuses measurements of another model's files or other conversations; where an older file does not tell, says
    so."""
    if "measured on" in result:
        refuse_other_content(result["measured on"], calibration.content, output)
        print(f"{output} holds these measurements already; layers are picked from it")
    else:
        print(
            f"{output} is of a version that did not note what it measured on: whether model and "
            f"conversations are still the same is not known; to be sure, {ANEW_OR_ELSEWHERE}"
        )


def measure_all(
    settings: CalibrateConfig, budget: Reductions | None, partial: Partial, calibration: CalibrationSet
) -> dict[str, Any]:
    """What layers.json holds beside the layers: LC under the budget and, with compare_full, of all visual tokens."""
    first = measure(settings, budget, partial, calibration)
    measurements = [first, measure(settings, Reductions(), partial)] if settings.compare_full else [first]
    summaries = [item.summary() for item in measurements]
    return {
        "settings": settings_that_matter(settings),
        "model": settings.model,
        "instructions": settings.instructions,
        "samples": len(first.visual),
        "seed": settings.seed,
        "num_layers": first.visual.shape[2],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(sum(item.seconds for item in measurements), 3),
        "measurements": summaries,
        "digest": measured_digest(summaries),
        "measured on": calibration.content,
    }


def chart_of(output: Path) -> Path:
    """Where the chart of a layers.json lies."""
    return output.with_suffix(".png")


def check_outputs(settings: CalibrateConfig, result: dict[str, Any] | None) -> None:
    """Raises ValueError, before anything is measured, for outputs that would replace what is not theirs, and
    `CannotWrite` for a place that cannot be written to. `result`: what the output holds already."""
    output, chart = settings.output, chart_of(settings.output)
    if settings.overwrite:
        refuse_inputs((output, chart), (settings.model, settings.instructions))
    if output == chart:
        raise UserError(f"--output {output} is the name of the chart: give the JSON file's, {output.stem}.json, say")
    for path in (output, chart):
        if path.is_dir():
            raise FileInTheWay(f"{path} is a folder, and a file of that name is to be written: give another --output")
    is_from_unmarked = result is not None and "digest" not in result  # whose chart bears no mark
    if chart.exists() and not settings.overwrite and not is_from_unmarked and not is_own_chart(chart):
        raise FileInTheWay(
            f"{chart} is another picture, and the chart would replace it: move it, give another --output, or "
            "--overwrite true"
        )
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output.parent) as probe:
            probe.write(b"0" * 4096)


def is_own_chart(path: Path) -> bool:
    """Whether a picture was drawn by `draw_contributions`."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return picture.info.get("Software") == DRAWN_BY
    except (OSError, ValueError, SyntaxError):
        return False


def report(result: dict[str, Any], output: Path) -> str:
    """What the command prints."""
    direction = result["direction"]
    lines = [
        f"LC of {result['num_layers']} layers on {result['samples']} conversations of {result['instructions']} "
        f"(seed {result['seed']}), {result['seconds']:.1f} s; "
        f"{'KL(full || frozen)' if direction == DIRECTIONS[0] else 'KL(frozen || full)'}",
    ]
    for item in result["measurements"]:
        lines += ["", f"{budget_name(item['budget'])}: {item['visual_tokens_per_prompt']:g} visual tokens per prompt"]
        lines.append(f"  {'layer':>5}  {'visual tokens':>21}  {'text tokens':>21}")
        frozen = result["layers"] if item is result["measurements"][0] and result["layers"] is not None else []
        for layer in item["visual"][direction]["ranking"]:
            cells = [
                f"{item[kind][direction]['mean'][layer]:9.3g} ± {item[kind][direction]['std'][layer]:<9.3g}"
                if kind in item
                else f"{'-':>21}"
                for kind in ("visual", "text")
            ]
            lines.append(f"  {layer:>5}  {cells[0]}  {cells[1]}{'  frozen' if layer in frozen else ''}")
        if item["dropped"]:
            lines.append(f"  left out: {', '.join(f'{count} {reason}' for reason, count in item['dropped'].items())}")
    if result["freeze"] is not None:
        lines += ["", f"shortv: {format_shortv(result['layers'])}"]
    else:
        lines += ["", "To pick layers: the same command with --freeze 60% (or a number of layers)."]
    lines.append(f"written: {output} and {chart_of(output)}")
    return "\n".join(lines)


def draw_contributions(result: dict[str, Any], path: str | Path) -> None:
    """A bar chart of the layer contributions in a layers.json: one bar per layer and budget, text tokens below.

    `result` has `direction`, `layers` (the frozen ones, or None), `num_layers` and `measurements`, each with `budget`
    and, per kind of token and direction, `mean` and `std`. Logarithmic axes.
    """
    measurements, direction, depth = result["measurements"], result["direction"], result["num_layers"]
    kinds = [kind for kind in ("visual", "text") if kind in measurements[0]]
    figure = Figure(figsize=(max(6.5, 0.32 * depth + 2), 2.9 * len(kinds) + 0.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    frozen = set(result["layers"] or [])
    panels = figure.subplots(len(kinds), 1, squeeze=False, sharex=True)[:, 0]
    for axes, kind in zip(panels, kinds, strict=True):
        for number, item in enumerate(measurements):
            place = (number - (len(measurements) - 1) / 2, 0.8 / len(measurements))
            colors = [
                _bar_color(number, is_frozen=kind == "visual" and number == 0 and layer in frozen)
                for layer in range(depth)
            ]
            _draw_bars(axes, item[kind][direction], item["samples"], colors, place)
        _style_panel(axes, kind)
    panels[-1].set_xticks(range(depth))
    panels[-1].set_xlabel("LLM layer", fontsize=9)
    handles = [
        Patch(color=_bar_color(number), label=budget_name(item["budget"])) for number, item in enumerate(measurements)
    ]
    if frozen:
        look: dict[str, Any] = {"facecolor": _bar_color(0, is_frozen=True), "hatch": FROZEN, "edgecolor": "white"}
        handles.append(Patch(**look, label=f"frozen: {len(frozen)} of {depth} layers"))
    panels[0].legend(handles=handles, fontsize=8.5, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3)
    figure.suptitle("How much the answer changes when a layer leaves tokens as they are", fontsize=11, color=INK)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    replace_file(Path(path), lambda file: figure.savefig(file, metadata={"Software": DRAWN_BY}))


def _draw_bars(axes: Any, lc: Mapping[str, Any], samples: int, colors: list[str], place: tuple[float, float]) -> None:
    """A bar per layer with its standard error. `place`: (in bars beside the layer's middle, width of a bar)."""
    beside, width = place
    mean, error = np.array(lc["mean"]), np.array(lc["std"]) / max(1, samples) ** 0.5
    places = np.arange(len(mean)) + beside * width
    hatches = [FROZEN if color == _bar_color(0, is_frozen=True) else "" for color in colors]
    bars = {"color": colors, "hatch": hatches, "edgecolor": "white", "linewidth": 0}
    axes.bar(places, mean, width, yerr=error, ecolor=INK, error_kw={"elinewidth": 0.8}, **bars)
    for at_zero in places[mean == 0]:
        axes.annotate("0", (at_zero, 0.01), xycoords=("data", "axes fraction"), ha="center", fontsize=8, color=INK)


def _style_panel(axes: Any, kind: str) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel(f"LC of {kind} tokens\n(nats, log scale)", fontsize=9)
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)
    axes.tick_params(labelsize=8)


def _bar_color(number: int, is_frozen: bool = False) -> str:
    return "#8ec1ee" if is_frozen else ("#1f5f9f", "#b8a07a")[number]


def main(argv: Sequence[str]) -> None:
    run(parse_config(CalibrateConfig, argv, program="calibrate_shortv.py"))


def run(config: CalibrateConfig) -> None:
    """Measures, and prints what was found."""
    try:
        say(report(calibrate(config), config.output))
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on from here") from interrupt


if __name__ == "__main__":
    run_command(main)
