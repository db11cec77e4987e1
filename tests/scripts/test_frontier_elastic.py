"""The frontier with one projector for all budgets, beside those that are tuned for one each."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import ROOT, write_points_recipe

from shortzip.data.kept import Kept
from shortzip.reduction.reductions import Reductions
from shortzip.scripts.frontier import main
from shortzip.scripts.tune_points import candidate_of, run_of, tune_point
from shortzip.train.evaluation.frontier_points import ELASTIC, points_of, share_of, tuned_as, tuned_points
from shortzip.train.evaluation.frontier_report import GRID_OF_POINTS
from shortzip.train.settings.budget import BudgetScheduleConfig, VisionZipConfig
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import load_config, parse_config
from shortzip.train.settings.config import DataConfig, TuneConfig
from shortzip.train.settings.frontier import FrontierConfig

LAYERS = {("lc", "0", budget, 0): [] for budget in ("all", "4+2", "8+4")}
LAYERS |= {("lc", "50%", "all", 0): [1, 2], ("lc", "50%", "4+2", 0): [0, 1], ("lc", "50%", "8+4", 0): [0, 2]}


def config(**changes: Any) -> FrontierConfig:
    settings: dict[str, Any] = {"budgets": ["4+2", "8+4"], "freeze": ["0", "50%"], "seeds": [0, 1]}
    settings |= {"output": "out", "elastic": True, "tune": True}
    return FrontierConfig("r.yaml", **{**settings, **changes})


def test_each_budget_is_a_point_and_all_of_one_seed_are_one_run() -> None:
    points = points_of(config(), LAYERS)
    ours = [(point.budget, point.reductions.layers) for point in points if point.series == ELASTIC]
    assert ours == [("4+2", []), ("8+4", []), ("4+2", [0, 1]), ("8+4", [0, 1])], "layers of the first budget"
    assert not [point for point in points_of(config(elastic=False), LAYERS) if point.series == ELASTIC]
    tuned = [point for point in tuned_points(config(), points) if point.series == ELASTIC]
    assert len({point.name for point in tuned}) == len(tuned) == 8
    assert len({tuned_as(point, config()).name for point in tuned}) == 4, "two seeds, two numbers of frozen layers"
    others = [point for point in tuned_points(config(), points) if point.series != ELASTIC]
    assert all(tuned_as(point, config()) == point for point in others)


def test_its_run_has_all_budgets_and_its_points_load_one_each() -> None:
    recipe = TuneConfig(
        model="m", data=DataConfig("d.json"), visionzip=VisionZipConfig(6, 3),
        budget_schedule=BudgetScheduleConfig(12, 0.5),
    )  # fmt: skip
    tuned = tuned_points(config(), points_of(config(), LAYERS))
    runs = {point.name: run_of(point, config(), recipe) for point in tuned}
    ours = [runs[point.name] for point in tuned if point.series == ELASTIC]
    assert all(run.budgets == ["4+2", "8+4"] and not run.sandwich for run in ours)
    assert all(run.visionzip == VisionZipConfig(4, 2) and run.budget_schedule is None for run in ours)
    assert len({run.output_dir for run in ours}) == 4
    assert all(run.data.cache_features is not None for run in ours)
    assert not any(runs[point.name].budgets for point in tuned if point.series != ELASTIC)
    of_list = replace(recipe, budget_schedule=None, budgets=["6+3", "12+6"])
    alone = run_of(next(point for point in tuned if point.series == GRID_OF_POINTS), config(), of_list)
    assert alone.budgets == [], "a recipe for several is taken for one where one is asked"
    assert all(run_of(point, config(sandwich=True), recipe).sandwich for point in tuned if point.series == ELASTIC)
    for point in tuned:
        loaded = candidate_of(point, "checkpoint", recipe).reductions
        assert loaded == (point.reductions if point.series == ELASTIC else None)


def test_points_of_one_run_are_in_one_share() -> None:
    points = tuned_points(config(), points_of(config(), LAYERS))
    shares = [share_of(points, config(), number, 3) for number in (1, 2, 3)]
    assert sorted(point.name for share in shares for point in share) == sorted(point.name for point in points)
    homes = [{tuned_as(point, config()).name for point in share} for share in shares]
    assert len(set.union(*homes)) == sum(map(len, homes))
    alone = config(elastic=False)
    points = tuned_points(alone, points_of(alone, LAYERS))
    assert share_of(points, alone, 2, 3) == points[1::3], "as before there were such runs"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budgets": ["4+2"]}, r"elastic is true, and budgets is \['4\+2'\]: two or more"),
        ({"budgets": ["4+2", "3+3"]}, "elastic: two of budgets have 6 tokens"),
        ({"elastic": False, "sandwich": True}, "sandwich is true, and elastic is false"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**changes)


def test_the_shipped_config_is_read() -> None:
    shipped = ROOT / "configs" / "eval" / "frontier-elastic-demo.yaml"
    found = parse_config(FrontierConfig, ["--config", str(shipped), "--tune", "true"], default=None, program="test")
    assert (found.elastic, found.budgets) == (True, ["12+4", "24+8", "48+16"])
    layers = {("lc", "0", budget, 0): [] for budget in ("all", *found.budgets)}
    recipe = load_config(["--config", str(ROOT / found.recipe)])
    for point in tuned_points(found, points_of(found, layers)):
        run_of(point, found, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_it_is_shown_beside_those_for_one_budget_each(
    processes: int, tiny_release: Path, tiny_instructions: Path, tiny_held_out: Path, tmp_path: Path
) -> None:
    recipe = write_points_recipe(tmp_path / "recipe.yaml", tiny_release, tiny_instructions, tiny_held_out)
    asked = {
        "recipe": str(recipe), "output": str(tmp_path / "out"), "budgets": ["4+2", "8+4"], "elastic": True,
        "tune": True, "seeds": [0], "prefill_rounds": 1, "processes": processes,
    }  # fmt: skip
    (tmp_path / "frontier.yaml").write_text(yaml.safe_dump(asked))
    main(["--config", str(tmp_path / "frontier.yaml")])
    rows = json.loads((tmp_path / "out" / "frontier.json").read_text())["rows"]
    tuned = {(row["series"], row["budget"]): row["visual_tokens"] for row in rows if row["tuned"]}
    assert tuned == {
        ("all tokens", "all"): 36, (GRID_OF_POINTS, "4+2"): 6, (GRID_OF_POINTS, "8+4"): 12,
        (ELASTIC, "4+2"): 6, (ELASTIC, "8+4"): 12,
    }  # fmt: skip
    runs = [path.name for path in (tmp_path / "out" / "runs").iterdir()]
    assert len(runs) == 4
    (ours,) = [name for name in runs if name.startswith("one-projector")]
    saved = json.loads((tmp_path / "out" / "runs" / ours / "final" / "config.json").read_text())
    assert [budget["dominant"] for budget in saved["budgets"]] == [4, 8]
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count(f"| {ELASTIC} |") == 2
    assert f"| {ELASTIC}: 8+4 visual tokens | 12 |" in table, "beside the projector for this budget alone"
    before = [path.stat().st_mtime_ns for path in (tmp_path / "out" / "points").glob("*.json")]
    main(["--config", str(tmp_path / "frontier.yaml")])
    assert [path.stat().st_mtime_ns for path in (tmp_path / "out" / "points").glob("*.json")] == before
    assert Reductions.from_config(saved) == Reductions.parse("4+2")


def test_what_was_tuned_before_there_were_lists_is_still_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[str] = []

    class Record(Kept):
        def find(self, name: str, parts: dict[str, Any]) -> Any:
            known.append(parts["recipe"])
            return super().find(name, parts)

    monkeypatch.setattr("shortzip.scripts.tune_points.Kept", Record)
    monkeypatch.setattr("shortzip.scripts.tune_points.tune", lambda run: None)
    asked, recipe = config(output=str(tmp_path)), load_config(["--max_steps", "7"])
    for point in tuned_points(asked, points_of(asked, LAYERS))[:1]:
        tune_point(point, asked, recipe, {})
    assert "budgets" not in known[0]
    assert "sandwich" not in known[0]
    for point in tuned_points(asked, points_of(asked, LAYERS)):
        if point.series == ELASTIC:
            tune_point(point, asked, recipe, {})
    assert "budgets:\n- 4+2\n- 8+4\n" in known[-1]
