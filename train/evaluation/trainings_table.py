"""The frontier's tuned points by how they were tuned: what each training, one projector for all budgets and a budget
for each image win back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shortzip.reduction.selectors import VISIONZIP, has_own_budgets
from shortzip.train.evaluation.frontier_points import ELASTIC, Point, point_of
from shortzip.train.evaluation.frontier_report import GRID_OF_POINTS
from shortzip.train.evaluation.paired import Difference, OverSeeds, paired_difference
from shortzip.train.run.report import print_table
from shortzip.train.settings.frontier import FrontierConfig

FULL = "all tokens"
Key = tuple[str, str, str, int, str, str]  # series, budget, pruning, frozen layers, positions, training


@dataclass(frozen=True)
class TrainedRow(OverSeeds):
    """A reduction as one training has tuned it, over its seeds."""

    name: str
    training: str
    visual_tokens: float
    """Mean of the images."""
    seeds: list[int | None]
    exact_match: list[float]
    """One per seed."""
    untuned: float | None
    """Exact match of the same reduction, untuned: mean of what it draws; None where it is not measured."""
    won_back: float | None
    """Share of what the reduction costs untuned that tuning makes good; None where it costs nothing."""
    difference: Difference | None
    """To the training that it is compared with; None of the first, and where that is not measured."""
    to_own: Difference | None
    """Of one projector for all budgets, and of a budget for each image: to the same training for this budget alone."""


@dataclass(frozen=True)
class _Answers:
    """A row's points, [S, Q] which questions they answer right, and their mean number of visual tokens."""

    points: list[Point]
    correct: NDArray[np.bool_]
    visual_tokens: float


def trained_rows(entries: Sequence[Mapping[str, Any]], config: FrontierConfig) -> list[TrainedRow]:
    """A row per tuned reduction and training, in the order of the points, one training after the other.

    Args:
        entries: what was measured of points: `point`, `correct` (whether each question, the same of all, was answered
            right) and `evaluation`.
    """
    groups: dict[tuple[Key, bool], list[Mapping[str, Any]]] = {}
    for entry in entries:
        point = point_of(entry["point"])
        groups.setdefault((_key(point), point.tuned), []).append(entry)
    found = {key: _answers(group) for key, group in groups.items()}
    full = next((own.correct.mean() for (key, tuned), own in found.items() if key[0] == FULL and not tuned), None)
    against = {each.name: each.against or config.trainings[0].name for each in config.trainings}
    rows = []
    for (key, tuned), own in found.items():
        if not tuned or key[0] == FULL:
            continue
        training = key[-1]
        before = found.get(((*key[:-1], ""), False))
        untuned = None if before is None else float(before.correct.mean())
        lost = None if untuned is None or full is None else float(full) - untuned
        other = against.get(training, training)
        alone = (GRID_OF_POINTS, *key[1:]) if _stands_for_a_budget(own.points[0]) else None
        reference = found.get(((*key[:-1], other), True)) if other != training else None
        rows.append(
            TrainedRow(
                _in_words(own.points[0]),
                training,
                own.visual_tokens,
                [point.seed for point in own.points],
                own.correct.mean(axis=1).tolist(),
                untuned,
                (float(own.correct.mean()) - untuned) / lost if untuned is not None and lost and lost > 0 else None,
                _difference(own, reference, config.resamples),
                _difference(own, found.get((alone, True)), config.resamples) if alone else None,
            )
        )
    return rows


def _key(point: Point) -> Key:
    reductions = point.reductions
    return (
        point.series, reductions.budget_words, reductions.fastv_words, point.frozen, point.positions, point.training
    )  # fmt: skip


def _stands_for_a_budget(point: Point) -> bool:
    """Whether a projector tuned for this budget alone is what the point is to be held against."""
    zipped = point.reductions.visionzip
    if point.series == ELASTIC:
        return True
    return zipped is not None and has_own_budgets(zipped) and point.reductions.method_words == VISIONZIP


def _answers(group: Sequence[Mapping[str, Any]]) -> _Answers:
    return _Answers(
        [point_of(entry["point"]) for entry in group],
        np.array([entry["correct"] for entry in group], dtype=bool),
        float(np.mean([entry["evaluation"]["visual_tokens"] for entry in group])),
    )


def _difference(own: _Answers, other: _Answers | None, resamples: int) -> Difference | None:
    """Over the seeds that both have."""
    if other is None:
        return None
    mine, theirs = [point.seed for point in own.points], [point.seed for point in other.points]
    both = [seed for seed in mine if seed in theirs]
    if not both:
        return None
    correct, reference = own.correct[[mine.index(s) for s in both]], other.correct[[theirs.index(s) for s in both]]
    return paired_difference(correct, reference, resamples)


def _in_words(point: Point) -> str:
    """What the table calls a reduction."""
    described = point.reductions.describe()
    return described if point.series in (GRID_OF_POINTS, described) else f"{point.series}: {described}"


def show_trained(rows: Sequence[TrainedRow], config: FrontierConfig) -> str:
    """The table as Markdown; it is printed too."""
    headings = ["reduction", "visual tokens", "training", "untuned", "tuned", "won back", "to its reference", "to own"]
    named = {each.name: each.against or config.trainings[0].name for each in config.trainings}
    cells = []
    for row in rows:
        spread = f" ± {100 * row.spread:.1f}" if len(row.exact_match) > 1 else ""
        reference = f"{row.difference} ({named[row.training]})" if row.difference else ""
        cells.append(
            [
                row.name,
                f"{row.visual_tokens:.4g}",
                row.training or "the recipe's",
                "" if row.untuned is None else f"{100 * row.untuned:.1f}",
                f"{100 * row.mean:.1f}{spread}",
                "" if row.won_back is None else f"{row.won_back:.0%}",
                reference,
                str(row.to_own or ""),
            ]
        )
    note = (
        f"Exact match, %; ±: standard deviation over seeds. Differences in points, with 95 % intervals over questions "
        f"and seeds (paired bootstrap, {config.resamples} draws); (noise): the interval holds 0. To own: of one "
        "projector for all budgets, or a budget for each image, to a projector tuned for this one budget for all."
    )
    title = "What tuning wins back"
    return f"### {title}\n\n" + print_table(title, headings, cells, note) + f"\n{note}\n"
