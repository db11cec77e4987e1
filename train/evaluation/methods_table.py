"""The frontier's methods at equal tokens: their rows, compared question by question, and the tables of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shortzip.train.evaluation.frontier_points import COMPACT, Point, point_of
from shortzip.train.evaluation.paired import OTHER, Difference, OverSeeds, kinds_of, paired_difference, share_of
from shortzip.train.evaluation.selection_cost import SelectionCost
from shortzip.train.run.report import print_table
from shortzip.train.settings.frontier import FrontierConfig

DOWNSAMPLE = "downsample"
Key = tuple[str, int, str, bool]  # method, tokens, positions, tuned


@dataclass(frozen=True)
class MethodRow(OverSeeds):
    """A method at so many visual tokens, untuned or tuned, over its seeds."""

    method: str
    budget: str
    tokens: int
    positions: str
    tuned: bool
    seeds: list[int | None]
    exact_match: list[float]
    """One per seed."""
    difference: Difference | None
    """To the reference at equal tokens, positions and tuning; None of the reference itself, and without it."""
    to_compact: Difference | None
    """With original positions: to the same method with compact ones."""
    difficult: float | None
    """Exact match on the difficult questions: those that the untuned model gets wrong on images made smaller, to as
    many visual tokens (VTC-Bench, arXiv 2510.07143). The others need no choice of tokens."""
    difficult_questions: int
    kinds: dict[str, float] = field(default_factory=dict)
    """Exact match by the kind of question."""


def method_rows(
    entries: Sequence[Mapping[str, Any]], config: FrontierConfig, texts: Mapping[tuple[str, int], str]
) -> list[MethodRow]:
    """A row per method, number of tokens, positions and tuning, in the order of the config.

    Args:
        entries: what was measured of points, at least one: `point`, `questions`, the same of all (a conversation's id
            and the turn), and `correct`, whether each was answered right.
        texts: the questions' texts, by the same id and turn.
    """
    answers = _answers(entries, config)
    questions = [texts.get((name, turn), "") for name, turn in entries[0]["questions"]]
    kinds = kinds_of(questions, {kind.name: kind.pattern for kind in config.kinds}) if config.kinds else []
    in_order = [*(kind.name for kind in config.kinds), OTHER]
    rows = []
    for key, (points, correct) in answers.items():
        method, tokens, positions, tuned = key
        reference = answers.get((config.reference, tokens, positions, tuned)) if method != config.reference else None
        compact = answers.get((method, tokens, COMPACT, tuned)) if positions != COMPACT else None
        easy = answers.get((DOWNSAMPLE, tokens, COMPACT, False))
        hard = np.zeros(len(questions), bool) if easy is None else ~easy[1][0]
        rows.append(
            MethodRow(
                method,
                points[0].budget,
                tokens,
                positions,
                tuned,
                [point.seed for point in points],
                correct.mean(axis=1).tolist(),
                _difference(points, correct, reference, config.resamples),
                _difference(points, correct, compact, config.resamples),
                share_of(correct, hard),
                int(hard.sum()),
                {kind: share_of(correct, np.array(kinds) == kind) or 0.0 for kind in in_order if kind in kinds},
            )
        )
    return rows


def _answers(
    entries: Sequence[Mapping[str, Any]], config: FrontierConfig
) -> dict[Key, tuple[list[Point], NDArray[np.bool_]]]:
    """The points of each row, and [S, Q] which of the questions they answer right."""
    groups: dict[Key, list[tuple[Point, list[bool]]]] = {}
    for entry in entries:
        point = point_of(entry["point"])
        if point.series in config.methods:
            key = (point.series, int(point.tokens), point.positions, point.tuned)
            groups.setdefault(key, []).append((point, entry["correct"]))
    order = sorted(groups, key=lambda key: (key[1], config.methods.index(key[0]), key[2], key[3]))
    return {
        key: ([point for point, _ in groups[key]], np.array([correct for _, correct in groups[key]], dtype=bool))
        for key in order
    }


def _difference(
    points: Sequence[Point],
    correct: NDArray[np.bool_],
    others: tuple[Sequence[Point], NDArray[np.bool_]] | None,
    resamples: int,
) -> Difference | None:
    """To another row, over the seeds that both have, where they have some: those differ by the method alone."""
    if others is None:
        return None
    mine, theirs, reference = [point.seed for point in points], [point.seed for point in others[0]], others[1]
    both = [seed for seed in mine if seed is not None and seed in theirs]
    if both:
        correct, reference = correct[[mine.index(seed) for seed in both]], reference[[theirs.index(s) for s in both]]
    return paired_difference(correct, reference, resamples)


def show_methods(
    rows: Sequence[MethodRow], costs: Mapping[tuple[str, int], SelectionCost], config: FrontierConfig
) -> str:
    """The tables as Markdown, one per number of tokens, and one of the kinds of questions; they are printed too."""
    parts = []
    for tokens in dict.fromkeys(row.tokens for row in rows):
        own = [row for row in rows if row.tokens == tokens]
        parts.append(_table_at(tokens, own, costs, config))
    if any(row.to_compact for row in rows):
        parts.append(_table_of_positions(rows))
    if config.kinds:
        parts.append(_table_of_kinds(rows))
    return "\n".join(parts)


def _table_at(
    tokens: int, rows: Sequence[MethodRow], costs: Mapping[tuple[str, int], SelectionCost], config: FrontierConfig
) -> str:
    against = f"to {config.reference}"
    headings = ["method", "budget", "positions", "untuned", against, "tuned", against, "difficult", "… tuned", "ms"]
    cells = []
    for untuned, tuned in _pairs(rows):
        row = untuned or tuned
        assert row is not None
        cost = costs.get((row.method, tokens))
        cells.append(
            [
                row.method,
                row.budget,
                row.positions,
                _percent(untuned),
                str((untuned and untuned.difference) or ""),
                _percent(tuned),
                str((tuned and tuned.difference) or ""),
                _share(untuned.difficult if untuned else None),
                _share(tuned.difficult if tuned else None),
                f"{cost.selection_ms:.2f}" if cost else "",
            ]
        )
    of_tower = [f"the tower takes {cost.tower_ms:.2f}" for (_, at), cost in costs.items() if at == tokens][:1]
    notes = [
        f"Differences in points, with 95 % intervals over questions and seeds (paired bootstrap, {config.resamples} "
        "draws); (noise): the interval holds 0.",
        f"Difficult: the {rows[0].difficult_questions} questions that the untuned model gets wrong on down-sampled "
        "images of as many tokens.",
        "ms: the selection alone, per image" + "".join(f"; {words}" for words in of_tower) + ".",
    ]
    note = " ".join(notes)
    title = f"{tokens} visual tokens"
    return f"### {title}\n\n" + print_table(title, headings, cells, note) + f"\n{note}\n"


def _table_of_positions(rows: Sequence[MethodRow]) -> str:
    headings = ["method", "tokens", "", "exact match", "to compact"]
    cells = [
        [row.method, str(row.tokens), _tuned(row), _percent(row), str(row.to_compact)]
        for row in rows
        if row.to_compact
    ]
    title = "original positions, to the same method with compact ones"
    return f"### {title.capitalize()}\n\n" + print_table(title, headings, cells)


def _table_of_kinds(rows: Sequence[MethodRow]) -> str:
    kinds = list(rows[0].kinds)
    headings = ["method", "tokens", "positions", "", *kinds]
    cells = [
        [
            row.method,
            str(row.tokens),
            row.positions,
            _tuned(row),
            *(_share(row.kinds.get(kind)) for kind in kinds),
        ]
        for row in rows
    ]
    return "### By kind of question\n\n" + print_table("by kind of question", headings, cells)


def _pairs(rows: Sequence[MethodRow]) -> list[tuple[MethodRow | None, MethodRow | None]]:
    """Untuned and tuned of each method and positions."""
    found: dict[tuple[str, str], list[MethodRow | None]] = {}
    for row in rows:
        found.setdefault((row.method, row.positions), [None, None])[row.tuned] = row
    return [(untuned, tuned) for untuned, tuned in found.values()]


def _percent(row: MethodRow | None) -> str:
    if row is None:
        return ""
    spread = f" ± {100 * row.spread:.1f}" if len(row.exact_match) > 1 else ""
    return f"{100 * row.mean:.1f}{spread} %"


def _tuned(row: MethodRow) -> str:
    return "tuned" if row.tuned else "untuned"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
