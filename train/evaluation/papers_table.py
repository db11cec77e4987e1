"""The papers' tables: what is measured, the rows, their percentages and FLOPs, and what the papers say of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from shortzip.reduction.flops import usual_tiles, visual_tokens_of_video
from shortzip.reduction.parsing import (
    budget_by,
    format_budget,
    parse_budget,
    parse_layers,
    pruned_title,
)
from shortzip.reduction.positions import COMPACT
from shortzip.reduction.reductions import ALL, NONE, Reductions
from shortzip.train.run.report import print_table
from shortzip.train.settings.comparing import TRAINING_FREE, TUNED, VISIONZIP, PapersConfig, Published


@dataclass(frozen=True)
class Row:
    """A row of the table: one model in one reduction."""

    kind: str
    model: str
    budget: str
    layers: str
    method: str = VISIONZIP
    fastv: str = NONE
    positions: str = COMPACT

    @classmethod
    def saved(cls, model: str, reductions: Reductions) -> Row:
        """The row of a tuned checkpoint that was saved with these reductions."""
        return cls(
            TUNED,
            model,
            reductions.budget_words,
            reductions.layers_words,
            reductions.method_words,
            reductions.fastv_words,
            reductions.positions,
        )

    @property
    def title(self) -> str:
        """What the table calls it."""
        title = f"{TUNED}: {self.model}" if self.kind == TUNED else self.kind
        if self == Row(TRAINING_FREE, self.model, ALL, NONE):
            title = "all tokens"
        if self.fastv != NONE:
            title = f"{pruned_title(self.fastv)}, {title}"
        if self.positions != COMPACT:
            title = f"{self.positions} positions, {title}"
        return title if self.method == VISIONZIP else f"{self.method}, {title}"

    @property
    def settings(self) -> str:
        """Its reductions, as the keys of a tuned entry."""
        text = f"budget: {self.budget}, layers: {self.layers}"
        text += "" if self.method == VISIONZIP else f", method: {self.method}"
        text += "" if self.fastv == NONE else f", fastv: {self.fastv}"
        return text if self.positions == COMPACT else f"{text}, positions: {self.positions}"

    @property
    def reductions(self) -> Reductions:
        """What it reduces."""
        return Reductions.parse(self.budget, self.layers, self.fastv, method=self.method, positions=self.positions)


def rows_of(config: PapersConfig) -> list[Row]:
    """All tokens first, then every budget with every list of layers, each training-free and (where given) tuned; then
    pruning inside, and the tuned checkpoints of other budgets and layers."""
    rows = [Row(TRAINING_FREE, config.model, ALL, NONE)]
    tuned = [
        Row(TUNED, each.model, each.budget, each.layers, each.method, each.fastv, each.positions)
        for each in config.tuned
    ]
    for layers in config.layers:
        for budget in config.budgets or [ALL]:
            for method in config.methods if budget != ALL else [VISIONZIP]:
                by = budget if budget == ALL else format_budget(budget_by(parse_budget(budget), method))
                for positions in config.positions if budget != ALL else [COMPACT]:
                    rows.append(Row(TRAINING_FREE, config.model, by, layers, method, positions=positions))
            rows += [row for row in tuned if (row.budget, row.layers, row.fastv) == (budget, layers, NONE)]
    rows += [Row(TRAINING_FREE, config.model, ALL, NONE, fastv=fastv) for fastv in config.fastv]
    return list(dict.fromkeys([*rows, *tuned]))


def llm_flops(model: PreTrainedConfig, row: Row, text_tokens: int, frames: int | None = None) -> int:
    """FLOPs of the language model for a prompt of `text_tokens` about one image (in LLaVA-NeXT of five tiles), or
    about a video of so many frames."""
    if frames is None:
        visual = row.reductions.tokens_per_image(model, usual_tiles(model))
    else:
        visual = visual_tokens_of_video(model, row.reductions.visionzip, frames)
    return row.reductions.prefill_flops(model.text_config, text_tokens, visual)


@dataclass(frozen=True)
class Average:
    """A percentage of full performance."""

    percent: float
    tasks: tuple[str, ...]
    """The benchmarks that it is the mean of."""


def average_of(scores: Mapping[str, float], full: Mapping[str, float]) -> Average | None:
    """VisionZip's average: the mean of score / score with all tokens, times 100, over the benchmarks that both have
    and in which all tokens score at all; None where there is none."""
    shares = {name: scores[name] / full[name] for name in full if name in scores and full[name]}
    return Average(100 * sum(shares.values()) / len(shares), tuple(shares)) if shares else None


def papers_average(config: PapersConfig, paper: Published, tasks: Sequence[str]) -> Average | None:
    """The paper's percentage over these very tasks; None where its scores of them are not known."""
    full = {task.name: task.full for task in config.tasks if task.full is not None and task.name in tasks}
    average = average_of(paper.scores, full)
    if average is None or set(average.tasks) != set(tasks):
        return None
    return Average(paper.percent, average.tasks) if len(tasks) == len(paper.scores) else average


