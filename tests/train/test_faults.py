"""What goes wrong in a run: every process decides alike, nothing saved is harmed, and the reason is written down."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from runs import checkpoint_tensors, output_of, run_here, start_there, wait_until, write_recipe
from torch import Tensor

from shortzip.data.dataset import MicroBatch
from shortzip.data.drops import BadSample, TooManyBadSamples
from shortzip.train.run.checkpoint import CheckpointError
from shortzip.train.run.processes import failures_recorded, start_accelerator, watched
from shortzip.train.run.run_folder import RunFolderError, read_metrics, read_status
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.config import DataConfig, TuneConfig
from shortzip.train.step.objective import SupervisedLoss
from shortzip.train.tune_projector import NonFiniteLoss

Forward = Callable[[SupervisedLoss, MicroBatch], Tensor]


@pytest.fixture(scope="module")
def recipe(tiny_release: Path, tiny_instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    return write_recipe(path, tiny_release, tiny_instructions, max_steps=4)


def poisoned(real: Forward, bad_calls: range) -> Forward:
    """The loss, with NaN in the calls of these numbers (two calls a step here)."""
    calls = iter(range(1_000_000))

    def forward(self: SupervisedLoss, batch: MicroBatch) -> Tensor:
        loss = real(self, batch)
        return loss * float("nan") if next(calls) in bad_calls else loss

    return forward


def test_a_step_with_nan_is_skipped_counted_and_does_no_harm(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SupervisedLoss, "forward", poisoned(SupervisedLoss.forward, range(4, 5)))
    folder = run_here(recipe, tmp_path / "run", "--save_steps", "1")
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["nonfinite_steps"] for line in lines] == [0, 0, 1, 1]
    assert lines[2]["loss"] is None
    assert lines[2]["grad_norm"] is None
    assert [line["samples_seen"] for line in lines] == [6, 12, 18, 24]
    before, after = checkpoint_tensors(folder, 2), checkpoint_tensors(folder, 3)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint_tensors(folder, 4).values())


def test_too_many_in_a_row_stop_the_run_with_the_ids_written_down(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SupervisedLoss, "forward", poisoned(SupervisedLoss.forward, range(2, 100)))
    folder = tmp_path / "run"
    with pytest.raises(NonFiniteLoss, match="2 steps in a row"):
        run_here(recipe, folder, "--max_nonfinite_steps", "2", "--save_steps", "1")
    streak = json.loads((folder / "nonfinite.json").read_text())
    assert [entry["step"] for entry in streak] == [2, 3]
    assert all(len(entry["ids"]) == 6 for entry in streak)
    status = read_status(folder)
    assert status["state"] == "failed"
    assert "NonFiniteLoss: 2 steps in a row" in status["reason"]


def test_another_run_s_folder_is_refused_and_untouched(recipe: Path, tmp_path: Path) -> None:
    folder = run_here(recipe, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(RunFolderError, match="holds another run"):
        run_here(recipe, folder, "--seed", "1")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_continuing_with_other_settings_or_data_is_refused(recipe: Path, tmp_path: Path, tiny_held_out: Path) -> None:
    folder = run_here(recipe, tmp_path / "run")
    resume = ("--resume_from_checkpoint", "latest")
    with pytest.raises(CheckpointError, match=r"learning_rate was 0.01 and is 0.02; seed was 0 and is 1"):
        run_here(recipe, folder, *resume, "--seed", "1", "--learning_rate", "0.02")
    with pytest.raises(CheckpointError, match=r"Changed since: .*the turns of the conversations"):
        run_here(recipe, folder, *resume, "--data.instructions", str(tiny_held_out))


def test_what_the_user_can_mend_is_said_in_one_line_before_anything_is_fetched(recipe: Path, tmp_path: Path) -> None:
    process = start_there(
        recipe, tmp_path / "run", "--model", str(tmp_path / "no-release"), "--data.instructions", "nowhere.json"
    )
    output = output_of(process)
    assert process.returncode == 1
    assert "error: nowhere.json is neither a file, nor a folder" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists(), "refused without a trace"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--visionzip.dominant", "40"], ValueError, "37"),
        (["--shortv.layers", "[1, 4]"], ValueError, "layer"),
        (["--shortv.layers", "null", "--shortv.freeze", "9"], ValueError, "4 layers"),
        (["--model", "no/such/release"], FileNotFoundError, "no/such/release"),
        (["--data.instructions", "no-such.json"], FileNotFoundError, "no-such.json"),
        (["--data.image_root", "/tmp"], BadSample, "picture-"),
        (["--data.max_length", "8"], ValueError, "too_long"),
        (["--resume_from_checkpoint", "latest"], RunFolderError, "holds no run"),
        (["--resume_from_checkpoint", "step-000002"], RunFolderError, "holds no run"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(
    recipe: Path, tmp_path: Path, arguments: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_here(recipe, tmp_path / "run", *arguments)


def test_unreadable_images_can_be_skipped_counted_and_listed(
    tiny_release: Path, tiny_instructions: Path, tmp_path: Path
) -> None:
    rows = json.loads(tiny_instructions.read_text())
    pictured = [row for row in rows if "image" in row]
    shutil.copytree(tiny_instructions.parent / "images", tmp_path / "images")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    pictured[3]["image"] = "broken.png"
    pictured[3]["conversations"][0]["value"] = "<image>what?"
    instructions = tmp_path / "instructions.json"
    instructions.write_text(json.dumps(rows))
    data = {"image_root": str(tmp_path), "on_bad_sample": "skip", "max_bad_fraction": 0.2}
    keys = {"max_steps": None, "num_train_epochs": 1, "global_batch_size": 8}
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_release, instructions, data=data, **keys)
    folder = run_here(recipe, tmp_path / "run")
    dropped = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    assert [drop["sample_id"] for drop in dropped] == [pictured[3]["id"]]
    assert read_metrics(folder / "metrics.jsonl")[-1]["samples_seen"] == 40
    with pytest.raises(TooManyBadSamples):
        run_here(recipe, tmp_path / "strict", "--data.max_bad_fraction", "0.001")
    with pytest.raises(BadSample, match=r"broken.png"):
        run_here(recipe, tmp_path / "raise", "--data.on_bad_sample", "raise")


def test_processes_that_did_not_find_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TuneConfig(model="m", data=DataConfig(instructions="i"), output_dir=str(tmp_path), mixed_precision="no")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="started 2 processes, but this one is in a group of 1"):
        start_accelerator(config)


def test_a_run_computes_with_the_threads_it_was_given(tmp_path: Path) -> None:
    settings = {"model": "m", "data": DataConfig(instructions="i"), "output_dir": str(tmp_path)}
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            start_accelerator(TuneConfig(**settings, cpu_threads=threads))
            assert torch.get_num_threads() == threads
        start_accelerator(TuneConfig(**settings))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ConfigError, match="cpu_threads is 0: at least 1"):
        TuneConfig(**settings, cpu_threads=0)


def test_the_reason_is_written_though_workers_go_on_dying() -> None:
    """torch raises from its SIGCHLD handler, wherever the main thread is."""

    def raise_as_torch_does(number: int, frame: object) -> None:
        raise RuntimeError("DataLoader worker is killed")

    reasons: list[str] = []

    def record_while_a_worker_dies(reason: str) -> None:
        os.kill(os.getpid(), signal.SIGCHLD)
        reasons.append(reason)

    before = signal.signal(signal.SIGCHLD, raise_as_torch_does)
    try:
        with (
            pytest.raises(RuntimeError, match="worker 1"),
            failures_recorded(record_while_a_worker_dies, Accelerator(mixed_precision="no")),
        ):
            raise RuntimeError("worker 1 is dead")
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert reasons == ["process 0: RuntimeError: worker 1 is dead"]


def test_the_reason_is_written_though_a_worker_dies_as_its_handler_is_taken_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`signal.signal` runs the handlers of signals that have arrived."""
    before = signal.getsignal(signal.SIGCHLD)
    set_handler, arrivals = signal.signal, iter(["first", "second"])

    def signal_in_between(number: int, handler: signal.Handlers) -> None:
        if number == signal.SIGCHLD and next(arrivals, None):
            raise RuntimeError("DataLoader worker is killed")
        set_handler(number, handler)

    reasons: list[str] = []
    try:
        with monkeypatch.context() as patched:
            patched.setattr("shortzip.train.run.processes.signal.signal", signal_in_between)
            with (
                pytest.raises(EOFError),
                failures_recorded(reasons.append, Accelerator(mixed_precision="no")),
            ):
                raise EOFError
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
        assert next(arrivals, None) is None
        assert reasons == ["process 0: EOFError: "]
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("seen_first", ["the connection", "the signal"])
def test_a_worker_killed_for_its_silence_is_called_silent(seen_first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_as_torch_does(number: int, frame: object) -> None:
        if seen_first == "the signal":
            raise RuntimeError("DataLoader worker is killed")

    def wait_for(worker: ForkProcess) -> Iterator[None]:
        worker.join(60)
        raise EOFError
        yield

    monkeypatch.setattr("shortzip.train.run.processes.GRACE", 0.1)
    worker = get_context("fork").Process(target=time.sleep, args=(600,))
    before = signal.signal(signal.SIGCHLD, raise_as_torch_does)
    try:
        worker.start()
        with pytest.raises(RuntimeError, match=r"no micro-batch for 0.2 s \(data.worker_timeout\)"):
            next(watched(wait_for(worker), 0.2))
    finally:
        signal.signal(signal.SIGCHLD, before)
        worker.kill()
        worker.join()


def test_a_data_worker_that_hangs_ends_the_run_with_the_reason(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    workers = ("--data.num_workers", "1", "--data.worker_timeout", "10")
    process = start_there(recipe, folder, "--max_steps", "100000", "--save_steps", "100000", *workers)
    metrics = folder / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, process)
    main_pid = read_status(folder)["pid"]
    for child in Path(f"/proc/{main_pid}/task/{main_pid}/children").read_text().split():
        os.kill(int(child), signal.SIGSTOP)
    output = output_of(process, 240)
    assert process.returncode != 0
    status = read_status(folder)
    assert status["state"] == "failed", output
    assert "timed out" in status["reason"] or "data.worker_timeout" in status["reason"], output


def test_when_one_process_dies_the_other_stops_and_says_so(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start_there(recipe, folder, "--max_steps", "100000", "--save_steps", "100000", processes=2)
    metrics = folder / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, process)
    main_pid = read_status(folder)["pid"]
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    victim = next(pid for pid in workers if pid != main_pid)
    os.kill(victim, signal.SIGKILL)
    output = output_of(process, 240)
    assert process.returncode != 0
    status = read_status(folder)
    assert status["state"] == "failed", output
    assert "process 0" in status["reason"]
