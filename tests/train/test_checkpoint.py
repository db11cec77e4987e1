"""Checkpoints: whole or not there, damage found, the exact state back."""

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shortzip.data.files import sha256
from shortzip.train.run import checkpoint as checkpoint_module
from shortzip.train.run.checkpoint import (
    CHECKSUMS,
    FILES,
    Checkpoint,
    CheckpointError,
    check_same_run,
    damage,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
    set_aside,
    sweep,
)


def some_checkpoint(step: int, value: float = 0.5) -> Checkpoint:
    weight = torch.full((3, 2), value)
    return Checkpoint(
        projector={"model.multi_modal_projector.linear_1.weight": weight},
        optimizer={"exp_avg.model.multi_modal_projector.linear_1.weight": weight * 2},
        state={"step": step, "samples_seen": 8 * step},
    )


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    saved = some_checkpoint(7)
    path = save_checkpoint(tmp_path, saved, keep=None)
    assert path.name == "step-000007"
    assert sorted(p.name for p in path.iterdir()) == sorted([*FILES, CHECKSUMS])
    loaded = load_checkpoint(path)
    assert loaded.state == saved.state
    for name in ("projector", "optimizer"):
        torch.testing.assert_close(getattr(loaded, name), getattr(saved, name), rtol=0, atol=0)


def test_the_checksums_are_those_of_sha256sum(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, some_checkpoint(1), keep=None)
    subprocess.run(["sha256sum", "--check", "--strict", CHECKSUMS], cwd=path, check=True, capture_output=True)


@pytest.mark.parametrize("name", [*FILES, CHECKSUMS])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_any_damage_is_refused_and_the_one_before_is_offered(tmp_path: Path, name: str, harm: str) -> None:
    older = save_checkpoint(tmp_path, some_checkpoint(1), keep=None)
    newer = save_checkpoint(tmp_path, some_checkpoint(2), keep=None)
    file = newer / name
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif harm == "truncate":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(newer)
    with pytest.raises(CheckpointError, match=f"damaged.*--resume_from_checkpoint {older}"):
        find_checkpoint(tmp_path, str(newer))
    found, passed_over = find_checkpoint(tmp_path, "latest")
    assert found == older
    assert list(passed_over) == [newer]
    set_aside(newer)
    assert list_checkpoints(tmp_path) == [older]
    assert (tmp_path / "damaged-step-000002").is_dir()


def test_latest_is_the_highest_step_or_none(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, "latest") == (None, {})
    for step in (2, 1_000_000, 10):
        save_checkpoint(tmp_path, some_checkpoint(step), keep=None)
    assert find_checkpoint(tmp_path, "latest")[0] == tmp_path / "step-1000000"


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, some_checkpoint(3), keep=None)
    with pytest.raises(CheckpointError, match=r"no such folder. Checkpoints in .*: step-000003"):
        find_checkpoint(tmp_path, str(tmp_path / "step-000004"))
    with pytest.raises(CheckpointError, match="there is no run in"):
        find_checkpoint(tmp_path / "nothing", "latest")
    (tmp_path / "step-000003" / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"No checkpoint is whole .*state.json is missing"):
        find_checkpoint(tmp_path, "latest")


def test_only_so_many_are_kept_and_never_not_the_one_just_written(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, some_checkpoint(step), keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000003", "step-000004"]
    save_checkpoint(tmp_path, some_checkpoint(2), keep=1)  # a run that was taken back
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000002"]


def test_a_step_taken_again_replaces_the_old_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, some_checkpoint(5, value=1.0), keep=None)
    path = save_checkpoint(tmp_path, some_checkpoint(5, value=2.0), keep=None)
    assert load_checkpoint(path).projector["model.multi_modal_projector.linear_1.weight"][0, 0] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["step-000005"]


