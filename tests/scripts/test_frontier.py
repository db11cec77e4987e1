"""The frontier: its points, its rows, and the whole of it on a tiny release."""

import json
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from accelerate import Accelerator
from matplotlib.text import Text
from runs import ROOT, environment, output_of, wait_until
from tiny import LLM_LAYERS

from shortzip.reduction.reductions import Reductions
from shortzip.scripts.frontier import DEFAULT, PointsFailed, in_processes, layers_to_freeze, main
from shortzip.scripts.tune_points import evaluate_point, run_of, tune_point
from shortzip.train.evaluation.frontier_points import (
    FrontierConfig,
    Point,
    point_of,
    points_of,
    tuned_points,
)
from shortzip.train.evaluation.frontier_report import GRID_OF_POINTS, Summary, picture, show, summarise
from shortzip.train.run.processes import StopRequest
from shortzip.train.run.run_folder import read_status, write_status
from shortzip.train.settings.budget import BudgetScheduleConfig, VisionZipConfig
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import MENDABLE, load_config, parse_config
from shortzip.train.settings.config import DataConfig, FastVConfig, TuneConfig
from shortzip.train.settings.distill import DistillConfig

LAYERS = {("lc", "0", budget, 0): [] for budget in ("all", "6+3", "9+3")}
LAYERS |= {("lc", "60%", "all", 0): [1, 2], ("lc", "60%", "6+3", 0): [0, 1], ("lc", "60%", "9+3", 0): [0, 2]}
LAYERS |= {("cosine", "60%", "all", 0): [2, 3], **{("random", "60%", "all", seed): [seed, 3] for seed in (0, 1)}}


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
    frozen = {
        point.budget: tuple(point.reductions.layers)
        for point in points
        if point.series == GRID_OF_POINTS and point.frozen
    }
    assert frozen == {"all": (1, 2), "6+3": (0, 1), "9+3": (0, 2)}, "those with the lowest LC at each budget"
    others = {point.series: point for point in points}
    assert others["grid"].reductions.visionzip == {"dominant": 9, "contextual": 0, "method": "grid"}
    assert others["dominant only"].reductions.visionzip == {"dominant": 9, "contextual": 0}
    drawn = [point.reductions.visionzip for point in points if point.series == "random"]
    assert [visionzip and visionzip["seed"] for visionzip in drawn] == [0, 1]
    assert [point.reductions.layers for point in points if point.series == "random layers"] == [[0, 3], [1, 3]]
    assert len({point.name for point in points}) == len(points)


def test_points_share_a_teacher_and_come_down_to_their_own_budget() -> None:
    recipe = TuneConfig(
        model="m", data=DataConfig("d.json"), visionzip=VisionZipConfig(6, 3), distill=DistillConfig(),
        budget_schedule=BudgetScheduleConfig(12, 0.5),
    )  # fmt: skip
    runs = {point.budget: run_of(point, config(), recipe) for point in points_of(config(fastv=[]), LAYERS)}
    assert {run.data.cache_teacher for run in runs.values()} == {str(Path("out") / "lessons")}
    assert runs["6+3"].budget_schedule == recipe.budget_schedule
    assert runs["6+3"].data.cache_features is None
    assert runs["9+3"].budget_schedule is None, "it begins at that budget"
    assert runs["9+3"].data.cache_features is not None
    assert runs["all"].budget_schedule is None


def test_what_is_described_twice_is_one_point() -> None:
    again = {("lc", "0%", *key[2:]): [] for key in LAYERS if key[0] == "lc"}
    again |= {("lc", "2", *key[2:]): layers for key, layers in LAYERS.items() if key[:2] == ("lc", "60%")}
    twice = points_of(config(freeze=["0", "0%", "2", "60%"]), {**LAYERS, **again})
    assert [point.name for point in twice] == [point.name for point in points_of(config(), LAYERS)]


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
            "point": asdict(Point("random", Reductions.parse("9+0", method="random", seed=seed), seed)),
            "evaluation": {"exact_match": value, "llm_flops": 10, "prefill_ms": time, "visual_tokens": 9.0},
        }
        for seed, value, time in ((0, 0.5, 3.0), (1, 0.6, 1.0), (2, 0.7, 2.0))
    ]
    (row,) = summarise(entries)
    assert (row.mean, row.prefill_ms) == (pytest.approx(0.6), 2.0)
    assert row.spread == pytest.approx(0.1)
    tuned = [{**entry, "point": {**entry["point"], "tuned": True}} for entry in entries[1:]]
    tuned = [{**entry, "evaluation": {**entry["evaluation"], "prefill_ms": 9.0}} for entry in tuned]
    rows = summarise([*entries, *tuned])
    assert [(row.tuned, row.prefill_ms) for row in rows] == [(False, 2.0), (True, 2.0)], "tuning is no work in prefill"


