"""The frontier's methods at equal tokens: points, comparison question by question, tables and picture."""

import json
import math
import re
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.text import Text

from shortzip.data.errors import UserError
from shortzip.reduction.flops import visual_tokens_by_layer
from shortzip.reduction.reductions import Reductions
from shortzip.reduction.selectors import BASELINES, SELECTORS
from shortzip.scripts.frontier import layers_to_freeze, main
from shortzip.scripts.tune_points import run_of
from shortzip.train.evaluation.frontier_points import Point, points_of, reductions_at, tuned_points
from shortzip.train.evaluation.methods_picture import picture_of_methods
from shortzip.train.evaluation.methods_table import method_rows, show_methods
from shortzip.train.evaluation.selection_cost import SelectionCost, selection_costs
from shortzip.train.release.loading import load_release
from shortzip.train.release.opening import open_release
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import load_config, parse_config
from shortzip.train.settings.frontier import FrontierConfig, Kind

ROOT = Path(__file__).parents[2]


def at_equal_tokens(**changes: object) -> FrontierConfig:
    settings = {
        "recipe": "r.yaml", "output": "out", "tokens": [8, 4], "methods": ["visionzip", "pool", "downsample"],
        "seeds": [0, 1], "resamples": 200,
        "kinds": [Kind("place", "^Where"), Kind("count", "many")],
    }  # fmt: skip
    return FrontierConfig(**{**settings, **changes})  # type: ignore[arg-type]


def test_methods_are_held_to_equal_tokens() -> None:
    asked = at_equal_tokens(methods=["visionzip", "duet", "scope:alpha=2.0", "dominant only", "random"])
    points = points_of(asked, {("lc", "0", "all", 0): []})
    assert {point.tokens for point in points[1:]} == {8, 4}
    budgets = {(point.series, point.budget) for point in points if point.tokens == 8}
    assert budgets == {
        ("visionzip", "6+2"), ("duet", "6+2"), ("scope:alpha=2.0", "8+0"), ("dominant only", "8+0"), ("random", "8+0")
    }  # fmt: skip
    scope = next(point for point in points if point.series.startswith("scope"))
    assert scope.reductions.visionzip == {"dominant": 8, "contextual": 0, "method": "scope", "alpha": 2.0}
    assert len({point.name for point in points}) == len(points) == 1 + 2 * 6
    tuned = tuned_points(at_equal_tokens(tune=True), points_of(at_equal_tokens(), {("lc", "0", "all", 0): []}))
    order = [(point.tokens, point.seed, point.series) for point in tuned]
    methods = ["visionzip", "pool", "downsample"]
    assert order[:-2] == [(tokens, seed, method) for tokens in (4, 8) for seed in (0, 1) for method in methods]
    assert {series for _, _, series in order[-2:]} == {"all tokens"}


def test_pruning_inside_the_language_model_stands_beside_methods_at_equal_tokens() -> None:
    """As the demo's table has it: as many visual tokens per layer, on average, as its rows of 64."""
    path = ROOT / "configs" / "eval" / "frontier-methods-demo.yaml"
    asked = parse_config(FrontierConfig, ["--config", str(path)], program="frontier.py")
    points = points_of(asked, {("lc", "0", "all", 0): []})
    pruned = {point.series: point for point in points if point.reductions.fastv}
    assert list(pruned) == ["FastV", "PyramidDrop", "SparseVLM"]
    for point in pruned.values():
        assert point.reductions.visionzip is None
        assert point.reductions.fastv is not None
        assert 63 <= sum(visual_tokens_by_layer(point.reductions.fastv, 144, 8)) / 8 <= 64
    assert len({point.name for point in points}) == len(points)
    assert not {point.series for point in pruned.values()} & set(asked.methods), "rows of a table of their own"
    assert {point.tokens for point in tuned_points(asked, points)[-9:]} == {math.inf}, "tuned last: they take longest"


def entry(method: str, tokens: int, correct: str, seed: int | None = None, tuned: bool = False) -> dict[str, Any]:
    point = Point(method, reductions_at(method, tokens, 0.25), seed, tuned)
    return {
        "point": asdict(point),
        "questions": [[f"row {number}", 0] for number in range(len(correct))],
        "correct": [answer == "+" for answer in correct],
    }


TEXTS = {(f"row {number}", 0): text for number, text in enumerate(["Where is it?", "How many?", "Where?", "Is it?"])}
MEASURED = [
    entry("visionzip", 8, "++--"), entry("pool", 8, "+++-"), entry("downsample", 8, "+---"),
    entry("visionzip", 8, "++--", 0, True), entry("visionzip", 8, "+++-", 1, True), entry("pool", 8, "++++", 1, True),
    entry("visionzip", 4, "----"),
]  # fmt: skip


