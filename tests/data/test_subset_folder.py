"""The folder of a subset: whole or not there, one process at a time, and nothing of the user's replaced unasked."""

import errno
import io
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import shortzip.data.subset
from shortzip.data.errors import Busy, CannotWrite, FileInTheWay, UserError
from shortzip.data.subset import SubsetOptions, prepare_subset
from shortzip.data.subset_folder import new_subset, subset_report

NAMES = {"subset.json", "images.txt", "missing_images.txt", "dropped.jsonl", "report.json"}
TURNS = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]


def quiet(what: str, done: int, total: int | None) -> None:
    """No progress bar."""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"id": str(n), "image": f"a/{n}.png", "conversations": TURNS} for n in range(20)]))
    return file


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def table(folder: Path, images: list[Any]) -> Path:
    """A parquet file of which each row has one of `images`: encoded, or a path."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    messages = [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}]
    columns = {"id": [str(n) for n in range(len(images))], "image": images, "messages": [messages] * len(images)}
    folder.mkdir()
    parquet.write_table(pyarrow.table(columns), folder / "x.parquet")
    return folder / "x.parquet"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def draw(source: Path, output: Path, **options: Any) -> dict[str, Any]:
    return prepare_subset(SubsetOptions(str(source), output, **{"fraction": 0.5, **options}), quiet)


def in_a_child(action: Callable[[], object]) -> int:
    """How a forked process that does it ends: 0, or minus the signal."""
    child = os.fork()
    if not child:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def whole(output: Path) -> bool:
    """Whether a subset lies there with its report, and nothing else lies there or beside it."""
    report = subset_report(output / "subset.json")
    return (
        report is not None
        and len(json.loads((output / "subset.json").read_text())) == report["written"]
        and {file.name for file in output.iterdir()} - {"images"} == NAMES
        and not [file.name for file in output.parent.iterdir() if file.name.startswith(".")]
    )


@pytest.mark.parametrize("point", ["_pick", "_write_rows", "_write_lines", "answer_histogram", "rename"])
def test_killed_at_any_point_it_leaves_nothing_and_runs_again(
    point: str, tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(*((Path, "rename") if point == "rename" else (shortzip.data.subset, point)), die)
        for _ in range(2):
            assert in_a_child(lambda: draw(rows, output)) == -signal.SIGKILL
            assert not output.exists()
    draw(rows, output)
    assert whole(output)


@pytest.mark.parametrize("steps", range(1, 7))
def test_killed_while_it_replaces_a_subset_it_leaves_an_old_a_new_or_none(
    steps: int, tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    draw(rows, output, fraction=1.0)
    (output / "notes.txt").write_text("mine")
    left = [steps]
    replace = Path.replace

    def replaced(self: Path, target: Path) -> Path:
        left[0] -= 1
        if self.parent.name == ".new-subset" and left[0] < 0:
            die()
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", replaced)
        ended = in_a_child(lambda: draw(rows, output, overwrite=True))
    assert ended == (0 if steps > 4 else -signal.SIGKILL)
    assert (output / "subset.json").exists() == (ended == 0)
    assert draw(rows, output, overwrite=True)["written"] == 10
    assert {file.name for file in output.iterdir()} == NAMES | {"notes.txt"}


def test_killed_while_it_decodes_it_leaves_no_process_that_holds_its_folder(tmp_path: Path, rows: Path) -> None:
    (tmp_path / "a").mkdir()
    for number in range(20):
        (tmp_path / "a" / f"{number}.png").write_bytes(png())
    output = tmp_path / "out"

    def killed() -> None:
        def progress(what: str, done: int, total: int | None) -> None:
            if what == "decoding images":
                die()

        options = SubsetOptions(str(rows), output, tmp_path, 1.0, verify_images=True, num_workers=1)
        prepare_subset(options, progress)

    assert in_a_child(killed) == -signal.SIGKILL
    for _ in range(50):
        draw(rows, output, overwrite=True)
        if whole(output):
            break
        time.sleep(0.1)
    assert whole(output)


def test_a_second_one_into_the_same_folder_is_refused(tmp_path: Path, rows: Path) -> None:
    output = tmp_path / "out"

    def second() -> None:
        with pytest.raises(Busy, match=f"out is in use by process {os.getppid()}"):
            draw(rows, output)

    with new_subset(output, overwrite=False) as folder:
        (folder / "subset.json").write_text("[]")
        assert in_a_child(second) == 0
    assert [file.name for file in output.iterdir()] == ["subset.json"]


@pytest.mark.parametrize("name", ["images.txt", "report.json", "dropped.jsonl", "subset.json", "images/0.png", "x"])
def test_what_lies_there_is_replaced_only_when_asked(tmp_path: Path, rows: Path, name: str) -> None:
    output = tmp_path / "out"
    (output / name).parent.mkdir(parents=True)
    (output / name).write_text("mine")
    with pytest.raises(FileInTheWay, match="--overwrite"):
        draw(rows, output)
    assert [file for file in output.rglob("*") if file.is_file()] == [output / name]
    assert (output / name).read_text() == "mine"
    draw(rows, output, overwrite=True)
    assert ((output / name).read_text() == "mine") == (name not in NAMES)
    assert subset_report(output / "subset.json") is not None


def test_an_empty_folder_a_link_and_a_file(tmp_path: Path, rows: Path) -> None:
    (tmp_path / "empty").mkdir()
    draw(rows, tmp_path / "empty")
    assert whole(tmp_path / "empty")
    (tmp_path / "link").symlink_to(tmp_path / "named")
    draw(rows, tmp_path / "link")
    assert whole(tmp_path / "named")
    with pytest.raises(FileInTheWay, match="is a file"):
        draw(rows, rows)


def test_a_full_disk_is_said_with_the_file_and_the_cure(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shortzip.data.subset, "_write_lines", full)
    for overwrite in (False, True):
        with pytest.raises(CannotWrite, match=r"out.* cannot be written: No space left on device. Make space"):
            draw(rows, tmp_path / "out", overwrite=overwrite)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]


def test_what_cannot_be_read_is_not_said_of_the_folder(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shortzip.data.subset, "iterate_json_rows", refused)
    with pytest.raises(UserError, match=r"rows.json cannot be read: Input/output error"):
        draw(rows, tmp_path / "out")
    with pytest.raises(UserError, match=r"gone.json"):
        draw(tmp_path / "gone.json", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "test"}, "has no splits"),
        ({"streaming": True}, "streaming is for datasets on the Hub"),
        ({"verify_images": True}, "verify_images needs image_root"),
        ({"missing": "drop"}, "drop_missing needs image_root"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    tmp_path: Path, rows: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        draw(rows, tmp_path / "out", **options)


@pytest.mark.parametrize("missing", ["keep", "drop"])
def test_a_table_that_holds_its_images_needs_no_image_root(tmp_path: Path, missing: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    file = table(tmp_path / "t", [png(f"#0000{n:02x}") for n in range(6)])
    report = draw(file, tmp_path / "out", fraction=1.0, image_root=tmp_path / "elsewhere", missing=missing)
    assert report["image_root"] == str(tmp_path / "out" / "images")
    assert (report["written"], report["missing_images"]) == (6, 0)
    listed = (tmp_path / "out" / "images.txt").read_text().splitlines()
    assert sorted(listed) == sorted(os.listdir(tmp_path / "out" / "images"))


def test_a_table_of_paths_has_the_image_root_that_is_given(tmp_path: Path) -> None:
    file = table(tmp_path / "t", [f"{n}.png" for n in range(6)])
    report = draw(file, tmp_path / "out", fraction=1.0, image_root=tmp_path)
    assert (report["image_root"], report["missing_images"]) == (str(tmp_path), 6)
    assert draw(file, tmp_path / "rootless", fraction=1.0)["image_root"] is None


def test_an_image_of_a_table_that_cannot_be_opened_is_dropped_and_leaves_no_file(tmp_path: Path) -> None:
    file = table(tmp_path / "t", [png(), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", png("blue")])
    report = draw(file, tmp_path / "out", fraction=1.0)
    assert report["dropped"] == {"unreadable_image": 1}
    assert sorted(os.listdir(tmp_path / "out" / "images")) == ["00000000-0.png", "00000002-0.png"]


@pytest.mark.parametrize("name", ["a\nb.png", "a\rb.png", "b.png\n", "a\u2028b.png", "a\x85b.png"])
def test_a_line_break_in_a_name_does_not_get_into_the_list(tmp_path: Path, name: str) -> None:
    rows = [{"id": str(n), "image": f"a/{n}.png", "conversations": TURNS} for n in range(200)]
    rows.append({"id": "odd", "image": name, "conversations": TURNS})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    report = draw(tmp_path / "rows.json", tmp_path / "out", fraction=1.0)
    assert report["dropped"] == {"malformed_row": 1}
    assert len((tmp_path / "out" / "images.txt").read_text().splitlines()) == report["images"] == 200


def test_half_a_character_in_a_column_is_passed_on(tmp_path: Path) -> None:
    rows = [{"id": str(n), "image": "a.png", "conversations": TURNS, "note": "half \ud83d"} for n in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    draw(tmp_path / "rows.json", tmp_path / "out", fraction=1.0)
    assert json.loads((tmp_path / "out" / "subset.json").read_text())[0]["note"] == "half \ud83d"
