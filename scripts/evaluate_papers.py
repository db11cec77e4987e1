"""The papers' tables: all tokens, training-free and tuned, for lists of budgets and frozen layers, by lmms-eval.

    python scripts/evaluate_papers.py --config configs/eval/llava-1.5-7b.yaml --processes 8
    python scripts/evaluate_papers.py --config configs/eval/demo.yaml        # the demo's held-out scenes, on a CPU

Every row and task is one run of lmms-eval, whose results are kept in `output`: what is done is skipped, so the command
continues where it was interrupted; scores are computed from them anew. Models, budgets, layers and methods are checked
before the first run. The table stands in `output`/table.md and table.json, beside the papers' figures.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from shortzip.data.files import read_json, write_atomically, writing
from shortzip.data.kept import Kept, identity_of
from shortzip.reduction.families import family_of
from shortzip.reduction.positions import COMPACT
from shortzip.train.evaluation.papers_table import (
    Row,
    llm_flops,
    rows_of,
    show,
    table_rows,
)
from shortzip.train.release.lineage import check_tuned, check_untuned
from shortzip.train.release.loading import reduced_config
from shortzip.train.release.opening import Release, open_release, release_content
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.run.processes import StopRequest, StopRequested, run_until_stopped
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import end_stopped, parse_config, printable, run_command, say
from shortzip.train.settings.comparing import TRAINING_FREE, TUNED, VISIONZIP, PapersConfig, Task

LAST_LINES = 20
JUDGE = ("API_TYPE", "MODEL_VERSION", "OPENAI_API_URL")  # lmms-eval's own environment variables, of who judges
REASON = re.compile(r"(\[rank\d+\]:\s*)?[A-Za-z_][\w.]*(Error|Exception)\b")  # how an exception is printed


@dataclass(frozen=True)
class Checked:
    """What a row is measured on."""

    release: Release
    llm_flops: int


# ---------------------------------------------------------------------------------------------- before the first run


def check_lmms_eval(config: PapersConfig) -> None:
    """Raises ConfigError where lmms-eval is not installed, and for tasks that want a judge where it has none."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise ConfigError("lmms-eval is not installed: pip install 'shortzip[eval]'")
    judged = [task.name for task in config.asked if task.judge]
    if not judged:
        return
    from lmms_eval.llm_judge import get_server  # seconds

    kind = os.environ.get("API_TYPE", "openai")
    try:
        is_ready = kind != "dummy" and get_server(kind).is_available()
    except Exception:  # no such kind; or no key, of which the client itself complains where openai is installed
        is_ready = False
    if not is_ready:
        raise ConfigError(
            f"{', '.join(judged)}: GPT judges the answers, and lmms-eval has no judge here (API_TYPE is {kind!r}), "
            "without which it would make up scores. Set OPENAI_API_KEY, or API_TYPE=azure with AZURE_API_KEY and "
            "AZURE_ENDPOINT, or leave these tasks out with --skip_judged true"
        )


def check_rows(config: PapersConfig) -> dict[Row, Checked]:
    """Every row with its release. Raises ConfigError, FileNotFoundError or ValueError for a model that is not there,
    is itself reduced or tuned, or cannot take the row's reductions, and for a checkpoint that was tuned from another
    one or saved with other reductions."""
    if config.include_path is not None and not Path(config.include_path).is_dir():
        raise ConfigError(f"include_path {config.include_path}: no such folder")
    if computed_on(config) == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {config.device!r}, and there is no GPU here: give --device cpu")
    releases: dict[str, Release] = {}
    rows = {}
    for row in rows_of(config):
        if row.model not in releases:
            releases[row.model] = open_release(
                ReleaseSpec(row.model, config.revision if row.model == config.model else None)
            )
        release = releases[row.model]
        if row.kind == TUNED:
            saved = Row.saved(row.model, release.saved_reductions)
            if saved != row and row not in _other_rows(row.model, release):
                raise ConfigError(
                    f"tuned: {row.model} was saved with {saved.settings}, and is given with {row.settings}: write "
                    f"{{model: {row.model}, {saved.settings}}}"
                )
            check_tuned(release, releases[config.model])
        else:
            check_untuned(release)
        try:
            model_config = reduced_config(release, row.reductions)
            if config.frames is not None:
                family_of(model_config.model_type).check_frames(config.frames, model_config)
        except ValueError as error:
            raise ConfigError(f"{row.title}, {row.settings}: {error}") from error
        rows[row] = Checked(release, llm_flops(model_config, row, config.text_tokens, config.frames))
    return rows


def _other_rows(model: str, release: Release) -> list[Row]:
    """Those of a tuned checkpoint under the budgets of its list that are not the one it was saved with."""
    saved = release.saved_reductions
    under = [saved.with_budget(budget) for budget in release.saved_budgets or [] if saved.visionzip is not None]
    return [Row.saved(model, reductions) for reductions in under if reductions != saved]