def test_methods_are_compared_question_by_question() -> None:
    rows = {(row.method, row.tokens, row.tuned): row for row in method_rows(MEASURED, at_equal_tokens(), TEXTS)}
    assert next(iter(rows)) == ("visionzip", 4, False), "fewest tokens first, then in the order of the methods"
    pool = rows["pool", 8, False]
    assert pool.difference is not None
    assert (pool.difference.mean, pool.difference.is_noise) == (0.25, True)
    assert pool.difficult_questions == 3
    assert pool.difficult == pytest.approx(2 / 3)
    assert rows["downsample", 8, False].difficult == 0
    assert rows["visionzip", 4, False].difficult is None, "nothing says there which questions are difficult"
    assert pool.kinds == {"place": 1.0, "count": 1.0, "other": 0.0}
    assert rows["visionzip", 8, True].exact_match == [0.5, 0.75]
    tuned = rows["pool", 8, True].difference
    assert tuned is not None
    assert tuned.mean == 0.25, "of the seed that both were tuned with"
    assert rows["visionzip", 8, True].difference is None


def test_the_tables_say_what_is_noise() -> None:
    costs = {("visionzip", 8): SelectionCost(0.5, 5.0)}
    text = show_methods(method_rows(MEASURED, at_equal_tokens(), TEXTS), costs, at_equal_tokens())
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    of_pool = next(line for line in lines if line[:2] == ["pool", "8+0"])
    assert of_pool[3] == "75.0 %"
    assert re.fullmatch(r"\+25\.0 \[\+0\.0, \+75\.0\] \(noise\)", of_pool[4])
    of_visionzip = next(line for line in lines if line[:2] == ["visionzip", "6+2"])
    assert of_visionzip[3:] == ["50.0 %", "", "62.5 ± 17.7 %", "", "33.3", "50.0", "0.50"]
    assert "the 3 questions that the untuned model gets wrong on down-sampled images" in text
    assert "the tower takes 5.00" in text
    assert "### By kind of question" in text


def test_names_in_the_picture_of_ten_methods_do_not_cover_each_other() -> None:
    methods = ["visionzip", "divprune", "vispruner", "scope", "dpp", "duet", "fastervlm", "prumerge+", "pool", "grid"]
    entries = [
        entry(method, tokens, "+" * (number % 3) + "-" * (40 - number % 3), seed, seed is not None)
        for tokens in (4, 8) for number, method in enumerate(methods) for seed in (None, 0)
    ]  # fmt: skip
    figure = picture_of_methods(method_rows(entries, at_equal_tokens(methods=methods, kinds=[]), {}), 0.5)
    assert len(figure.axes) == 2
    for axis in figure.axes:
        boxes = [Text.get_window_extent(label) for label in axis.texts]
        assert len(boxes) == 11
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
        assert all(axis.bbox.x0 <= box.x0 and box.x1 <= axis.bbox.x1 for box in boxes)


