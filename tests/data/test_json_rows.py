"""Reading rows of a JSON file as a stream gives what reading it whole gives, or says where it is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shortzip.data.json_rows
from shortzip.data.json_rows import JsonRowError, iterate_json_rows

ROWS: list[Any] = [
    {"id": "1", "text": 'quotes \\" and ] brackets [', "number": -1.5e3},
    {"id": "ü湖🏞", "nested": [{"a": [1, 2, {"b": None}]}]},
    {},
    {"id": "last", "yes": True},
]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(autouse=True, params=[7, 64, 1 << 22])
def _block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is read in tiny blocks too, so that rows, characters and white space straddle their ends."""
    monkeypatch.setattr(shortzip.data.json_rows, "_CHUNK", request.param)


def written(rows: list[Any], kind: str) -> str:
    if kind == "lines":
        return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    return json.dumps(rows, ensure_ascii=kind == "ascii", indent=1 if kind == "indented" else None)


@pytest.mark.parametrize("kind", ["ascii", "indented", "unicode", "lines"])
@pytest.mark.parametrize("mark", ["", "\ufeff", "\r\n  "])
def test_rows_and_their_places(tmp_path: Path, kind: str, mark: str) -> None:
    file = tmp_path / "rows"
    file.write_bytes((mark + written(ROWS, kind)).encode())
    rows = list(iterate_json_rows(file))
    assert [row.value for row in rows] == ROWS
    content = file.read_bytes()
    assert [json.loads(content[row.start : row.start + row.size]) for row in rows] == ROWS


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=4), values, max_size=3), max_size=6),
    kind=st.sampled_from(["ascii", "indented", "unicode", "lines"]),
)
def test_any_rows(tmp_path_factory: pytest.TempPathFactory, rows: list[Any], kind: str) -> None:
    file = tmp_path_factory.mktemp("any") / "rows"
    file.write_bytes(written(rows, kind).encode("utf-8", "surrogatepass"))
    assert [row.value for row in iterate_json_rows(file)] == rows


@pytest.mark.parametrize("content", ["", "  \n", "[]", "[ ]\n"])
def test_no_rows(tmp_path: Path, content: str) -> None:
    (tmp_path / "rows").write_text(content)
    assert list(iterate_json_rows(tmp_path / "rows")) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1}, {"b": 2}', "end of the file after row 1"),
        ('[{"a": 1}, {"b": ', "row 1, byte 11: the file breaks off"),
        ('[{"a": 1} {"b": 2}]', "'{' after row 0, where a comma"),
        ('[{"a": 1}, {"b" 2, "and": "more of it that follows"}]', "row 1, byte 11: Expecting ':'"),
        ('[{"a": 1}, ]', "a comma and no row after row 0"),
        ('[{"a": 1}] and', "goes on after the end of the array"),
        ('{"a": 1}\n{"b" 2, "and": "more of it that follows"}\n', "row 1, byte 9: Expecting ':'"),
        ('{\n "a": 1,\n "rows": []\n}', r"one JSON object with the keys \['a', 'rows'\]"),
        ('"text"', "starts with a JSON str"),
        ("<html>404 not found, and more of a page</html>", "row 0, byte 0: Expecting value at '<html>"),
    ],
)
def test_a_wrong_file_says_where(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows").write_text(content)
    with pytest.raises(JsonRowError, match=message):
        list(iterate_json_rows(tmp_path / "rows"))


def test_other_encodings_are_named(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes('[{"a": "é"}]'.encode("latin-1"))
    with pytest.raises(JsonRowError, match="not UTF-8"):
        list(iterate_json_rows(tmp_path / "rows"))


def test_a_row_without_an_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortzip.data.json_rows, "_LONGEST_ROW", 1000)
    (tmp_path / "rows").write_text('[{"a": "' + "x" * 5_000_000 + '"}]')
    if shortzip.data.json_rows._CHUNK < 1000:
        with pytest.raises(JsonRowError, match="row 0, byte 1: no row ends within"):
            list(iterate_json_rows(tmp_path / "rows"))
