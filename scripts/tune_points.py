"""Tunes and evaluates points of the frontier, one after the other in this process.

    python scripts/tune_points.py checkpoints/frontier-demo/frontier.yaml 1/2

scripts/frontier.py starts it, as often as it has `processes`: each works on its share of the points that lie beside
the YAML. What is done is kept, so that it continues where it was interrupted.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from shortzip.data.drops import DropLog
from shortzip.data.errors import UserError
from shortzip.data.files import read_json, write_atomically
from shortzip.data.kept import Kept, conversations_digest, identity_of
from shortzip.reduction.errors import ReductionError
from shortzip.reduction.selectors import has_own_budgets
from shortzip.train.evaluation.answers import write_answers
from shortzip.train.evaluation.comparison import Candidate, answer_files, compare
from shortzip.train.evaluation.frontier_points import ELASTIC, Point, is_cacheable, point_of, share_of, tuned_as
from shortzip.train.inputs.samples import held_out_conversations, training_conversations
from shortzip.train.release.opening import open_release, release_content
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.run.run_folder import FINAL, STATUS, is_finished
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import dump_config, load_config, parse_config, run_command, what_to_mend
from shortzip.train.settings.config import DataConfig, FastVConfig, ShortVConfig, TuneConfig, VisionZipConfig
from shortzip.train.settings.frontier import FrontierConfig
from shortzip.train.tune_projector import run as tune

FORMAT = 2  # of what is kept of a point: to be raised when that changes
POINTS = "points.json"  # beside the YAML: those to be measured
# Folders in `output` that runs share: of the tower's features, of token counts, and of what a teacher says.
CACHES = ("features", "tokens", "lessons")


def recipes_of(config: FrontierConfig) -> dict[str, TuneConfig]:
    """The recipe, as "", and that of each training by its name. Raises ConfigError for settings that no run has."""
    recipes = {"": load_config(["--config", config.recipe])}
    for training in config.trainings:
        words: list[str] = []
        for key, value in training.settings.items():
            words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        try:
            recipes[training.name] = load_config(["--config", config.recipe, *words])
        except (UserError, ReductionError) as error:
            raise ConfigError(f"trainings: {training.name}: {error}") from error
    return recipes


def tuned_on(point: Point, recipe: TuneConfig) -> dict[str, Any]:
    """The content of what a tuned point is made of: the release's files, the conversations and their images."""
    release = open_release(ReleaseSpec.of(recipe))
    drops = DropLog(recipe.data.on_bad_sample, recipe.data.max_bad_fraction)
    conversations, root = training_conversations(recipe.data, point.seed or 0, drops)
    return {**release_content(release), "conversations": conversations_digest(conversations, root)}


