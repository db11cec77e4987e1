"""Rows of a JSON array or JSONL file one at a time, so that a gigabyte needs only the memory of a few rows."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

_CHUNK = 1 << 22
# No row of an instruction mix is near this; a longer one is a missing bracket, and the rest of the file would be read
# into memory to find that out.
_LONGEST_ROW = 1 << 26
_SPACE = " \t\r\n"


class JsonRowError(ValueError):
    """A file that is neither a JSON array nor JSONL, or that breaks off."""


@dataclass(frozen=True, slots=True)
class JsonRow:
    """One row.

    Attributes:
        value: the parsed row.
        text: the row as it stands in the file.
    """

    value: Any
    text: str


def iterate_json_rows(path: str | os.PathLike[str]) -> Iterator[JsonRow]:
    """The rows of a file, in order: the elements of a JSON array, or one JSON value a line.

    Raises:
        JsonRowError: not JSON, with the place; or a single object where rows are expected.
        OSError: the file cannot be read.
    """
    # utf-8-sig: a byte order mark, as Windows editors write it, is no error.
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        try:
            yield from _rows(file)
        except UnicodeDecodeError as error:
            raise JsonRowError(f"is not UTF-8 text ({error.reason} at byte {error.start} of a block)") from error


def _rows(file: TextIO) -> Iterator[JsonRow]:
    decoder = json.JSONDecoder()
    buffer, at, taken, count = file.read(_CHUNK), 0, 0, 0
    ended = len(buffer) == 0
    at = _skip(buffer, at)
    if at == len(buffer):
        if ended or not file.read(1):
            return
        raise JsonRowError("starts with megabytes of white space")
    array = buffer[at] == "["
    at += array
    need_comma = False
    while True:
        at = _skip(buffer, at)
        if at < len(buffer) and array and buffer[at] == "," and need_comma:
            at, need_comma = at + 1, False
            continue
        if at < len(buffer) and array and buffer[at] == "]":
            rest = buffer[at + 1 :] + file.read(_CHUNK)
            if rest.strip():
                raise JsonRowError(f"goes on after the end of the array: {rest.strip()[:40]!r}")
            return
        failure: json.JSONDecodeError | None = None
        if at < len(buffer) and array and need_comma:
            raise JsonRowError(f"has no comma after row {count - 1}, character {taken + at}: {buffer[at : at + 40]!r}")
        if at < len(buffer):
            try:
                value, end = decoder.raw_decode(buffer, at)
            except json.JSONDecodeError as error:
                failure = error
                if not _may_go_on(error, buffer):
                    where = f"row {count}, character {taken + error.pos}"
                    raise JsonRowError(f"{where}: {error.msg} at {buffer[error.pos : error.pos + 40]!r}") from error
            else:
                if not array and count == 0 and _is_document(value, buffer, end):
                    raise JsonRowError(f"is one JSON object with the keys {sorted(value)[:20]}, not a list of rows")
                yield JsonRow(value, buffer[at:end])
                at, count, need_comma = end, count + 1, True
                continue
        more = "" if ended else file.read(_CHUNK)
        if not more:
            if failure is None and not array:
                return
            if failure is None:
                raise JsonRowError(f"breaks off after row {count - 1}: the array is not closed")
            raise JsonRowError(f"row {count}, character {taken + failure.pos}: {failure.msg}") from failure
        if len(buffer) - at > _LONGEST_ROW:
            where = f"row {count}, character {taken + at}"
            raise JsonRowError(f"{where}: no row ends within {_LONGEST_ROW >> 20} million characters") from failure
        taken += at
        buffer, at = buffer[at:] + more, 0


def _may_go_on(error: json.JSONDecodeError, buffer: str) -> bool:
    """Whether the block ended inside a row, as against a row that is wrong."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(buffer) - 16


def _is_document(value: Any, buffer: str, end: int) -> bool:
    """Whether the first value of a file without brackets is spread over lines, as JSONL's rows are not."""
    if not isinstance(value, dict):
        raise JsonRowError(f"starts with a JSON {type(value).__name__}, not with an array or an object per line")
    return "\n" in buffer[:end].lstrip()


def _skip(buffer: str, at: int) -> int:
    length = len(buffer)
    while at < length and buffer[at] in _SPACE:
        at += 1
    return at
