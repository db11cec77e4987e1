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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from shortzip.data.drops import DropLog
from shortzip.data.errors import UserError
from shortzip.data.files import write_atomically, writing
from shortzip.data.kept import Kept, conversations_digest, identity_of
from shortzip.data.supervision import Supervision
from shortzip.reduction.parsing import parse_budget
from shortzip.reduction.reductions import Reductions
from shortzip.train.calibration.choosing import calibration_prompts, choose_layers
from shortzip.train.evaluation.answers import write_answers
from shortzip.train.evaluation.comparison import (
    Candidate,
    answer_files,
    check_candidates,
    compare,
    describe_machine,
    prefill_times,
)
from shortzip.train.evaluation.frontier_points import FrontierConfig, Point, Ranked, points_of, tuned_points
from shortzip.train.evaluation.frontier_report import draw, show, summarise
from shortzip.train.inputs.samples import (
    check_instructions,
    draw_demo_scenes,
    held_out_conversations,
    training_conversations,
)
from shortzip.train.release.loading import load_processor
from shortzip.train.release.opening import open_release, release_content
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.run.processes import StopRequest, StopRequested, run_until_stopped
from shortzip.train.run.run_folder import FINAL, STATUS, is_finished
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import dump_config, end_stopped, load_config, parse_config, run_command, say
from shortzip.train.settings.config import DataConfig, FastVConfig, ShortVConfig, TuneConfig, VisionZipConfig

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
                asked = replace(
                    recipe, visionzip=visionzip, shortv=shortv, fastv=None, seed=seed, output_dir=str(folder)
                )
                known[key] = choose_layers(asked, release, accelerator)[0] or []
            kept.keep("frozen-layers", measured_with, known)
        found[ranking, freeze, budget, seed] = known[key]
    return found


class TuningFailed(UserError):
    """A run that tunes a point ended with an error; the end of what it printed is said."""


def tuned_on(point: Point, recipe: TuneConfig) -> dict[str, Any]:
    """The content of what a tuned point is made of: the release's files, the conversations and their images."""
    release = open_release(ReleaseSpec.of(recipe))
    drops = DropLog(recipe.data.on_bad_sample, recipe.data.max_bad_fraction)
    conversations, root = training_conversations(recipe.data, point.seed or 0, drops)
    return {**release_content(release), "conversations": conversations_digest(conversations, root)}


def tune_point(point: Point, config: FrontierConfig, recipe: TuneConfig, content: Mapping[str, Any]) -> Path:
    """The run's folder of a tuned point: tuned now, or continued, unless it is finished by the same recipe on the same
    `content` (`tuned_on`).

    Raises `TuningFailed` when the run fails, and `StopRequested`, with the run stopped, when this process is asked to
    stop meanwhile.
    """
    folder = Path(config.output) / "runs" / point.name
    run = replace(
        recipe,
        visionzip=VisionZipConfig.of(point.reductions.visionzip) if point.reductions.visionzip else None,
        shortv=ShortVConfig(layers=point.reductions.layers) if point.reductions.shortv else None,
        fastv=FastVConfig(**point.reductions.fastv) if point.reductions.fastv else None,
        seed=point.seed or 0,
        output_dir=str(folder),
        run_name=None,
        overwrite_output_dir=False,
        resume_from_checkpoint=None,
        final_evaluation=False,
        control=False,
        eval_steps=None,
        pictures=0,
        save_total_limit=1,
        report_to=[],
        push_to_hub=False,
        hub_model_id=None,
    )
    given, text = Path(config.output) / "recipes" / f"{point.name}.yaml", dump_config(run)
    kept, parts = Kept(given.parent), {"recipe": text, **content}
    is_begun = kept.find(point.name, parts) is not None and (folder / STATUS).is_file()
    if is_begun and is_finished(folder):
        return folder
    kept.keep(point.name, parts, "begun")
    write_atomically(given, text)
    how = ["--resume_from_checkpoint", "latest"] if is_begun else ["--overwrite_output_dir", "true"]
    command = [sys.executable, str(ROOT / "train" / "tune_projector.py"), "--config", str(given), *how]
    log = given.with_suffix(".log")
    with StopRequest() as stop:
        code = run_until_stopped(command, log, stop)
    if code != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
        raise TuningFailed(f"tuning {point.name} ended with {code} (all of it: {log}):\n{tail}")
    return folder


def candidate_of(point: Point, model: str, recipe: TuneConfig) -> Candidate:
    """What is evaluated of a point: `model` is the recipe's, or of a tuned point its checkpoint."""
    release = ReleaseSpec.of(recipe)
    if point.tuned:
        return Candidate(point.name, release.tuned(model))
    return Candidate(point.name, release, point.reductions)