# ------------------------------------------------------------------------------------------- what results belong to


def computed_on(config: PapersConfig) -> str:
    """The kind of device; several processes take theirs from Accelerate."""
    if config.processes > 1:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device.partition(":")[0]


def model_arguments(row: Row, config: PapersConfig, release: Release | None = None) -> str:
    """lmms-eval's --model_args of a row. `release`: of a tuned one, which may have been tuned for several budgets."""
    auto = "float32" if computed_on(config) == "cpu" else "bfloat16"
    arguments = {"pretrained": row.model, "dtype": auto if config.dtype == "auto" else config.dtype}
    if row.kind == TRAINING_FREE:
        arguments |= {"budget": row.budget, "layers": row.layers, "fastv": row.fastv}
        if row.method != VISIONZIP:
            arguments["method"] = row.method
        if row.positions != COMPACT:
            arguments["positions"] = row.positions
    elif release is not None and row in _other_rows(row.model, release):
        arguments |= {"budget": row.budget, "method": row.method}
    if config.frames is not None:
        arguments["max_frames_num"] = str(config.frames)
    if config.revision and row.model == config.model:
        arguments["revision"] = config.revision
    return ",".join(f"{key}={value}" for key, value in arguments.items())


class _TaskLoader(yaml.SafeLoader):
    """Reads lmms-eval's `!function` as text."""


_TaskLoader.add_constructor("!function", lambda loader, node: node.value)


def _read_task(file: Path) -> dict[str, Any]:
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _TaskLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"include_path: {file} is not YAML: {error}") from error
    return content if isinstance(content, dict) else {}


def task_files(task: str, include_path: str | None) -> list[Path]:
    """The YAML files of a local task, and the data files that they name; none for lmms-eval's own tasks."""
    for file in sorted(Path(include_path).rglob("*.yaml")) if include_path else []:
        if _read_task(file).get("task") == task:
            return list(_files_below(file))
    return []


def _files_below(file: Path) -> Iterator[Path]:
    yield file
    content = _read_task(file)
    included = content.get("include", [])
    for name in [included] if isinstance(included, str) else included:
        yield from _files_below(Path(name) if Path(name).is_file() else file.parent / name)
    named = (content.get("dataset_kwargs") or {}).get("data_files", [])
    for names in named.values() if isinstance(named, dict) else [named]:
        for name in [names] if isinstance(names, str) else names:
            yield from (Path(path) for path in sorted(glob.glob(str(file.parent / name))))


def digest_of(task: Task, config: PapersConfig) -> str:
    """A digest of what is asked: the task, lmms-eval's version of it or the files of a local one, and who judges."""
    digest = hashlib.sha256()
    judge = [os.environ.get(key) for key in JUDGE] if task.judge else []
    digest.update(json.dumps([task.task, version("lmms_eval"), task.gen_kwargs, config.limit, judge]).encode())
    for file in task_files(task.task, config.include_path):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def depends_on(row: Row, release: Release, task_digest: str, config: PapersConfig) -> dict[str, Any]:
    """What kept results depend on: what is asked (`digest_of`), model and arguments, and the kind of device.

    A model is known by its commit on the Hub, or by the content of its files: weights, configs, tokenizer, template.
    """
    return {
        "asked": task_digest,
        "model's arguments": model_arguments(row, config, release),
        "computed on": computed_on(config),
        "model": release.revision or release_content(release),
    }


# ------------------------------------------------------------------------------------------------------------ runs