def test_the_table_says_what_each_point_is() -> None:
    said = show([
        Summary(series, budget, frozen, False, [0.5], 10, 1.0, 9)
        for series, budget, frozen in (
            ("all tokens", "all", 0), (GRID_OF_POINTS, "all", 5),
            (GRID_OF_POINTS, "6+3", 0), (GRID_OF_POINTS, "6+3", 5),
        )
    ])  # fmt: skip
    names = [line.split("|")[1].strip() for line in said.splitlines()[2:]]
    assert names == ["all tokens", "ShortV", "VisionZip 6+3", "VisionZip 6+3 and ShortV"]


def test_no_label_of_the_picture_covers_another_or_a_mark() -> None:
    """Of the points that the demo's frontier has, many of which cost the same."""
    kept = json.loads((ROOT / "checkpoints" / "demo-llava" / "pictures" / "frontier.json").read_text())["rows"]
    rows = [
        Summary(**{key: value for key, value in row.items() if key in Summary.__dataclass_fields__}) for row in kept
    ]
    for axis in picture(rows).axes:
        boxes = [Text.get_window_extent(label) for label in axis.texts]
        assert len(boxes) == 7
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
        marks = [line.get_xydata()[0] for line in axis.lines if len(line.get_xydata()) == 1]
        assert not any(box.contains(*mark) for box in boxes for mark in axis.transData.transform(marks))
        assert all(axis.bbox.count_contains(box.corners()) == 4 for box in boxes)


