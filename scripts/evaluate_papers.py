"""The papers' tables: all tokens, training-free and tuned, for lists of budgets and frozen layers, by lmms-eval.

    python scripts/evaluate_papers.py --config configs/eval/llava-1.5-7b.yaml --processes 8
    python scripts/evaluate_papers.py --config configs/eval/demo.yaml        # the demo's held-out scenes, on a CPU

Every row and task is one run of lmms-eval, whose result is kept in `output`: what is done is skipped, so the command
continues where it was interrupted. The table stands in `output`/table.md and table.json, beside the papers' figures.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from reduction.parsing import parse_budget
from train.checkpoint import write_atomically
from train.config import ConfigError, parse_config

ALL, NONE = "all", "none"
TRAINING_FREE, TUNED = "training-free", "tuned"
LAST_LINES = 30


@dataclass(frozen=True)
class Task:
    """A benchmark."""

    name: str
    """The column's heading."""
    task: str
    """lmms-eval's task."""
    metrics: list[str]
    """The metrics of its results whose sum is the score, like ["exact_match,none"]."""
    scale: float = 100.0
    """The score is multiplied by this: 100 for shares, 1 for scores that are percent or points already."""
    gen_kwargs: str | None = None
    """Settings of generation over the task's own, as lmms-eval takes them."""
    full: float | None = None
    """The paper's score with all tokens."""

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ConfigError(f"task {self.name}: metrics is empty; at least one is needed")


@dataclass(frozen=True)
class Tuned:
    """A tuned checkpoint."""

    model: str
    """Reduced checkpoint, run folder or Hub id."""
    budget: str
    """The budget it was tuned for; all for every visual token."""
    layers: str = NONE
    """The frozen layers it was tuned for."""


@dataclass(frozen=True)
class Published:
    """What a paper reports of a row: its percentage of full performance."""

    percent: float
    """Mean over the benchmarks of score / score with all tokens, times 100."""
    source: str
    """Which table of which paper."""
    budget: str = ALL
    """The row's budget."""
    layers: str = NONE
    """The row's frozen layers."""
    kind: str = TRAINING_FREE
    """training-free or tuned."""


@dataclass(frozen=True)
class PapersConfig:
    """Settings of scripts/evaluate_papers.py."""

    model: str
    """The release."""
    tasks: list[Task]
    """The benchmarks."""
    output: str
    """Folder of the results and of the table."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    budgets: list[str] = field(default_factory=list)
    """Budgets, each with each of `layers`: dominant+contextual, or all."""
    layers: list[str] = field(default_factory=lambda: [NONE])
    """Lists of frozen layers like 31+29+30, or none."""
    methods: list[str] = field(default_factory=lambda: ["visionzip"])
    """Ways to the budget: visionzip and baselines (random, grid, pool, downsample)."""
    tuned: list[Tuned] = field(default_factory=list)
    """Tuned checkpoints, as further rows."""
    published: list[Published] = field(default_factory=list)
    """The papers' figures, to stand beside the rows."""
    processes: int = 1
    """Processes (GPUs) of each run of lmms-eval."""
    device: str = "cuda"
    """Where one process computes."""
    dtype: str = "auto"
    """float32, bfloat16 or float16; auto: bfloat16 on a GPU."""
    batch_size: int = 16
    """Prompts at once."""
    include_path: str | None = None
    """Folder of local tasks."""
    limit: int | None = None
    """Only the first so many documents of each task: to try the machinery, not to report."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("tasks is empty: at least one benchmark is needed")
        for budget in [*self.budgets, *(tuned.budget for tuned in self.tuned)]:
            if budget != ALL:
                try:
                    parse_budget(budget)
                except ValueError as error:
                    raise ConfigError(str(error)) from error
        if self.processes < 1 or self.batch_size < 1:
            raise ConfigError(f"processes {self.processes}, batch_size {self.batch_size}: at least 1 each is needed")


@dataclass(frozen=True)
class Row:
    """A row of the table: one model in one reduction."""

    kind: str
    model: str
    budget: str
    layers: str
    method: str = "visionzip"

    @property
    def title(self) -> str:
        """What the table calls it."""
        if (self.budget, self.layers) == (ALL, NONE) and self.kind == TRAINING_FREE:
            return "all tokens"
        method = "" if self.method == "visionzip" else f"{self.method}, "
        return f"{method}{self.kind}"

    @property
    def tokens(self) -> int | None:
        """Visual tokens per image; None for all."""
        return None if self.budget == ALL else sum(parse_budget(self.budget).values())


def rows_of(config: PapersConfig) -> list[Row]:
    """All tokens first, then every budget with every list of layers, each training-free and (where given) tuned."""
    rows = [Row(TRAINING_FREE, config.model, ALL, NONE)]
    tuned = {(entry.budget, entry.layers): entry.model for entry in config.tuned}
    for layers in config.layers:
        for budget in config.budgets or [ALL]:
            for method in config.methods if budget != ALL else ["visionzip"]:
                row = Row(TRAINING_FREE, config.model, _as_method(budget, method), layers, method)
                if row not in rows:
                    rows.append(row)
            if (budget, layers) in tuned:
                rows.append(Row(TUNED, tuned.pop((budget, layers)), budget, layers))
    rows += [Row(TUNED, model, budget, layers) for (budget, layers), model in tuned.items()]
    return rows


def _as_method(budget: str, method: str) -> str:
    return budget if method == "visionzip" else f"{sum(parse_budget(budget).values())}+0"


def model_arguments(row: Row, config: PapersConfig) -> str:
    """lmms-eval's --model_args of a row."""
    arguments = {"pretrained": row.model, "dtype": config.dtype}
    if row.kind == TRAINING_FREE:
        arguments |= {"budget": row.budget, "layers": row.layers}
        if row.method != "visionzip":
            arguments["method"] = row.method
    if config.revision and row.model == config.model:
        arguments["revision"] = config.revision
    return ",".join(f"{key}={value}" for key, value in arguments.items())


