"""Rows and files that a parser takes, refuses or chokes on: one row's matter where it can be, always named."""

import bz2
import gzip
import lzma
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from shortzip.data.drops import BadSample, DropLog
from shortzip.data.instructions import UnknownFormat, read_instructions
from shortzip.data.json_rows import MalformedRow, iterate_json_rows
from shortzip.data.subset import SubsetOptions, prepare_subset

ROW = (
    '{"id": "good", "image": "1.jpg", '
    '"conversations": [{"from": "human", "value": "<image>\\nQ"}, {"from": "gpt", "value": "A"}]}'
)


def quiet(*step: Any) -> None:
    """No progress bar."""


@pytest.mark.parametrize(
    ("key", "row"),
    [
        ("image", ROW.replace('"image": "1.jpg"', '"image": "1.jpg", "image": "2.jpg"')),
        ("value", ROW.replace('"value": "A"', '"value": "A", "value": "B"')),
        ("id", ROW.replace('"id": "good"', '"id": "good", "note": {"a": {"id": 1, "id": 1}}')),
    ],
)
@pytest.mark.parametrize("lines", [True, False])
def test_a_key_that_stands_twice_is_a_bad_row(tmp_path: Path, key: str, row: str, lines: bool) -> None:
    file = tmp_path / "rows.json"
    row = row.replace('"good"', '"twice"', 1)
    file.write_text("\n".join([row, ROW, ROW]) if lines else f"[{row}, {ROW}, {ROW}]")
    with pytest.raises(BadSample, match=f"row 'twice'.*the key '{key}' stands twice"):
        read_instructions(file)
    drops = DropLog("skip", 0.5)
    assert [row.id for row in read_instructions(file, drops=drops)] == ["good", "good"]
    assert drops.counts == {"malformed_row": 1}
    report = prepare_subset(SubsetOptions(str(file), tmp_path / "out", fraction=1.0, max_bad_fraction=0.5), quiet)
    assert (report["written"], report["dropped"]) == (2, {"malformed_row": 1})


def test_the_places_of_rows_around_it_stay(tmp_path: Path) -> None:
    content = '[{"a": 1}, {"b": 1, "b": 2}, {"a": [{"b": 3}, {"b": 4}]}]'
    (tmp_path / "rows").write_text(content)
    rows = list(iterate_json_rows(tmp_path / "rows"))
    assert [isinstance(row.value, MalformedRow) for row in rows] == [False, True, False]
    assert [content[row.start : row.start + row.size] for row in rows][2] == '{"a": [{"b": 3}, {"b": 4}]}'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(ROW.encode()), "compressed by gzip, not JSON: unpack it with gunzip"),
        (bz2.compress(ROW.encode()), "compressed by bzip2"),
        (lzma.compress(ROW.encode()), "compressed by xz"),
        (b"PK\x03\x04" + b"\0" * 30, "is a zip archive"),
        (b"PAR1" + b"\0" * 30, "a parquet table, not JSON: name it .parquet"),
        (ROW.encode("utf-16"), "is UTF-16 text, not JSON: save it as UTF-8"),
        (f"[{ROW}]".encode("utf-16-be"), "is UTF-16 text"),
        (ROW.encode("utf-16-le"), "is UTF-16 text"),
        (ROW.encode("utf-32"), "is UTF-32 text"),
        (ROW.replace("Q", "é").encode("latin-1"), "is not UTF-8 text: .* before its first row ends; save it as UTF-8"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "rows.json.gz"
    file.write_bytes(content)
    with pytest.raises(UnknownFormat, match=said):
        read_instructions(file, drops=DropLog("skip"))
    with pytest.raises(UnknownFormat, match=said):
        prepare_subset(SubsetOptions(str(file), tmp_path / "out"), quiet)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_nesting_names_the_row(tmp_path: Path, opening: str) -> None:
    file = tmp_path / "rows.json"
    deep = opening * 100_000 + "1" + ("]" if opening == "[" else "}") * 100_000
    for content in (f"[{ROW}, {deep}]", f'{ROW}\n{{"a": {deep}}}\n'):
        file.write_text(content)
        with pytest.raises(UnknownFormat, match=r"row 1, byte .*nested too deeply"):
            read_instructions(file, drops=DropLog("skip"))


def test_nesting_that_is_just_read_is_one_rows_matter_or_kept(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    read = 0
    for depth in range(700, 1000, 20):
        note = "[" * depth + "1" + "]" * depth
        file.write_text(f'[{ROW}, {{"note": {note}, "id": "deep", "conversations": {note}}}, {ROW}]')
        options = SubsetOptions(str(file), tmp_path / f"out{depth}", fraction=1.0, max_bad_fraction=0.5)
        # Only the depth that the parser takes differs: no other error comes.
        with suppress(UnknownFormat):
            assert prepare_subset(options, quiet)["written"] == 2
            assert len(read_instructions(file, drops=DropLog("skip", 0.5))) == 2
            read += 1
    assert read


@pytest.mark.parametrize("lines", [True, False])
def test_a_number_without_end_is_one_rows_matter(tmp_path: Path, lines: bool) -> None:
    file = tmp_path / "rows.json"
    row = ROW.replace('"good"', f'"long", "score": {"1" * 5000}', 1)
    file.write_text("\n".join([row, ROW]) if lines else f"[{row}, {ROW}]")
    with pytest.raises(BadSample, match=r"row 'long'.*a number has 5000 digits"):
        read_instructions(file)
    assert [row.id for row in read_instructions(file, drops=DropLog("skip", 0.5))] == ["good"]


def test_an_image_that_is_null_in_a_table_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    said = [{"role": "user", "content": "<image><image>Q"}, {"role": "assistant", "content": "A"}]
    content = {"bytes": b"x", "path": None}
    for images in (datasets.List(datasets.Image()), datasets.List(datasets.Value("binary"))):
        held = content if isinstance(images.feature, datasets.Image) else b"x"
        table = datasets.Dataset.from_dict(
            {
                "id": ["a", "b", "c", "d"],
                "messages": [said] * 4,
                "images": [[held] * 2, [held, None], None, [None] * 2],
            },
            features=datasets.Features(
                {
                    "id": datasets.Value("string"),
                    "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
                    "images": images,
                }
            ),
        )
        table.to_parquet(tmp_path / "rows.parquet")
        drops = DropLog("skip", 1.0)
        (row,) = read_instructions(tmp_path / "rows.parquet", drops=drops)
        assert (row.id, [image.read() for image in row.images]) == ("a", [b"x", b"x"])  # type: ignore[union-attr]
        assert [(drop.sample_id, drop.reason) for drop in drops.drops] == [
            ("b", "malformed_row"),
            ("c", "placeholder_count"),
            ("d", "placeholder_count"),
        ]
        assert "an image is NoneType null" in drops.drops[0].detail