def test_bad_settings_are_refused() -> None:
    for changes, message in (
        ({"methods": ["best"]}, "method is 'best'"),
        ({"rankings": ["lc"]}, "'lc' is none of cosine"),
        ({"seeds": []}, "seeds is empty"),
        ({"freeze": []}, "freeze is empty"),
        ({"prefill_rounds": 0}, "prefill_rounds is 0"),
        ({"budgets": []}, "both are empty"),
        ({"seeds": [0, 1, 0]}, "seeds: 0 stands there twice"),
        ({"budgets": ["6+3", "6+3"]}, r"budgets: '6\+3' stands there twice"),
        ({"fastv": [FastVConfig(2, 0.25), FastVConfig(2, 0.25)]}, r"fastv: FastVConfig\(.*\) stands there twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(**changes)


def test_a_point_is_measured_again_when_settings_or_conversations_have_changed(
    tiny_release: Path, tiny_held_out: Path, tmp_path: Path
) -> None:
    held_out = tmp_path / "held-out.json"
    held_out.write_text(tiny_held_out.read_text())
    (tmp_path / "images").symlink_to(tiny_held_out.parent / "images")
    written = write_frontier(tmp_path, recipe(tiny_release, held_out, tmp_path), budgets=[], fastv=[])
    by = load_config(["--config", str(tmp_path / "recipe.yaml")])
    asked = parse_config(FrontierConfig, ["--config", str(written)], default=None, program="test")
    point, kept = Point("all tokens", Reductions()), tmp_path / "out" / "points"

    def measured(recipe: TuneConfig) -> bool:
        before = [file.stat().st_mtime_ns for file in kept.glob("*.json")]
        evaluate_point(point, recipe.model, asked, recipe, Accelerator())
        return before != [file.stat().st_mtime_ns for file in kept.glob("*.json")]

    assert measured(by)
    assert not measured(by)
    assert measured(replace(by, max_new_tokens=3))
    assert measured(replace(by, mixed_precision="bf16"))
    assert measured(by)
    held_out.write_text(json.dumps(json.loads(held_out.read_text())[1:]))
    assert measured(by)


def test_a_budget_over_the_grid_is_refused_before_anything_is_measured(
    tiny_release: Path, tiny_held_out: Path, tmp_path: Path
) -> None:
    written = write_frontier(
        tmp_path, recipe(tiny_release, tiny_held_out, tmp_path), budgets=["6+3", "90+9"], freeze=["0", "50%"]
    )
    with pytest.raises(MENDABLE, match=r"90 \+ contextual 9 = 99 exceeds the 37"):
        main(["--config", str(written)])
    assert not (tmp_path / "out").exists()


def test_a_release_that_is_not_there_meets_a_message(tmp_path: Path, tiny_held_out: Path) -> None:
    written = write_frontier(tmp_path, recipe(tmp_path / "nowhere", tiny_held_out, tmp_path))
    with pytest.raises(MENDABLE, match=r"nowhere"):
        main(["--config", str(written)])


def test_the_shipped_config_is_read() -> None:
    shipped = parse_config(FrontierConfig, ["--config", str(DEFAULT)], default=None, program="test")
    assert shipped.fastv[0].layer == 2
    assert Point("FastV", Reductions.parse(fastv="2+0.5")).name == "FastV-2-0.5--all--0-frozen"


def recipe(release: Path, held_out: Path, folder: Path) -> dict[str, Any]:
    data = {"instructions": str(held_out), "eval_instructions": str(held_out), "eval_samples": 3, "num_workers": 0}
    return {
        "model": str(release), "mixed_precision": "no", "max_new_tokens": 4, "output_dir": str(folder / "run"),
        "data": data,
    }  # fmt: skip


def write_frontier(folder: Path, recipe: dict[str, Any], **changes: Any) -> Path:
    """The YAML of a frontier by a recipe, writing to `folder`/out."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    settings = {
        "recipe": str(folder / "recipe.yaml"), "output": str(folder / "out"), "budgets": ["6+3"],
        "fastv": [{"layer": 2, "keep": 0.25}], **changes,
    }  # fmt: skip
    written = folder / "frontier.yaml"
    written.write_text(yaml.safe_dump(settings))
    return written


def test_it_draws_and_continues(
    tiny_release: Path, tiny_held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = write_frontier(
        tmp_path,
        {**recipe(tiny_release, tiny_held_out, tmp_path), "shortv": {"freeze": 2, "calibration_samples": 2}},
        freeze=["0", "50%"],
        methods=["downsample"],
        rankings=["cosine", "random"],
        seeds=[0, 1],
    )
    main(["--config", str(written)])
    report = json.loads((tmp_path / "out" / "frontier.json").read_text())
    rows = {(row["series"], row["budget"], row["frozen"]): row for row in report["rows"]}
    full = rows["all tokens", "all", 0]["llm_flops"]
    assert rows[GRID_OF_POINTS, "6+3", 0]["llm_flops"] == rows["downsample", "9+0", 0]["llm_flops"] < full
    assert rows[GRID_OF_POINTS, "6+3", 2]["llm_flops"] < rows[GRID_OF_POINTS, "6+3", 0]["llm_flops"]
    assert len(rows["random layers", "all", 2]["exact_match"]) == 2
    measured = tmp_path / "out" / "frozen-layers.json"
    layers = json.loads(measured.read_text())["result"]
    assert all(0 <= layer < LLM_LAYERS for chosen in layers.values() for layer in chosen)
    assert (tmp_path / "out" / "frontier.png").stat().st_size > 10_000
    assert "FastV, K = 2, 25 % kept" in (tmp_path / "out" / "table.md").read_text()
    points = sorted((tmp_path / "out" / "points").glob("*.json"))
    times = {path: path.stat().st_mtime_ns for path in points}
    points[0].unlink()
    main(["--config", str(written)])
    assert [path for path in points if path.stat().st_mtime_ns != times[path]] == points[:1]

    times = json.loads((tmp_path / "out" / "prefill.json").read_text())["result"]
    assert len(times) == len(points)
    assert rows["all tokens", "all", 0]["prefill_ms"] == times[0]

    before = measured.stat().st_mtime_ns
    settings = parse_config(FrontierConfig, ["--config", str(written)], default=None, program="test")
    tuned_by = load_config(["--config", settings.recipe])
    layers_to_freeze(settings, tuned_by)
    assert measured.stat().st_mtime_ns == before, "nothing has changed"
    layers_to_freeze(settings, replace(tuned_by, data=replace(tuned_by.data, fraction=0.5)))
    assert measured.stat().st_mtime_ns != before, "layers measured on other samples are not taken for these"
    before = measured.stat().st_mtime_ns
    layers_to_freeze(settings, replace(tuned_by, mixed_precision="bf16"))
    assert measured.stat().st_mtime_ns != before, "bf16 may rank layers otherwise"


def test_layers_are_those_that_a_run_of_the_points_budget_would_freeze(
    tiny_release: Path, tiny_held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Any, Any]] = []

    def choose(recipe: TuneConfig, *_: object) -> tuple[list[int], None]:
        assert recipe.shortv
        asked.append((recipe.shortv.ranking, recipe.shortv.freeze, recipe.visionzip and recipe.visionzip.as_key()))
        return [1, 3], None

    monkeypatch.setattr("shortzip.scripts.frontier.choose_layers", choose)
    (tmp_path / "out").mkdir()
    written = write_frontier(
        tmp_path, {**recipe(tiny_release, tiny_held_out, tmp_path), "visionzip": {"dominant": 4, "contextual": 2}}
    )
    arguments = ["--config", str(written), "--freeze", '["0", "50%"]', "--rankings", "[cosine]"]
    layers_to_freeze(
        parse_config(FrontierConfig, arguments, default=None, program="test"),
        load_config(["--config", str(tmp_path / "recipe.yaml")]),
    )
    budget = {"dominant": 6, "contextual": 3, "method": "visionzip", "seed": 0}
    assert [(ranking, freeze, at and {**budget, **at}) for ranking, freeze, at in asked] == [
        ("lc", "50%", None), ("lc", "50%", budget), ("cosine", "50%", None)
    ]  # fmt: skip


def test_conversations_that_cannot_be_read_meet_a_message(
    tiny_release: Path, tiny_held_out: Path, tmp_path: Path
) -> None:
    written = write_frontier(tmp_path, recipe(tiny_release, tmp_path / "nowhere.json", tmp_path))
    with pytest.raises(MENDABLE, match=r"nowhere.json is neither a file"):
        main(["--config", str(written)])
    rows = json.loads(tiny_held_out.read_text())
    pictured = next(row for row in rows if "image" in row)
    (tmp_path / "held-out.json").write_text(json.dumps([{**pictured, "image": "missing.png"}]))
    written = write_frontier(tmp_path, recipe(tiny_release, tmp_path / "held-out.json", tmp_path))
    with pytest.raises(MENDABLE, match=r"missing.png"):
        main(["--config", str(written)])


def test_a_tuned_run_is_kept_continued_or_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[str] = []
    point = Point("point", Reductions(), seed=1, tuned=True)

    def tune(run: TuneConfig) -> None:
        ways.append("anew" if run.overwrite_output_dir else str(run.resume_from_checkpoint))
        folder = Path(run.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_status(folder, "running", 3)

    monkeypatch.setattr("shortzip.scripts.tune_points.tune", tune)
    recipe, content = load_config(["--max_steps", "7"]), {"release": {"model.safetensors": "a digest"}}
    folder = tune_point(point, config(output=str(tmp_path)), recipe, content)
    tune_point(point, config(output=str(tmp_path)), recipe, content)
    write_status(folder, "finished", 7)
    tune_point(point, config(output=str(tmp_path)), recipe, content)
    assert ways == ["anew", "latest"]
    tune_point(point, config(output=str(tmp_path)), replace(recipe, learning_rate=0.5), content)
    assert ways[2:] == ["anew"], "finished, but by another recipe"


def test_what_ended_in_an_error_is_said_when_all_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], log: Path, _: StopRequest) -> int:
        commands.append(command)
        log.write_text("the disk is full\n")
        return int(command[-1] == "1/2")

    monkeypatch.setattr("shortzip.scripts.frontier.run_until_stopped", run)
    points = points_of(config(), LAYERS)
    with pytest.raises(PointsFailed, match=r"ended with 1 \(all of it: .*points-1.log\):\nthe disk is full"):
        in_processes(points, config(output=str(tmp_path), processes=2))
    assert sorted(command[-1] for command in commands) == ["1/2", "2/2"]
    written = json.loads((tmp_path / "points.json").read_text())["points"]
    assert [point_of(values) for values in written] == points


def test_asked_to_stop_it_stops_the_run_too(tiny_release: Path, tiny_held_out: Path, tmp_path: Path) -> None:
    endless = {"max_steps": 100_000, "global_batch_size": 4, "save_steps": 100_000}
    written = write_frontier(
        tmp_path,
        {**recipe(tiny_release, tiny_held_out, tmp_path), **endless},
        budgets=[],
        fastv=[],
        seeds=[0],
        tune=True,
    )
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "frontier.py"), "--config", str(written)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    run = tmp_path / "out" / "runs" / "all-tokens--all--0-frozen--seed-0--tuned"
    metrics = run / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, process)
    tuning = psutil.Process(read_status(run)["pid"])
    process.send_signal(signal.SIGTERM)
    said = output_of(process)
    assert "stopped; the same command continues" in said
    assert process.returncode == 1
    assert not tuning.is_running()
    assert read_status(run)["state"] == "stopped"
    assert list(run.glob("step-*")), "what it had is saved"


@pytest.mark.slow
def test_points_are_tuned(tiny_release: Path, tiny_held_out: Path, tmp_path: Path) -> None:
    tuned = {"max_steps": 2, "global_batch_size": 4, "learning_rate": 0.01}
    written = write_frontier(
        tmp_path,
        {**recipe(tiny_release, tiny_held_out, tmp_path), **tuned},
        methods=["random"],
        seeds=[0],
        tune=True,
    )
    main(["--config", str(written)])
    rows = json.loads((tmp_path / "out" / "frontier.json").read_text())["rows"]
    assert {(row["series"], row["tuned"]) for row in rows if row["tuned"]} == {
        ("all tokens", True), (GRID_OF_POINTS, True), ("random", True), ("FastV, K = 2, 25 % kept", True)
    }  # fmt: skip
