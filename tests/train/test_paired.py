"""Differences between two models' answers to the same questions, and how sure they are."""

import math

import numpy as np
import pytest

from shortzip.train.evaluation.paired import kinds_of, paired_difference, share_of

DRAWS = 20_000


def binomial_quantile(trials: int, share: float, level: float) -> int:
    """The smallest count that at most so many of `trials` reach with probability `level`."""
    total = 0.0
    for count in range(trials + 1):
        total += math.comb(trials, count) * share**count * (1 - share) ** (trials - count)
        if total >= level:
            return count
    return trials


def answers(right: int, questions: int = 50) -> np.ndarray:
    return (np.arange(questions) < right)[None]


def test_the_interval_is_the_binomial_one_where_that_is_right() -> None:
    """Of 50 questions the one answers 20 more right, none fewer: what is drawn of them is binomially distributed."""
    found = paired_difference(answers(30), answers(10), DRAWS)
    assert found.mean == pytest.approx(0.4)
    low, high = (binomial_quantile(50, 0.4, level) / 50 for level in (0.025, 0.975))
    assert (found.low, found.high) == (pytest.approx(low, abs=0.021), pytest.approx(high, abs=0.021))
    assert not found.is_noise


def test_it_is_paired() -> None:
    """Equal answers differ by nothing, however hard the questions are; as many right ones elsewhere, by noise."""
    same = paired_difference(answers(25), answers(25), DRAWS)
    assert (same.mean, same.low, same.high, same.is_noise) == (0, 0, 0, True)
    elsewhere = paired_difference(answers(25), answers(25)[:, ::-1], DRAWS)
    assert elsewhere.mean == 0
    assert elsewhere.is_noise
    # each question's difference is 1 or -1: that of the mean is 1 / sqrt(50)
    assert elsewhere.high == pytest.approx(1.96 / math.sqrt(50), abs=0.03)
    assert elsewhere.low == pytest.approx(-elsewhere.high, abs=0.05)


def test_seeds_are_drawn_too() -> None:
    """Of two seeds one answers everything, the other nothing: half of the draws take one of them twice."""
    split = np.repeat([[True], [False]], 50, axis=1)
    found = paired_difference(split, np.zeros((1, 50), bool), DRAWS)
    assert (found.mean, found.low, found.high) == (0.5, 0, 1)
    together = paired_difference(split, split, DRAWS)
    assert (together.low, together.high) == (0, 0), "of the same seeds the same are drawn"


def test_the_same_answers_give_the_same_interval() -> None:
    first = paired_difference(answers(30), answers(26)[:, ::-1], 500)
    assert first == paired_difference(answers(30), answers(26)[:, ::-1], 500)


def test_answers_to_other_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="the same questions"):
        paired_difference(answers(3), answers(3, questions=49), 10)


def test_shares_and_kinds() -> None:
    assert share_of(np.array([[True, False], [True, True]]), np.array([False, True])) == 0.5
    assert share_of(answers(3), np.zeros(50, bool)) is None
    patterns = {"place": "^Where", "count": "many", "late": "W"}
    assert kinds_of(["Where is it?", "How many?", "Why?", "so"], patterns) == ["place", "count", "late", "other"]
