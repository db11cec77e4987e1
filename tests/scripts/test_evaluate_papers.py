"""The papers' tables: rows, arguments and arithmetic; and the whole of it with the real lmms-eval (slow)."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tiny import write_release

from shortzip.data.instructions import read_instructions
from shortzip.data.kept import Kept, identity_of
from shortzip.reduction.reductions import Reductions
from shortzip.scripts.estimate_cost import known_release
from shortzip.scripts.evaluate_papers import (
    Checked,
    check_judged,
    check_lmms_eval,
    check_rows,
    command_of,
    depends_on,
    digest_of,
    main,
    model_arguments,
    run_all,
    score_of,
)
from shortzip.train.evaluation.lmms_plugin import write_task
from shortzip.train.evaluation.papers_table import (
    Row,
    average_of,
    llm_flops,
    papers_average,
    rows_of,
    show,
    table_rows,
)
from shortzip.train.release.loading import load_release
from shortzip.train.release.opening import Release, open_release, release_projector
from shortzip.train.release.writing import write_reduced_checkpoint
from shortzip.train.run.processes import CONSENT_S, StopRequest, StopRequested
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import parse_config
from shortzip.train.settings.comparing import ALL, NONE, TRAINING_FREE, TUNED, PapersConfig, Published, Task, Tuned

ROOT = Path(__file__).resolve().parents[2]
PAPERS = ROOT / "configs" / "eval" / "llava-1.5-7b.yaml"
SHORTV = ROOT / "configs" / "eval" / "shortv-llava-1.5-7b.yaml"
METHODS = ROOT / "configs" / "eval" / "methods-llava-1.5-7b.yaml"

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
    full = {task.name: task.full for task in papers.tasks if task.full is not None}
    published = {(entry.budget, entry.kind): entry for entry in papers.published if entry.layers == NONE}
    assert published.keys() == TABLE.keys()
    for row, scores in TABLE.items():
        assert published[row].scores == dict(zip(full, scores, strict=True))
        found = average_of(published[row].scores, full)
        assert found is not None
        assert found.percent == pytest.approx(published[row].percent, abs=0.06)


def test_shortvs_percentage_is_the_papers(shortv: PapersConfig) -> None:
    full = {task.name: task.full for task in shortv.tasks if task.full is not None}
    (published,) = shortv.published
    assert published.scores == dict(zip(full, FROZEN, strict=True))
    found = average_of(published.scores, full)
    assert found is not None
    assert found.percent == pytest.approx(published.percent, abs=0.06)
    assert rows_of(shortv)[1].layers == published.layers
    assert published.layers.count("+") + 1 == 19
    assert published.flops == 55


def test_the_papers_percentage_is_over_the_tasks_that_ours_is_over(papers: PapersConfig) -> None:
    paper = next(entry for entry in papers.published if (entry.budget, entry.kind) == ("54+10", TRAINING_FREE))
    skipped = replace(papers, skip_judged=True)
    full = {task.name: 50.0 for task in skipped.asked}
    rows = {Row(TRAINING_FREE, papers.model, ALL, NONE): full, Row(TRAINING_FREE, papers.model, "54+10", NONE): full}
    lines = table_rows(skipped, rows, dict.fromkeys(rows, 1))
    assert lines[1]["paper_percent"] == pytest.approx(93.1, abs=0.06)
    assert "| 100.0 (9 of 11) | 93.1 (9 of 11) |" in show(skipped, lines)
    everything = papers_average(papers, paper, [task.name for task in papers.tasks])
    assert everything is not None
    assert everything.percent == 94.0
    bare = replace(skipped, published=[replace(paper, scores={})])
    assert "| 100.0 (9 of 11) | 94.0 (as stated) |" in show(bare, table_rows(bare, rows, dict.fromkeys(rows, 1)))
    another = replace(papers, tasks=[*papers.tasks, Task("mine", "mine", ["m"])])
    scores = {task.name: 50.0 for task in another.tasks}
    lines = table_rows(another, dict.fromkeys(rows, scores), dict.fromkeys(rows, 1))
    assert "| 100.0 | 94.0 (as stated, over 11) |" in show(another, lines), (
        "the paper's mean knows nothing of the twelfth"
    )
    assert papers_average(papers, replace(paper, scores={"GQA": 55.1}), ["GQA", "MME"]) is None


def test_flops_stand_beside_the_papers(shortv: PapersConfig) -> None:
    config = known_release("llava-1.5-7b")
    assert config is not None
    rows = rows_of(shortv)
    flops = {row: llm_flops(config, row, shortv.text_tokens) for row in rows}
    lines = table_rows(shortv, {row: {} for row in rows}, flops)
    assert [round(line["flops_percent"], 1) for line in lines] == [100, 55.2]
    assert "55.2 % (paper: 55 %)" in show(shortv, lines)
    tiled = known_release("llava-next-7b")
    assert tiled is not None
    half = [llm_flops(tiled, row, shortv.text_tokens) / 1e12 for row in rows]
    assert half == pytest.approx([42.675, 21.560], rel=1e-3)  # TFLOPs that ShortV states
    fewer = {row: llm_flops(config, row, shortv.text_tokens) for row in [
        Row(TRAINING_FREE, "m", ALL, NONE), Row(TRAINING_FREE, "m", ALL, NONE, fastv="2+0.5"),
        Row(TRAINING_FREE, "m", "54+10", NONE), Row(TRAINING_FREE, "m", "54+10", "1+2"),
    ]}  # fmt: skip
    assert list(fewer.values()) == sorted(fewer.values(), reverse=True)


def test_lmms_eval_knows_every_task_and_metric(papers: PapersConfig, shortv: PapersConfig) -> None:
    import lmms_eval

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    package = Path(lmms_eval.__file__).parent / "tasks"
    methods = parse_config(PapersConfig, ["--config", str(METHODS)], default=None, program="test")
    tasks = [*papers.tasks, *shortv.tasks, *methods.tasks]
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
        "base", [Task("t", "t", ["m"])], "out", budgets=["all", "8+2"], layers=["none", "2+1"], device="cpu",
        methods=["visionzip", "pool", "duet:window=4", "scope:alpha=.5"],
        tuned=[Tuned("run", "8+2", "1+2"), Tuned("other", "4+0")], fastv=["2+.5"],
    )  # fmt: skip
    assert rows_of(config) == [
        Row(TRAINING_FREE, "base", "all", "none"),
        Row(TRAINING_FREE, "base", "8+2", "none"),
        Row(TRAINING_FREE, "base", "10+0", "none", "pool"),
        Row(TRAINING_FREE, "base", "8+2", "none", "duet"),
        Row(TRAINING_FREE, "base", "10+0", "none", "scope:alpha=0.5"),
        Row(TRAINING_FREE, "base", "all", "1+2"),
        Row(TRAINING_FREE, "base", "8+2", "1+2"),
        Row(TRAINING_FREE, "base", "10+0", "1+2", "pool"),
        Row(TRAINING_FREE, "base", "8+2", "1+2", "duet"),
        Row(TRAINING_FREE, "base", "10+0", "1+2", "scope:alpha=0.5"),
        Row(TUNED, "run", "8+2", "1+2"),
        Row(TRAINING_FREE, "base", "all", "none", fastv="2+0.5"),
        Row(TUNED, "other", "4+0", "none"),
    ]
    arguments = [model_arguments(row, config) for row in rows_of(config)]
    assert arguments[2] == "pretrained=base,dtype=float32,budget=10+0,layers=none,fastv=none,method=pool"
    assert arguments[4] == "pretrained=base,dtype=float32,budget=10+0,layers=none,fastv=none,method=scope:alpha=0.5"
    assert arguments[10] == "pretrained=run,dtype=float32"  # as it was saved
    assert arguments[11] == "pretrained=base,dtype=float32,budget=all,layers=none,fastv=2+0.5"
    assert len(set(arguments)) == len(arguments)


def test_rows_of_both_positions() -> None:
    tuned = Tuned("run", "8+2", positions="original")
    config = PapersConfig(
        "base", [Task("t", "t", ["m"])], "out", budgets=["all", "8+2"], positions=["compact", "original"],
        tuned=[tuned], device="cpu",
    )  # fmt: skip
    rows = rows_of(config)
    kept = Row(TRAINING_FREE, "base", "8+2", "none", positions="original")
    assert rows == [
        Row(TRAINING_FREE, "base", "all", "none"), Row(TRAINING_FREE, "base", "8+2", "none"), kept,
        Row(TUNED, "run", "8+2", "none", positions="original"),
    ]  # fmt: skip
    assert kept.title == "original positions, training-free"
    assert kept.settings == "budget: 8+2, layers: none, positions: original"
    assert Row.saved("run", kept.reductions) == rows[-1]
    said = "pretrained=base,dtype=float32,budget=8+2,layers=none,fastv=none,positions=original"
    assert model_arguments(kept, config) == said


def test_every_tuned_checkpoint_of_a_budget_has_its_row() -> None:
    runs = [Tuned(f"seed-{seed}", "8+2", "1+2") for seed in range(3)]
    tasks = [Task("t", "t", ["m"])]
    config = PapersConfig("base", tasks, "out", budgets=["8+2"], layers=["1+2"], tuned=runs)
    scores = {row: {"t": 10.0 + number} for number, row in enumerate(rows_of(config))}
    lines = table_rows(config, scores, dict.fromkeys(scores, 1))
    assert [line["checkpoint"] for line in lines] == ["base", "base", "seed-0", "seed-1", "seed-2"]
    shown = show(config, lines)
    for seed in range(3):
        assert f"| tuned: seed-{seed} | 8+2 | 2 | 100.0 % | {12 + seed}.0 |" in shown
    with pytest.raises(ConfigError, match=r"tuned: Tuned\(model='seed-0'.* stands there 2 times"):
        replace(config, tuned=[*runs, Tuned("seed-0", "8 + 2", "2+1")])


def test_a_published_figure_is_of_its_method() -> None:
    published = [Published(96.0, "a paper", "10+0", method="scope:alpha=1"), Published(93.4, "it too", "10+0")]
    tasks = [Task("t", "t", ["m"])]
    config = PapersConfig("base", tasks, "out", budgets=["10+0"], methods=["visionzip", "scope", "scope:alpha=2"],
                          published=published)  # fmt: skip
    rows = rows_of(config)
    lines = table_rows(config, {row: {} for row in rows}, dict.fromkeys(rows, 1))
    assert [line["paper_percent"] for line in lines] == [None, 93.4, 96.0, None]


def test_a_row_meets_its_published_figure_however_its_layers_are_written() -> None:
    published = [Published(90.0, "a paper", layers="2+0+1"), Published(95.0, "it too", "8+2", "1+0", kind=TUNED)]
    tasks, tuned = [Task("t", "t", ["m"])], [Tuned("run", "8+2", "0+1")]
    config = PapersConfig("base", tasks, "out", layers=["1+2+0", "0+1+2"], tuned=tuned, published=published)
    rows = rows_of(config)
    assert [row.layers for row in rows] == ["none", "0+1+2", "0+1"]
    lines = table_rows(config, {row: {} for row in rows}, dict.fromkeys(rows, 1))
    assert [line["paper_percent"] for line in lines] == [None, 90, 95]
    with pytest.raises(
        ConfigError, match=r"published: \('training-free', 'all', '0\+1\+2', 'visionzip'\) stands there 2 times"
    ):
        replace(config, published=[*published, Published(91.0, "another", layers="0+1+2")])


def test_what_is_kept_belongs_to_its_arguments(tiny_release: Path, tmp_path: Path) -> None:
    config = PapersConfig(str(tiny_release), [Task("t", "t", ["m"])], "out", device="cpu")
    task, row, release = config.tasks[0], rows_of(config)[0], open_release(str(tiny_release))

    def key(config: PapersConfig = config, task: Task = task, row: Row = row, release: Release = release) -> str:
        return identity_of(depends_on(row, release, digest_of(task, config), config))

    same = key()
    assert same == key(replace(config, output="elsewhere", batch_size=2))
    assert same == key(replace(config, dtype="float32"))
    assert same == key(task=replace(task, metrics=["other"], scale=1, name="another"))
    others = [
        key(replace(config, limit=3)),
        key(replace(config, dtype="bfloat16")),
        key(replace(config, device="cuda")),
        key(replace(config, device="cuda", dtype="float32")),
        key(task=replace(task, gen_kwargs="max_new_tokens=4")),
        key(task=replace(task, judge=True)),
        key(row=Row(TUNED, str(tiny_release), "all", "none")),
        key(row=replace(row, fastv="2+0.5")),
        key(release=replace(release, revision="a commit")),
        key(release=replace(release, revision="another commit")),
    ]
    folder = replace(release, source=tmp_path, folder=tmp_path)
    for name in ("config.json", "model.safetensors", "chat_template.jinja", "tokenizer.json", "mm_projector.bin"):
        (tmp_path / name).touch()
        others.append(key(release=replace(folder, projector=tmp_path / name if name.endswith(".bin") else None)))
    assert len({same, *others}) == len(others) + 1


def test_what_is_kept_belongs_to_the_local_tasks_content(local_task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = Path(yaml.safe_load((local_task / "tiny.yaml").read_text())["include"])
    (local_task / "_template_yaml").write_text(template.read_text())
    content = (local_task / "tiny.yaml").read_text()
    (local_task / "tiny.yaml").write_text(content.replace(str(template), "_template_yaml"))
    config = PapersConfig("m", [Task("t", "tiny", ["m"])], "out", include_path=str(local_task))
    seen = [digest_of(config.tasks[0], config)]
    for name in ("tiny.yaml", "_template_yaml", "tiny.jsonl"):
        with (local_task / name).open("a") as file:
            file.write("\n")
        seen.append(digest_of(config.tasks[0], config))
    assert len(set(seen)) == 4
    (local_task / "tiny_likelihood.yaml").write_text("task: tiny_likelihood\n")  # another task's
    assert digest_of(config.tasks[0], config) == seen[-1]
    monkeypatch.setenv("MODEL_VERSION", "gpt-4-0613")
    assert digest_of(config.tasks[0], config) == seen[-1]
    judged = replace(config.tasks[0], judge=True)
    by_one = digest_of(judged, config)
    monkeypatch.setenv("MODEL_VERSION", "gpt-4o")
    by_another = digest_of(judged, config)
    monkeypatch.setenv("OPENAI_API_URL", "http://127.0.0.1/v1/chat/completions")
    assert len({by_one, by_another, digest_of(judged, config)}) == 3
    monkeypatch.setattr("shortzip.scripts.evaluate_papers.version", lambda name: f"another version of {name}")
    assert digest_of(config.tasks[0], config) != seen[-1]


def test_several_processes_are_torchruns(tmp_path: Path) -> None:
    task = Task("t", "t", ["m"])
    config = PapersConfig("m", [task], "o", processes=2)
    assert "torch.distributed.run" in command_of(rows_of(config)[0], task, config, tmp_path)


def test_scores_are_sums_of_metrics() -> None:
    results: dict[str, Any] = {"mme": {"a,none": 1500.0, "b,none": 350.0, "alias": "mme"}}
    assert score_of(results, Task("MME", "mme", ["a,none", "b,none"], scale=1)) == 1850
    with pytest.raises(ValueError, match=r"no number for c,none among a,none, alias, b,none"):
        score_of(results, Task("MME", "mme", ["c,none"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budgets": ["64"]}, "dominant\\+contextual"),
        ({"tuned": [("run", "8+2", "1,2")]}, "layers is '1,2': write indices like 31"),
        ({"tuned": [("run", "8+2", "none", "poll")]}, "method is 'poll'; it must be one of .'visionzip', 'divprune'"),
        ({"methods": ["visionzp"]}, "method is 'visionzp'; it must be one of .'visionzip', 'divprune'"),
        ({"fastv": ["half"]}, "fastv is 'half': write the layer and the share kept, like 2"),
        ({"fastv": ["2+1.5"]}, "got keep: 1.5, at most 1 is needed"),
        ({"dtype": "fp16"}, "dtype is 'fp16'; it must be one of auto, float32"),
        ({"text_tokens": 0}, "text_tokens 0: at least 1 each"),
        ({"tasks": []}, "tasks is empty"),
        ({"tasks": [Task("t", "t", ["m"]), Task("t", "u", ["m"])]}, "tasks: t stands there 2 times"),
        ({"published": [Published(90.0, "a paper", scores={"GQ": 1.0})]}, "scores of 'GQ'; the tasks are t"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):  # noqa: PT012 - entries of the parametrisation must not raise
        if "tuned" in settings:
            settings = {"tuned": [Tuned(*entry) for entry in settings["tuned"]]}
        PapersConfig(**{"model": "m", "tasks": [Task("t", "t", ["m"])], "output": "o", **settings})
    with pytest.raises(ConfigError, match="metrics is empty"):
        Task("t", "t", [])
    with pytest.raises(ConfigError, match="kind is 'tund'; it must be training-free or tuned"):
        Published(1.0, "a paper", kind="tund")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"budgets": ["6+3", "30+20"]},
            r"budget: 30\+20, layers: none: visionzip: dominant 30 \+ contextual 20 = 50 exc",
        ),
        ({"budgets": ["6+1"], "methods": ["pool"]}, r"method: pool: .*7 tokens make no grid over 6 by 6 patches"),
        ({"layers": ["1+2", "3+4"]}, r"layers: 3\+4: shortv: layers \[4\] do not exist: this model has layers 0 to 3"),
        ({"layers": ["1+1"]}, r"\[1\] more than once"),
        ({"fastv": ["4+0.5"]}, r"fastv: 4\+0.5: fastv: layer 4: this model has 4 layers"),
        ({"tuned": [Tuned("/no/such/run", "6+3")]}, "/no/such/run does not exist: needed is a folder, or a Hub id"),
        ({"model": "/no/such/release"}, "/no/such/release does not exist"),
        ({"include_path": "/no/such/tasks"}, "include_path /no/such/tasks: no such folder"),
    ],
)
def test_what_cannot_be_run_is_refused_before_the_first_run(
    settings: dict[str, Any], message: str, tiny_release: Path
) -> None:
    base = {"model": str(tiny_release), "tasks": [Task("t", "t", ["m"])], "output": "o", "device": "cpu"}
    with pytest.raises((ConfigError, FileNotFoundError), match=message):
        check_rows(PapersConfig(**{**base, **settings}))


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
        "budgets": ["6+3"], "fastv": ["2+0.5"], "tasks": [
            {"name": "scenes", "task": "tiny", "metrics": ["exact_match,none"], "gen_kwargs": "max_new_tokens=4"}
        ],
        "published": [{"budget": "6+3", "percent": 94.0, "source": "a paper"}],
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    main(["--config", str(tmp_path / "config.yaml")])
    first = capsys.readouterr().out
    assert "kept" not in first
    kept = sorted((tmp_path / "out" / "results").glob("*.json"))
    assert len(kept) == 3
    written = kept[1].stat().st_mtime_ns
    kept[0].unlink()
    main(["--config", str(tmp_path / "config.yaml")])
    again = capsys.readouterr().out
    assert again.count(": kept") == 2
    assert kept[1].stat().st_mtime_ns == written
    assert "94" in (tmp_path / "out" / "table.md").read_text()


JUDGED = """
def process_results(doc, results):
    return {"gpt_eval_score": {"score": 0.0, "eval_model": VERDICTS[doc["id"]]}}

