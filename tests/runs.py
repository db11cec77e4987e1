"""Runs of the real loop on a tiny release: in this process where that is enough, in ones of their own elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from safetensors.torch import load_file

from shortzip.train.tune_projector import main

ROOT = Path(__file__).parents[1]
BUILT = Path(sys.prefix) / "torch_extensions"  # what DeepSpeed compiles: for this environment, not for all of HOME
SCRIPT = str(ROOT / "train" / "tune_projector.py")


def write_recipe(path: Path, release: Path, instructions: Path, **keys: Any) -> Path:
    """A config of ten steps on the tiny release; `keys` are added, those that are None taken out."""
    recipe: dict[str, Any] = {
        "model": str(release),
        "data": {"instructions": str(instructions), "num_workers": 0},
        "visionzip": {"dominant": 4, "contextual": 2},
        "shortv": {"layers": [1, 3]},
        "learning_rate": 0.01,
        "max_steps": 10,
        "global_batch_size": 6,
        "per_device_train_batch_size": 3,
        "mixed_precision": "no",
        "save_steps": 2,
        "save_total_limit": None,
    }
    recipe["data"].update(keys.pop("data", {}))
    path.write_text(yaml.safe_dump({**recipe, **keys}))
    return path


def write_points_recipe(path: Path, release: Path, instructions: Path, held_out: Path) -> Path:
    """What a frontier tunes its points by: two steps, no frozen layer, four short answers."""
    data = {"eval_instructions": str(held_out), "eval_samples": 4}
    return write_recipe(path, release, instructions, data=data, max_steps=2, shortv=None, max_new_tokens=2, pictures=0)


def run_here(recipe: Path, output: Path, *arguments: str) -> Path:
    """A run in this process; returns its folder."""
    main(["--config", str(recipe), "--output_dir", str(output), *arguments])
    return output


def start_there(
    recipe: Path,
    output: Path,
    *arguments: str,
    processes: int | None = None,
    script: str | Path = SCRIPT,
    variables: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """A run in a process of its own, or under torchrun in several that really know of each other."""
    launcher = [sys.executable]
    if processes is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.Popen(
        [*launcher, str(script), "--config", str(recipe), "--output_dir", str(output), *arguments],
        env={**environment(), **(variables or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def environment() -> dict[str, str]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "TORCH_EXTENSIONS_DIR": str(BUILT),
    }


def unlock_what_is_built() -> None:
    """Removes the locks of builds that were killed: torch waits for them without end."""
    for lock in BUILT.glob("**/lock"):
        lock.unlink()


def output_of(process: subprocess.Popen[str], seconds: float = 500) -> str:
    """What a process printed, when it has ended; it and its children are ended if that takes too long."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        end(process)
        raise AssertionError(f"still running after {seconds} s:\n{process.communicate()[0]}") from None
    except BaseException:  # pytest's own limit, say
        end(process)
        raise


def end(process: subprocess.Popen[str]) -> None:
    """Kills a process and all that it started, in whatever session."""
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in below:
            with suppress(psutil.NoSuchProcess):
                child.kill()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 500) -> None:
    """Waits for something that a running process does; fails with its output if it ends before."""
    latest = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended too early:\n{process.communicate()[0]}"
        if time.monotonic() > latest:
            output_of(process, 0)
        time.sleep(0.01)


def checkpoint_tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Projector and optimizer of a run's checkpoint."""
    path = folder / f"step-{step:06d}"
    return {**load_file(path / "projector.safetensors"), **load_file(path / "optimizer.safetensors")}


def copy_until(run: Path, target: Path, step: int) -> Path:
    """The run's folder as it was when it had just written the checkpoint of `step`."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("final", "answers"))
    for path in target.glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return target
