"""The frontier: its points, its rows, and the whole of it on a tiny release."""

import json
from pathlib import Path

import pytest
import yaml
from tiny import LLM_LAYERS

from scripts.frontier import (
    DEFAULT,
    FrontierConfig,
    Point,
    main,
    points_of,
    tuned_points,
)
from train.config import ConfigError, FastVConfig, parse_config
from train.frontier_report import GRID_OF_POINTS, summarise

LAYERS = {("lc", "0", 0): [], ("lc", "60%", 0): [1, 2], ("cosine", "60%", 0): [2, 3]}
LAYERS |= {("random", "60%", seed): [seed, 3] for seed in (0, 1)}


def config(**changes: object) -> FrontierConfig:
    settings = {
        "recipe": "r.yaml", "output": "out", "budgets": ["6+3", "9+3"], "freeze": ["0", "60%"],
        "methods": ["random", "grid", "dominant only"], "fastv": [FastVConfig(2, 0.25)],
        "rankings": ["cosine", "random"], "seeds": [0, 1],
    }  # fmt: skip
    return FrontierConfig(**{**settings, **changes})  # type: ignore[arg-type]


def test_points_are_budgets_by_layers_and_the_baselines_at_equal_tokens() -> None:
    points = points_of(config(), LAYERS)
    grid = [(point.budget, point.frozen) for point in points if point.series == GRID_OF_POINTS]
    assert grid == [("6+3", 0), ("9+3", 0), ("all", 2), ("6+3", 2), ("9+3", 2)]
    others = {point.series: point for point in points}
    assert others["grid"].visionzip == {"dominant": 9, "contextual": 0, "method": "grid"}
    assert others["dominant only"].visionzip == {"dominant": 9, "contextual": 0}
    assert [point.visionzip["seed"] for point in points if point.series == "random" and point.visionzip] == [0, 1]
    assert [point.layers for point in points if point.series == "random layers"] == [(0, 3), (1, 3)]
    assert len({point.name for point in points}) == len(points)


def test_each_point_is_tuned_once_per_seed() -> None:
    points = points_of(config(), LAYERS)
    tuned = list(tuned_points(config(), points))
    assert len({point.name for point in tuned}) == len(tuned)
    assert all(point.tuned and point.seed in (0, 1) for point in tuned)
    for series in {point.series for point in points}:
        distinct = {(point.budget, point.frozen) for point in points if point.series == series}
        assert sum(point.series == series for point in tuned) == 2 * len(distinct), series


def test_seeds_become_mean_and_spread() -> None:
    entries = [
        {
            "point": {"series": "random", "budget": "9+0", "frozen": 0, "fastv": None, "tuned": False, "seed": seed},
            "evaluation": {"exact_match": value, "llm_flops": 10, "prefill_ms": time, "visual_tokens": 9.0},
        }
        for seed, value, time in ((0, 0.5, 3.0), (1, 0.6, 1.0), (2, 0.7, 2.0))
    ]
    (row,) = summarise(entries)
    assert (row.mean, row.prefill_ms) == (pytest.approx(0.6), 2.0)
    assert row.spread == pytest.approx(0.1)


def test_bad_settings_are_refused() -> None:
    for changes, message in (
        ({"methods": ["best"]}, "'best' is none of random"),
        ({"rankings": ["lc"]}, "'lc' is none of cosine"),
        ({"seeds": []}, "seeds is empty"),
        ({"budgets": []}, "budgets is empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(**changes)


def test_the_shipped_config_is_read() -> None:
    shipped = parse_config(FrontierConfig, ["--config", str(DEFAULT)], default=None, program="test")
    assert shipped.fastv[0].layer == 2
    assert Point("FastV", "all", 0, None, (), fastv={"layer": 2, "keep": 0.5}).name == "FastV-2-0.5--all--0-frozen"


def test_it_draws_and_continues(
    tiny_release: Path, tiny_held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {
        "model": str(tiny_release), "mixed_precision": "no", "max_new_tokens": 4, "output_dir": str(tmp_path / "run"),
        "shortv": {"freeze": 2, "calibration_samples": 2}, "num_train_epochs": 1,
        "data": {"instructions": str(tiny_held_out), "eval_instructions": str(tiny_held_out), "eval_samples": 3,
                 "num_workers": 0},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    settings = {
        "recipe": str(tmp_path / "recipe.yaml"), "output": str(tmp_path / "out"), "budgets": ["6+3"],
        "freeze": ["0", "50%"], "methods": ["downsample"], "fastv": [{"layer": 2, "keep": 0.25}],
        "rankings": ["cosine", "random"], "seeds": [0, 1],
    }  # fmt: skip
    (tmp_path / "frontier.yaml").write_text(yaml.safe_dump(settings))
    main(["--config", str(tmp_path / "frontier.yaml")])
    report = json.loads((tmp_path / "out" / "frontier.json").read_text())
    rows = {(row["series"], row["budget"], row["frozen"]): row for row in report["rows"]}
    full = rows["all tokens", "all", 0]["llm_flops"]
    assert rows[GRID_OF_POINTS, "6+3", 0]["llm_flops"] == rows["downsample", "9+0", 0]["llm_flops"] < full
    assert rows[GRID_OF_POINTS, "6+3", 2]["llm_flops"] < rows[GRID_OF_POINTS, "6+3", 0]["llm_flops"]
    assert len(rows["random layers", "all", 2]["exact_match"]) == 2
    layers = json.loads((tmp_path / "out" / "frozen-layers.json").read_text())
    assert all(0 <= layer < LLM_LAYERS for chosen in layers.values() for layer in chosen)
    assert (tmp_path / "out" / "frontier.png").stat().st_size > 10_000
    assert "FastV, K = 2, 25% kept" in (tmp_path / "out" / "table.md").read_text()
    points = sorted((tmp_path / "out" / "points").glob("*.json"))
    times = {path: path.stat().st_mtime_ns for path in points}
    points[0].unlink()
    main(["--config", str(tmp_path / "frontier.yaml")])
    assert [path for path in points if path.stat().st_mtime_ns != times[path]] == points[:1]


@pytest.mark.slow
def test_points_are_tuned(tiny_release: Path, tiny_held_out: Path, tmp_path: Path) -> None:
    recipe = {
        "model": str(tiny_release), "mixed_precision": "no", "max_new_tokens": 4, "max_steps": 2,
        "global_batch_size": 4, "output_dir": str(tmp_path / "run"), "learning_rate": 0.01,
        "data": {"instructions": str(tiny_held_out), "eval_instructions": str(tiny_held_out), "eval_samples": 3,
                 "num_workers": 0},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    settings = {
        "recipe": str(tmp_path / "recipe.yaml"), "output": str(tmp_path / "out"), "budgets": ["6+3"],
        "methods": ["random"], "fastv": [{"layer": 2, "keep": 0.25}], "seeds": [0], "tune": True,
    }  # fmt: skip
    (tmp_path / "frontier.yaml").write_text(yaml.safe_dump(settings))
    main(["--config", str(tmp_path / "frontier.yaml")])
    rows = json.loads((tmp_path / "out" / "frontier.json").read_text())["rows"]
    assert {(row["series"], row["tuned"]) for row in rows if row["tuned"]} == {
        ("all tokens", True), (GRID_OF_POINTS, True), ("random", True), ("FastV, K = 2, 25% kept", True)
    }  # fmt: skip
