"""Nothing is lost in silence: every row that does not reach the model is counted by reason, printed and listed."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from shortzip.data.errors import UserError, printable, shown

OnBadSample = Literal["raise", "skip"]

# What is wrong with the data (a bad sample), against what the settings leave out (a drop that is nobody's fault).
IMAGE_REASONS = frozenset(
    {"missing_image", "unreadable_image", "outside_image_root", "missing_video", "unreadable_video"}
)
BAD_REASONS = IMAGE_REASONS | {"malformed_row", "placeholder_count", "template"}
DROP_REASONS = frozenset({"no_answer", "too_long", "text_only", "video"})


class BadSample(UserError):
    """A row that cannot be trained on as it is.

    Attributes:
        reason: one of `BAD_REASONS` or `DROP_REASONS`.
        sample_id: the row's id.
        file: the file the row, or its image, stands in.
        detail: what is wrong and what to do, in words.
    """

    def __init__(self, reason: str, sample_id: str, detail: str, file: str = "") -> None:
        if reason not in BAD_REASONS | DROP_REASONS:
            raise UserError(f"unknown reason {reason!r}; one of {sorted(BAD_REASONS | DROP_REASONS)}")
        super().__init__(reason, sample_id, detail, file)
        self.reason, self.sample_id, self.detail, self.file = reason, sample_id, detail, file

    def __str__(self) -> str:
        file = shown(self.file)
        where = f" in {file}" if file and not self.detail.startswith((file, self.file)) else ""
        return printable(f"row {self.sample_id!r}{where}: {self.detail}")


class TooManyBadSamples(UserError):
    """More of the data is bad than `max_bad_fraction` allows."""


@dataclass(frozen=True, slots=True)
class Drop:
    """One row that was left out."""

    sample_id: str
    reason: str
    detail: str
    file: str = ""

    @classmethod
    def of(cls, error: BadSample) -> "Drop":
        """The drop that an error became when bad samples are skipped."""
        return cls(error.sample_id, error.reason, error.detail, error.file)


class DropLog:
    """Every row that was left out, with the reason.

    Args:
        on_bad_sample: "raise" stops at the first bad row, with its id and file; "skip" counts it and goes on.
            Drops that are the settings' doing (`DROP_REASONS`: a row too long, without an answer, without an image
            where images are wanted, with a video where the family takes none) are always counted, never raised.
        max_bad_fraction: share of bad rows among those seen, 0 to 1, above which `check` raises.

    Attributes:
        drops: every row that was left out, in the order it was found.
        bad: how many of them are the data's fault (`BAD_REASONS`).
        settled: how many of those were checked against the rows of the whole file, of which a part may be drawn then.
        placed: rows that are used, but name no place for their images: they stand at the start of the first question.
    """

    def __init__(self, on_bad_sample: OnBadSample = "raise", max_bad_fraction: float = 0.01) -> None:
        if on_bad_sample not in ("raise", "skip"):
            raise UserError(f"on_bad_sample is {on_bad_sample!r}; 'raise' or 'skip'")
        if not 0 <= max_bad_fraction <= 1:
            raise UserError(f"max_bad_fraction is {max_bad_fraction}; a share between 0 and 1")
        self.on_bad_sample = on_bad_sample
        self.max_bad_fraction = max_bad_fraction
        self.drops: list[Drop] = []
        self.bad = 0
        self.settled = 0
        self.placed = 0

    def add(self, error: BadSample) -> None:
        """Count a row, or raise the error where bad samples are to stop the run.

        Raises:
            BadSample: the row is bad and `on_bad_sample` is "raise".
        """
        if self.on_bad_sample == "raise" and error.reason in BAD_REASONS:
            raise error
        self.bad += error.reason in BAD_REASONS
        self.drops.append(Drop.of(error))

    def extend(self, drops: Iterable[Drop]) -> None:
        """Count rows that were found elsewhere (in a worker, in another process).

        Raises:
            BadSample: a row is bad and `on_bad_sample` is "raise".
        """
        for drop in drops:
            self.add(BadSample(drop.reason, drop.sample_id, drop.detail, drop.file))

    @property
    def counts(self) -> dict[str, int]:
        """Rows per reason, most frequent first."""
        return dict(Counter(drop.reason for drop in self.drops).most_common())

    def check(self, seen: int, minimum: int = 100) -> None:
        """Stop when too much of the data is bad.

        Args:
            seen: rows looked at so far, the bad ones included.
            minimum: the share is taken of at least this many rows, so that one bad row among the first is no reason.

        Raises:
            TooManyBadSamples: the share of bad rows is above `max_bad_fraction`.
        """
        bad = self.bad - self.settled
        share = bad / max(seen, minimum)
        if share > self.max_bad_fraction:
            raise TooManyBadSamples(
                f"{bad} of {seen} rows are bad ({share:.1%}), more than max_bad_fraction = "
                f"{self.max_bad_fraction:.1%} allows. {self.summary()}. Mend the data, or raise max_bad_fraction."
            )

    def summary(self) -> str:
        """One line: how many rows were left out and why, and what was done to others."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.items())
        words = f"{len(self.drops)} rows were left out: {reasons}" if self.drops else "No row was left out"
        if self.placed:
            words += f". {self.placed} rows name no place for their images: put at the start of the first question"
        return words

    def write(self, path: str | os.PathLike[str]) -> None:
        """List every drop, one JSON object a line (sample_id, reason, detail, file)."""
        lines = [json.dumps(asdict(drop), ensure_ascii=False) for drop in self.drops]
        # Half a character in a row, or a file's name that is no UTF-8, becomes an escape.
        Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8", errors="backslashreplace")
