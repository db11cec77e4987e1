"""The run's folder: what was measured stays readable, and how the run stands is told."""

import json
from pathlib import Path

import pytest

from shortzip.data.errors import UserError
from shortzip.train.run.run_folder import Metrics, is_finished, read_metrics, read_status, write_status


def test_metrics_after_the_resumed_step_are_dropped_with_a_half_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(tmp_path, None)
    for step in (1, 2, 3):
        metrics.write("train", step, loss=0.5 * step)
        assert [line["step"] for line in read_metrics(path)] == list(range(1, step + 1)), "not visible while running"
    metrics.close()
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    resumed = Metrics(tmp_path, 2)
    resumed.write("train", 3, loss=9.0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 1.0), (3, 9.0)]


def test_lines_that_cannot_be_read_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = {"kind": "train", "step": 1, "loss": 0.5}
    nested = "[" * 100_000
    path.write_text("\n".join(["garbage", json.dumps(good), "[1]", '{"step": "2"}', "", nested, '{"kind": "tr']))
    assert read_metrics(path) == [good]
    said: list[str] = []
    resumed = Metrics(tmp_path, 1, said.append)
    resumed.close()
    assert said == [f"{path}: 5 of its lines cannot be read, and were left out"]
    assert path.read_text() == json.dumps(good) + "\n"


def test_metrics_are_of_the_main_process_and_finite(tmp_path: Path) -> None:
    Metrics(None, None).write("train", 1, loss=1.0)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="JSON"):
        Metrics(tmp_path, None).write("train", 1, loss=float("nan"))


def test_the_status_says_why(tmp_path: Path) -> None:
    write_status(tmp_path, "stopped", 7, "SIGTERM")
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["reason"]) == ("stopped", 7, "SIGTERM")


@pytest.mark.parametrize("text", ["", "nonsense", "[]", '{"state": "finished"}', '{"state": "lost", "step": 1}'])
def test_a_damaged_status_is_said_and_counts_as_unfinished(tmp_path: Path, text: str) -> None:
    assert not is_finished(tmp_path)
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(UserError, match=r"status\.json"):
        read_status(tmp_path)
    assert not is_finished(tmp_path)
    write_status(tmp_path, "finished")
    assert is_finished(tmp_path)