def evaluate_point(
    point: Point, model: str, config: FrontierConfig, recipe: TuneConfig, accelerator: Accelerator
) -> dict[str, Any]:
    """The point's values; kept from before where model, reduction, settings and conversations are the same."""
    data, candidate = held_out_data(config, recipe), candidate_of(point, model, recipe)
    drops = DropLog(data.on_bad_sample, data.max_bad_fraction)
    release = open_release(candidate.spec)
    parts = {
        "candidate": {**asdict(candidate), "spec": candidate.spec.as_config()},
        "data": asdict(data),
        "batch_size": recipe.eval_batch_size,
        "max_new_tokens": recipe.max_new_tokens,
        "device": str(accelerator.device),
        **release_content(release),
        "conversations": conversations_digest(*held_out_conversations(data, drops)),
    }

    def measured() -> dict[str, Any]:
        (found,), (answers,) = compare(
            [candidate],
            data,
            accelerator,
            batch_size=recipe.eval_batch_size,
            max_new_tokens=recipe.max_new_tokens,
        )
        write_answers(Path(config.output) / "answers" / answer_files([point.name])[0], answers)
        return {"point": asdict(point), "evaluation": asdict(found), "identity": identity_of(parts)}

    return Kept(Path(config.output) / "points").get(point.name, parts, measured)


def time_prefill(
    points: Sequence[Point],
    entries: Sequence[dict[str, Any]],
    config: FrontierConfig,
    recipe: TuneConfig,
    accelerator: Accelerator,
) -> None:
    """Sets the entries' prefill time to one measured side by side; kept until one of the points is another."""
    parts = {"rounds": config.prefill_rounds, "points": [entry["identity"] for entry in entries]}

    def measured() -> list[float]:
        print("prefill of all untuned points, side by side", flush=True)
        return prefill_times(
            [candidate_of(point, recipe.model, recipe) for point in points],
            held_out_data(config, recipe),
            accelerator,
            batch_size=recipe.eval_batch_size,
            rounds=config.prefill_rounds,
        )

    times = Kept(config.output).get("prefill", parts, measured)
    for entry, milliseconds in zip(entries, times, strict=True):
        entry["evaluation"]["prefill_ms"] = milliseconds


def held_out_data(config: FrontierConfig, recipe: TuneConfig) -> DataConfig:
    """The recipe's held-out conversations, or the first of them."""
    return recipe.data if config.samples is None else replace(recipe.data, eval_samples=config.samples)


def measure(untuned: Sequence[Point], config: FrontierConfig, recipe: TuneConfig) -> list[dict[str, Any]]:
    """The entries of the points, and of those tuned: what is not kept is tuned and evaluated, and prefill is timed."""
    accelerator, entries = Accelerator(), []
    contents: dict[int | None, dict[str, Any]] = {}
    points = [*untuned, *(tuned_points(config, untuned) if config.tune else [])]
    for number, point in enumerate(points, start=1):
        print(f"[{number}/{len(points)}] {point.name}", flush=True)
        model = recipe.model
        if point.tuned:
            if point.seed not in contents:
                contents[point.seed] = tuned_on(point, recipe)
            model = str(tune_point(point, config, recipe, contents[point.seed]) / FINAL)
        entries.append(evaluate_point(point, model, config, recipe, accelerator))
    time_prefill(untuned, entries[: len(untuned)], config, recipe, accelerator)
    return entries


def write(entries: Sequence[Mapping[str, Any]], config: FrontierConfig, recipe: TuneConfig) -> None:
    """The table, the picture and the JSON."""
    output, rows = Path(config.output), summarise(entries)
    plain = [{**asdict(row), "mean": row.mean, "spread": row.spread} for row in rows]
    report = {
        "recipe": config.recipe,
        "model": recipe.model,
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "seeds": config.seeds,
        "rows": plain,
    }
    write_atomically(output / "frontier.json", json.dumps(report, indent=1) + "\n")  # before anything is shown
    draw(rows, output / "frontier.png")
    write_atomically(output / "table.md", show(rows))
    say(f"written: {output / 'frontier.json'}, {output / 'frontier.png'}, {output / 'table.md'}")


def main(argv: Sequence[str]) -> None:
    run(parse_config(FrontierConfig, argv, default=DEFAULT, program="frontier.py"))


def run(config: FrontierConfig) -> None:
    """Checks every point, measures and tunes what is not kept, and writes the report."""
    recipe = load_config(["--config", config.recipe])
    if recipe.data.eval_instructions is None:
        raise ConfigError(f"{config.recipe} names no held-out conversations: data.eval_instructions is needed")
    check_instructions(recipe.data)
    unfrozen = points_of(config, defaultdict(list))  # before layers are measured, which takes its time
    check_candidates([candidate_of(point, recipe.model, recipe) for point in unfrozen])
    with writing(Path(config.output)):
        Path(config.output).mkdir(parents=True, exist_ok=True)
    try:
        draw_demo_scenes(recipe.data)
        points = points_of(config, layers_to_freeze(config, recipe))
        write(measure(points, config, recipe), config, recipe)
    except (StopRequested, KeyboardInterrupt) as stopped:
        end_stopped("stopped; the same command continues", by=str(stopped) or "SIGINT")


if __name__ == "__main__":
    run_command(main)
