"""The ways to start a run: by the package's name, by the clone's path, alone and under accelerate."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import SCRIPT, end, environment, output_of, wait_until, write_recipe

from shortzip.train.run.run_folder import read_status

ACCELERATE = (
    sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no",
)  # fmt: skip
NAME = "shortzip.train.tune_projector"


def start(folder: Path, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [(*ACCELERATE, "-m", NAME), (sys.executable, "-m", NAME), (*ACCELERATE, SCRIPT), (sys.executable, SCRIPT)],
)
def test_a_run_is_started_by_name_and_by_path_with_arguments(
    tiny_release: Path, tiny_instructions: Path, tmp_path: Path, launcher: tuple[str, ...]
) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml", tiny_release, tiny_instructions, max_steps=1, warmup_ratio=0.0,
        final_evaluation=False, pictures=0,
    )  # fmt: skip
    run = start(tmp_path, *launcher, "--config", str(recipe), "--output_dir", "run")
    said = output_of(run)
    assert run.returncode == 0, said
    assert (tmp_path / "run" / "final" / "config.json").is_file()
    assert read_status(tmp_path / "run")["state"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(*ACCELERATE, "-m", NAME), (*ACCELERATE, SCRIPT)])
def test_without_arguments_it_is_the_demo(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    """Stopped when it has started to train; `test_demo_training.py` runs it to the end."""
    run = start(tmp_path, *launcher)
    folder = tmp_path / "checkpoints" / "demo"
    try:
        wait_until(lambda: (folder / "metrics.jsonl").is_file(), run)
        run.send_signal(signal.SIGTERM)
        said = output_of(run)
    finally:
        end(run)
    assert read_status(folder)["state"] == "stopped", said