def command_of(row: Row, task: Task, config: PapersConfig, folder: Path, release: Release | None = None) -> list[str]:
    """The run of lmms-eval for one row and task. `release`: as of `model_arguments`."""
    launch = [sys.executable, "-m"]
    if config.processes > 1:
        launch += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(config.processes), "-m"]
    command = [
        *launch, "lmms_eval", "--model", "reduced_llava", "--model_args",
        model_arguments(row, config, release),
        "--tasks", task.task, "--batch_size", str(config.batch_size), "--device", config.device,
        "--output_path", str(folder), "--log_samples",
        "--verbosity", "DEBUG",  # else it swallows what goes wrong, and the other processes wait for the one it was in
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
    values = {key: value for block in results.values() for key, value in block.items()}
    if task.task in results:
        values = results[task.task]
    bad = [metric for metric in task.metrics if not isinstance(values.get(metric), (int, float))]
    if bad:
        raise ValueError(f"task {task.name}: no number for {', '.join(bad)} among {', '.join(sorted(values))}")
    return task.scale * sum(values[metric] for metric in task.metrics)


def run_all(
    config: PapersConfig, rows: Mapping[Row, Checked], say: Callable[[str], None], stop: StopRequest
) -> tuple[dict[Row, dict[str, float]], list[str]]:
    """Scores of every row by task, and what failed, with the end of its output.

    What is kept from before is not run again; what fails leaves its cell of the table empty, and the others go on.
    Raises StopRequested when `stop` was signalled, after it has ended what runs.
    """
    scores: dict[Row, dict[str, float]] = {row: {} for row in rows}
    failures, store = list[str](), Kept(Path(config.output) / "results")
    failed = set[str]()  # runs: two columns may be metrics of one
    total, number = len(rows) * len(config.asked), 0
    digests = {task.name: digest_of(task, config) for task in config.asked}
    for row, checked in rows.items():
        for task in config.asked:
            number += 1
            parts = depends_on(row, checked.release, digests[task.name], config)
            name = f"{task.task}-{identity_of(parts)[:20]}"
            folder, results = store.folder / name, store.find(name, parts)
            what = f"[{number}/{total}] {row.title}, {row.settings}: {task.name}"
            say(what if results is None else f"{what}: kept")
            try:
                if results is None and name in failed:
                    raise RuntimeError("the same run of lmms-eval, which failed above")
                if results is None:
                    failed.add(name)
                    results = _run(command_of(row, task, config, folder, checked.release), task, folder, stop)
                    store.keep(name, parts, results)
                    failed.remove(name)
                scores[row][task.name] = score_of(results, task)
            except (RuntimeError, ValueError) as error:
                failures.append(f"{what}: {error}")
                say(f"failed: {error}")
    return scores, failures


def _run(command: Sequence[str], task: Task, folder: Path, stop: StopRequest) -> dict[str, Any]:
    start = time.time()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "log.txt"
    code = run_until_stopped(command, path, stop)
    fresh = [file for file in sorted(folder.rglob("*.json*")) if file.stat().st_mtime >= start - 1]
    written = [file for file in fresh if file.name.endswith("_results.json")]
    if code != 0 or not written:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        # the reason may stand far above: under it come those that it was wrapped in, and what torchrun says of it
        reasons = dict.fromkeys(line for line in lines[:-LAST_LINES] if REASON.match(line))
        shown = "\n".join([*reasons, *lines[-LAST_LINES:]])
        results = "" if written else " and wrote no results"
        raise RuntimeError(f"lmms-eval ended with {code}{results} (all of it: {path}):\n{shown}")
    if task.judge:
        check_judged(task, [file for file in fresh if file.match("*_samples_*.jsonl")], path)
    scores: dict[str, Any] = read_json(max(written, key=lambda file: file.stat().st_mtime))["results"]
    return scores


def check_judged(task: Task, samples: Sequence[Path], log: Path) -> None:
    """Raises RuntimeError when an answer got no judgement: lmms-eval scores it all the same, and ends with 0.

    Of such an answer MM-Vet says no name of a judge, and LLaVA-Bench scores below 0.
    """
    names = [metric.partition(",")[0] for metric in task.metrics]
    lines = [json.loads(line) for file in samples for line in file.read_text(encoding="utf-8").splitlines()]
    verdicts = [line[name] for line in lines for name in names if isinstance(line.get(name), dict)]
    missing = [
        verdict
        for verdict in verdicts
        if verdict.get("eval_model") in ("", "Failed Request") or any(score < 0 for score in verdict.get("scores", ()))
    ]
    if missing or not verdicts:
        words = f"no judgement of {len(missing)} of {len(verdicts)} answers" if verdicts else "no judgements"
        raise RuntimeError(
            f"{words}: the judge could not be asked, or said what lmms-eval cannot read (all of it: {log}). Scores "
            "made up for them are not kept"
        )


def main(argv: Sequence[str]) -> None:
    run(parse_config(PapersConfig, argv, program="evaluate_papers.py"))


def run(config: PapersConfig) -> None:
    """Checks every row, runs what is not kept, and writes the table."""
    check_lmms_eval(config)
    rows = check_rows(config)
    output = Path(config.output)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    try:
        with StopRequest() as stop:
            scores, failures = run_all(config, rows, partial(say, flush=True), stop)
    except (KeyboardInterrupt, StopRequested) as stopped:
        end_stopped("stopped; the same command continues", by=str(stopped) or "SIGINT")
    lines = table_rows(config, scores, {row: checked.llm_flops for row, checked in rows.items()})
    table = {"model": config.model, "text_tokens": config.text_tokens, "rows": lines}
    write_atomically(output / "table.json", json.dumps(table, indent=1) + "\n")
    write_atomically(output / "table.md", show(config, lines))
    say(f"written: {output / 'table.md'}, {output / 'table.json'}, {output / 'results'}/")
    if failures:
        failed = "\n".join(f"- {failure.splitlines()[0]}" for failure in failures)
        sys.exit(
            f"{len(failures)} of the runs failed (why stands above); the same command tries them again:\n"
            f"{printable(failed)}"
        )


if __name__ == "__main__":
    run_command(main)