def table_rows(
    config: PapersConfig, scores: Mapping[Row, Mapping[str, float]], flops: Mapping[Row, int]
) -> list[dict[str, Any]]:
    """The table as plain values. `flops`: the language model's, of each row."""
    first, all_tokens = next(iter(scores.items()))
    averaged = {task.name for task in config.tasks if task.averaged}
    full = {name: score for name, score in all_tokens.items() if name in averaged}
    lines = []
    for row, scores_of_row in scores.items():
        of_row = [
            entry
            for entry in config.published
            if (entry.budget, entry.layers, entry.kind, entry.method, NONE, COMPACT)
            == (row.budget, row.layers, row.kind, row.method, row.fastv, row.positions)
        ]
        paper = next((entry for entry in of_row if not entry.rerun), None)
        own = average_of(scores_of_row, full)
        beside = papers_average(config, paper, own.tasks) if paper and own else None
        lines.append(
            {
                "model": row.title,
                "kind": row.kind,
                "checkpoint": row.model,
                "budget": row.budget,
                "layers": row.layers,
                "method": row.method,
                "fastv": row.fastv,
                "positions": row.positions,
                "scores": dict(scores_of_row),
                "percent": own.percent if own else None,
                "tasks": list(own.tasks) if own else [],
                "llm_flops": flops[row],
                "flops_percent": 100 * flops[row] / flops[first],
                "paper_percent": beside.percent if beside else paper.percent if paper else None,
                "paper_is_over_the_same_tasks": beside is not None if paper else None,
                "paper_tasks": len(paper.scores) if paper else None,
                "paper_flops_percent": paper.flops if paper else None,
                "paper": paper.source if paper else None,
                "reruns": [{"percent": entry.percent, "source": entry.source} for entry in of_row if entry.rerun],
            }
        )
    return lines


def show(config: PapersConfig, lines: Sequence[Mapping[str, Any]]) -> str:
    """The table as Markdown; it is printed too."""
    names, total = [task.name for task in config.asked], sum(task.averaged for task in config.tasks)
    headings = ["model", "visual tokens", "frozen layers", "LLM FLOPs", *names, "% of full", "paper's %"]
    cells = []
    if any(task.full is not None for task in config.tasks):
        figures = ["" if task.full is None else f"{task.full:g}" for task in config.asked]
        cells.append(["all tokens, as published", ALL, "0", "100 %", *figures, "", "100"])
    for line in lines:
        scores = [f"{line['scores'][name]:.1f}" if name in line["scores"] else "" for name in names]
        count, percent, paper = len(line["tasks"]), "", ""
        fewer = "" if count == total else f" ({count} of {total})"
        if line["percent"] is not None:
            percent = f"{line['percent']:.1f}{fewer}"
        if line["paper_percent"] is not None:
            is_same = line["paper_is_over_the_same_tasks"]
            over = f", over {line['paper_tasks']}" if line["paper_tasks"] else ""
            paper = f"{line['paper_percent']:.1f}" + (fewer if is_same else f" (as stated{over})")
        if line["reruns"]:
            reruns = "; ".join(f"{entry['percent']:.1f} ({entry['source']})" for entry in line["reruns"])
            paper = f"{paper}; by others {reruns}" if paper else f"by others {reruns}"
        cost = f"{line['flops_percent']:.1f} %"
        cost += "" if line["paper_flops_percent"] is None else f" (paper: {line['paper_flops_percent']:g} %)"
        frozen = str(len(parse_layers(line["layers"])))
        cells.append([line["model"], line["budget"], frozen, cost, *scores, percent, paper])
    about = "one image" if config.frames is None else f"one video, of {config.frames} frames"
    note = f"LLM FLOPs: of a prompt of {config.text_tokens} text tokens about {about}."
    return print_table(f"{config.model}, {', '.join(names)}", headings, cells, note) + f"\n{note}\n"
