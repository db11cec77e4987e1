"""Rows of a JSON array or JSONL file one at a time, so that a gigabyte needs only the memory of a few rows."""

import codecs
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data.errors import UserError

_CHUNK = 1 << 22
# No row of an instruction mix is near this; a longer one is a missing bracket, and the rest of the file would be read
# into memory to find that out.
_LONGEST_ROW = 1 << 26
_SPACE = " \t\r\n"


class JsonRowError(UserError):
    """A file that is neither a JSON array nor JSONL, or that breaks off."""


@dataclass(frozen=True, slots=True)
class JsonRow:
    """One row.

    Attributes:
        value: the parsed row.
        start: the byte of the file that it begins at.
        size: its bytes.
    """

    value: Any
    start: int
    size: int


def iterate_json_rows(path: str | os.PathLike[str]) -> Iterator[JsonRow]:
    """The rows of a file, in order: the elements of a JSON array, or one JSON value a line.

    Raises:
        JsonRowError: not JSON, with the place; or a single object where rows are expected.
        OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        yield from _Reader(file).rows()


class _Reader:
    """A window of text that slides over the file; `at` is where reading goes on in it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text = ""
        self.at = 0
        self.counted = 0  # place in the text up to which `position` has counted
        self.position = 0  # bytes of the file up to there
        self.count = 0

    def rows(self) -> Iterator[JsonRow]:
        self._read()
        # A byte order mark, as Windows editors write it, is no error.
        self.at = len(self.text) - len(self.text.removeprefix("\ufeff"))
        self._skip_space()
        if self.at == len(self.text):
            return
        is_array = self.text[self.at] == "["
        self.at += is_array
        yield from self._array() if is_array else self._lines()

    def _array(self) -> Iterator[JsonRow]:
        while True:
            symbol = self._next_symbol()
            if symbol == "]":
                self.at += 1
                if rest := self._next_symbol():
                    raise JsonRowError(
                        f"goes on after the end of the array, at byte {self._bytes_to(self.at)}: {rest!r}"
                    )
                return
            if self.count:
                if symbol != ",":
                    found = repr(symbol) if symbol else "the end of the file"
                    raise JsonRowError(f"has {found} after row {self.count - 1}, where a comma or ] is due")
                self.at += 1
                self._next_symbol()
            yield self._row()

    def _lines(self) -> Iterator[JsonRow]:
        while self._next_symbol():
            row = self._row()
            if self.count == 1:
                if not isinstance(row.value, dict):
                    kind = type(row.value).__name__
                    raise JsonRowError(f"starts with a JSON {kind}, not with an array or with an object per line")
                if "\n" in self.text[: self.at].lstrip("\ufeff" + _SPACE):
                    raise JsonRowError(
                        f"is one JSON object with the keys {sorted(row.value)[:20]}, not a list of rows"
                    )
            yield row

    def _row(self) -> JsonRow:
        decoder = json.JSONDecoder()
        while True:
            failure = None
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                failure = error
                if not _may_go_on(error, self.text):
                    raise self._wrong(error) from error
            else:
                start = self._bytes_to(self.at)
                self.at, self.count = end, self.count + 1
                return JsonRow(value, start, self._bytes_to(end) - start)
            if len(self.text) - self.at > _LONGEST_ROW:
                place = f"row {self.count}, byte {self._bytes_to(self.at)}"
                raise JsonRowError(f"{place}: no row ends within {_LONGEST_ROW >> 20} million characters") from failure
            if not self._read():
                raise self._wrong(failure) from failure

    def _wrong(self, error: json.JSONDecodeError) -> JsonRowError:
        place = f"row {self.count}, byte {self._bytes_to(self.at)}"
        if error.pos >= len(self.text):
            return JsonRowError(f"{place}: the file breaks off inside the row")
        return JsonRowError(f"{place}: {error.msg} at {self.text[error.pos : error.pos + 40]!r}")

    def _next_symbol(self) -> str:
        """The next character that is no white space, "" at the end of the file."""
        self._skip_space()
        while self.at == len(self.text):
            if not self._read():
                return ""
            self._skip_space()
        return self.text[self.at]

    def _skip_space(self) -> None:
        text, at, length = self.text, self.at, len(self.text)
        while at < length and text[at] in _SPACE:
            at += 1
        self.at = at

    def _read(self) -> bool:
        """Slide the window on; False at the end of the file."""
        self._bytes_to(self.at)
        block = self.file.read(_CHUNK)
        try:
            more = self.decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise JsonRowError(f"is not UTF-8 text: {error.reason} after row {self.count - 1}") from error
        self.text = self.text[self.at :] + more
        self.at = self.counted = 0
        return bool(block)

    def _bytes_to(self, place: int) -> int:
        """Bytes of the file before a place in the text that is not before the last one asked for."""
        self.position += len(self.text[self.counted : place].encode("utf-8", "surrogatepass"))
        self.counted = place
        return self.position


def _may_go_on(error: json.JSONDecodeError, text: str) -> bool:
    """Whether the window ended inside a row, as against a row that is wrong."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - 16
