"""Choosing a share of the rows: in proportion to their sources, the same on every machine.

Rows are ranked by a hash of the seed and of what they say, and each source gives its first ones. So the choice depends
on neither the order of the file nor its formatting, and a smaller fraction is contained in a larger one.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from data.errors import UserError
from data.instructions import Conversation

TEXT_ONLY = "(text only)"
NO_FOLDER = "(no folder)"


def source_of(conversation: Conversation) -> str:
    """The source of a row, as its first image's path shows it: `coco` for `coco/train2017/1.jpg`."""
    if not conversation.images:
        return TEXT_ONLY
    first = conversation.images[0]
    parts = PurePosixPath(first if isinstance(first, str) else "").parts
    return parts[0] if len(parts) > 1 else NO_FOLDER


def rank_of(conversation: Conversation, seed: int) -> int:
    """A number in [0, 2^64) that depends on the seed and on what the row says, and on nothing else."""
    # An embedded image, and a row without an id, are called by their place in the file, which must not come in.
    paths = [source for source in conversation.images if isinstance(source, str)]
    name = "" if conversation.id.startswith("#") else conversation.id
    said = json.dumps([seed, name, paths, conversation.turns], separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "big")


def quotas(rows: dict[str, int], fraction: float) -> dict[str, int]:
    """How many rows each source gives: its share, rounded so that the sum is the share of all rows."""
    exact = {source: count * fraction for source, count in rows.items()}
    taken = {source: int(share) for source, share in exact.items()}
    left = round(sum(rows.values()) * fraction) - sum(taken.values())
    for source in sorted(exact, key=lambda source: (taken[source] - exact[source], source))[:left]:
        taken[source] += 1
    return taken


@dataclass(slots=True)
class Ranking:
    """What is known of every row that can be used: a few bytes each.

    Attributes:
        ranks: hash of each row.
        sources: number of its source in `names`.
        rows: its number in the file.
        names: the sources.
    """

    ranks: "array[int]" = field(default_factory=lambda: array("Q"))
    sources: "array[int]" = field(default_factory=lambda: array("I"))
    rows: "array[int]" = field(default_factory=lambda: array("Q"))
    names: dict[str, int] = field(default_factory=dict)

    def add(self, conversation: Conversation, row: int, seed: int) -> str:
        """Take in a row; returns its source."""
        source = source_of(conversation)
        self.ranks.append(rank_of(conversation, seed))
        self.sources.append(self.names.setdefault(source, len(self.names)))
        self.rows.append(row)
        return source

    def counts(self) -> dict[str, int]:
        """Rows of each source."""
        numbers = Counter(self.sources)
        return {name: numbers[number] for name, number in self.names.items()}

    def select(self, fraction: float) -> list[int]:
        """Numbers of the chosen rows, rising.

        Raises:
            ValueError: the fraction is not above 0 and at most 1.
        """
        if not 0 < fraction <= 1:
            raise UserError(f"fraction is {fraction}; above 0 and at most 1")
        wanted = quotas(self.counts(), fraction)
        by_number = {number: wanted[name] for name, number in self.names.items()}
        chosen: list[int] = []
        for place in sorted(range(len(self.ranks)), key=self.ranks.__getitem__):
            if by_number[self.sources[place]]:
                by_number[self.sources[place]] -= 1
                chosen.append(self.rows[place])
        return sorted(chosen)


def draw(conversations: Sequence[Conversation], fraction: float, seed: int) -> list[Conversation]:
    """A share of conversations in memory, as `prepare_subset` would choose it, in their order.

    Raises:
        ValueError: the fraction is not above 0 and at most 1.
    """
    ranking = Ranking()
    for number, conversation in enumerate(conversations):
        ranking.add(conversation, number, seed)
    return [conversations[number] for number in ranking.select(fraction)]