def test_bad_settings_of_methods_are_refused() -> None:
    for changes, message in (
        ({"methods": ["scop"]}, "method is 'scop'"),
        ({"methods": ["scope:beta=1"]}, "beta"),
        ({"tokens": [8, 8]}, "tokens: 8 stands there twice"),
        ({"tokens": [0]}, r"tokens \[0\]"),
        ({"contextual_share": 1.0}, "contextual_share is 1.0"),
        ({"tune_original": ["scope"]}, "'scope' is none of methods"),
        ({"positions": []}, "positions is empty"),
        ({"processes": 0}, "processes 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            at_equal_tokens(**changes)
    with pytest.raises(ConfigError, match=r"kinds: place: '\(' is no regular expression"):
        Kind("place", "(")


def test_what_choosing_costs_is_measured_beside_the_tower(tiny_release: Path) -> None:
    model, _ = load_release(open_release(str(tiny_release)), Reductions())
    methods = [*SELECTORS, *BASELINES]
    reductions = [Reductions(), *(reductions_at(method, 9, 0.25) for method in methods)]
    costs = selection_costs(model, reductions, torch.rand(2, 3, 24, 24), rounds=1)
    assert len({cost.tower_ms for cost in costs}) == 1
    assert costs[0].tower_ms > costs[0].selection_ms >= 0, "all tokens: nothing is chosen"
    assert all(cost.selection_ms > 0 for cost in costs[1:])


@pytest.mark.slow
def test_the_whole_table_on_a_tiny_release(tiny_release: Path, tiny_held_out: Path, tmp_path: Path) -> None:
    data = {"instructions": str(tiny_held_out), "eval_instructions": str(tiny_held_out), "eval_samples": 3}
    recipe = {
        "model": str(tiny_release), "mixed_precision": "no", "max_new_tokens": 4, "output_dir": str(tmp_path / "run"),
        "data": {**data, "num_workers": 0},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    settings = {
        "recipe": str(tmp_path / "recipe.yaml"), "output": str(tmp_path / "out"), "tokens": [9],
        "methods": ["visionzip", "scope", "downsample"], "positions": ["compact", "original"], "seeds": [0],
        "kinds": [{"name": "colour", "pattern": "colour"}], "resamples": 100, "prefill_rounds": 1,
        "fastv": [{"layer": 1, "keep": 0.25}, {"method": "pyramiddrop", "layers": [1, 2], "keep": [0.5, 0.1]}],
    }  # fmt: skip
    (tmp_path / "frontier.yaml").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"nothing is measured in .* yet"):
        main(["--config", str(tmp_path / "frontier.yaml"), "--report_only", "true"])
    main(["--config", str(tmp_path / "frontier.yaml")])
    report = json.loads((tmp_path / "out" / "frontier.json").read_text())
    names = ["all tokens", "FastV, K = 1, 25 % kept", "PyramidDrop: 0.5, 0.1 of them kept before layers 1, 2"]
    assert [row["series"] for row in report["rows"]] == names, "those that are not held to a number of tokens"
    rows = report["methods"]
    assert [(row["method"], row["budget"], row["positions"]) for row in rows] == [
        (method, budget, positions)
        for method, budget in (("visionzip", "7+2"), ("scope", "9+0"), ("downsample", "9+0"))
        for positions in ("compact", "original")
    ]
    assert rows[2]["difference"]["low"] <= rows[2]["difference"]["mean"] <= rows[2]["difference"]["high"]
    assert rows[1]["to_compact"]
    assert set(rows[0]["kinds"]) <= {"colour", "other"}
    table = (tmp_path / "out" / "table.md").read_text()
    assert "### 9 visual tokens" in table
    assert all(f"| {name} |" in table for name in names)
    assert "### Original positions" in table
    assert (tmp_path / "out" / "frontier.png").stat().st_size > 10_000
    points = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "points").glob("*.json")}
    assert len(points) == 9
    main(["--config", str(tmp_path / "frontier.yaml")])
    main(["--config", str(tmp_path / "frontier.yaml"), "--report_only", "true"])
    assert points == {path: path.stat().st_mtime_ns for path in points}
    assert table == (tmp_path / "out" / "table.md").read_text(), "the same answers, the same intervals"


def test_a_recipe_that_distills_or_keeps_positions_is_a_points(
    tiny_release: Path, tiny_held_out: Path, tmp_path: Path
) -> None:
    """What a teacher says is kept, for a cache of features has no pixels; layers are chosen as the points' positions
    have it."""
    data = {"instructions": str(tiny_held_out), "eval_instructions": str(tiny_held_out), "num_workers": 0}
    path, budget = tmp_path / "recipe.yaml", {"dominant": 4, "contextual": 2}
    recipe = {"model": str(tiny_release), "data": {**data, "cache_features": str(tmp_path)}, "visionzip": budget}
    recipe |= {"positions": "original", "mixed_precision": "no"}
    path.write_text(json.dumps(recipe))
    asked = FrontierConfig(
        recipe=str(path), output=str(tmp_path / "out"), budgets=["4+2"], freeze=["1"], methods=["scope"],
        tokens=[6], seeds=[0],
    )  # fmt: skip
    points = points_of(asked, layers_to_freeze(asked, load_config(["--config", str(path)])))
    point = next(point for point in points if point.series == "scope")
    assert run_of(point, asked, load_config(["--config", str(path)])).data.cache_features is not None
    path.write_text(json.dumps({**recipe, "data": data, "distill": {"weight": 0.5}}))
    taught = run_of(point, asked, load_config(["--config", str(path)]))
    assert taught.distill is not None
    assert taught.data.cache_teacher is not None
    config = {**asdict(asked), "fastv": [{"layer": 1, "keep": 0.5}], "tune": True}
    (tmp_path / "frontier.yaml").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="distills, which pruned points cannot"):
        main(["--config", str(tmp_path / "frontier.yaml")])
