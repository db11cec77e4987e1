"""scripts/make_lmms_task.py: held-out conversations as a task, and what it says to what cannot be one."""

import json
from pathlib import Path

import pytest

from shortzip.data.errors import FileInTheWay, UserError
from shortzip.scripts.make_lmms_task import main
from shortzip.train.evaluation.lmms_plugin import TEMPLATES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.instructions", "nowhere.json"], "nowhere.json"),
        (["--data.image_root", "nowhere"], "there is no image .*nowhere"),
        (["--data.samples", "-3"], "data.samples is -3: at least 1"),
        (["--name", "a/b"], "letters, digits"),
    ],
)
def test_what_cannot_be_a_task_meets_a_message(
    tiny_held_out: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    given = ["--data.instructions", str(tiny_held_out), "--output", str(tmp_path / "tasks")]
    with pytest.raises(UserError, match=f"{message}"):
        main([*given, *options])
    assert not (tmp_path / "tasks").exists()


@pytest.mark.parametrize("existing", ["held.jsonl", "held.yaml", "held_likelihood.yaml"])
def test_nothing_that_is_no_task_of_ours_is_written_over(tiny_held_out: Path, tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_text("task: !function mine.task\n")
    given = ["--data.instructions", str(tiny_held_out), "--output", str(tmp_path)]
    with pytest.raises(FileInTheWay, match=rf"{existing} exists already: give --overwrite"):
        main([*given, "--name", "held"])
    assert [path.name for path in tmp_path.iterdir()] == [existing]
    assert (tmp_path / existing).read_text() == "task: !function mine.task\n"
    main([*given, "--name", "another"])
    main([*given, "--name", "another", "--data.samples", "1", "--overwrite", "true"])
    assert len({json.loads(line)["id"] for line in (tmp_path / "another.jsonl").read_text().splitlines()}) == 1


def test_a_task_of_a_name_of_its_own(tiny_held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([
        "--data.instructions", str(tiny_held_out), "--output", str(tmp_path), "--name", "mine", "--data.samples", "2",
    ])  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in lines}) == 2
    assert {path.name for path in tmp_path.glob("*.yaml")} == {"mine.yaml", "mine_likelihood.yaml"}
    assert f"--include_path {tmp_path}" in capsys.readouterr().out


def test_the_shipped_tasks_are_nobodys_to_replace(tiny_held_out: Path) -> None:
    before = {path: path.read_bytes() for path in TEMPLATES.iterdir() if path.is_file()}
    for name in ("demo_scenes", "new"):
        with pytest.raises(FileInTheWay, match="is the folder of the shipped tasks: choose another one"):
            main(
                ["--data.instructions", str(tiny_held_out), "--output", str(TEMPLATES), "--name", name, "--overwrite"]
            )
    assert {path: path.read_bytes() for path in TEMPLATES.iterdir() if path.is_file()} == before
