"""Models side by side on the same held-out conversations: what the tables of a run and of
scripts/evaluate_models.py show."""

from __future__ import annotations

import gc
import json
import os
import platform
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.table import Table

from shortzip.data.files import flush_to_disk, replace_file, sweep, writing, written_whole
from shortzip.reduction.parsing import pruned_title
from shortzip.reduction.positions import COMPACT
from shortzip.reduction.question_tokens import QuestionReader
from shortzip.reduction.reductions import NONE, Reductions
from shortzip.reduction.selectors import VISIONZIP
from shortzip.train.evaluation.answers import (
    Answer,
    Evaluation,
    evaluate,
    write_answers,
)
from shortzip.train.evaluation.questions import Prefill
from shortzip.train.inputs.image_budgets import budgets_by_tower
from shortzip.train.inputs.samples import held_out_set
from shortzip.train.release.lineage import shares_weights
from shortzip.train.release.loading import load_processor, load_release, reduced_config, share_weights
from shortzip.train.release.opening import Release, open_release, release_projector
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.run.report import literal
from shortzip.train.run.run_folder import ANSWERS, RESULTS
from shortzip.train.settings.config import DataConfig

ROUNDS = 3  # of timing several models' prefill
NAME_LENGTH = 160  # characters of a file's name


@dataclass(frozen=True)
class Candidate:
    """A row of the table: a model, and how it is reduced."""

    name: str
    spec: ReleaseSpec
    reductions: Reductions | None = None
    """None: as the model was saved."""
    text_tower: str | None = None
    """The CLIP by which each question chooses the budget's tokens (CDPruner), a folder or a Hub id; None: the method
    of the reductions does."""

    def reader(self) -> QuestionReader | None:
        """What reads the questions. Raises ReductionError for what is no CLIP release."""
        return None if self.text_tower is None else QuestionReader.from_pretrained(self.text_tower)


def check_candidates(candidates: Sequence[Candidate]) -> None:
    """Raises what `compare` would raise for models that are not there or cannot be reduced so; reads no weights."""
    for candidate in candidates:
        config = reduced_config(open_release(candidate.spec), candidate.reductions)
        if (reader := candidate.reader()) is not None:
            reader.check_model(config)