def mean(results):
    return sum(result["score"] for result in results)
"""


@pytest.mark.parametrize("judges", [["gpt", ""], ["gpt", "Failed Request"], ["gpt", "gpt"]])
def test_scores_that_no_judge_gave_are_not_kept(
    tiny_release: Path, local_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judges: list[str]
) -> None:
    """The real lmms-eval, on a task that scores without a judge as its MM-Vet does."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    questions = {json.loads(line)["id"]: line for line in (local_task / "tiny.jsonl").read_text().splitlines()}
    verdicts = dict(zip(questions, judges, strict=False))
    (local_task / "tiny.jsonl").write_text("".join(questions[name] + "\n" for name in verdicts))
    (local_task / "judging.py").write_text(f"VERDICTS = {verdicts!r}\n{JUDGED}")
    task = yaml.safe_load((local_task / "tiny.yaml").read_text())
    (local_task / "judged.yaml").write_text(
        yaml.safe_dump({**task, "task": "judged", "generation_kwargs": {"max_new_tokens": 2}})
        + "process_results: !function judging.process_results\n"
        + "metric_list: [{metric: gpt_eval_score, aggregation: !function judging.mean, higher_is_better: true}]\n"
    )
    asked = Task("judged", "judged", ["gpt_eval_score,none"], judge=True)
    config = PapersConfig(
        str(tiny_release), [asked], str(tmp_path / "out"), device="cpu", include_path=str(local_task)
    )
    scores, failures = run_all(config, check_rows(config), print, StopRequest())
    kept = list((tmp_path / "out" / "results").glob("*.json"))
    if judges == ["gpt", "gpt"]:
        assert list(scores.values()) == [{"judged": 0.0}]
        assert len(kept) == 1
    else:
        assert list(scores.values()) == [{}]
        assert "no judgement of 1 of 2 answers" in failures[0]
        assert not kept


