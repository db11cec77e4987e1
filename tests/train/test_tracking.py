"""Trackers: what W&B (offline) and TensorBoard have on disk afterwards, and that a resumed run goes on in the same."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from runs import run_here, write_recipe

from shortzip.train.run.run_folder import read_metrics
from shortzip.train.run.tracking import Trackers
from shortzip.train.settings.config import DataConfig, TuneConfig


def wandb_history(file: Path) -> list[dict[str, Any]]:
    """The logged rows of a W&B transaction log: records in LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, place, rows, unfinished = file.read_bytes(), 7, [], b""
    assert content[:4] == b":W&B"
    while place + 7 <= len(content):
        block_left = 32768 - place % 32768
        if block_left < 7:  # too short for a record's header: filled up
            place += block_left
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        unfinished += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind not in (1, 4):  # a whole record, or the last part of one
            continue
        record = wandb_internal_pb2.Record()
        record.ParseFromString(unfinished)
        unfinished = b""
        if record.WhichOneof("record_type") == "history":
            rows.append({".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    return rows


def test_wandb_offline_and_tensorboard_have_every_step_and_a_resumed_run_continues_them(
    tiny_release: Path, tiny_instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    data = {"eval_instructions": str(tiny_instructions), "eval_samples": 4}
    keys = {"max_steps": 4, "eval_steps": 2, "final_evaluation": False, "report_to": ["wandb", "tensorboard"]}
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_release, tiny_instructions, data=data, **keys)
    folder = run_here(recipe, tmp_path / "run")
    run_here(recipe, folder, "--resume_from_checkpoint", str(folder / "step-000002"))

    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]
    run_id = json.loads((folder / "wandb-run.json").read_text())["id"]
    logs = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [path.name for path in logs] == [f"run-{run_id}.wandb"] * 2
    losses = [[row["train/loss"] for row in wandb_history(path) if "train/loss" in row] for path in logs]
    assert losses == [[line["loss"] for line in lines], [line["loss"] for line in lines[2:]]]
    assert [row["eval/loss"] for row in wandb_history(logs[0]) if "eval/loss" in row] == [
        line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "eval"
    ]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard" / "shortzip"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    assert shown == pytest.approx({line["step"]: line["loss"] for line in lines}, rel=1e-6)


def test_wandb_that_cannot_be_reached_costs_nothing_but_a_message(
    tiny_release: Path,
    tiny_instructions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import wandb
    from wandb.errors import CommError

    real = wandb.init

    def unreachable(**options: Any) -> Any:
        if options.get("mode") != "offline":
            raise CommError("Failed to get resume status: connection refused")
        return real(**options)

    monkeypatch.setattr(wandb, "init", unreachable)
    monkeypatch.setenv("WANDB_SILENT", "true")
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_release, tiny_instructions, max_steps=2, report_to=["wandb"])
    folder = run_here(recipe, tmp_path / "run")
    assert capsys.readouterr().out.count("W&B cannot be used") == 1
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 2]
    assert len(list((folder / "wandb").glob("offline-run-*/run-*.wandb"))) == 1


def test_a_tracker_that_fails_in_mid_run_is_reported_once(
    tiny_release: Path,
    tiny_instructions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def refuse(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", refuse)
    keys = {"max_steps": 3, "report_to": ["tensorboard"]}
    folder = run_here(
        write_recipe(tmp_path / "recipe.yaml", tiny_release, tiny_instructions, **keys), tmp_path / "run"
    )
    assert capsys.readouterr().out.count("A tracker failed (No space left on device)") == 1
    assert len(read_metrics(folder / "metrics.jsonl")) == 3


def test_wandb_that_cannot_record_offline_either_costs_nothing_but_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine W&B's service was seen to say that the run it had given up was still in use."""
    from wandb.errors import CommError

    errors = iter([CommError("unreachable"), RuntimeError("run ID is in use")])

    def fail(*_: object, **__: object) -> None:
        raise next(errors)

    accelerator = Accelerator()
    monkeypatch.setattr(accelerator, "init_trackers", fail)
    said: list[str] = []
    config = TuneConfig(model="m", data=DataConfig(instructions="i"), report_to=["wandb"], output_dir=str(tmp_path))
    trackers = Trackers(accelerator, config, tmp_path, said.append)
    trackers.log(1, loss=1.0)
    trackers.finish()
    assert ["unreachable" in said[0], "in use" in said[1], len(said)] == [True, True, 2]
