"""Memory runs out inside a step: repeated once in halves by a single process, an end with the cure otherwise."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import ROOT, checkpoint_tensors, output_of, run_here, start_there, write_recipe
from torch import Tensor

from shortzip.data.dataset import MicroBatch
from shortzip.train.run.run_folder import read_metrics, read_status
from shortzip.train.step.objective import SupervisedLoss

Forward = Callable[[SupervisedLoss, MicroBatch], Tensor]


@pytest.fixture(scope="module")
def recipe(tiny_release: Path, tiny_instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    keys = {"max_steps": 4, "global_batch_size": 12, "per_device_train_batch_size": 4, "learning_rate": 0.001}
    return write_recipe(tmp_path_factory.mktemp("recipe") / "recipe.yaml", tiny_release, tiny_instructions, **keys)


@pytest.fixture(scope="module")
def small(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that has the small micro-batch from the start."""
    return run_here(recipe, tmp_path_factory.mktemp("small") / "run", "--per_device_train_batch_size", "2")


def full_beyond(
    real: Forward, rows: int, first_call: int, filling: list[weakref.ref[Tensor]] | None = None
) -> Forward:
    """The loss of a device that cannot hold more than `rows` rows, from the call of this number on.

    What is there when it fails is added to `filling`.
    """
    calls = iter(range(1_000_000))

    def forward(self: SupervisedLoss, batch: MicroBatch) -> Tensor:
        loss = real(self, batch)
        if next(calls) >= first_call and len(batch.inputs["input_ids"]) > rows:
            if filling is not None:
                filling.append(weakref.ref(loss))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss

    return forward


@pytest.mark.parametrize(("first_call", "step"), [(1, 1), (7, 3)])
def test_a_single_process_repeats_the_step_in_halves_and_ends_where_the_small_micro_batch_ends(
    recipe: Path,
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    first_call: int,
    step: int,
) -> None:
    """The second micro-batch of a step fails, when the first one's gradient is there already: it must not stay.

    Nor may what the failed one had computed, which the exception holds on to, when memory is emptied.
    """
    filling: list[weakref.ref[Tensor]] = []
    left: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: left.extend(loss() is not None for loss in filling))
    monkeypatch.setattr(SupervisedLoss, "forward", full_beyond(SupervisedLoss.forward, 2, first_call, filling))
    folder = run_here(recipe, tmp_path / "run")
    said = capsys.readouterr().out
    words = f"out of memory at step {step}: it is repeated, micro-batches of at most 2 rows from here on"
    assert left
    assert not any(left)
    assert said.count(words) == said.count("out of memory") == 1
    lines, expected_lines = (read_metrics(path / "metrics.jsonl") for path in (folder, small))
    for line, expected in zip(lines, expected_lines, strict=True):
        for key in ("step", "samples_seen", "supervised_tokens", "learning_rate"):
            assert line[key] == expected[key], "the global batch is kept"
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    found, expected_tensors = checkpoint_tensors(folder, 4), checkpoint_tensors(small, 4)
    for name, tensor in expected_tensors.items():
        tolerance = 0.0 if step == 1 else 1e-5 * tensor.abs().max().item()
        torch.testing.assert_close(found[name], tensor, rtol=0 if step == 1 else 1e-5, atol=tolerance)
    state = json.loads((folder / "step-000004" / "state.json").read_text())
    assert state["run"]["micro_batch"]["rows"] == 2, "a continued run starts from what fits"


def test_a_second_time_it_stops_with_the_cure_and_what_was_saved_stays(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three calls of four rows, then six of two: the first step to fail is the third, and its repetition fails, too.
    monkeypatch.setattr(SupervisedLoss, "forward", full_beyond(SupervisedLoss.forward, 1, 6))
    folder = tmp_path / "run"
    cure = r"out of memory again, in micro-batches of at most 2 rows: lower per_device_train_batch_size.*Tried to all"
    with pytest.raises(torch.OutOfMemoryError, match=cure):
        run_here(recipe, folder)
    status = read_status(folder)
    assert status["state"] == "failed"
    assert "lower per_device_train_batch_size or max_tokens_per_micro_batch, set gradient_check" in status["reason"]
    assert "--resume_from_checkpoint latest" in status["reason"]
    assert [path.name for path in folder.glob("step-*")] == ["step-000002"]
    monkeypatch.undo()
    run_here(recipe, folder, "--resume_from_checkpoint", "latest", "--per_device_train_batch_size", "1")
    assert read_status(folder)["state"] == "finished"


FULL = """
import os, sys
sys.path[:0] = {tests!r}
from test_out_of_memory import full_beyond
from shortzip.train.step.objective import SupervisedLoss
from shortzip.train.tune_projector import main
if os.environ["RANK"] == "1":
    SupervisedLoss.forward = full_beyond(SupervisedLoss.forward, 2, 3)
main(sys.argv[1:])
"""


def test_of_two_processes_both_stop_with_the_cure(recipe: Path, tmp_path: Path) -> None:
    """Only one runs out of memory. The other waits for its gradient in the middle of a step."""
    script, folder = tmp_path / "full.py", tmp_path / "run"
    script.write_text(FULL.format(tests=[str(ROOT / folder) for folder in ("", "tests", "tests/train")]))
    process = start_there(recipe, folder, "--save_steps", "1", processes=2, script=script)
    output = output_of(process, 240)
    assert process.returncode != 0, output
    status = read_status(folder)
    assert status["state"] == "failed"
    words = (
        "out of memory on one of 2 processes, in micro-batches of at most 4 rows: lower per_device_train_batch_size"
    )
    assert words in output
    assert words in status["reason"] or "process 0" in status["reason"]
    assert "it is repeated" not in output
    assert list(folder.glob("step-*"))