def identity(row: Row, task: Task, config: PapersConfig) -> str:
    """What a kept result belongs to: arguments, task, and the checkpoint's files where it is a folder."""
    files = sorted(Path(row.model).rglob("*.safetensors")) if Path(row.model).is_dir() else []
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    parts = [model_arguments(row, config), task.task, task.gen_kwargs, config.limit, stats]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def command_of(row: Row, task: Task, config: PapersConfig, folder: Path) -> list[str]:
    """The run of lmms-eval for one row and task."""
    launch = [sys.executable, "-m"]
    if config.processes > 1:
        launch += ["torch.distributed.run", "--nproc_per_node", str(config.processes), "--master_port", "0", "-m"]
    command = [
        *launch, "lmms_eval", "--model", "reduced_llava", "--model_args", model_arguments(row, config),
        "--tasks", task.task, "--batch_size", str(config.batch_size), "--device", config.device,
        "--output_path", str(folder), "--log_samples",
    ]  # fmt: skip
    for option, value in (
        ("--include_path", config.include_path),
        ("--gen_kwargs", task.gen_kwargs),
        ("--limit", config.limit),
    ):
        command += [option, str(value)] if value is not None else []
    return command


def score_of(results: Mapping[str, Any], task: Task) -> float:
    """The score in lmms-eval's results. Raises ValueError when a metric is not there, naming those that are."""
    found = {key: value for block in results["results"].values() for key, value in block.items()}
    if task.task in results["results"]:
        found = results["results"][task.task]
    bad = [metric for metric in task.metrics if not isinstance(found.get(metric), (int, float))]
    if bad:
        raise ValueError(f"task {task.name}: no number for {', '.join(bad)} among {', '.join(sorted(found))}")
    return task.scale * sum(found[metric] for metric in task.metrics)


def run_all(config: PapersConfig, say: Callable[[str], None]) -> dict[Row, dict[str, float]]:
    """Scores of every row by task; what is kept from before is not run again.

    Raises RuntimeError, with the end of its output, when a run of lmms-eval fails.
    """
    output, rows = Path(config.output), rows_of(config)
    scores: dict[Row, dict[str, float]] = {row: {} for row in rows}
    total, number = len(rows) * len(config.tasks), 0
    for row in rows:
        for task in config.tasks:
            number += 1
            key = identity(row, task, config)
            kept = output / "results" / f"{task.task}-{key}.json"
            what = f"[{number}/{total}] {row.title}, {row.budget}, layers {row.layers}: {task.name}"
            if kept.is_file():
                say(f"{what}: kept")
            else:
                say(what)
                _run(row, task, config, kept)
            scores[row][task.name] = json.loads(kept.read_text(encoding="utf-8"))["score"]
    return scores


