"""The papers' tables: rows, arguments and arithmetic; and the whole of it with the real lmms-eval (slow)."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from data.instructions import read_instructions
from scripts.evaluate_papers import (
    NONE,
    TRAINING_FREE,
    TUNED,
    PapersConfig,
    Row,
    Task,
    Tuned,
    command_of,
    identity,
    main,
    model_arguments,
    percent_of_full,
    rows_of,
    run_all,
    score_of,
)
from train.config import ConfigError, parse_config
from train.lmms_plugin import write_task

ROOT = Path(__file__).resolve().parents[2]
PAPERS = ROOT / "configs" / "eval" / "llava-1.5-7b.yaml"
SHORTV = ROOT / "configs" / "eval" / "shortv-llava-1.5-7b.yaml"

# VisionZip (arXiv 2412.04467), Table 1, LLaVA-1.5-7B, the benchmarks in the order of PAPERS.
FULL = [61.9, 64.7, 1862, 85.9, 69.5, 78.5, 58.2, 36.3, 58.6, 31.1, 66.8]
TABLE = {
    ("162+30", TRAINING_FREE): [59.3, 63.0, 1782.6, 85.3, 68.9, 76.8, 57.3, 36.6, 56.4, 31.7, 67.7],
    ("108+20", TRAINING_FREE): [57.6, 62.0, 1761.7, 83.2, 68.9, 75.6, 56.8, 37.9, 54.9, 32.6, 64.8],
    ("54+10", TRAINING_FREE): [55.1, 60.1, 1690, 77.0, 69.0, 72.4, 55.5, 36.2, 52.2, 31.7, 62.9],
    ("162+30", TUNED): [60.1, 63.4, 1834, 84.9, 68.2, 77.4, 57.8, 36.2, 57.1, 32.6, 66.7],
    ("108+20", TUNED): [58.9, 62.6, 1823, 83.7, 68.3, 76.6, 57.0, 37.3, 55.8, 32.9, 64.8],
    ("54+10", TUNED): [57.0, 61.5, 1756, 80.9, 68.8, 74.2, 56.0, 35.6, 53.4, 30.2, 63.6],
}


# ShortV (arXiv 2504.00502), Table 1, LLaVA-1.5-7B with 19 frozen layers, in the order of SHORTV.
FROZEN = [1503.1, 64.8, 36.2, 33.3, 66.2, 60.9, 71.3]


@pytest.fixture(scope="module")
def shortv() -> PapersConfig:
    return parse_config(PapersConfig, ["--config", str(SHORTV)], default=None, program="test")


@pytest.fixture(scope="module")
def papers() -> PapersConfig:
    return parse_config(PapersConfig, ["--config", str(PAPERS)], default=None, program="test")


def test_the_shipped_config_is_the_papers_eleven(papers: PapersConfig) -> None:
    assert [task.full for task in papers.tasks] == FULL
    assert len({task.task for task in papers.tasks}) == 11


def test_percentages_are_the_papers(papers: PapersConfig) -> None:
    names = [task.name for task in papers.tasks]
    full = dict(zip(names, FULL, strict=True))
    published = {(entry.budget, entry.kind): entry.percent for entry in papers.published if entry.layers == NONE}
    assert published.keys() == TABLE.keys()
    for row, scores in TABLE.items():
        assert percent_of_full(dict(zip(names, scores, strict=True)), full) == pytest.approx(published[row], abs=0.06)


def test_shortvs_percentage_is_the_papers(shortv: PapersConfig) -> None:
    full = {task.name: task.full for task in shortv.tasks if task.full is not None}
    (published,) = shortv.published
    found = percent_of_full(dict(zip(full, FROZEN, strict=True)), full)
    assert found == pytest.approx(published.percent, abs=0.06)
    assert rows_of(shortv)[1].layers == published.layers
    assert published.layers.count("+") + 1 == 19


def test_lmms_eval_knows_every_task_and_metric(papers: PapersConfig, shortv: PapersConfig) -> None:
    import lmms_eval
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    package = Path(lmms_eval.__file__).parent / "tasks"
    tasks = [*papers.tasks, *shortv.tasks]
    known: dict[str, set[str]] = {}
    for file in [*package.rglob("*.yaml"), *(ROOT / "configs" / "eval" / "tasks").glob("*.yaml")]:
        text = file.read_text(encoding="utf-8")
        if not any(task.task in text for task in tasks):
            continue
        content = yaml.load(text, Loader)
        include = content.get("include") if isinstance(content, dict) else None
        if isinstance(include, str):
            content = {**yaml.load((file.parent / include).read_text(encoding="utf-8"), Loader), **content}
        if isinstance(content, dict) and isinstance(content.get("task"), str):
            known[content["task"]] = {entry["metric"] for entry in content.get("metric_list", [])}
    for task in tasks:
        assert {metric.removesuffix(",none") for metric in task.metrics} <= known[task.task], task.task


def test_rows_are_budgets_by_layers_by_kind() -> None:
    config = PapersConfig(
        "base", [Task("t", "t", ["m"])], "out", budgets=["all", "8+2"], layers=["none", "1+2"],
        methods=["visionzip", "pool"], tuned=[Tuned("run", "8+2", "1+2"), Tuned("other", "4+0")],
    )  # fmt: skip
    assert rows_of(config) == [
        Row(TRAINING_FREE, "base", "all", "none"),
        Row(TRAINING_FREE, "base", "8+2", "none"),
        Row(TRAINING_FREE, "base", "10+0", "none", "pool"),
        Row(TRAINING_FREE, "base", "all", "1+2"),
        Row(TRAINING_FREE, "base", "8+2", "1+2"),
        Row(TRAINING_FREE, "base", "10+0", "1+2", "pool"),
        Row(TUNED, "run", "8+2", "1+2"),
        Row(TUNED, "other", "4+0", "none"),
    ]
    arguments = [model_arguments(row, config) for row in rows_of(config)]
    assert arguments[2] == "pretrained=base,dtype=auto,budget=10+0,layers=none,method=pool"
    assert arguments[6] == "pretrained=run,dtype=auto"  # as it was saved
    assert len(set(arguments)) == len(arguments)


def test_what_is_kept_belongs_to_its_arguments(tiny_release: Path, tmp_path: Path) -> None:
    task = Task("t", "t", ["m"])
    config = PapersConfig(str(tiny_release), [task], str(tmp_path))
    row = rows_of(config)[0]
    same = identity(row, task, config)
    assert same == identity(row, task, PapersConfig(str(tiny_release), [task], "elsewhere", batch_size=2))
    assert same != identity(row, task, PapersConfig(str(tiny_release), [task], str(tmp_path), limit=3))
    assert same != identity(Row(TUNED, str(tiny_release), "all", "none"), task, config)
    assert "torch.distributed.run" in command_of(row, task, PapersConfig("m", [task], "o", processes=2), tmp_path)


def test_scores_are_sums_of_metrics() -> None:
    results: dict[str, Any] = {"results": {"mme": {"a,none": 1500.0, "b,none": 350.0, "alias": "mme"}}}
    assert score_of(results, Task("MME", "mme", ["a,none", "b,none"], scale=1)) == 1850
    with pytest.raises(ValueError, match=r"no number for c,none among a,none, alias, b,none"):
        score_of(results, Task("MME", "mme", ["c,none"]))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="dominant\\+contextual"):
        PapersConfig("m", [Task("t", "t", ["m"])], "o", budgets=["64"])
    with pytest.raises(ConfigError, match="tasks is empty"):
        PapersConfig("m", [], "o")
    with pytest.raises(ConfigError, match="metrics is empty"):
        Task("t", "t", [])


@pytest.fixture
def local_task(tiny_held_out: Path, tmp_path: Path) -> Path:
    write_task(tmp_path / "tasks", "tiny", read_instructions(tiny_held_out)[:4], str(tiny_held_out.parent))
    return tmp_path / "tasks"


@pytest.mark.slow
def test_a_table_is_continued_and_printed(
    tiny_release: Path, local_task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "model": str(tiny_release), "output": str(tmp_path / "out"), "include_path": str(local_task), "device": "cpu",
        "budgets": ["6+3"], "tasks": [{"name": "scenes", "task": "tiny", "metrics": ["exact_match,none"],
                                       "gen_kwargs": "max_new_tokens=4"}],
        "published": [{"budget": "6+3", "percent": 94.0, "source": "a paper"}],
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    main(["--config", str(tmp_path / "config.yaml")])
    first = capsys.readouterr().out
    assert "kept" not in first
    kept = sorted((tmp_path / "out" / "results").glob("*.json"))
    assert len(kept) == 2
    written = kept[1].stat().st_mtime_ns
    kept[0].unlink()
    main(["--config", str(tmp_path / "config.yaml")])
    again = capsys.readouterr().out
    assert again.count(": kept") == 1
    assert kept[1].stat().st_mtime_ns == written
    assert "94" in (tmp_path / "out" / "table.md").read_text()


def test_a_failing_run_says_why_and_leaves_what_is_done(
    tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [Task("done", "done", ["m"]), Task("fails", "fails", ["m"])]
    config = PapersConfig(str(tiny_release), tasks, str(tmp_path), device="cpu")
    row = rows_of(config)[0]
    kept = tmp_path / "results" / f"done-{identity(row, tasks[0], config)}.json"
    kept.parent.mkdir()
    kept.write_text('{"score": 3.0}')
    failing = [sys.executable, "-c", "print('the disk is full'); raise SystemExit(3)"]
    monkeypatch.setattr("scripts.evaluate_papers.command_of", lambda *arguments: failing)
    said: list[str] = []
    with pytest.raises(RuntimeError, match=r"ended with 3[\s\S]*the disk is full"):
        run_all(config, said.append)
    assert said[0].endswith("done: kept")
    assert kept.read_text() == '{"score": 3.0}'
