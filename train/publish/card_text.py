"""Text of others in a model card: names, licences and settings stand there as text, and as nothing else."""

from __future__ import annotations

import re

_LENGTH = 120
# No character that Markdown or HTML reads as anything; "www." alone makes a link of what follows.
_HARMLESS = re.compile(r"(?!.*www\.)[A-Za-z0-9]([A-Za-z0-9 ,.+%/()-]|_(?=[A-Za-z0-9]))*", re.IGNORECASE)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")


def one_line(text: object) -> str:
    """The text without line ends, control characters and characters that turn others round; cut where it is long."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())
    return line if len(line) <= _LENGTH else line[: _LENGTH - 1] + "…"


def inline(text: object) -> str:
    """The text within a paragraph, a list or a table: as it is where it is harmless, else as code."""
    line = one_line(text)
    if _HARMLESS.fullmatch(line):
        return line
    return "`" + line.replace("`", "'").replace("|", "\\|") + "`" if line else "(no name)"


def fenced(language: str, text: str) -> str:
    """A block of code that nothing in the text ends before its time, without control characters."""
    text = "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def is_repository(name: str) -> bool:
    """Whether a name is that of a repository on the Hub, user/name."""
    return _REPOSITORY.fullmatch(name) is not None


def licence_id(licence: str | None) -> str:
    """The licence as the card's metadata name it: `other` for words that are no identifier."""
    if licence is None:
        return "unknown"
    return licence if _LICENCE.fullmatch(licence.lower()) else "other"