def test_below_zero_is_no_judgement(tmp_path: Path) -> None:
    """As LLaVA-Bench scores an answer that its judge said nothing of."""
    task = Task("bench", "bench", ["gpt_eval_llava_all,none"], judge=True)
    file = tmp_path / "x_samples_bench.jsonl"
    for scores, is_judged in (([8, 6], True), ([-1, -1], False)):
        file.write_text(json.dumps({"gpt_eval_llava_all": {"scores": scores, "eval_model": "gpt-4o"}}) + "\n")
        with nullcontext() if is_judged else pytest.raises(RuntimeError, match="no judgement of 1 of 1"):
            check_judged(task, [file], tmp_path / "log.txt")
    with pytest.raises(RuntimeError, match="no judgements"):
        check_judged(task, [], tmp_path / "log.txt")


def kept_results(config: PapersConfig, rows: dict[Row, Checked], results: dict[str, dict[str, Any]]) -> list[Path]:
    """Writes what lmms-eval would have found for the tasks, in every row."""
    written = []
    for row, checked in rows.items():
        for task in config.tasks:
            if task.task in results:
                parts = depends_on(row, checked.release, digest_of(task, config), config)
                kept, name = Kept(Path(config.output) / "results"), f"{task.task}-{identity_of(parts)[:20]}"
                kept.keep(name, parts, {task.task: results[task.task]})
                written.append(kept.path(name))
    return written


