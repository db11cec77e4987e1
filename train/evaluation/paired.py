"""What two models' answers to the same questions tell: the difference, how sure it is, and means over seeds."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SEED = 0  # of the drawing: the same answers give the same interval
LEVEL = 0.95
OTHER = "other"  # the kind of a question that fits none
AT_ONCE = 1 << 22  # drawn counts held in memory


class OverSeeds:
    """A row of a table whose `exact_match` has a value per seed."""

    exact_match: list[float]

    @property
    def mean(self) -> float:
        """Mean exact match."""
        return statistics.fmean(self.exact_match)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 for one."""
        return statistics.stdev(self.exact_match) if len(self.exact_match) > 1 else 0.0


@dataclass(frozen=True)
class Difference:
    """By how much a model's exact match is above a reference's, in shares (0 to 1), with its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def is_noise(self) -> bool:
        """Whether the interval holds 0."""
        return self.low <= 0 <= self.high

    def __str__(self) -> str:
        """In points, like "+3.1 [+0.5, +5.6]"."""
        words = f"{100 * self.mean:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
        return f"{words} (noise)" if self.is_noise else words


def paired_difference(correct: NDArray[np.bool_], reference: NDArray[np.bool_], resamples: int) -> Difference:
    """The mean difference of two models on the same questions, with its bootstrap percentile interval.

    Questions are drawn with replacement, the same for both models, and so are seeds: those of both together where both
    have equally many, else each model's own.

    Args:
        correct: [S, Q], for each seed of the model which of the questions were answered right.
        reference: [S', Q], of the reference.
        resamples: how often is drawn.

    Raises:
        ValueError: other questions, or none.
    """
    if correct.shape[1] != reference.shape[1] or not correct.size or not reference.size:
        raise ValueError(f"answers {correct.shape} and {reference.shape} are not those to the same questions")
    generator = np.random.default_rng(SEED)
    seeds, questions = correct.shape
    is_paired = seeds == len(reference)
    means = []
    for start in range(0, resamples, step := max(1, AT_ONCE // questions)):
        count = min(step, resamples - start)
        weights = generator.multinomial(questions, np.full(questions, 1 / questions), count)
        own = _drawn_seeds(generator, seeds, count)
        others = own if is_paired else _drawn_seeds(generator, len(reference), count)
        means.append(_mean(correct, weights, own) - _mean(reference, weights, others))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(float(correct.mean() - reference.mean()), float(low), float(high))


def _drawn_seeds(generator: np.random.Generator, seeds: int, count: int) -> NDArray[np.int64]:
    return generator.multinomial(seeds, np.full(seeds, 1 / seeds), count)


def _mean(correct: NDArray[np.bool_], questions: NDArray[np.int64], seeds: NDArray[np.int64]) -> NDArray[np.float64]:
    """[R] share of right answers, with each question [R, Q] and seed [R, S] counted as often as it was drawn."""
    per_seed = questions @ correct.T.astype(np.float64)
    drawn: NDArray[np.float64] = (per_seed * seeds).sum(axis=1)
    return drawn / (correct.shape[0] * correct.shape[1])


def share_of(correct: NDArray[np.bool_], chosen: NDArray[np.bool_]) -> float | None:
    """Exact match [S, Q] on some of the questions [Q], mean over seeds; None where there is none."""
    return float(correct[:, chosen].mean()) if chosen.any() else None


def kinds_of(questions: Sequence[str], patterns: Mapping[str, str]) -> list[str]:
    """The kind of each question: the first whose regular expression is found in it; "other" where none is."""
    return [
        next((kind for kind, pattern in patterns.items() if re.search(pattern, text)), OTHER) for text in questions
    ]
