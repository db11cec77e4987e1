"""Rows of a JSON array or JSONL file one at a time, so that a gigabyte needs only the memory of a few rows."""

import codecs
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from shortzip.data.errors import UserError

_CHUNK = 1 << 22
# No row of an instruction mix is near this; a longer one is a missing bracket, and the rest of the file would be read
# into memory to find that out.
_LONGEST_ROW = 1 << 26
_SPACE = " \t\r\n"


# How files begin that are often given instead: (bytes, what it is, what to do).
_OTHER_FILES = (
    (b"\x1f\x8b", "compressed by gzip", "unpack it with gunzip"),
    (b"BZh", "compressed by bzip2", "unpack it with bunzip2"),
    (b"\xfd7zXZ", "compressed by xz", "unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it with unzstd"),
    (b"PK\x03\x04", "a zip archive", "unpack it with unzip"),
    (b"PAR1", "a parquet table", "name it .parquet"),
    (b"\xff\xfe\0\0", "UTF-32 text", "save it as UTF-8"),
    (b"\0\0\xfe\xff", "UTF-32 text", "save it as UTF-8"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
    (b"[\0", "UTF-16 text", "save it as UTF-8"),
    (b"{\0", "UTF-16 text", "save it as UTF-8"),
    (b"\0[", "UTF-16 text", "save it as UTF-8"),
    (b"\0{", "UTF-16 text", "save it as UTF-8"),
)


class JsonRowError(UserError):
    """A file that is neither a JSON array nor JSONL, or that breaks off."""


@dataclass(frozen=True, slots=True)
class MalformedRow:
    """A row that is JSON, but not to be taken for what it seems to say.

    Attributes:
        value: what Python's parser makes of it.
        problem: why it is not to be used, in words.
    """

    value: Any
    problem: str


@dataclass(frozen=True, slots=True)
class JsonRow:
    """One row.

    Attributes:
        value: the parsed row; a `MalformedRow` where a key stands twice in one of its objects, or a number is endless.
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
        self.problems: list[str] = []  # of the row that is being read
        self.json = json.JSONDecoder(object_pairs_hook=self._object, parse_int=self._integer)

    def rows(self) -> Iterator[JsonRow]:
        start = self.file.read(8)
        self.file.seek(0)
        for magic, kind, cure in _OTHER_FILES:
            if start.startswith(magic):
                raise JsonRowError(f"is {kind}, not JSON: {cure}")
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
                    words = repr(symbol) if symbol else "the end of the file"
                    raise JsonRowError(f"has {words} after row {self.count - 1}, where a comma or ] is due")
                self.at += 1
                if self._next_symbol() == "]":
                    raise JsonRowError(f"has a comma and no row after row {self.count - 1}: take out the comma")
            yield self._row()

    def _lines(self) -> Iterator[JsonRow]:
        while self._next_symbol():
            row = self._row()
            if self.count == 1:
                first = row.value.value if isinstance(row.value, MalformedRow) else row.value
                if not isinstance(first, dict):
                    kind = type(first).__name__
                    raise JsonRowError(f"starts with a JSON {kind}, not with an array or with an object per line")
                if "\n" in self.text[: self.at].lstrip("\ufeff" + _SPACE):
                    raise JsonRowError(f"is one JSON object with the keys {sorted(first)[:20]}, not a list of rows")
            yield row

    def _row(self) -> JsonRow:
        while True:
            failure = None
            self.problems.clear()
            try:
                value, end = self.json.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                failure = error
                if not _may_go_on(error, self.text):
                    raise self._wrong(error) from error
            except RecursionError as error:
                raise JsonRowError(f"{self._place()}: nested too deeply to be read; no conversation is") from error
            else:
                if self.problems:
                    value = MalformedRow(value, self.problems[0])
                start = self._bytes_to(self.at)
                self.at, self.count = end, self.count + 1
                return JsonRow(value, start, self._bytes_to(end) - start)
            if len(self.text) - self.at > _LONGEST_ROW:
                longest = f"{_LONGEST_ROW >> 20} million characters"
                raise JsonRowError(f"{self._place()}: no row ends within {longest}") from failure
            if not self._read():
                raise self._wrong(failure) from failure

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """What the parser makes of an object: for a key that stands twice it would take the last value unsaid."""
        made = dict(pairs)
        if len(made) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            self.problems.append(f"the key {twice!r} stands twice in one object: keep one")
        return made

    def _integer(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:  # Python reads 4300 digits and no more
            self.problems.append(f"a number has {len(digits)} digits, {digits[:20]}…")
            return 0

    def _place(self) -> str:
        return f"row {self.count}, byte {self._bytes_to(self.at)}"

    def _wrong(self, error: json.JSONDecodeError) -> JsonRowError:
        if error.pos >= len(self.text):
            return JsonRowError(f"{self._place()}: the file breaks off inside the row")
        return JsonRowError(f"{self._place()}: {error.msg} at {self.text[error.pos : error.pos + 40]!r}")

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
            where = f"after row {self.count - 1}" if self.count else "before its first row ends"
            raise JsonRowError(f"is not UTF-8 text: {error.reason} {where}; save it as UTF-8") from error
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
