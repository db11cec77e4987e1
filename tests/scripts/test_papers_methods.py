"""The papers' table of every method: the shipped config, its rows at toy size, and what stands beside our figures."""

from dataclasses import replace
from pathlib import Path

import pytest

from shortzip.reduction.selectors import BASELINES, SELECTORS
from shortzip.scripts.evaluate_papers import check_rows, model_arguments
from shortzip.train.evaluation.papers_table import Row, rows_of, show, table_rows
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import parse_config
from shortzip.train.settings.comparing import ALL, NONE, TRAINING_FREE, PapersConfig, Published, Task

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "eval" / "methods-llava-1.5-7b.yaml"


@pytest.fixture(scope="module")
def methods() -> PapersConfig:
    return parse_config(PapersConfig, ["--config", str(CONFIG)], default=None, program="test")


def test_every_method_is_held_to_four_budgets(methods: PapersConfig) -> None:
    assert set(methods.methods) == {*SELECTORS, *BASELINES}
    rows = [row for row in rows_of(methods) if row.budget != ALL]
    tokens = [sum(map(int, row.budget.split("+"))) for row in rows]
    assert sorted(set(tokens), reverse=True) == [192, 128, 64, 32]
    assert len({model_arguments(row, methods) for row in rows}) == len(rows) == 4 * len(methods.methods)
    budgets = {row.method: row.budget for row in rows if tokens[rows.index(row)] == 64}
    assert {method for method, budget in budgets.items() if budget == "54+10"} == {"visionzip", "duet"}
    known = {(row.method, row.budget) for row in rows}
    assert {(entry.method, entry.budget) for entry in methods.published} <= known, "each stands beside a row"
    assert all("arXiv" in entry.source for entry in methods.published)


def test_each_is_ready_to_run_at_toy_size(methods: PapersConfig, tiny_release: Path) -> None:
    toy = replace(methods, model=str(tiny_release), budgets=["6+3"], include_path=None, device="cpu", published=[])
    checked = check_rows(toy)
    flops = [kept.llm_flops for row, kept in checked.items() if row.budget != ALL]
    assert len(flops) == len(methods.methods)
    assert len(set(flops)) == 1, "as many tokens of each"


def test_places_and_hallucinations_do_not_count_among_the_eleven(methods: PapersConfig) -> None:
    others = [task.name for task in methods.tasks if not task.averaged]
    assert others == ["RefCOCO", "RefCOCO+", "RefCOCOg", "CHAIR-i"]
    scores = {task.name: 50.0 for task in methods.tasks}
    row = Row(TRAINING_FREE, methods.model, "64+0", NONE, "scope")
    rows = {Row(TRAINING_FREE, methods.model, ALL, NONE): scores, row: {**scores, "RefCOCO": 5.0, "CHAIR-i": 90.0}}
    lines = table_rows(methods, rows, dict.fromkeys(rows, 1))
    assert lines[1]["percent"] == 100
    assert "| 100.0 | 96.0 (as stated) |" in show(methods, lines)


def test_what_others_measured_stands_behind_the_authors_figure() -> None:
    tasks = [Task("t", "t", ["m"])]
    published = [
        Published(94.0, "its paper", "8+2"), Published(91.3, "a re-run", "8+2", rerun=True),
        Published(90.0, "another", "8+2", rerun=True), Published(95.0, "a re-run", "10+0", method="scope", rerun=True),
    ]  # fmt: skip
    config = PapersConfig("m", tasks, "out", budgets=["8+2"], methods=["visionzip", "scope"], published=published)
    rows = rows_of(config)
    lines = table_rows(config, {row: {"t": 50.0} for row in rows}, dict.fromkeys(rows, 1))
    shown = show(config, lines)
    assert "94.0 (as stated); by others 91.3 (a re-run); 90.0 (another) |" in shown
    assert "| by others 95.0 (a re-run) |" in shown
    with pytest.raises(ConfigError, match=r"published: .* stands there 2 times"):
        replace(config, published=[*published, Published(1.0, "a re-run", "8+2", rerun=True)])
