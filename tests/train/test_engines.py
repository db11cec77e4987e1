"""Every engine is the same run: gradients, losses, learning rates, order of samples, checkpoints that change engines.

Two real processes on the CPU, over gloo: DeepSpeed and FSDP2 as installed, started as a launcher starts them.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from runs import (
    ROOT,
    checkpoint_tensors,
    copy_until,
    environment,
    output_of,
    run_here,
    start_there,
    unlock_what_is_built,
    write_recipe,
)

from shortzip.train.run.checkpoint import CHECKSUMS, FILES
from shortzip.train.run.launcher import check_engine
from shortzip.train.run.run_folder import read_metrics
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.config import DataConfig, TuneConfig

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed", exc_type=ImportError)
PROBE = Path(__file__).with_name("engine_probe.py")
STEPS = 12
FSDP2 = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, dict[str, str]]:
    """By engine, what its launcher puts into the environment. The weights of a tiny model would all count as too small
    to be worth spreading: here none does."""
    unlock_what_is_built()
    folder, found = tmp_path_factory.mktemp("deepspeed"), {"fsdp2": FSDP2}
    for name in ("zero2", "zero3", "zero3_offload"):
        settings = json.loads((ROOT / "configs" / "deepspeed" / f"{name}.json").read_text())
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        path = folder / f"{name}.json"
        path.write_text(json.dumps(settings))
        found[name] = {
            "ACCELERATE_USE_CPU": "false",
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path),
        }
    return found


@pytest.fixture(scope="module")
def recipe(
    tiny_release: Path, tiny_instructions: Path, tiny_held_out: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Uneven last micro-batches, rows without images, more than an epoch, clipping, held-out losses in between."""
    keys = {"max_steps": STEPS, "global_batch_size": 7, "save_steps": 3, "eval_steps": 3, "final_evaluation": False}
    data = {"eval_instructions": str(tiny_held_out)}
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    return write_recipe(path, tiny_release, tiny_instructions, data=data, **keys)


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_here(recipe, tmp_path_factory.mktemp("runs") / "alone")


def run_under(engine: Mapping[str, str], recipe: Path, output: Path, *arguments: str) -> str:
    process = start_there(recipe, output, *arguments, processes=2, variables=engine)
    said = output_of(process)
    assert process.returncode == 0, said
    assert "on 2 process(es)" in said
    return said


