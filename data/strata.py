"""Choosing a share of the rows: in proportion to their sources, the same on every machine.

Rows are ranked by a hash of the seed and of what they say, and each source gives its first ones. So the choice depends
on neither the order of the file nor its formatting, and a smaller fraction is contained in a larger one.
"""

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from shortzip.data.drops import BadSample, DropLog
from shortzip.data.errors import UserError
from shortzip.data.images import BadImage, resolve_image_path
from shortzip.data.instructions import Conversation

TEXT_ONLY = "(text only)"
NO_FOLDER = "(no folder)"


def source_of(conversation: Conversation) -> str:
    """The source of a row, as its first image's (or video's) path shows it: `coco` for `coco/train2017/1.jpg`."""
    if not conversation.images and not conversation.videos:
        return TEXT_ONLY
    first: Any = (*conversation.images, *conversation.videos)[0]
    first = first[0] if isinstance(first, tuple) else first
    named = first if isinstance(first, str) else ""
    # Windows writes backslashes, and reads both.
    parts = (PureWindowsPath if "\\" in named else PurePosixPath)(named).parts
    return parts[0] if len(parts) > 1 else NO_FOLDER


def rank_of(conversation: Conversation, seed: int) -> int:
    """A number in [0, 2^64) that depends on the seed and on what the row says, and on nothing else."""
    # An embedded image, and a row without an id, are called by their place in the file, which must not come in.
    paths = [source for source in conversation.images if isinstance(source, str)]
    name = "" if conversation.id.startswith("#") else conversation.id
    said = [seed, name, paths, conversation.turns, *([conversation.videos] if conversation.videos else [])]
    text = json.dumps(said, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


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
            UserError: the fraction is not above 0 and at most 1, or is less than one row.
        """
        if not 0 < fraction <= 1:
            raise UserError(f"fraction is {fraction}; above 0 and at most 1")
        counts = quotas(self.counts(), fraction)
        if self.ranks and not any(counts.values()):
            raise UserError(too_small(fraction, len(self.ranks)))
        by_number = {number: counts[name] for name, number in self.names.items()}
        numbers: list[int] = []
        for place in sorted(range(len(self.ranks)), key=self.ranks.__getitem__):
            if by_number[self.sources[place]]:
                by_number[self.sources[place]] -= 1
                numbers.append(self.rows[place])
        return sorted(numbers)


def too_small(fraction: float, rows: int) -> str:
    """What to say of a fraction that chooses nothing."""
    return f"fraction {fraction:g} of {rows} usable rows chooses no row: give {1 / rows:.2g} or more"


def check_drawable(
    conversation: Conversation,
    source: str = "",
    image_root: str | os.PathLike[str] | None = None,
    keep_text_only: bool = False,
) -> None:
    """Refuse a row that no share of the rows is to hold.

    Raises:
        BadSample: it has no answer, no image or video (that the projector could learn from), or one outside the root.
    """
    if not any(text for role, text in conversation.turns if role == "assistant"):
        raise BadSample("no_answer", conversation.id, "every answer is empty: nothing to learn from", source)
    if not conversation.images and not conversation.videos and not keep_text_only:
        raise BadSample("text_only", conversation.id, "no image, so no gradient for the projector", source)
    of_videos = (path for video in conversation.videos for path in ((video,) if isinstance(video, str) else video))
    try:
        for path in (*conversation.images, *of_videos):
            # Without an image root, nobody can say what lies outside of it, but `..` shows.
            if isinstance(path, str) and (image_root is not None or not os.path.isabs(path)):
                resolve_image_path(path, image_root or "image root")
    except BadImage as error:
        raise BadSample(error.problem, conversation.id, str(error), source) from error


def draw(
    conversations: Sequence[Conversation],
    fraction: float,
    seed: int,
    *,
    drops: DropLog | None = None,
    source: str = "",
    image_root: str | os.PathLike[str] | None = None,
) -> list[Conversation]:
    """A share of conversations in memory: those that `prepare_subset` would choose, in their order.

    Args:
        conversations: all of them.
        fraction: share of those that can be drawn (`check_drawable`), above 0 and at most 1.
        seed: another seed draws others.
        drops: where the others go; None: the first bad one raises.
        source: the file they are from, for messages.
        image_root: the folder that image paths are relative to.

    Raises:
        BadSample: a row that cannot be drawn and is the data's fault, where `drops` does not skip it.
        UserError: the fraction is not above 0 and at most 1, or is less than one row.
    """
    drops = DropLog() if drops is None else drops
    ranking = Ranking()
    for number, conversation in enumerate(conversations):
        try:
            check_drawable(conversation, source, image_root)
        except BadSample as error:
            drops.add(error)
        else:
            ranking.add(conversation, number, seed)
    drops.check(len(conversations))
    drops.settled = drops.bad  # those found so far are of all rows; what follows is of those that are drawn
    return [conversations[number] for number in ranking.select(fraction)]