def compare(
    candidates: Sequence[Candidate],
    data: DataConfig,
    accelerator: Accelerator,
    *,
    batch_size: int,
    max_new_tokens: int,
    timed: bool = True,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> tuple[list[Evaluation], list[list[Answer]]]:
    """Evaluates each candidate on the held-out conversations of `data`, one after the other, on all processes.

    Returns their evaluations and their answers. Rows of the same weights share one copy of them, which is loaded once,
    and have their prefill timed side by side: rows of equal work would else differ by what the machine did meanwhile.
    `timed`: see `evaluate`.
    """
    results: dict[int, Evaluation] = {}
    answers: dict[int, list[Answer]] = {}
    for group in _groups(candidates):
        prefills: list[Prefill] = []
        for number, model, processor in _loaded(candidates, group, accelerator.device):
            dataset = held_out_set(data, processor, budgets_by_tower(model, processor))
            reader = candidates[number].reader()
            results[number], answers[number] = evaluate(
                candidates[number].name,
                model,
                dataset,
                accelerator,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                timed=timed,
                progress=partial(progress, candidates[number].name),
                reader=reader,
            )
            if timed and len(candidates) > 1:
                prefills.append(Prefill.of(model, dataset, batch_size, reader))
        if prefills:
            times = _side_by_side(prefills, ROUNDS, partial(progress, "prefill, side by side"))
            for number, milliseconds in zip(group, times, strict=True):
                results[number] = replace(results[number], prefill_ms=milliseconds)
        del model, prefills  # before the next weights are loaded
        _free_memory()
    return [results[number] for number in sorted(results)], [answers[number] for number in sorted(answers)]


def prefill_times(
    candidates: Sequence[Candidate],
    data: DataConfig,
    accelerator: Accelerator,
    *,
    batch_size: int,
    rounds: int,
) -> list[float]:
    """Milliseconds of each candidate's prefill, as `Evaluation.prefill_ms`, timed as `compare` does."""
    times: dict[int, float] = {}
    for group in _groups(candidates):
        timed = []
        for _, model, processor in _loaded(candidates, group, accelerator.device):
            dataset = held_out_set(data, processor, budgets_by_tower(model, processor))
            timed.append(Prefill.of(model, dataset, batch_size))
        times.update(zip(group, _side_by_side(timed, rounds), strict=True))
        del model, timed
        _free_memory()
    return [times[number] for number in sorted(times)]


def _groups(candidates: Sequence[Candidate]) -> list[list[int]]:
    """The numbers of the candidates that share weights, of one group after the other."""
    groups: list[tuple[Release, list[int]]] = []
    for number, candidate in enumerate(candidates):
        release = open_release(candidate.spec)
        for first, group in groups:
            if shares_weights(release, first):
                group.append(number)
                break
        else:
            groups.append((release, [number]))
    return [group for _, group in groups]


def _loaded(
    candidates: Sequence[Candidate], group: Sequence[int], device: torch.device
) -> Iterator[tuple[int, Any, Any]]:
    """Number, model and processor of each candidate of a group, whose weights are read and on the device once."""
    first: Any = None
    for number in group:
        release, reductions = open_release(candidates[number].spec), candidates[number].reductions
        if first is None:
            first, processor = load_release(release, reductions)
            yield number, first.to(device), processor
            continue
        if reductions is None:
            reductions = release.saved_reductions
        yield (
            number,
            share_weights(first, reductions, release_projector(release)),
            load_processor(release, reductions),
        )


def _side_by_side(
    timed: Sequence[Prefill],
    rounds: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[float]:
    """Milliseconds of each prefill: the median of `rounds` measurements.

    A round measures every model once: a machine that is slower for a while is so for all of them.
    """
    times: list[list[float]] = [[] for _ in timed]
    for turn in range(rounds):
        for number, prefill in enumerate(timed):
            progress(turn * len(timed) + number, rounds * len(timed))
            times[number].append(prefill.measure())
    return [statistics.median(seconds) for seconds in times]


def _free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def answer_files(names: Sequence[str]) -> list[str]:
    """A file name for each model's answers: letters and digits of its name, and a number where two would be alike."""
    files: list[str] = []
    for name in names:
        plain = "".join(letter if letter.isalnum() else "-" for letter in name).strip("-").lower()[:NAME_LENGTH]
        plain, number = plain or "model", 1
        while (file := f"{plain}{'' if number == 1 else f'-{number}'}.jsonl") in files:
            number += 1
        files.append(file)
    return files


def table_of(results: Sequence[Evaluation], title: str) -> Table:
    """The results as a table for the terminal."""
    first = results[0]
    caption = f"{first.questions} questions; prefill: {first.prefill_batch} prompts at once"
    table = Table(title=literal(title), caption=caption)
    table.add_column("model", no_wrap=True)
    for heading in ("exact match", "loss", "visual tokens", "frozen layers", "LLM FLOPs", "prefill"):
        table.add_column(heading, justify="right")
    for row in results:
        tokens = (
            f"{row.visual_tokens:g}" if row.visual_tokens == int(row.visual_tokens) else f"{row.visual_tokens:.1f}"
        )
        table.add_row(
            literal(row.name),
            f"{row.exact_match:.1%}",
            f"{row.loss:.4f}",
            ", ".join([tokens, *_chosen(row)]),
            str(row.frozen_layers),
            f"{_flops(row.llm_flops)} ({row.llm_flops / first.llm_flops:.0%})",
            f"{row.prefill_ms:.1f} ms ({row.prefill_ms / first.prefill_ms:.0%})",
        )
    return table


def _chosen(row: Evaluation) -> list[str]:
    """How a row's visual tokens are chosen, where it is not VisionZip's way, pruned, and where they stand."""
    words = [] if row.method == VISIONZIP else [row.method]
    words += [] if row.fastv == NONE else [pruned_title(row.fastv)]
    return words if row.positions == COMPACT else [*words, f"{row.positions} positions"]


def _flops(value: float) -> str:
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g}"


def recovered_share(full: Evaluation, untuned: Evaluation, tuned: Evaluation) -> float | None:
    """Share of the exact match lost by the reduction that tuning won back; None if nothing was lost."""
    lost = full.exact_match - untuned.exact_match
    return (tuned.exact_match - untuned.exact_match) / lost if lost > 0 else None


def write_evaluation(
    folder: Path, results: Sequence[Evaluation], answers: Sequence[Sequence[Answer]], **more: Any
) -> None:
    """Writes `folder`/evaluation.json and `folder`/answers in place of those that are there, or leaves these.

    Everything is on the disk before anything is replaced. The table, which names each row's file of answers, comes
    last: where it is there, its answers are those beside it. `more`: what else belongs to the table. Raises
    `CannotWrite`.
    """
    files = answer_files([row.name for row in results])
    rows = [{**asdict(row), "answers": f"{ANSWERS}/{file}"} for row, file in zip(results, files, strict=True)]
    table = json.dumps({"machine": describe_machine(), "rows": rows, **more}, indent=1) + "\n"

    def write(partial: Path) -> None:
        partial.write_text(table, encoding="utf-8")
        flush_to_disk(partial)
        with written_whole(folder / ANSWERS, replace=True) as new:
            for file, of_model in zip(files, answers, strict=True):
                write_answers(new / file, of_model)
                flush_to_disk(new / file)
            (folder / RESULTS).unlink(missing_ok=True)

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    replace_file(folder / RESULTS, write)


def describe_machine() -> str:
    """What the times were measured on: the GPU, or the processor and its cores; and torch's version."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    name = names[0] if names else platform.processor() or "a CPU"
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"