def in_another_process(action: Callable[[], object]) -> int:
    """Runs `action` in a forked process; returns its exit status, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("stop_before", range(12))
def test_killed_at_any_moment_of_writing_the_older_checkpoint_stays(tmp_path: Path, stop_before: int) -> None:
    """A real process dies at its n-th file-system call while it replaces a checkpoint and removes the oldest."""
    for step in (1, 2):
        save_checkpoint(tmp_path, some_checkpoint(step, value=1.0), keep=None)

    def die_while_saving() -> None:
        calls = itertools.count()

        def dying(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                if next(calls) == stop_before:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **named)

            return call

        checkpoint_module.save_file = dying(checkpoint_module.save_file)
        os.fsync = dying(os.fsync)
        checkpoint_module.Path.rename = dying(Path.rename)
        checkpoint_module.shutil.rmtree = dying(shutil.rmtree)
        save_checkpoint(tmp_path, some_checkpoint(2, value=2.0), keep=1)

    assert in_another_process(die_while_saving) == -signal.SIGKILL
    sweep(tmp_path)
    found, passed_over = find_checkpoint(tmp_path, "latest")
    assert found == tmp_path / "step-000002"
    assert not passed_over
    assert damage(found) is None
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_full_disk_leaves_the_older_checkpoint_and_says_what_to_do(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A real ENOSPC would need a file system of our own; a limit on the size of files stops the same write."""
    older = save_checkpoint(tmp_path, some_checkpoint(1), keep=1)

    def save_on_a_full_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        save_checkpoint(tmp_path, replace(some_checkpoint(2), projector={"weight": torch.zeros(2000)}), keep=1)

    assert in_another_process(save_on_a_full_disk) == 1
    shown = capfd.readouterr().err
    assert "CheckpointError" in shown
    assert "step-000002 could not be written" in shown
    assert f"{older} is untouched: make space" in shown
    assert damage(older) is None
    assert [p.name for p in tmp_path.iterdir()] == [older.name]


def test_settings_that_differ_are_named(tmp_path: Path) -> None:
    check_same_run({"seed": 1}, {"seed": 1}, tmp_path)
    with pytest.raises(CheckpointError, match=r"learning_rate was 1e-05 and is 2e-05; seed was 1 and is None"):
        check_same_run({"seed": 1, "learning_rate": 1e-5}, {"learning_rate": 2e-5}, tmp_path)


def test_an_older_checkpoint_with_random_states_loads_and_is_checked_too(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, some_checkpoint(1), keep=None)
    (path / "rng.safetensors").write_bytes(b"random states")
    with (path / CHECKSUMS).open("a") as sums:
        sums.write(f"{sha256(path / 'rng.safetensors')}  rng.safetensors\n")
    assert load_checkpoint(path).state == some_checkpoint(1).state
    (path / "rng.safetensors").write_bytes(b"random stages")
    with pytest.raises(CheckpointError, match=r"rng.safetensors does not have the checksum"):
        load_checkpoint(path)


def test_the_optimizer_continues_exactly() -> None:
    def steps(layer: torch.nn.Linear, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            layer(torch.arange(6.0).reshape(2, 3)).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 4)
    start = {name: value.clone() for name, value in layer.state_dict().items()}
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    steps(layer, optimizer, 3)
    middle = {name: value.clone() for name, value in layer.state_dict().items()}
    tensors = optimizer_tensors(optimizer, {parameter: name for name, parameter in layer.named_parameters()})
    tensors = {name: value.clone() for name, value in tensors.items()}
    assert sorted(tensors) == sorted(f"{k}.{n}" for k in ("exp_avg", "exp_avg_sq", "step") for n in ("weight", "bias"))
    steps(layer, optimizer, 2)

    other = torch.nn.Linear(3, 4)
    other.load_state_dict(middle)
    continued = torch.optim.AdamW(other.parameters(), lr=0.1)
    restore_optimizer(continued, dict(other.named_parameters()), tensors)
    steps(other, continued, 2)
    torch.testing.assert_close(other.state_dict(), layer.state_dict(), rtol=0, atol=0)
    assert not torch.equal(start["weight"], layer.weight)

    with pytest.raises(CheckpointError, match="which this projector has not"):
        restore_optimizer(continued, dict(torch.nn.Linear(3, 5).named_parameters()), tensors)


def test_state_json_is_plain(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, some_checkpoint(1), keep=None)
    assert json.loads((path / "state.json").read_text())["samples_seen"] == 8