def assert_like(folder: Path, alone: Path, first: int = 3) -> None:
    """The checkpoints from step `first` on, and all of metrics.jsonl, as of one process."""
    for step in range(first, STEPS + 1, 3):
        expected, found = checkpoint_tensors(alone, step), checkpoint_tensors(folder, step)
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            assert found[name].dtype == torch.float32
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5 * tensor.abs().max().item())
        assert {path.name for path in (folder / f"step-{step:06d}").iterdir()} == {*FILES, CHECKSUMS}
    lines = [read_metrics(path / "metrics.jsonl") for path in (folder, alone)]
    for line, other in zip(*lines, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        if line["kind"] == "train":
            assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        for key in ("kind", "step", "learning_rate", "samples_seen", "supervised_tokens", "nonfinite_steps"):
            assert line.get(key) == other.get(key)


def test_an_engine_continues_another_s_checkpoint_and_equals_one_process(
    zero: Mapping[str, dict[str, str]], recipe: Path, alone: Path, tmp_path: Path
) -> None:
    """ZeRO-3 from the start, FSDP2 from its step 3."""
    run_under(zero["zero3"], recipe, tmp_path / "zero3")
    assert_like(tmp_path / "zero3", alone)
    folder = copy_until(tmp_path / "zero3", tmp_path / "fsdp2", 3)
    run_under(zero["fsdp2"], recipe, folder, "--resume_from_checkpoint", "latest")
    assert_like(folder, alone, 3)


@pytest.mark.slow
def test_each_engine_continues_the_one_before_and_one_process_the_last(
    zero: Mapping[str, dict[str, str]], recipe: Path, alone: Path, tmp_path: Path
) -> None:
    """FSDP2 from the start, ZeRO-2 from its step 3, ZeRO-3 from there on, one process at the end."""
    resume = ("--resume_from_checkpoint", "latest")
    previous, step = tmp_path / "fsdp2", 3
    run_under(zero["fsdp2"], recipe, previous)
    for engine in ("zero2", "zero3"):
        folder = copy_until(previous, tmp_path / engine, step)
        run_under(zero[engine], recipe, folder, *resume)
        assert_like(folder, alone, step)
        previous, step = folder, step + 3
    folder = copy_until(previous, tmp_path / "one-again", step)
    run_here(recipe, folder, *resume, "--per_device_train_batch_size", "7")
    assert_like(folder, alone, step)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3_offload", "fsdp2"])
def test_an_engine_from_the_start_equals_one_process(
    zero: Mapping[str, dict[str, str]], engine: str, recipe: Path, alone: Path, tmp_path: Path
) -> None:
    run_under(zero[engine], recipe, tmp_path / engine)
    assert_like(tmp_path / engine, alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_deepspeed_s_launch_files_as_a_user_starts_them(name: str, recipe: Path, alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / name
    command = [
        str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file",
        str(ROOT / "configs" / "accelerate" / f"deepspeed_{name}.yaml"), "--num_processes", "2",
        str(ROOT / "train" / "tune_projector.py"), "--config", str(recipe), "--output_dir", str(folder),
    ]  # fmt: skip
    variables = environment()
    del variables["ACCELERATE_USE_CPU"]
    shown = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT, check=False)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert_like(folder, alone)


def probe(engine: Mapping[str, str], release: Path, instructions: Path, mixed_precision: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen(
        [*launcher, str(PROBE), str(release), str(instructions), mixed_precision],
        env={**environment(), **engine},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    said = output_of(process)
    assert process.returncode == 0, said
    assert "probed" in said


def test_zero3_skips_an_update_on_all_processes_and_forgets_it(
    zero: Mapping[str, dict[str, str]], tiny_release: Path, tiny_instructions: Path
) -> None:
    probe(zero["zero3"], tiny_release, tiny_instructions, "no")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "mixed_precision"),
    [
        ("zero2", "no"),
        ("zero2", "bf16"),
        ("zero3", "bf16"),
        ("zero3_offload", "no"),
        ("fsdp2", "no"),
        ("fsdp2", "bf16"),
    ],
)
def test_an_update_that_is_not_finite_is_skipped_and_forgotten(
    zero: Mapping[str, dict[str, str]], engine: str, mixed_precision: str, tiny_release: Path, tiny_instructions: Path
) -> None:
    probe(zero[engine], tiny_release, tiny_instructions, mixed_precision)


@pytest.mark.parametrize(
    ("variables", "keys", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {"load_in_4bit": True}, r"load_in_4bit.*DeepSpeed.*ddp\.yaml"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {"tuning": "lora"}, r"tuning lora.*DeepSpeed.*fsdp2\.yaml"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {"load_in_4bit": True}, r"load_in_4bit.*FSDP2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {}, "fsdp_version to 2"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_with_the_cure(
    variables: dict[str, str], keys: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TuneConfig(model="m", data=DataConfig(instructions="i"), **keys)  # type: ignore[arg-type]
    check_engine(config)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        check_engine(config)


def test_without_the_package_deepspeed_is_refused_with_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("shortzip.train.run.launcher.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'shortzip\[deepspeed\]'"):
        check_engine(TuneConfig(model="m", data=DataConfig(instructions="i")))


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_a_launch_file_begins_with_its_command_and_names_files_that_are_there(path: Path) -> None:
    text = path.read_text()
    assert f"--config_file configs/accelerate/{path.name}" in text.split("compute_environment")[0]
    settings = yaml.safe_load(text)
    assert settings["distributed_type"] in ("NO", "MULTI_GPU", "DEEPSPEED", "FSDP")
    if settings["distributed_type"] == "DEEPSPEED":
        assert json.loads((ROOT / settings["deepspeed_config"]["deepspeed_config_file"]).read_text())[
            "zero_optimization"
        ]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero3_offload"])
def test_micro_batches_are_sized_for_the_engine(
    zero: Mapping[str, dict[str, str]], recipe: Path, tmp_path: Path, engine: str
) -> None:
    """Engines that spread weights take every token through every layer: of the same memory, fewer fit at a time."""
    settings = ("--per_device_train_batch_size", "null", "--max_steps", "1", "--max_memory", "1026MiB")
    settings += ("--gradient_checkpointing", "false", "--eval_steps", "null", "--save_steps", "1")
    settings += ("--warmup_ratio", "0")

    def tokens(folder: Path) -> int:
        state = json.loads((folder / "step-000001" / "state.json").read_text())
        return state["run"]["micro_batch"]["tokens"]

    run_under({}, recipe, tmp_path / "whole", *settings)
    run_under(zero[engine], recipe, tmp_path / "spread", *settings)
    assert 0 < tokens(tmp_path / "spread") < tokens(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize("how", ["asked", "kept", "kept, on a schedule", "asked, and a sandwich of budgets"])
def test_every_engine_hears_the_same_teacher(
    zero: Mapping[str, dict[str, str]],
    recipe: Path,
    tmp_path: Path,
    engine: str,
    how: str,
) -> None:
    """Asked in every step, or before the first one by all processes together; also while the budget falls, and where
    the largest of several teaches the others."""
    keys = ("--distill.weight", "0.5", "--distill.temperature", "2.0", "--max_steps", "4", "--eval_steps", "null")
    keys += ("--budget_schedule.start", "20", "--budget_schedule.share", "0.8") if "schedule" in how else ()
    keys += ("--budgets", "4+2,8+4,16+8", "--sandwich", "true") if "sandwich" in how else ()
    kept_at = [
        ("--data.cache_teacher", str(tmp_path / name)) if "kept" in how else () for name in ("alone's", "run's")
    ]
    expected = read_metrics(run_here(recipe, tmp_path / "alone", *keys, *kept_at[0]) / "metrics.jsonl")
    variables = {"ddp": {"ACCELERATE_USE_CPU": "true"}, **zero}[engine]
    run_under(variables, recipe, tmp_path / "run", *keys, *kept_at[1])
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert losses == pytest.approx([line["loss"] for line in expected], rel=1e-4)