def test_what_fails_leaves_its_cell_empty_and_the_rest_goes_on(
    tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [Task("fails", "fails", ["m"]), Task("done", "done", ["m"], scale=1)]
    config = PapersConfig(str(tiny_release), tasks, str(tmp_path), device="cpu")
    rows = check_rows(config)
    (row,) = rows
    (kept,) = kept_results(config, rows, {"done": {"m": 3.0}})
    before = kept.read_text()
    failing = [sys.executable, "-c", "print('the disk is full'); raise SystemExit(3)"]
    monkeypatch.setattr("shortzip.scripts.evaluate_papers.command_of", lambda *arguments: failing)
    said: list[str] = []
    scores, failures = run_all(config, rows, said.append, StopRequest())
    assert re.search(r"ended with 3[\s\S]*the disk is full", said[1])
    assert said[2].endswith("done: kept")
    assert scores == {row: {"done": 3.0}}
    assert len(failures) == 1
    assert kept.read_text() == before
    assert "100.0 (1 of 2)" in show(config, table_rows(config, scores, {row: 1}))
    options = [{"name": task.name, "task": task.task, "metrics": task.metrics} for task in tasks]
    written = {"model": str(tiny_release), "output": str(tmp_path), "device": "cpu", "tasks": options}
    (tmp_path / "config.yaml").write_text(json.dumps(written))
    with pytest.raises(SystemExit, match=r"1 of the runs failed[\s\S]*fails"):
        main(["--config", str(tmp_path / "config.yaml")])
    assert (tmp_path / "table.md").is_file()


def test_a_corrected_metric_or_scale_needs_no_other_run(
    tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PapersConfig(str(tiny_release), [Task("t", "t", ["wrong"])], str(tmp_path), device="cpu")
    rows = check_rows(config)
    (row,) = rows
    found = {"results": {"t": {"right": 0.5}}}
    script = f"import pathlib, sys; pathlib.Path(sys.argv[1], 'a_results.json').write_text('{json.dumps(found)}')"
    runs: list[Path] = []

    def command(row: Row, task: Task, config: PapersConfig, folder: Path, *_: Release) -> list[str]:
        runs.append(folder)
        return [sys.executable, "-c", script, str(folder)]

    monkeypatch.setattr("shortzip.scripts.evaluate_papers.command_of", command)
    scores, failures = run_all(config, rows, print, StopRequest())
    assert scores == {row: {}}
    assert "no number for wrong among right" in failures[0]
    for scale in (100.0, 1.0):
        right = replace(config, tasks=[Task("t", "t", ["right"], scale=scale)])
        assert run_all(right, rows, print, StopRequest()) == ({row: {"t": scale / 2}}, [])
    assert len(runs) == 1


def test_two_metrics_of_a_task_are_one_run_even_where_it_fails(
    tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [Task("accuracy", "t", ["a"], scale=1), Task("score", "t", ["b"], scale=1), Task("other", "u", ["a"])]
    config = PapersConfig(str(tiny_release), tasks, str(tmp_path), device="cpu")
    rows = check_rows(config)
    (row,) = rows
    runs: list[str] = []

    def failing(row: Row, task: Task, *_: Any) -> list[str]:
        runs.append(task.task)
        return [sys.executable, "-c", "raise SystemExit(3)"]

    monkeypatch.setattr("shortzip.scripts.evaluate_papers.command_of", failing)
    scores, failures = run_all(config, rows, print, StopRequest())
    assert (runs, scores) == (["t", "u"], {row: {}})
    assert ["ended with 3" in failure for failure in failures] == [True, False, True]
    assert "score: the same run of lmms-eval, which failed above" in failures[1]
    kept_results(config, rows, {"t": {"a": 1.0, "b": 2.0}})
    scores, failures = run_all(config, rows, print, StopRequest())
    assert (runs[2:], scores) == (["u"], {row: {"accuracy": 1.0, "score": 2.0}})


def test_why_lmms_eval_failed_is_said(
    tiny_release: Path, local_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tasks = [Task("t", "absent", ["m"])]
    config = PapersConfig(str(tiny_release), tasks, str(tmp_path), device="cpu", include_path=str(local_task))
    rows = check_rows(config)
    said: list[str] = []
    run_all(config, rows, said.append, StopRequest())  # the real one
    assert re.search(
        r"failed: lmms-eval ended with 1 and wrote no results[\s\S]*ValueError: Tasks not found: absent", said[1]
    )
    quiet = "print('a.b.RetryError: why'); print('and so on\\n' * 50)"
    monkeypatch.setattr(
        "shortzip.scripts.evaluate_papers.command_of", lambda *arguments: [sys.executable, "-c", quiet]
    )
    run_all(config, rows, said.append, StopRequest())
    assert re.search(r"ended with 0 and wrote no results[\s\S]*\na\.b\.RetryError: why\n(and so on\n)+", said[3])


def descendants(process: psutil.Process, are_there: Callable[[list[psutil.Process]], bool]) -> list[psutil.Process]:
    """The process's children and theirs, once those that are waited for are there."""
    end = time.monotonic() + 300
    while not are_there(found := process.children(recursive=True)):
        assert time.monotonic() < end
        assert process.is_running()
        time.sleep(0.1)
    return found


def runs_lmms_eval(process: psutil.Process) -> bool:
    with suppress(psutil.Error):  # it has ended, or is not what it will be yet
        return "lmms_eval" in process.cmdline()
    return False


@pytest.fixture
def started(tiny_release: Path, local_task: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The command itself, in the middle of its first run of the real lmms-eval."""
    settings = {
        "model": str(tiny_release), "output": str(tmp_path / "out"), "include_path": str(local_task), "device": "cpu",
        "tasks": [{"name": "scenes", "task": "tiny", "metrics": ["exact_match,none"]}],
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    command = [sys.executable, str(ROOT / "scripts" / "evaluate_papers.py"), "--config", str(tmp_path / "config.yaml")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    yield process
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    process.kill()
    process.communicate()


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_lmms_eval_ends_with_the_command(started: subprocess.Popen[str], asked: signal.Signals) -> None:
    below = descendants(psutil.Process(started.pid), lambda found: any(map(runs_lmms_eval, found)))
    started.send_signal(asked)
    _, said = started.communicate(timeout=4 * CONSENT_S)
    assert started.returncode == (130 if asked == signal.SIGINT else 1)
    assert "stopped; the same command continues" in said
    assert not [child for child in below if child.is_running()]


class AskedOnce:
    """In place of a StopRequest: `answer` says whether it was signalled."""

    def __init__(self, answer: Callable[[], str | None]) -> None:
        self.answer = answer

    @property
    def signal(self) -> str | None:
        return self.answer()


@pytest.mark.parametrize("fails", [True, False])
def test_all_that_a_run_started_ends_with_it(
    tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    config = PapersConfig(str(tiny_release), [Task("t", "t", ["m"])], str(tmp_path), device="cpu")
    rows = check_rows(config)
    deaf = "import subprocess, time; subprocess.Popen(['sh', '-c', 'trap \"\" TERM; sleep 600; :']); time.sleep(600)"
    monkeypatch.setattr("shortzip.scripts.evaluate_papers.command_of", lambda *arguments: [sys.executable, "-c", deaf])
    here = psutil.Process()
    others = here.children(recursive=True)
    seen: list[psutil.Process] = []

    def answer() -> str:
        if not seen:
            found = descendants(here, lambda found: len([child for child in found if child not in others]) >= 3)
            seen.extend(child for child in found if child not in others)
        if fails:
            raise OSError("the disk is full")
        return "SIGTERM"

    with pytest.raises(OSError if fails else StopRequested):
        run_all(config, rows, print, AskedOnce(answer))  # type: ignore[arg-type]
    assert len(seen) >= 3
    assert psutil.wait_procs([child for child in seen if not is_zombie(child)], timeout=60)[1] == []


def is_zombie(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return False


JUDGES = ("OPENAI_API_KEY", "AZURE_API_KEY", "AZURE_ENDPOINT", "API_TYPE")


def test_scores_that_a_judge_gives_need_one(monkeypatch: pytest.MonkeyPatch, papers: PapersConfig) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)  # whose client asks for OpenAI's key even where Azure judges
    for given, is_judge in (
        ({}, False),
        ({"OPENAI_API_KEY": "a key"}, True),
        ({"AZURE_API_KEY": "a key"}, False),
        ({"API_TYPE": "azure", "AZURE_API_KEY": "a key"}, False),
        ({"API_TYPE": "azure", "AZURE_API_KEY": "a key", "AZURE_ENDPOINT": "https://here"}, True),
        ({"API_TYPE": "azure", "OPENAI_API_KEY": "a key"}, False),
        ({"API_TYPE": "dummy", "OPENAI_API_KEY": "a key"}, False),
        ({"API_TYPE": "somebody", "OPENAI_API_KEY": "a key"}, False),
    ):
        for key in JUDGES:
            monkeypatch.delenv(key, raising=False)
        for key, value in given.items():
            monkeypatch.setenv(key, value)
        if is_judge:
            check_lmms_eval(papers)
        else:
            kind = given.get("API_TYPE", "openai")
            with pytest.raises(ConfigError, match=rf"MM-Vet, LLaVA-Bench: GPT judges .* \(API_TYPE is '{kind}'\)"):
                check_lmms_eval(papers)
    skipped = replace(papers, skip_judged=True)
    check_lmms_eval(skipped)
    assert [task.name for task in skipped.asked] == [task.name for task in papers.tasks if not task.judge]
    assert len(skipped.asked) == 9
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(ConfigError, match=r"lmms-eval is not installed: pip install 'shortzip\[eval\]'"):
        check_lmms_eval(skipped)


def test_a_percentage_is_of_what_both_have() -> None:
    for scores, full, percent, tasks in (
        ({"a": 9.0}, {"a": 10.0, "b": 4.0}, 90, ("a",)),
        ({"a": 9.0, "b": 2.0}, {"a": 10.0, "b": 0.0}, 90, ("a",)),
        ({"a": 9.0, "b": 2.0}, {"a": 10.0}, 90, ("a",)),
    ):
        found = average_of(scores, full)
        assert found is not None
        assert (found.percent, found.tasks) == (pytest.approx(percent), tasks)
    assert average_of({}, {"a": 10.0}) is None


def test_a_task_that_all_tokens_lack_is_not_counted() -> None:
    config = PapersConfig("m", [Task("a", "a", ["m"]), Task("b", "b", ["m"])], "o", budgets=["8+2"])
    scores = dict(zip(rows_of(config), ({"b": 10.0}, {"a": 5.0, "b": 9.0}), strict=True))
    lines = table_rows(config, scores, dict.fromkeys(scores, 1))
    assert lines[1]["tasks"] == ["b"]
    assert "| 5.0 | 9.0 | 90.0 (1 of 2) |" in show(config, lines)


def tuned_checkpoint(folder: Path, tiny_release: Path, budgets: Any = None, **reductions: Any) -> str:
    release = open_release(str(tiny_release))
    _, processor = load_release(release)
    write_reduced_checkpoint(
        folder, release, release_projector(release), processor, Reductions(**reductions), budgets=budgets
    )
    return str(folder)


def test_a_checkpoint_for_several_budgets_has_a_row_for_each(tiny_release: Path, tmp_path: Path) -> None:
    budget, other = {"dominant": 6, "contextual": 3}, {"dominant": 12, "contextual": 6}
    tuned = tuned_checkpoint(tmp_path / "tuned", tiny_release, [budget, other], visionzip=budget)
    base = PapersConfig(str(tiny_release), [Task("t", "t", ["m"])], "o", device="cpu")
    rows = check_rows(replace(base, tuned=[Tuned(tuned, "6+3"), Tuned(tuned, "12+6")]))
    given = [model_arguments(row, base, checked.release) for row, checked in rows.items() if row.kind == TUNED]
    assert given == [
        f"pretrained={tuned},dtype=float32", f"pretrained={tuned},dtype=float32,budget=12+6,method=visionzip",
    ]  # fmt: skip
    whole, small, large = (checked.llm_flops for checked in rows.values())
    assert small < large < whole
    (row,) = [row for row in rows if row.budget == "12+6"]
    command = command_of(row, base.tasks[0], base, tmp_path, rows[row].release)
    assert f"pretrained={tuned},dtype=float32,budget=12+6,method=visionzip" in command
    with pytest.raises(ConfigError, match=r"was saved with budget: 6\+3"):
        check_rows(replace(base, tuned=[Tuned(tuned, "9+6")]))


def test_a_tuned_checkpoint_stands_in_its_own_row(tiny_release: Path, tmp_path: Path) -> None:
    budget: dict[str, Any] = {"dominant": 6, "contextual": 3}
    pool = {"dominant": 9, "contextual": 0, "method": "pool"}
    scope = {"dominant": 9, "contextual": 0, "method": "scope", "alpha": 0.5}
    plain = tuned_checkpoint(tmp_path / "plain", tiny_release, visionzip=budget, shortv={"layers": [2, 1]})
    pooled = tuned_checkpoint(tmp_path / "pooled", tiny_release, visionzip=pool, shortv=None)
    scoped = tuned_checkpoint(tmp_path / "scoped", tiny_release, visionzip=scope, shortv=None)
    pruned = tuned_checkpoint(
        tmp_path / "pruned", tiny_release, visionzip=None, shortv=None, fastv={"layer": 2, "keep": 0.5}
    )
    base = PapersConfig(str(tiny_release), [Task("t", "t", ["m"])], "o", device="cpu")
    right = [
        Tuned(plain, "6+3", "1+2"),
        Tuned(pooled, "9+0", method="pool"),
        Tuned(scoped, "9+0", method="scope:alpha=0.5"),
        Tuned(pruned, "all", fastv="2+0.5"),
    ]
    rows = check_rows(replace(base, tuned=right))
    assert [row.title for row in rows] == [
        "all tokens", f"tuned: {plain}", f"pool, tuned: {pooled}", f"scope:alpha=0.5, tuned: {scoped}",
        f"FastV 2+0.5, tuned: {pruned}"
    ]  # fmt: skip
    for wrong, saved in (
        (Tuned(plain, "6+3"), "budget: 6+3, layers: 1+2"),
        (Tuned(plain, "6+2", "1+2"), "budget: 6+3, layers: 1+2"),
        (Tuned(plain, "all", "1+2"), "budget: 6+3, layers: 1+2"),
        (Tuned(plain, "6+3", "1+3"), "budget: 6+3, layers: 1+2"),
        (Tuned(pooled, "9+0"), "budget: 9+0, layers: none, method: pool"),
        (Tuned(scoped, "9+0", method="scope"), "budget: 9+0, layers: none, method: scope:alpha=0.5"),
        (Tuned(pruned, "all"), "budget: all, layers: none, fastv: 2+0.5"),
        (Tuned(str(tiny_release), "6+3"), "budget: all, layers: none"),
    ):
        message = f"{wrong.model} was saved with {saved}, and is given with budget"
        with pytest.raises(ConfigError, match=re.escape(message)):
            check_rows(replace(base, tuned=[wrong]))


def test_rows_are_of_one_release_and_what_was_tuned_from_it(tiny_release: Path, tmp_path: Path) -> None:
    write_release(tmp_path / "other", seed=1)
    tuned = tuned_checkpoint(tmp_path / "tuned", tiny_release, visionzip={"dominant": 6, "contextual": 3}, shortv=None)
    tasks = [Task("t", "t", ["m"])]
    for model, entry, message in (
        (str(tmp_path / "other"), Tuned(tuned, "6+3"), f"tuned {tuned} was tuned from other weights than model"),
        (str(tiny_release), Tuned(str(tmp_path / "other"), "all"), "is a release, and was not tuned from one"),
        (str(tiny_release), Tuned(str(tiny_release), "all"), "is a release, and was not tuned from one"),
        (tuned, None, f"model {tuned} is a reduced or tuned checkpoint: needed is the release"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            check_rows(PapersConfig(model, tasks, "o", tuned=[entry] if entry else [], device="cpu"))
