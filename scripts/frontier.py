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

from data.errors import UserError
from data.files import write_atomically, writing
from reduction.parsing import parse_budget
from train.checkpoint import stamp_of
from train.command_line import dump_config, end_stopped, load_config, parse_config, run_command, say
from train.comparison import Candidate, answer_files, check_candidates, compare, describe_machine, prefill_times
from train.config import DEMO, ConfigError, DataConfig, FastVConfig, ShortVConfig, TuneConfig, VisionZipConfig
from train.evaluation import write_answers
from train.frontier_points import FrontierConfig, Point, Ranked, points_of, tuned_points
from train.frontier_report import draw, show, summarise
from train.processes import StopRequest, StopRequested, run_until_stopped
from train.release import dtype_of, open_release
from train.run_folder import FINAL, STATUS, read_status
from train.samples import check_instructions, choose_layers, demo_folder, draw_demo_scenes

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = ROOT / "configs" / "eval" / "frontier-demo.yaml"


def layers_to_freeze(config: FrontierConfig, recipe: TuneConfig) -> dict[Ranked, list[int]]:
    """The layers of every ranking, number, budget and seed that `points_of` asks for.

    They are kept in frozen-layers.json beside what they were measured with, and measured again when that has changed.
    """
    path = Path(config.output) / "frozen-layers.json"
    known_settings = recipe.shortv or ShortVConfig(freeze=1)
    settings = ("model", "revision", "mm_projector", "vision_tower", "mixed_precision", "load_in_4bit")
    measured_with = json.loads(
        json.dumps(
            {
                **{key: getattr(recipe, key) for key in settings},
                "files": stamp_of([*_weights(recipe.model), *_conversations(recipe.data, held_out=False)]),
                "data": asdict(recipe.data),
                "calibration_samples": known_settings.calibration_samples,
            }
        )
    )
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known = kept["layers"] if kept.get("measured_with") == measured_with else {}
    accelerator = Accelerator()
    release = open_release(
        recipe.model, recipe.revision, mm_projector=recipe.mm_projector, vision_tower=recipe.vision_tower
    )
    first = config.seeds[0]
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
                    calibration_samples=known_settings.calibration_samples,
                )
                visionzip = None if budget == "all" else VisionZipConfig(**parse_budget(budget))  # type: ignore[arg-type]  # two numbers
                folder = Path(config.output) / "layers"
                folder.mkdir(parents=True, exist_ok=True)
                asked = replace(
                    recipe, visionzip=visionzip, shortv=shortv, fastv=None, seed=seed, output_dir=str(folder)
                )
                known[key] = choose_layers(asked, release, dtype_of(recipe.mixed_precision), accelerator) or []
            write_atomically(path, json.dumps({"measured_with": measured_with, "layers": known}, indent=1) + "\n")
        found[ranking, freeze, budget, seed] = known[key]
    return found


class TuningFailed(UserError):
    """A run that tunes a point ended with an error; the end of what it printed is said."""


