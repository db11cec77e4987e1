"""Accuracy against cost: VisionZip budgets x frozen layers and the baselines at equal tokens, untuned and tuned.

    python scripts/frontier.py                                   # the demo: configs/eval/frontier-demo.yaml
    python scripts/frontier.py --recipe configs/MY.yaml --budgets '[162+30, 108+20, 54+10]' --freeze '["0", "60%"]'

Writes `output`/frontier.json, frontier.png (accuracy against LLM FLOPs and against measured prefill time), table.md.
With `tune`, each point is also tuned by the recipe, once per seed. Every evaluation and every tuned run is kept: the
same command continues after an interruption. Prefill times are comparable when nothing else runs on the machine.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from shortzip.data.drops import DropLog
from shortzip.data.errors import UserError
from shortzip.data.files import read_json, write_atomically, writing
from shortzip.data.instructions import PLACEHOLDER
from shortzip.data.kept import Kept, conversations_digest
from shortzip.data.supervision import Supervision
from shortzip.reduction.parsing import parse_budget
from shortzip.reduction.reductions import Reductions
from shortzip.scripts.tune_points import (
    POINTS,
    PointsFailed,
    candidate_of,
    held_out_data,
    measure_share,
    recipes_of,
    run_of,
)
from shortzip.train.calibration.choosing import calibration_prompts, choose_layers
from shortzip.train.evaluation.comparison import check_candidates, describe_machine, prefill_times
from shortzip.train.evaluation.frontier_points import (
    COMPACT,
    Point,
    Ranked,
    point_of,
    points_of,
    tuned_points,
)
from shortzip.train.evaluation.frontier_report import draw, show, summarise
from shortzip.train.evaluation.methods_picture import picture_of_methods
from shortzip.train.evaluation.methods_table import method_rows, show_methods
from shortzip.train.evaluation.questions import Prefill
from shortzip.train.evaluation.selection_cost import SelectionCost, selection_costs
from shortzip.train.evaluation.trainings_table import show_trained, trained_rows
from shortzip.train.inputs.samples import (
    check_instructions,
    draw_demo_scenes,
    held_out_conversations,
    held_out_set,
)
from shortzip.train.release.loading import load_processor, load_release
from shortzip.train.release.opening import open_release, release_content
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.run.processes import StopRequest, StopRequested, run_until_stopped
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import (
    dump_config,
    end_stopped,
    parse_config,
    run_command,
    say,
)
from shortzip.train.settings.config import ShortVConfig, TuneConfig, VisionZipConfig
from shortzip.train.settings.frontier import FrontierConfig

SELECTION_BATCH = 16  # images
ROOT = Path(__file__).resolve().parents[1]
DEFAULT = ROOT / "configs" / "eval" / "frontier-demo.yaml"


def layers_to_freeze(config: FrontierConfig, recipe: TuneConfig) -> dict[Ranked, list[int]]:
    """The layers of every ranking, number, budget and seed that `points_of` asks for.

    They are kept in frozen-layers.json beside what they were measured with, and measured again when that has changed.
    """
    kept, known_settings = Kept(config.output), recipe.shortv or ShortVConfig(freeze=1)
    settings = ("model", "revision", "mm_projector", "vision_tower", "mixed_precision", "load_in_4bit")
    release = open_release(ReleaseSpec.of(recipe))
    first, count = config.seeds[0], known_settings.calibration_samples
    measured_with = {
        **{key: getattr(recipe, key) for key in settings},
        **release_content(release),
        "data": asdict(recipe.data),
        "calibration_samples": count,
    }
    if any(freeze not in ("0", "0%") for freeze in config.freeze):
        processor = load_processor(release, Reductions())
        drops = DropLog(recipe.data.on_bad_sample, recipe.data.max_bad_fraction)
        supervision = Supervision(processor, max_length=None)
        chosen, root = calibration_prompts(replace(recipe, seed=first), supervision, count, drops)
        measured_with["conversations"] = conversations_digest([item.conversation for item in chosen], root)
    known = kept.find("frozen-layers", measured_with) or {}
    accelerator = Accelerator()
    wanted = [("lc", freeze, budget, first) for freeze in config.freeze for budget in ("all", *config.budgets)]
    for ranking in config.rankings:
        seeds = config.seeds if ranking == "random" else [first]
        wanted += [(ranking, config.freeze[-1], "all", seed) for seed in seeds]
    found = {}
    for ranking, freeze, budget, seed in wanted:
        key = f"{ranking}, {freeze} of the layers at {budget}, seed {seed}"
        if key not in known:
            known[key] = []
            if freeze not in ("0", "0%"):
                print(f"layers to freeze: {key}", flush=True)
                shortv = ShortVConfig(
                    freeze=freeze,
                    ranking=ranking,  # type: ignore[arg-type]  # one of the Literal's, as the config checks
                    calibration_samples=count,
                )
                visionzip = None if budget == "all" else VisionZipConfig(**parse_budget(budget))  # type: ignore[arg-type]  # two numbers
                folder = Path(config.output) / "layers"
                folder.mkdir(parents=True, exist_ok=True)
                # Points that freeze layers have compact positions, whatever the recipe's are.
                asked = replace(
                    recipe, visionzip=visionzip, shortv=shortv, fastv=None, positions="compact", budgets=[],
                    sandwich=False, budget_schedule=None,
                    data=replace(recipe.data, cache_features=None), seed=seed, output_dir=str(folder),
                )  # fmt: skip
                known[key] = choose_layers(asked, release, accelerator)[0] or []
            kept.keep("frozen-layers", measured_with, known)
        found[ranking, freeze, budget, seed] = known[key]
    return found


def time_prefill(
    untuned: Sequence[Point], known: Sequence[dict[str, Any]], config: FrontierConfig, recipe: TuneConfig
) -> None:
    """Sets the prefill time of the untuned points' entries to one measured side by side, but for methods at equal
    tokens; kept until one of the points is another. A report alone takes what is kept."""
    points = [point for point in untuned if not config.tokens or point.series not in config.methods]
    by_name = {point_of(entry["point"]).name: entry for entry in known}
    entries = [by_name[point.name] for point in points if point.name in by_name]
    parts = {"rounds": config.prefill_rounds, "points": [entry["identity"] for entry in entries]}

    def measured() -> list[float]:
        print("prefill of all untuned points, side by side", flush=True)
        return prefill_times(
            [candidate_of(point, recipe.model, recipe) for point in points],
            held_out_data(config, recipe),
            Accelerator(),
            batch_size=recipe.eval_batch_size,
            rounds=config.prefill_rounds,
        )

    kept = Kept(config.output)
    times = kept.find("prefill", parts) if config.report_only else kept.get("prefill", parts, measured)
    if times is None:
        return
    for entry, milliseconds in zip(entries, times, strict=True):
        entry["evaluation"]["prefill_ms"] = milliseconds


def measure(untuned: Sequence[Point], config: FrontierConfig, recipe: TuneConfig) -> list[dict[str, Any]]:
    """The entries of the points, and of those tuned: what is not kept is tuned and evaluated, and prefill is timed.

    Tuning, and with several processes everything, happens in processes of its own.
    """
    tuned = tuned_points(config, untuned) if config.tune else []
    handed = [*untuned, *tuned] if config.processes > 1 else tuned
    if config.processes == 1:
        measure_share(config, untuned)
    if handed:
        in_processes(handed, config)
    entries = known_entries([*untuned, *tuned], config)
    time_prefill(untuned, entries, config, recipe)
    return entries


def in_processes(points: Sequence[Point], config: FrontierConfig) -> None:
    """Tunes and evaluates points in `config.processes` processes (scripts/tune_points.py), and waits for them.

    Raises `PointsFailed` when all have ended and one of them in an error, and `StopRequested`, with all of them
    stopped, when this process is asked to stop meanwhile.
    """
    output = Path(config.output)
    given = output / "frontier.yaml"
    write_atomically(given, dump_config(config))
    write_atomically(output / POINTS, json.dumps({"points": [asdict(point) for point in points]}, indent=1) + "\n")
    shares = [f"{number}/{config.processes}" for number in range(1, config.processes + 1)]
    logs = [output / f"points-{number}.log" for number in range(1, config.processes + 1)]
    say(f"{len(points)} points in {config.processes} process(es): {', '.join(map(str, logs))}", flush=True)
    commands = [[sys.executable, str(ROOT / "scripts" / "tune_points.py"), str(given), share] for share in shares]
    with StopRequest() as stop, ThreadPoolExecutor(config.processes) as pool:
        codes = list(pool.map(run_until_stopped, commands, logs, repeat(stop)))
    for code, log in zip(codes, logs, strict=True):
        if code != 0:
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
            raise PointsFailed(f"tuning and evaluating ended with {code} (all of it: {log}):\n{tail}")


def known_entries(points: Sequence[Point], config: FrontierConfig) -> list[dict[str, Any]]:
    """What is kept of the points, in their order, whatever it was measured with; those without anything are left out.

    (What is of another release, recipe or conversation was measured anew by now, or is to be, before a report.)
    """
    folder = Path(config.output) / "points"
    files = [folder / f"{point.name}.json" for point in points]
    entries = [read_json(file).get("result") for file in files if file.is_file()]
    return [entry for entry in entries if entry and "correct" in entry]  # an earlier version kept no answers


def write(
    entries: Sequence[Mapping[str, Any]],
    costs: Mapping[tuple[str, int], SelectionCost],
    config: FrontierConfig,
    recipe: TuneConfig,
) -> None:
    """The table, the picture and the JSON."""
    output = Path(config.output)
    of_first = config.trainings[0].name if config.trainings else ""
    first = [entry for entry in entries if entry["point"].get("training", "") in ("", of_first)]
    of_methods = [entry for entry in first if config.tokens and entry["point"]["series"] in config.methods]
    rows = summarise([entry for entry in first if entry not in of_methods])
    methods = method_rows(of_methods, config, held_out_questions(config, recipe)) if of_methods else []
    trained = trained_rows(entries, config) if config.trainings or config.per_image or config.elastic else []
    report = {
        "recipe": config.recipe,
        "model": recipe.model,
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "seeds": config.seeds,
        "rows": [{**asdict(row), "mean": row.mean, "spread": row.spread} for row in rows],
        "reference": config.reference,
        "methods": [{**asdict(row), "mean": row.mean, "spread": row.spread} for row in methods],
        "trainings": [{**asdict(row), "mean": row.mean, "spread": row.spread} for row in trained],
        "selection": [{"method": key[0], "tokens": key[1], **asdict(cost)} for key, cost in costs.items()],
    }
    write_atomically(output / "frontier.json", json.dumps(report, indent=1) + "\n")  # before anything is shown
    tables = [show(rows)] if len(rows) > 1 or not methods else []
    if methods:
        full = next((row.mean for row in rows if row.series == "all tokens" and not row.tuned), None)
        picture_of_methods(methods, full).savefig(output / "frontier.png", dpi=150)
        tables.append(show_methods(methods, costs, config))
    else:
        draw(rows, output / "frontier.png")
    if trained:
        tables.append(show_trained(trained, config))
    write_atomically(output / "table.md", "\n".join(tables))
    say(f"written: {output / 'frontier.json'}, {output / 'frontier.png'}, {output / 'table.md'}")


def held_out_questions(config: FrontierConfig, recipe: TuneConfig) -> dict[tuple[str, int], str]:
    """The text of each held-out question, by its conversation's id and its turn."""
    data = held_out_data(config, recipe)
    conversations, _ = held_out_conversations(data, DropLog(data.on_bad_sample, data.max_bad_fraction))
    return {
        (conversation.id, turn): text.replace(PLACEHOLDER, "").strip()
        for conversation in conversations
        for turn, text in enumerate(text for role, text in conversation.turns if role == "user")
    }


