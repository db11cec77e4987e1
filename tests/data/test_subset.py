"""The subset: in proportion to its sources, the same everywhere, with nothing lost in silence."""

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shortzip.data.drops import TooManyBadSamples
from shortzip.data.generated.mixture import rows_of_the_mix
from shortzip.data.instructions import Conversation, UnknownFormat, parse_llava_row, read_instructions
from shortzip.data.strata import Ranking, draw, quotas, rank_of, source_of
from shortzip.data.subset import SubsetOptions, answer_histogram, prepare_subset

TURNS = (("user", "<image>\nQ"), ("assistant", "A"))


def quiet(what: str, done: int, total: int | None) -> None:
    """No progress bar."""


def prepared(output: Path, rows: Any, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Report and rows of a subset of rows (written to a file first) or of a file."""
    if not isinstance(rows, Path):
        file = output.with_suffix(".json")
        file.write_text(json.dumps(rows), encoding="utf-8")
        rows = file
    report = prepare_subset(SubsetOptions(str(rows), output, **options), quiet)
    return report, json.loads((output / "subset.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def mix() -> list[dict[str, Any]]:
    return list(rows_of_the_mix(1, 600))


def test_every_source_gives_its_share(tmp_path: Path, mix: list[dict[str, Any]]) -> None:
    report, rows = prepared(tmp_path / "out", mix, fraction=0.2)
    text_only = sum("image" not in row for row in mix)
    assert report["rows"] == 600
    assert report["usable"] == 600 - text_only
    assert report["dropped"] == {"text_only": text_only}
    assert len(rows) == report["written"] == round(0.2 * (600 - text_only))
    assert set(report["sources"]) == {"coco", "gqa", "ocr_vqa", "textvqa", "vg"}
    for source, counts in report["sources"].items():
        assert abs(counts["selected"] - 0.2 * counts["rows"]) < 1
        assert counts["rows"] == sum(row.get("image", "").startswith(source + "/") for row in mix)
        assert counts["written"] == sum(row["image"].startswith(source + "/") for row in rows)
    # Rows are passed on as they are, in the order of the file.
    places = [mix.index(row) for row in rows]
    assert places == sorted(places)


def test_the_subset_does_not_depend_on_order_or_formatting_of_the_file(
    tmp_path: Path, mix: list[dict[str, Any]]
) -> None:
    _, plain = prepared(tmp_path / "plain", mix, fraction=0.1)
    mixed = random.Random(0).sample(mix, len(mix))
    _, shuffled = prepared(tmp_path / "shuffled", mixed, fraction=0.1)
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in mix), "utf-8")
    _, lines = prepared(tmp_path / "lines", tmp_path / "x.jsonl", fraction=0.1)
    assert lines == plain
    assert sorted(map(json.dumps, shuffled)) == sorted(map(json.dumps, plain))


def test_a_smaller_fraction_is_part_of_a_larger_one_and_another_seed_is_not(mix: list[dict[str, Any]]) -> None:
    conversations = [Conversation(str(number), (f"a/{number}.jpg",), TURNS) for number in range(400)]
    small, large = draw(conversations, 0.1, seed=0), draw(conversations, 0.3, seed=0)
    assert (len(small), len(large)) == (40, 120)
    assert {one.id for one in small} < {one.id for one in large}
    other = draw(conversations, 0.1, seed=1)
    assert len({one.id for one in small} & {one.id for one in other}) < 15
    assert draw(conversations, 1.0, seed=0) == conversations


def test_the_rank_of_a_row_is_written_down() -> None:
    """Another rank would draw another subset than the published one."""
    assert rank_of(Conversation("000000033471", ("coco/train2017/000000033471.jpg",), TURNS), 0) == RANK
    assert rank_of(Conversation("#5", (), TURNS), 0) == rank_of(Conversation("#6", (), TURNS), 0)


RANK = 16741429658320828068


def test_another_python_with_another_hash_seed_draws_the_same() -> None:
    code = (
        "from shortzip.data.generated.mixture import rows_of_the_mix; "
        "from shortzip.data.instructions import parse_llava_row; "
        "from shortzip.data.strata import draw; "
        "print(*(row.images for row in draw([parse_llava_row(row) for row in rows_of_the_mix(0, 200)], 0.2, 0)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "1234"},
        capture_output=True,
        check=True,
        text=True,
    )
    here = draw([parse_llava_row(row) for row in rows_of_the_mix(0, 200)], 0.2, 0)
    assert run.stdout.split("\n")[0] == " ".join(str(row.images) for row in here)


def test_quotas_add_up_to_the_whole_share() -> None:
    assert quotas({"a": 5, "b": 5, "c": 5}, 0.1) == {"a": 1, "b": 1, "c": 0}
    for total in range(1, 40):
        rows = {"a": total, "b": 2 * total, "c": 7}
        for fraction in (0.01, 0.1, 0.33, 1.0):
            assert sum(quotas(rows, fraction).values()) == round(sum(rows.values()) * fraction)
            assert all(taken <= rows[source] for source, taken in quotas(rows, fraction).items())


@pytest.mark.parametrize(
    ("images", "source"),
    [
        ((), "(text only)"),
        (("x.jpg",), "(no folder)"),
        (("vg/VG_100K/1.jpg", "coco/1.jpg"), "vg"),
        ((b"x",), "(no folder)"),
    ],
)
def test_sources_are_what_the_paths_show(images: tuple[Any, ...], source: str) -> None:
    assert source_of(Conversation("x", images, TURNS)) == source


def test_rows_that_say_the_same_count_each() -> None:
    twin = Conversation("x", ("a/1.jpg",), TURNS)
    assert len(draw([twin] * 10, 0.5, 0)) == 5


def picture_rows(count: int) -> list[dict[str, Any]]:
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    return [{"id": str(number), "image": f"a/{number}.png", "conversations": turns} for number in range(count)]


@pytest.fixture
def half_full(tmp_path: Path) -> Path:
    """An image folder that holds every second one of 20 images, one of them broken."""
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    for number in range(0, 20, 2):
        Image.new("RGB", (8, 8), "red").save(folder / f"{number}.png")
    (folder / "4.png").write_bytes((folder / "4.png").read_bytes()[:30])
    return tmp_path / "images"


def lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


def test_missing_images_are_listed_and_their_rows_kept(tmp_path: Path, half_full: Path) -> None:
    report, rows = prepared(tmp_path / "out", picture_rows(20), fraction=1.0, image_root=half_full)
    assert len(rows) == 20
    assert sorted(lines(tmp_path / "out" / "images.txt")) == sorted(row["image"] for row in rows)
    assert sorted(lines(tmp_path / "out" / "missing_images.txt")) == sorted(f"a/{n}.png" for n in range(1, 20, 2))
    assert (report["images"], report["missing_images"]) == (20, 10)


def test_rows_of_missing_images_can_be_dropped(tmp_path: Path, half_full: Path) -> None:
    report, rows = prepared(tmp_path / "out", picture_rows(20), fraction=1.0, image_root=half_full, missing="drop")
    assert [row["id"] for row in rows] == [str(number) for number in range(0, 20, 2)]
    assert report["dropped"] == {"missing_image": 10}
    assert len(lines(tmp_path / "out" / "missing_images.txt")) == 10
    listed = [json.loads(line) for line in lines(tmp_path / "out" / "dropped.jsonl")]
    assert {drop["sample_id"] for drop in listed} == {str(number) for number in range(1, 20, 2)}
    assert all("no such file" in drop["detail"] for drop in listed)


def test_verifying_decodes_every_image(tmp_path: Path, half_full: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(picture_rows(20)))
    options = SubsetOptions(str(file), tmp_path / "out", half_full, 1.0, verify_images=True, num_workers=2)
    report = prepare_subset(options, lambda *step: seen.append(step))
    assert report["dropped"] == {"unreadable_image": 1}
    assert report["written"] == 19
    assert ("decoding images", 20, 20) in seen
    (drop,) = [json.loads(line) for line in lines(tmp_path / "out" / "dropped.jsonl")]
    assert drop["sample_id"] == "4"
    assert "a/4.png" in drop["detail"]
    with pytest.raises(ValueError, match="verify_images needs image_root"):
        prepared(tmp_path / "again", picture_rows(2), fraction=1.0, verify_images=True)


def test_bad_rows_are_dropped_with_their_reasons(tmp_path: Path) -> None:
    human, gpt = ({"from": who, "value": text} for who, text in (("human", "<image>\nQ"), ("gpt", "A")))
    rows = [
        *picture_rows(50),
        {"id": "two", "image": ["1", "2"], "conversations": [human, gpt]},
        {"id": "roles", "image": "1", "conversations": [human, human]},
        {"id": "silent", "image": "1", "conversations": [human, {**gpt, "value": ""}]},
        {"id": "out", "image": "../../etc/passwd", "conversations": [human, gpt]},
        {"id": "text", "conversations": [{**human, "value": "Q"}, gpt]},
    ]
    report, kept = prepared(tmp_path / "out", rows, fraction=1.0, max_bad_fraction=0.1)
    assert report["dropped"] == {
        "placeholder_count": 1, "malformed_row": 1, "no_answer": 1, "outside_image_root": 1, "text_only": 1
    }  # fmt: skip
    assert (report["rows"], report["usable"], len(kept)) == (55, 50, 50)
    report, kept = prepared(tmp_path / "text", rows, fraction=1.0, max_bad_fraction=0.1, keep_text_only=True)
    assert len(kept) == 51
    assert report["sources"]["(text only)"]["written"] == 1
    with pytest.raises(TooManyBadSamples, match="placeholder_count"):
        prepared(tmp_path / "strict", rows, fraction=1.0, max_bad_fraction=0.001)
    assert not (tmp_path / "strict" / "subset.json").exists()


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    rows = picture_rows(3)
    for fraction in (0.0, 1.1, -1.0):
        with pytest.raises(ValueError, match=f"fraction is {fraction}"):
            prepared(tmp_path / "out", rows, fraction=fraction)
    with pytest.raises(ValueError, match=r"chooses no row: give 0\.33 or more"):
        prepared(tmp_path / "out", rows, fraction=0.01)
    prepared(tmp_path / "out", rows, fraction=1.0)
    with pytest.raises(FileExistsError, match="holds a subset already"):
        prepared(tmp_path / "out", rows, fraction=1.0)
    with pytest.raises(UnknownFormat, match="keys"):
        prepared(tmp_path / "other", [{"text": "x"}])
    with pytest.raises(ValueError, match="holds no rows"):
        prepared(tmp_path / "none", [])
    with pytest.raises(ValueError, match="fraction"):
        Ranking().select(2)


def test_a_subset_can_be_trained_on(tmp_path: Path, mix: list[dict[str, Any]]) -> None:
    _, rows = prepared(tmp_path / "out", mix, fraction=0.1)
    conversations = read_instructions(tmp_path / "out" / "subset.json")
    assert [conversation.id for conversation in conversations] == [row["id"] for row in rows]


def encoded(colour: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.mark.parametrize("streaming", [False, True])
def test_the_images_of_a_table_become_files(tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    messages = [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}]
    table = datasets.Dataset.from_dict(
        {
            "id": [str(number) for number in range(40)],
            "images": [[encoded(f"#0000{number:02x}")] for number in range(40)],
            "messages": [messages] * 40,
        }
    ).cast_column("images", datasets.List(datasets.Image()))
    (tmp_path / "table").mkdir()
    table.to_parquet(tmp_path / "table" / "x.parquet")
    report, rows = prepared(
        tmp_path / "out", tmp_path / "table", fraction=0.5, streaming=streaming, verify_images=True
    )
    assert report["image_root"] == str(tmp_path / "out" / "images")
    assert 8 <= len(rows) <= 32 if streaming else len(rows) == 20
    for row in rows:
        with Image.open(tmp_path / "out" / "images" / row["image"]) as image:
            assert image.convert("RGB").getpixel((0, 0)) == (0, 0, int(row["id"]))
    assert read_instructions(tmp_path / "out" / "subset.json")[0].turns == (("user", "<image>Q"), ("assistant", "A"))


def test_the_histogram_of_answers() -> None:
    answers = ["", "A", "ab", "abc", "abcd", "x" * 7, "x" * 8]
    conversations = [Conversation("x", (), (("user", "Q"), ("assistant", answer))) for answer in answers]
    assert answer_histogram(conversations) == {"0": 1, "1": 1, "2-3": 2, "4-7": 2, "8-15": 1}


@pytest.mark.slow
def test_the_whole_mix_takes_two_minutes_and_two_gibibytes_at_most(tmp_path: Path) -> None:
    """A generated file of the real size; `python scripts/benchmarks/loading.py subset` prints the same measurement."""
    code = (
        "import resource, sys, time; from pathlib import Path; from shortzip.data.subset import *; "
        "start = time.time(); "
        "report = prepare_subset(SubsetOptions(sys.argv[1], Path(sys.argv[2])), lambda *step: None); "
        "print(time.time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, report['written'])"
    )
    from shortzip.data.generated.mixture import ROWS, write_mix

    write_mix(tmp_path / "mix.json")
    size = (tmp_path / "mix.json").stat().st_size
    command = [sys.executable, "-c", code, str(tmp_path / "mix.json"), str(tmp_path / "out")]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, check=True, text=True)
    seconds, gibibytes, written = map(float, run.stdout.split())
    assert ROWS == 665_298
    assert 0.8e9 < size < 1.3e9
    assert written == round(0.1 * (665_298 - 40_688))
    assert gibibytes < 2
    assert seconds < 120