def _run(row: Row, task: Task, config: PapersConfig, kept: Path) -> None:
    folder = kept.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    command, start = command_of(row, task, config, folder), time.time()
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code != 0:
        tail = "\n".join((folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])
        raise RuntimeError(f"lmms-eval ended with {code} (all of it: {folder / 'log.txt'}):\n{tail}")
    written = [file for file in folder.rglob("*_results.json") if file.stat().st_mtime >= start - 1]
    if not written:
        raise RuntimeError(f"lmms-eval wrote no results into {folder}: see {folder / 'log.txt'}")
    results = json.loads(max(written, key=lambda file: file.stat().st_mtime).read_text(encoding="utf-8"))
    entry = {"score": score_of(results, task), "command": command, "results": results["results"]}
    write_atomically(kept, json.dumps(entry, indent=1) + "\n")


def percent_of_full(scores: Mapping[str, float], full: Mapping[str, float]) -> float:
    """VisionZip's average: the mean over benchmarks of score / score with all tokens, times 100."""
    return 100 * sum(scores[name] / full[name] for name in full) / len(full) if all(full.values()) else float("nan")


def table_rows(config: PapersConfig, scores: Mapping[Row, Mapping[str, float]]) -> list[dict[str, Any]]:
    """The table as plain values."""
    full = next(iter(scores.values()))
    published = {(entry.budget, entry.layers, entry.kind): entry for entry in config.published}
    lines = []
    for row, found in scores.items():
        paper = published.get((row.budget, row.layers, row.kind)) if row.method == "visionzip" else None
        lines.append(
            {
                "model": row.title,
                "checkpoint": row.model,
                "budget": row.budget,
                "layers": row.layers,
                "scores": dict(found),
                "percent": percent_of_full(found, full),
                "paper_percent": paper.percent if paper else None,
                "paper": paper.source if paper else None,
            }
        )
    return lines


def show(config: PapersConfig, lines: Sequence[Mapping[str, Any]]) -> str:
    """The table as Markdown; it is printed too."""
    names = [task.name for task in config.tasks]
    headings = ["model", "visual tokens", "frozen layers", *names, "% of full", "paper's %"]
    cells = []
    if any(task.full is not None for task in config.tasks):
        figures = ["" if task.full is None else f"{task.full:g}" for task in config.tasks]
        cells.append(["all tokens, as published", ALL, "0", *figures, "", "100"])
    for line in lines:
        budget, layers = line["budget"], line["layers"]
        scores = [f"{line['scores'][name]:.1f}" for name in names]
        paper = "" if line["paper_percent"] is None else f"{line['paper_percent']:g}"
        frozen = "0" if layers == NONE else str(layers.count("+") + 1)
        cells.append([line["model"], budget, frozen, *scores, f"{line['percent']:.1f}", paper])
    table = Table(title=f"{config.model}, {', '.join(names)}")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place == 0 else "right")
    for row in cells:
        table.add_row(*row)
    Console().print(table)
    ruler = ["---", *["---:"] * (len(headings) - 1)]
    return "".join("| " + " | ".join(row) + " |\n" for row in [headings, ruler, *cells])


def main(argv: Sequence[str]) -> None:
    try:
        config = parse_config(PapersConfig, argv, default=None, program="evaluate_papers.py")
    except ConfigError as error:
        sys.exit(f"error: {error}")
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    try:
        scores = run_all(config, print)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues")
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}\nThe same command continues with what is left")
    lines = table_rows(config, scores)
    write_atomically(output / "table.md", show(config, lines))
    write_atomically(output / "table.json", json.dumps({"model": config.model, "rows": lines}, indent=1) + "\n")
    print(f"written: {output / 'table.md'}, {output / 'table.json'}, {output / 'results'}/")


if __name__ == "__main__":
    main(sys.argv[1:])
