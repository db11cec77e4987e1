"""What commands write: whole or not at all, in nobody's place, and shown as it is."""

import errno
import json
from pathlib import Path

import pytest
from rich.console import Console

from shortzip.data.errors import CannotWrite, FileInTheWay
from shortzip.data.files import refuse_to_replace, written_whole
from shortzip.train.evaluation import comparison
from shortzip.train.evaluation.answers import Answer, Evaluation
from shortzip.train.evaluation.comparison import answer_files, table_of, write_evaluation
from shortzip.train.run.report import Reporter, literal, print_table

HOSTILE = "m[/x]y \x1b[31mred\x07 [bold]z"


def row(name: str, loss: float = 1.0) -> Evaluation:
    return Evaluation(name, 0.5, loss, 2, 9, 6.0, 1, 1e9, 2.0, 1, 0.1)


def said(answer: str) -> list[Answer]:
    return [Answer("row", 0, "yes", answer, answer == "yes")]


def pair(folder: Path) -> tuple[float, dict[str, str]]:
    """The loss in evaluation.json, and every file of answers with the answer in it."""
    table = json.loads((folder / "evaluation.json").read_text())
    return table["rows"][0]["loss"], {
        path.name: json.loads(path.read_text())["answer"] for path in (folder / "answers").iterdir()
    }


def test_two_models_have_two_files_of_answers(tmp_path: Path) -> None:
    rows = [row("m-a"), row("m_a"), row("M a"), row("///"), row("x" * 400)]
    assert answer_files([one.name for one in rows[:4]]) == ["m-a.jsonl", "m-a-2.jsonl", "m-a-3.jsonl", "model.jsonl"]
    write_evaluation(tmp_path, rows, [said(str(number)) for number in range(5)])
    table = json.loads((tmp_path / "evaluation.json").read_text())
    for number, entry in enumerate(table["rows"]):
        assert json.loads((tmp_path / entry["answers"]).read_text())["answer"] == str(number)


@pytest.mark.parametrize("fails_at", ["answers", "swap"])
def test_an_evaluation_that_ends_early_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    write_evaluation(tmp_path, [row("old", 7.0)], [said("old")])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if fails_at == "answers":
        monkeypatch.setattr(comparison, "write_answers", full)
    else:
        monkeypatch.setattr(comparison, "flush_to_disk", full)
    with pytest.raises(CannotWrite, match=rf"{tmp_path}.* cannot be written: No space left on device\. Make space"):
        write_evaluation(tmp_path, [row("new", 3.0), row("newer")], [said("new"), said("newer")])
    assert pair(tmp_path) == (7.0, {"old.jsonl": "old"})
    monkeypatch.undo()
    write_evaluation(tmp_path, [row("new", 3.0)], [said("new")])
    assert pair(tmp_path) == (3.0, {"new.jsonl": "new"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers", "evaluation.json"]


def test_a_folder_is_replaced_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with written_whole(target) as new:
        (new / "one").write_text("1")
    with pytest.raises(FileInTheWay), written_whole(target):
        raise AssertionError
    with pytest.raises(KeyError), written_whole(target, replace=True) as new:
        raise KeyError
    assert [path.name for path in target.iterdir()] == ["one"]
    with written_whole(target, replace=True) as new:
        (new / "two").write_text("2")
    assert [path.name for path in target.iterdir()] == ["two"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "answers"
    target.mkdir()
    (target / "old.txt").write_text("old")
    rename = Path.rename

    def refuse_the_new_one(self: Path, to: Path) -> Path:
        if to == target and (self / "new.txt").exists():
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse_the_new_one)
    with pytest.raises(CannotWrite), written_whole(target, replace=True) as new:
        (new / "new.txt").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["answers"]
    assert (target / "old.txt").read_text() == "old"


def test_an_output_takes_nobodys_place(tmp_path: Path) -> None:
    photo, other, link = tmp_path / "photo.png", tmp_path / "other.png", tmp_path / "link.png"
    for path in (photo, other):
        path.write_text(path.name)
    link.symlink_to(photo)
    for overwrite in (False, True):
        for output in (photo, link):
            with pytest.raises(FileInTheWay, match=rf"would replace the input {photo}: choose another output"):
                refuse_to_replace(output, overwrite=overwrite, inputs=[photo])
        with pytest.raises(FileInTheWay, match="is a folder, needed is a file's name"):
            refuse_to_replace(tmp_path, overwrite=overwrite)
        with pytest.raises(CannotWrite, match=rf"{photo} is a file"):
            refuse_to_replace(photo / "x" / "y.png", overwrite=overwrite)
    with pytest.raises(FileInTheWay, match=r"other\.png exists already: give --overwrite to replace it"):
        refuse_to_replace(other, overwrite=False, inputs=[photo])
    refuse_to_replace(other, tmp_path / "new" / "x.png", overwrite=True, inputs=[photo, "https://a/b.png"])
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileInTheWay, match="exists already"):
        refuse_to_replace(tmp_path / "dangling", overwrite=False)


def test_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    report = Reporter(is_main=True)
    report.say(HOSTILE)
    report.heading(HOSTILE)
    report.progress(HOSTILE, 1, 1, HOSTILE)
    report.table(table_of([row(HOSTILE)], HOSTILE))
    print_table(HOSTILE, ["source", HOSTILE], [[HOSTILE, "1"]], HOSTILE)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert shown.count(r"m[/x]y \x1b[31mred\x07 [bold]z") >= 5


def test_a_bar_shows_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    report = Reporter(is_main=True)
    report.console = Console(force_terminal=True, width=150, color_system=None)
    report.progress("evaluating " + HOSTILE, 0, 2, "[/y]")
    report.progress("evaluating " + HOSTILE, 1, 2, "[/y]")
    report.end_progress()
    shown = capsys.readouterr().out
    assert r"m[/x]y \x1b[31mred\x07 [bold]z" in shown
    assert "[/y]" in shown
    assert literal(HOSTILE).plain == r"m[/x]y \x1b[31mred\x07 [bold]z"