def selection_cost(
    untuned: Sequence[Point], config: FrontierConfig, recipe: TuneConfig
) -> dict[tuple[str, int], SelectionCost]:
    """What each method's choice costs at each number of tokens, by (method, tokens); kept until one is another."""
    points = {
        (point.series, int(point.tokens)): point
        for point in untuned
        if config.tokens and point.series in config.methods and point.positions == COMPACT
    }
    if not points:
        return {}
    release = open_release(ReleaseSpec.of(recipe))
    parts = {
        # Without what they have had since these costs were first kept: no point here is tuned.
        "points": [
            {key: value for key, value in asdict(point).items() if key != "training"} for point in points.values()
        ],
        "rounds": config.prefill_rounds,
        "batch_size": SELECTION_BATCH,
        "machine": describe_machine(),
        **release_content(release),
    }

    def measured() -> list[dict[str, float]]:
        say("the selections' cost, side by side", flush=True)
        model, processor = load_release(release, Reductions())
        dataset = held_out_set(held_out_data(config, recipe), processor)
        model = model.to(Accelerator().device)
        pixels = Prefill.of(model, dataset, SELECTION_BATCH).inputs["pixel_values"]
        reductions = [point.reductions for point in points.values()]
        return [asdict(cost) for cost in selection_costs(model, reductions, pixels, config.prefill_rounds)]

    kept = Kept(config.output).get("selection", parts, measured)
    return {key: SelectionCost(**cost) for key, cost in zip(points, kept, strict=True)}