def run_of(point: Point, config: FrontierConfig, recipe: TuneConfig) -> TuneConfig:
    """The run that tunes a point: that of `recipe`, which is its training's (`recipes_of`), reduced as the point is,
    and without what it shows at its end.

    Runs share what the tower gives of each image, where that is all that the choice depends on and no teacher reads
    all of it, and token counts.
    """
    point = tuned_as(point, config)
    is_elastic, zipped = point.series == ELASTIC, point.reductions.visionzip
    own_budgets = zipped is not None and has_own_budgets(zipped)
    schedule, budget = recipe.budget_schedule, 0 if zipped is None else zipped["dominant"] + zipped["contextual"]
    if is_elastic or own_budgets or (schedule is not None and not 0 < budget < schedule.start):
        schedule = None  # there is nothing to come down to
    distill = None if own_budgets else recipe.distill
    features, tokens, lessons = (str(Path(config.output) / name) for name in CACHES)
    falls_slowly = schedule is not None and schedule.stages is None
    kept = features if is_cacheable(point.reductions) and not falls_slowly else None
    said = lessons if distill is not None else None
    return replace(
        recipe,
        visionzip=VisionZipConfig.of(zipped) if zipped else None,
        shortv=ShortVConfig(layers=point.reductions.layers) if point.reductions.shortv else None,
        fastv=FastVConfig(**point.reductions.fastv) if point.reductions.fastv else None,
        positions="original" if point.positions == "original" else "compact",
        budget_schedule=schedule,
        distill=distill,
        budgets=list(config.budgets) if is_elastic else [],
        sandwich=is_elastic and config.sandwich,
        data=replace(recipe.data, cache_features=kept, cache_teacher=said, cache_dir=tokens),
        cpu_threads=recipe.cpu_threads if config.processes == 1 else 1,
        seed=point.seed or 0,
        output_dir=str(Path(config.output) / "runs" / point.name),
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


def tune_point(point: Point, config: FrontierConfig, recipe: TuneConfig, content: Mapping[str, Any]) -> Path:
    """The folder of the run of a tuned point: tuned now, or continued, unless it is finished by the same recipe on the
    same `content` (`tuned_on`).

    Raises what the run raises; ends this process, with the run stopped, when that is asked to stop meanwhile.
    """
    run, point = run_of(point, config, recipe), tuned_as(point, config)
    folder = Path(run.output_dir)
    given, text = Path(config.output) / "recipes" / f"{point.name}.yaml", dump_config(run)
    # As recipes were written before there were these keys, so that what was tuned by them is still known.
    known_as = text
    for line in ("budgets: []\n", "sandwich: false\n", "  stages: null\n"):
        known_as = known_as.replace(line, "")
    kept, parts = Kept(given.parent), {"recipe": known_as, **content}
    is_begun = kept.find(point.name, parts) is not None and (folder / STATUS).is_file()
    if is_begun and is_finished(folder):
        return folder
    kept.keep(point.name, parts, "begun")
    write_atomically(given, text)
    tune(replace(run, resume_from_checkpoint="latest") if is_begun else replace(run, overwrite_output_dir=True))
    return folder


def candidate_of(point: Point, model: str, recipe: TuneConfig) -> Candidate:
    """What is evaluated of a point: `model` is the recipe's, or of a tuned point its checkpoint."""
    release = ReleaseSpec.of(recipe)
    if point.tuned:
        reductions = point.reductions if point.series == ELASTIC else None  # else as it was saved
        return Candidate(point.name, release.tuned(model), reductions)
    return Candidate(point.name, release, point.reductions)


def evaluate_point(
    point: Point, model: str, config: FrontierConfig, recipe: TuneConfig, accelerator: Accelerator
) -> dict[str, Any]:
    """The point's values; kept from before where model, reduction, settings and conversations are the same."""
    data, candidate = held_out_data(config, recipe), candidate_of(point, model, recipe)
    drops = DropLog(data.on_bad_sample, data.max_bad_fraction)
    release = open_release(candidate.spec)
    timed = not (point.tuned or (config.tokens and point.series in config.methods))  # else the time is not shown
    parts = {
        "candidate": {**asdict(candidate), "spec": candidate.spec.as_config()},
        "data": asdict(data),
        "batch_size": recipe.eval_batch_size,
        "max_new_tokens": recipe.max_new_tokens,
        "device": str(accelerator.device),
        **release_content(release),
        "conversations": conversations_digest(*held_out_conversations(data, drops)),
        "format": FORMAT,
        "timed": timed,
    }

    def measured() -> dict[str, Any]:
        (found,), (answers,) = compare(
            [candidate],
            data,
            accelerator,
            batch_size=recipe.eval_batch_size,
            max_new_tokens=recipe.max_new_tokens,
            timed=timed,
        )
        write_answers(Path(config.output) / "answers" / answer_files([point.name])[0], answers)
        return {
            "point": asdict(point),
            "evaluation": asdict(found),
            "questions": [[answer.id, answer.turn] for answer in answers],
            "correct": [answer.correct for answer in answers],
            "identity": identity_of(parts),
        }

    return Kept(Path(config.output) / "points").get(point.name, parts, measured)


def held_out_data(config: FrontierConfig, recipe: TuneConfig) -> DataConfig:
    """The recipe's held-out conversations, or the first of them."""
    return recipe.data if config.samples is None else replace(recipe.data, eval_samples=config.samples)


class PointsFailed(UserError):
    """Some of the points could not be measured, which the others did not wait for."""


def measure_share(config: FrontierConfig, points: Sequence[Point]) -> None:
    """Tunes and evaluates points, in their order; says which one it is at.

    Raises `PointsFailed`, when all others are measured, for those that were not.
    """
    recipes, accelerator = recipes_of(config), Accelerator()
    recipe = recipes[""]
    contents: dict[tuple[str, int | None], dict[str, Any]] = {}
    failures = []
    for number, point in enumerate(points, start=1):
        print(f"[{number}/{len(points)}] {point.name}", flush=True)
        model = recipe.model
        try:
            if point.tuned:
                data = point.training, point.seed
                if data not in contents:
                    contents[data] = tuned_on(point, recipes[point.training])
                model = str(tune_point(point, config, recipes[point.training], contents[data]) / FINAL)
            evaluate_point(point, model, config, recipe, accelerator)
        except Exception as error:  # hours of other points shall not wait for somebody to see to this one
            if what_to_mend(error) is None:
                traceback.print_exc()
            failures.append(f"{point.name}: {error}")
            print(f"failed: {failures[-1]}", flush=True)
    if failures:
        raise PointsFailed(f"{len(failures)} of {len(points)} points failed; {failures[0]}")


def main(argv: Sequence[str]) -> None:
    if len(argv) != 2:
        raise ConfigError(f"a frontier's YAML and a share like 1/2 are needed, and there are {len(argv)} arguments")
    config = parse_config(FrontierConfig, ["--config", argv[0]], program="tune_points.py")
    number, _, processes = argv[1].partition("/")
    points = [point_of(values) for values in read_json(Path(argv[0]).with_name(POINTS))["points"]]
    if config.processes > 1:
        torch.set_num_threads(1)
    measure_share(config, share_of(points, config, int(number), int(processes)))


if __name__ == "__main__":
    run_command(main)
