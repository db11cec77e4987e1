"""A conversation as tokens and labels."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation as tokens.

    Attributes:
        input_ids: [L] token ids, as many placeholder ids per image as the model fills.
        labels: [L] the id at supervised positions, -100 elsewhere; not shifted.
        answers: token ranges (start, end) of the answers that are left, end token included. `input_ids[:start]` is
            the prompt that the answer follows.
        images: how many of the conversation's images are left (the first ones).
        cut: None, "turn" if whole turns were cut off for `max_length`, "answer" if the first answer itself was.
        videos: how many of its videos are left (the first ones).
    """

    input_ids: list[int]
    labels: list[int]
    answers: list[tuple[int, int]]
    images: int
    cut: str | None = None
    videos: int = 0

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return sum(label != IGNORE_INDEX for label in self.labels)


def token_range(characters: list[tuple[int, int]], span: tuple[int, int]) -> tuple[int, int]:
    """The tokens that hold any character of a span. (Several tokens may share one character: byte fallback.)"""
    start = bisect_right(characters, span[0], key=lambda held: held[1])
    end = bisect_left(characters, span[1], key=lambda held: held[0])
    return start, max(start, end)