def main(argv: Sequence[str]) -> None:
    run(parse_config(FrontierConfig, argv, default=DEFAULT, program="frontier.py"))


def run(config: FrontierConfig) -> None:
    """Checks every point, measures and tunes what is not kept, and writes the report."""
    recipes = recipes_of(config)
    recipe = recipes[""]
    if recipe.data.eval_instructions is None:
        raise ConfigError(f"{config.recipe} names no held-out conversations: data.eval_instructions is needed")
    for name, each in recipes.items():
        if config.tune and config.fastv and each.distill is not None:
            who = f"training {name}" if name else config.recipe
            raise ConfigError(f"fastv: {who} distills, which pruned points cannot: set one of them to null")
        check_instructions(each.data)
    unfrozen = points_of(config, defaultdict(list))  # before layers are measured, which takes its time
    check_candidates([candidate_of(point, recipe.model, recipe) for point in unfrozen])
    for point in tuned_points(config, unfrozen) if config.tune else []:
        run_of(point, config, recipes[point.training])  # raises where the recipe's settings do not go with a point
    with writing(Path(config.output)):
        Path(config.output).mkdir(parents=True, exist_ok=True)
    try:
        for each in recipes.values():
            draw_demo_scenes(each.data)
        points = points_of(config, layers_to_freeze(config, recipe))
        costs = selection_cost(points, config, recipe)
        if config.report_only:
            tuned = tuned_points(config, points) if config.tune else []
            entries = known_entries([*points, *tuned], config)
            say(f"{len(entries)} of {len(points) + len(tuned)} points are measured")
            if not entries:
                raise UserError(f"nothing is measured in {config.output} yet: leave out --report_only")
            time_prefill(points, entries, config, recipe)
        else:
            entries = measure(points, config, recipe)
        write(entries, costs, config, recipe)
    except (StopRequested, KeyboardInterrupt) as stopped:
        end_stopped("stopped; the same command continues", by=str(stopped) or "SIGINT")


if __name__ == "__main__":
    run_command(main)