def tune_point(point: Point, config: FrontierConfig, recipe: TuneConfig) -> Path:
    """The run's folder of a tuned point: tuned now, or continued, unless it is finished by the same recipe.

    Raises `TuningFailed` when the run fails, and `StopRequested`, with the run stopped, when this process is asked to
    stop meanwhile.
    """
    folder = Path(config.output) / "runs" / point.name
    run = replace(
        recipe,
        visionzip=VisionZipConfig(**point.visionzip) if point.visionzip else None,
        shortv=ShortVConfig(layers=list(point.layers)) if point.layers else None,
        fastv=FastVConfig(**point.fastv) if point.fastv else None,
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
    is_begun = given.is_file() and given.read_text(encoding="utf-8") == text and (folder / STATUS).is_file()
    if is_begun and read_status(folder)["state"] == "finished":
        return folder
    given.parent.mkdir(parents=True, exist_ok=True)
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
    return Candidate(
        point.name,
        model,
        visionzip="saved" if point.tuned else point.visionzip,
        shortv="saved" if point.tuned else ({"layers": list(point.layers)} if point.layers else None),
        fastv="saved" if point.tuned else point.fastv,
        revision=None if point.tuned else recipe.revision,
        mm_projector=None if point.tuned else recipe.mm_projector,
        vision_tower=None if point.tuned else recipe.vision_tower,
        chat_template=recipe.data.chat_template,
    )


def evaluate_point(
    point: Point, model: str, config: FrontierConfig, recipe: TuneConfig, accelerator: Accelerator
) -> dict[str, Any]:
    """The point's values; kept from before where model, reduction, settings and conversations are the same."""
    data, candidate = held_out_data(config, recipe), candidate_of(point, model, recipe)
    settings = (
        recipe.mixed_precision,
        recipe.load_in_4bit,
        recipe.eval_batch_size,
        recipe.max_new_tokens,
        str(accelerator.device),
    )
    files = stamp_of([*_weights(model), *_conversations(data, held_out=True)])
    identity = repr((asdict(candidate), asdict(data), settings, files))
    kept = Path(config.output) / "points" / f"{point.name}.json"
    if kept.is_file():
        entry = json.loads(kept.read_text(encoding="utf-8"))
        if entry["identity"] == identity:
            return entry
    (found,), (answers,) = compare(
        [candidate],
        data,
        accelerator,
        dtype=dtype_of(recipe.mixed_precision),
        load_in_4bit=recipe.load_in_4bit,
        batch_size=recipe.eval_batch_size,
        max_new_tokens=recipe.max_new_tokens,
    )
    write_answers(Path(config.output) / "answers" / answer_files([point.name])[0], answers)
    entry = {"point": asdict(point), "evaluation": asdict(found), "identity": identity}
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(kept, json.dumps(entry, indent=1) + "\n")
    return entry


def time_prefill(
    points: Sequence[Point],
    entries: Sequence[dict[str, Any]],
    config: FrontierConfig,
    recipe: TuneConfig,
    accelerator: Accelerator,
) -> None:
    """Sets the entries' prefill time to one measured side by side; kept until one of the points is another."""
    path = Path(config.output) / "prefill.json"
    identity = [config.prefill_rounds, *(entry["identity"] for entry in entries)]
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if kept.get("identity") != identity:
        print("prefill of all untuned points, side by side", flush=True)
        times = prefill_times(
            [candidate_of(point, recipe.model, recipe) for point in points],
            held_out_data(config, recipe),
            accelerator,
            dtype=dtype_of(recipe.mixed_precision),
            load_in_4bit=recipe.load_in_4bit,
            batch_size=recipe.eval_batch_size,
            rounds=config.prefill_rounds,
        )
        kept = {"identity": identity, "prefill_ms": times}
        write_atomically(path, json.dumps(kept, indent=1) + "\n")
    for entry, milliseconds in zip(entries, kept["prefill_ms"], strict=True):
        entry["evaluation"]["prefill_ms"] = milliseconds


def held_out_data(config: FrontierConfig, recipe: TuneConfig) -> DataConfig:
    """The recipe's held-out conversations, or the first of them."""
    return recipe.data if config.samples is None else replace(recipe.data, eval_samples=config.samples)


def _weights(model: str) -> list[Path]:
    """The files of the weights in a folder; none for a release of the Hub, which has a revision."""
    return sorted(Path(model).rglob("*.safetensors")) if Path(model).is_dir() else []


def _conversations(data: DataConfig, *, held_out: bool) -> list[Path]:
    """The file of the conversations; none where they are no file."""
    source = data.eval_instructions if held_out else data.instructions
    assert source is not None
    file = Path(source)
    if source == DEMO:
        folder = (
            demo_folder(data.demo_scenes, True) if held_out else demo_folder(data.demo_scenes, False, data.fraction)
        )
        file = folder / "instructions.json"
    return [file] if file.is_file() else []


def measure(untuned: Sequence[Point], config: FrontierConfig, recipe: TuneConfig) -> list[dict[str, Any]]:
    """The entries of the points, and of those tuned: what is not kept is tuned and evaluated, and prefill is timed."""
    accelerator, entries = Accelerator(), []
    points = [*untuned, *(tuned_points(config, untuned) if config.tune else [])]
    for number, point in enumerate(points, start=1):
        print(f"[{number}/{len(points)}] {point.name}", flush=True)
        model = str(tune_point(point, config, recipe) / FINAL) if point.tuned else recipe.model
        entries.append(evaluate_point(point, model, config, recipe, accelerator))
    time_prefill(untuned, entries[: len(untuned)], config, recipe, accelerator)
    return entries


def write(entries: Sequence[Mapping[str, Any]], config: FrontierConfig, recipe: TuneConfig) -> None:
    """The table, the picture and the JSON."""
    output, rows = Path(config.output), summarise(entries)
    write_atomically(output / "table.md", show(rows))
    draw(rows, output / "frontier.png")
    plain = [{**asdict(row), "mean": row.mean, "spread": row.spread} for row in rows]
    report = {
        "recipe": config.recipe,
        "model": recipe.model,
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "seeds": config.seeds,
        "rows": plain,
    }
    write_atomically(output / "frontier.json", json.dumps(report, indent=1) + "\n")
    say(f"written: {output / 'frontier.json'}, {output / 'frontier.png'}, {output / 'table.md'}")


def main(argv: Sequence[str]) -> None:
    config = parse_config(FrontierConfig, argv, default=DEFAULT, program="frontier.py")
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
