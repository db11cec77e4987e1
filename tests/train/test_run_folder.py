"""The run's folder: no other run is harmed, and what was measured stays readable."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from train.command_line import load_config
from train.config import DataConfig, TuneConfig
from train.run_folder import Metrics, RunFolderError, prepare_folder, read_metrics, write_status


@pytest.fixture
def config(tmp_path: Path) -> TuneConfig:
    return TuneConfig(model="m", data=DataConfig(instructions="i"), output_dir=str(tmp_path / "run"))


def test_a_new_run_writes_its_config(config: TuneConfig) -> None:
    folder = prepare_folder(config)
    assert load_config(["--config", str(folder / "config.yaml")]) == config


def test_another_run_is_not_touched(config: TuneConfig) -> None:
    folder = prepare_folder(config)
    (folder / "metrics.jsonl").write_text("precious")
    with pytest.raises(RunFolderError, match=r"holds another run.*--resume_from_checkpoint latest"):
        prepare_folder(replace(config, seed=5))
    assert (folder / "metrics.jsonl").read_text() == "precious"
    assert load_config(["--config", str(folder / "config.yaml")]).seed == 0


def test_a_run_that_failed_before_its_first_step_is_no_hindrance(config: TuneConfig) -> None:
    folder = prepare_folder(config)
    write_status(folder, "failed", 0, "no such release")
    (folder / "metrics.jsonl").touch()
    assert load_config(["--config", str(prepare_folder(replace(config, seed=5)) / "config.yaml")]).seed == 5
    for state, step, metrics in (("running", 0, ""), ("stopped", 0, ""), ("failed", 3, ""), ("failed", 0, "{}\n")):
        write_status(folder, state, step)  # type: ignore[arg-type]  # one of the Literal's
        (folder / "metrics.jsonl").write_text(metrics)
        with pytest.raises(RunFolderError, match="holds another run"):
            prepare_folder(config)


def test_overwriting_deletes_the_run_and_nothing_else(config: TuneConfig) -> None:
    folder = prepare_folder(config)
    (folder / "metrics.jsonl").write_text("old")
    (folder / "notes.txt").write_text("mine")
    (folder / "step-000001").mkdir()
    prepare_folder(replace(config, overwrite_output_dir=True))
    assert sorted(p.name for p in folder.iterdir()) == ["config.yaml", "notes.txt"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_things_is_never_used(config: TuneConfig, overwrite: bool) -> None:
    folder = Path(config.output_dir)
    folder.mkdir()
    (folder / "thesis.tex").write_text("x")
    with pytest.raises(RunFolderError, match="holds no run"):
        prepare_folder(replace(config, overwrite_output_dir=overwrite))
    assert [p.name for p in folder.iterdir()] == ["thesis.tex"]


def test_resuming_needs_a_run(config: TuneConfig) -> None:
    with pytest.raises(RunFolderError, match="holds no run"):
        prepare_folder(replace(config, resume_from_checkpoint="latest"))
    Path(config.output_dir).write_text("a file")
    with pytest.raises(RunFolderError, match="is a file"):
        prepare_folder(config)


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


def test_metrics_are_of_the_main_process_and_finite(tmp_path: Path) -> None:
    Metrics(None, None).write("train", 1, loss=1.0)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="JSON"):
        Metrics(tmp_path, None).write("train", 1, loss=float("nan"))


def test_the_status_says_why(tmp_path: Path) -> None:
    write_status(tmp_path, "stopped", 7, "SIGTERM")
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["reason"]) == ("stopped", 7, "SIGTERM")
