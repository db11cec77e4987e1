"""The frontier's trainings: each point tuned in several ways, and what each of them wins back."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import ROOT, write_points_recipe, write_recipe

from shortzip.reduction.reductions import Reductions
from shortzip.scripts.frontier import main
from shortzip.scripts.tune_points import recipes_of, run_of
from shortzip.train.evaluation.frontier_points import ELASTIC, Point, point_of, points_of, tuned_points
from shortzip.train.evaluation.frontier_report import GRID_OF_POINTS
from shortzip.train.evaluation.trainings_table import show_trained, trained_rows
from shortzip.train.settings.budget import BudgetScheduleConfig, PerImageConfig, VisionZipConfig
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import parse_config
from shortzip.train.settings.config import DataConfig, TuneConfig
from shortzip.train.settings.distill import DistillConfig
from shortzip.train.settings.frontier import FrontierConfig, Training

OWN_NAME = "4+2 visual tokens' shares, 3 to 12 by coverage 0.5"
LAYERS = {("lc", "0", budget, 0): [] for budget in ("all", "4+2", "8+4")}
OWN = VisionZipConfig(4, 2, per_image=PerImageConfig("coverage", coverage=0.5, min=3, max=12))
SHORT, LONG = Training("short"), Training("long", {"max_steps": 8})


def config(**changes: Any) -> FrontierConfig:
    settings: dict[str, Any] = {"budgets": ["4+2", "8+4"], "seeds": [0, 1], "output": "out", "tune": True}
    return FrontierConfig("r.yaml", **{**settings, "trainings": [SHORT, LONG], "resamples": 200, **changes})


def test_every_point_is_tuned_in_each_way_and_all_tokens_in_the_first() -> None:
    tuned = tuned_points(config(), points_of(config(), LAYERS))
    found = [(point.budget, point.training) for point in tuned if point.seed == 0]
    assert found == [("all", "short"), ("4+2", "short"), ("8+4", "short"), ("4+2", "long"), ("8+4", "long")]
    assert len({point.name for point in tuned}) == len(tuned) == 10
    assert [point_of(asdict(point)) for point in tuned] == tuned
    before = {key: value for key, value in asdict(tuned[1]).items() if key != "training"}
    assert point_of(before).training == "", "as points were kept before there were trainings"
    alone = tuned_points(config(trainings=[]), points_of(config(), LAYERS))
    assert [point.name for point in alone] == [point.name.removesuffix("--short") for point in tuned[:6]]
    methods = config(methods=["grid"], tokens=[6], trainings=[SHORT, LONG])
    named = [point.training for point in tuned_points(methods, points_of(methods, LAYERS)) if point.tokens == 6]
    assert named == sorted(named, reverse=True), "one training after the other"


def test_a_training_is_the_recipe_with_other_values(
    tiny_release: Path, tiny_instructions: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_release, tiny_instructions, max_steps=2)
    settings = {"max_steps": 8, "distill": {"weight": 0.25}, "data.fraction": 0.5, "lr_scheduler_type": "linear"}
    asked = FrontierConfig(str(recipe), "out", budgets=["4+2"], trainings=[SHORT, Training("other", settings)])
    recipes = recipes_of(asked)
    assert recipes["short"] == recipes[""]
    other = recipes["other"]
    assert (other.max_steps, other.distill, other.data.fraction) == (8, DistillConfig(0.25), 0.5)
    assert other.lr_scheduler_type == "linear", "a word as it stands there"
    assert other.learning_rate == recipes[""].learning_rate
    with pytest.raises(ConfigError, match=r"trainings: bad: distill.weight is 2.0"):
        recipes_of(replace(asked, trainings=[Training("bad", {"distill.weight": 2})]))


def test_stages_are_kept_and_a_budget_for_each_image_has_neither_schedule_nor_teacher() -> None:
    schedule = BudgetScheduleConfig(12, 0.5, stages=3)
    recipe = TuneConfig(
        model="m", data=DataConfig("d.json"), visionzip=VisionZipConfig(6, 3), distill=DistillConfig(),
        budget_schedule=schedule,
    )  # fmt: skip
    asked = config(per_image=[OWN], elastic=True)
    runs = {point.series + point.budget: run_of(point, asked, recipe) for point in points_of(asked, LAYERS)}
    fixed = runs[f"{GRID_OF_POINTS}4+2"]
    assert (fixed.budget_schedule, fixed.data.cache_features) == (schedule, str(Path("out") / "features"))
    (own,) = [run for name, run in runs.items() if "by coverage" in name]
    assert (own.budget_schedule, own.distill, own.data.cache_teacher) == (None, None, None)
    assert own.visionzip == OWN
    assert own.data.cache_features is not None


def entries() -> list[dict[str, Any]]:
    """Ten questions: all tokens answer nine, 4+2 untuned five, and tuned as below by seed."""

    def entry(series: str, budget: str, right: int, seed: int | None = None, training: str = "") -> dict[str, Any]:
        zipped = Reductions.parse(budget).visionzip
        own = {**(zipped or {}), "per_image": OWN.per_image.as_key()} if series == OWN_NAME else zipped  # type: ignore[union-attr]
        point = Point(series, Reductions(own), seed, seed is not None, training)
        tokens = 36.0 if budget == "all" else 6.25 if series == OWN_NAME else 6.0
        return {
            "point": asdict(point), "correct": [True] * right + [False] * (10 - right),
            "evaluation": {"visual_tokens": tokens, "exact_match": right / 10, "llm_flops": 1, "prefill_ms": 1.0},
        }  # fmt: skip

    grid = [entry(GRID_OF_POINTS, "4+2", 5)]
    grid += [entry(GRID_OF_POINTS, "4+2", right, seed, "short") for seed, right in ((0, 6), (1, 8))]
    grid += [entry(GRID_OF_POINTS, "4+2", right, seed, "long") for seed, right in ((0, 8), (1, 8))]
    own = [entry(OWN_NAME, "4+2", 4), entry(OWN_NAME, "4+2", 9, 0, "short")]
    return [entry("all tokens", "all", 9), *grid, *own, entry(ELASTIC, "4+2", 5, 1, "short")]


def test_what_is_won_back_and_against_what() -> None:
    rows = trained_rows(entries(), config())
    assert [(row.name, row.training) for row in rows] == [
        ("4+2 visual tokens", "short"), ("4+2 visual tokens", "long"), (OWN_NAME, "short"),
        (f"{ELASTIC}: 4+2 visual tokens", "short"),
    ]  # fmt: skip
    short, long, own, elastic = rows
    assert (short.mean, short.untuned, short.won_back) == (pytest.approx(0.7), 0.5, pytest.approx(0.5))
    assert short.difference is None, "the first is compared with nothing"
    assert long.difference is not None
    assert long.difference.mean == pytest.approx(0.1)
    assert long.to_own is None
    assert own.won_back == pytest.approx(1.0)
    assert own.visual_tokens == 6.25
    assert own.to_own is not None
    assert own.to_own.mean == pytest.approx(0.3), "over seed 0, which both have"
    assert elastic.to_own is not None
    assert elastic.to_own.mean == pytest.approx(-0.3), "over seed 1"
    assert elastic.untuned is None
    assert elastic.won_back is None
    table = show_trained(rows, config())
    assert "| 4+2 visual tokens | 6 | long | 50.0 | 80.0 ± 0.0 | 75% | +10.0 [" in table
    assert "(short) |" in table
    alone = trained_rows([each for each in entries() if each["point"]["training"] != "short"], config())
    assert alone[0].difference is None, "the other one is not measured yet"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainings": [SHORT, SHORT]}, "trainings: .*short"),
        ({"trainings": [SHORT, Training("a", against="b")]}, "trainings: a: against is 'b': another one is needed"),
        ({"trainings": [SHORT, Training("a", against="a")]}, "trainings: a: against is 'a': another one is needed"),
        ({"trainings": [Training("w 0.5"), Training("w-0.5")]}, "trainings: .*w-0.5"),
        ({"per_image": [VisionZipConfig(4, 2)]}, "per_image: .* gives all images one budget"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**changes)


@pytest.mark.parametrize(
    "key",
    ["visionzip", "shortv.freeze", "budgets", "seed", "max_new_tokens", "load_in_4bit", "data", "data.cache_dir"],
)
def test_what_a_point_is_and_how_it_is_measured_is_no_training(key: str) -> None:
    with pytest.raises(ConfigError, match=f"trainings: a: {key} does not say how to tune"):
        Training("a", {key: None})
    with pytest.raises(ConfigError, match="one of them has no name"):
        Training(" ")


def test_a_point_is_left_out_of_a_training_that_it_cannot_have() -> None:
    taught, falling = (
        Training("taught", {"distill.weight": 0.5}),
        Training("falling", {"budget_schedule": {"start": 12}}),
    )
    asked = config(per_image=[OWN], elastic=True, trainings=[SHORT, taught, falling], seeds=[0])
    found: dict[str, list[str]] = {}
    for point in tuned_points(asked, points_of(asked, LAYERS)):
        found.setdefault(f"{point.series}, {point.budget}", []).append(point.training)
    every = ["short", "taught", "falling"]
    assert found == {
        "all tokens, all": every[:1], f"{GRID_OF_POINTS}, 4+2": every, f"{GRID_OF_POINTS}, 8+4": every[:2],
        f"{OWN_NAME}, 4+2": every[:1], f"{ELASTIC}, 4+2": every[:2], f"{ELASTIC}, 8+4": every[:2],
    }  # fmt: skip
    assert Training("a", {"budget_schedule.start": 9}).starts_at == 9
    twice = config(per_image=[OWN, OWN])
    with pytest.raises(ConfigError, match=r"per_image: .* stands there twice"):
        points_of(twice, LAYERS)


def test_the_shipped_config_is_read() -> None:
    shipped = ROOT / "configs" / "eval" / "frontier-trainings-demo.yaml"
    found = parse_config(FrontierConfig, ["--config", str(shipped), "--tune", "true"], default=None, program="test")
    layers = {("lc", "0", budget, 0): [] for budget in ("all", *found.budgets)}
    recipes = recipes_of(found)
    assert recipes["all, 4x steps"].max_steps == 640
    for point in tuned_points(found, points_of(found, layers)):
        run_of(point, found, recipes[point.training])


@pytest.mark.slow
def test_trainings_and_budgets_for_each_image_are_shown(
    tiny_release: Path, tiny_instructions: Path, tiny_held_out: Path, tmp_path: Path
) -> None:
    recipe = write_points_recipe(tmp_path / "recipe.yaml", tiny_release, tiny_instructions, tiny_held_out)
    taught = {"distill": {"weight": 0.5}, "budget_schedule": {"start": 12, "share": 0.5, "stages": 2}}
    asked = {
        "recipe": str(recipe), "output": str(tmp_path / "out"), "budgets": ["4+2"], "tune": True, "seeds": [0],
        "prefill_rounds": 1, "resamples": 100,
        "per_image": [OWN.as_key()],
        "trainings": [{"name": "labels"}, {"name": "all", "settings": taught}],
    }  # fmt: skip
    (tmp_path / "frontier.yaml").write_text(yaml.safe_dump(asked))
    main(["--config", str(tmp_path / "frontier.yaml")])
    report = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert {row["tuned"] for row in report["rows"]} == {True, False}
    assert len(report["rows"]) == 6, "the first training's alone"
    rows = [(row["name"].split(",")[0], row["training"]) for row in report["trainings"]]
    own = "4+2 visual tokens' shares"
    assert rows == [("4+2 visual tokens", "labels"), (own, "labels"), ("4+2 visual tokens", "all")]
    assert report["trainings"][1]["to_own"]
    assert report["trainings"][2]["difference"]
    assert "### What tuning wins back" in (tmp_path / "out" / "table.md").read_text()
