"""Whole runs: what a command leaves behind, and that interruption, processes and cuts do not change it."""

import json
import os
import signal
import subprocess
import sys
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
    wait_until,
    write_recipe,
)
from transformers import AutoProcessor, LlavaForConditionalGeneration

from shortzip.reduction import ReducedLlavaForConditionalGeneration
from shortzip.train.run.report import LEFT_OUT
from shortzip.train.run.run_folder import read_metrics, read_status

SLOWED = """
import runpy, sys, time
from shortzip.train.step.objective import SupervisedLoss
forward = SupervisedLoss.forward
SupervisedLoss.forward = lambda *arguments: time.sleep(0.1) or forward(*arguments)
runpy.run_module("shortzip.train.tune_projector", run_name="__main__")
"""


@pytest.fixture(scope="module")
def recipe(learned_release: Path, tiny_instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "recipe.yaml", learned_release, tiny_instructions)


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_here(recipe, tmp_path_factory.mktemp("runs") / "uninterrupted")


def assert_same_run(folder: Path, expected: Path) -> None:
    """Bit for bit the same checkpoint at the end, the same reduced checkpoint and the same losses."""
    torch.testing.assert_close(checkpoint_tensors(folder, 10), checkpoint_tensors(expected, 10), rtol=0, atol=0)
    weights = [(path / "final" / "model.safetensors").read_bytes() for path in (folder, expected)]
    assert weights[0] == weights[1]
    lines = [
        [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(path / "metrics.jsonl")]
        for path in (folder, expected)
    ]
    assert lines[0] == lines[1]


def test_what_a_run_leaves_behind(uninterrupted: Path, learned_release: Path) -> None:
    assert {path.name for path in uninterrupted.iterdir()} == {
        "config.yaml", "status.json", "metrics.jsonl", "loss.png", "final", ".run.lock",
        *(f"step-{step:06d}" for step in range(2, 11, 2)),
    }  # fmt: skip
    assert read_status(uninterrupted)["state"] == "finished"
    lines = read_metrics(uninterrupted / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert sum(line["loss"] for line in lines[-3:]) < sum(line["loss"] for line in lines[:3])
    assert lines[-1]["samples_seen"] == 60
    rates_of_speed = {"samples_per_second", "tokens_per_second", "mfu", "data_wait"}
    for number, line in enumerate(lines, 1):
        assert line["peak_memory"] > 0
        assert (rates_of_speed <= line.keys()) is (number > LEFT_OUT), "the first steps are left out"
        assert (line["seconds_left"] is not None) is (number > LEFT_OUT)
    assert all(lines[-1][rate] > 0 for rate in rates_of_speed)
    assert lines[-1]["seconds_left"] == 0 < lines[-2]["seconds_left"]
    rates = [line["learning_rate"] for line in lines]
    assert rates[0] == 0
    assert rates[1] == max(rates) == 0.01
    assert rates[9] < rates[5] < rates[1]
    untuned = LlavaForConditionalGeneration.from_pretrained(learned_release).state_dict()
    tuned = LlavaForConditionalGeneration.from_pretrained(uninterrupted / "final").state_dict()
    changed = {name for name in untuned if not torch.equal(untuned[name], tuned[name])}
    assert changed == {name for name in untuned if "multi_modal_projector" in name}


def test_the_reduced_checkpoint_in_a_new_process(uninterrupted: Path, tiny_instructions: Path) -> None:
    """Batches are generated, and with both reductions off the logits are plain LLaVA's."""
    image = str(tiny_instructions.parent / "images" / "0-0-0.png")
    script = f"""
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration
from shortzip.reduction import ReducedLlavaForConditionalGeneration, ReducedLlavaProcessor
final = {str(uninterrupted / "final")!r}
model = ReducedLlavaForConditionalGeneration.from_pretrained(final)
assert model.config.visionzip == dict(dominant=4, contextual=2) and model.config.shortv == dict(layers=[1, 3])
processor = ReducedLlavaProcessor.from_pretrained(final)
image = Image.open({image!r}).convert("RGB")
prompts = ["USER: <image>\\nname the colour ASSISTANT:", "USER: <image>\\nwhat colour is the picture? ASSISTANT:"]
inputs = processor(text=prompts, images=[image, image], padding=True, return_tensors="pt")
assert (inputs.input_ids == model.config.image_token_id).sum() == 12
greedy = dict(min_new_tokens=5, max_new_tokens=5, do_sample=False)
together = model.generate(**inputs, **greedy)[:, inputs.input_ids.shape[1]:]
alone = [processor(text=prompt, images=image, return_tensors="pt") for prompt in prompts]
alone = [model.generate(**one, **greedy)[0, one.input_ids.shape[1]:] for one in alone]
said = [processor.batch_decode(answers, skip_special_tokens=True) for answers in (together, alone)]
assert said[0] == said[1] and any(said[0]), said
plain = LlavaForConditionalGeneration.from_pretrained(final)
off = ReducedLlavaForConditionalGeneration.from_pretrained(final, visionzip=None, shortv=None)
processor = ReducedLlavaProcessor.from_pretrained(final, visionzip=None)
inputs = processor(text=prompts, images=[image, image], padding=True, return_tensors="pt")
with torch.no_grad():
    assert torch.equal(plain(**inputs).logits, off(**inputs).logits)
"""
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment(), cwd="/")
    assert shown.returncode == 0, shown.stderr


@pytest.fixture(scope="module")
def slowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command with a pause in every micro-batch: ten steps here are over before a signal would meet them."""
    script = tmp_path_factory.mktemp("slowed") / "slowed.py"
    script.write_text(SLOWED)
    return script


def test_killed_at_any_moment_and_resumed_it_is_the_same_run(
    recipe: Path, uninterrupted: Path, slowed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = start_there(recipe, folder, script=slowed)
    metrics = folder / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 5, process)
    os.kill(process.pid, signal.SIGKILL)
    output_of(process)
    assert read_status(folder)["state"] == "running", "it was killed too late to mean anything"
    run_here(recipe, folder, "--resume_from_checkpoint", "latest")
    assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_says_why_and_can_be_resumed(
    recipe: Path, uninterrupted: Path, slowed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    process = start_there(recipe, folder, "--save_steps", "1000", script=slowed)
    metrics = folder / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, process)
    os.kill(process.pid, number)
    output = output_of(process)
    status = read_status(folder)
    assert (status["state"], status["reason"]) == ("stopped", number.name), output
    assert f"stopped by {number.name}; continue by the same command with --resume_from_checkpoint latest" in output
    assert process.returncode == (130 if number == signal.SIGINT else 1)
    assert [path.name for path in folder.glob("step-*")] == [f"step-{status['step']:06d}"]
    run_here(recipe, folder, "--resume_from_checkpoint", "latest")
    assert_same_run(folder, uninterrupted)


def test_one_and_two_processes_have_the_same_gradients_and_continue_each_other(
    learned_release: Path, tiny_instructions: Path, tmp_path: Path
) -> None:
    """With a learning rate of next to 0 AdamW's moments are the gradients, summed up: nothing amplifies a difference.

    Over eleven steps: rows without images, a global batch that does not divide by the micro-batches or processes, and
    the end of an epoch. One process, then two from its step 4, then one from the two's step 8, in other micro-batches.
    """
    keys = {"learning_rate": 1e-30, "max_steps": 11, "global_batch_size": 7, "save_steps": 4, "max_grad_norm": 0.0}
    recipe = write_recipe(tmp_path / "recipe.yaml", learned_release, tiny_instructions, **keys)
    alone = run_here(recipe, tmp_path / "alone")
    resume = ("--resume_from_checkpoint", "latest", "--per_device_train_batch_size")
    both = copy_until(alone, tmp_path / "both", 4)
    process = start_there(recipe, both, *resume, "2", processes=2)
    output = output_of(process)
    assert process.returncode == 0, output
    assert "on 2 process(es)" in output
    assert json.loads((both / "step-000011" / "state.json").read_text())["num_processes"] == 2
    alone_again = copy_until(both, tmp_path / "alone-again", 8)
    run_here(recipe, alone_again, *resume, "7")
    for folder, step in ((both, 8), (both, 11), (alone_again, 11)):
        expected, found = checkpoint_tensors(alone, step), checkpoint_tensors(folder, step)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5 * tensor.abs().max().item())
    for folder in (both, alone_again):
        for line, other in zip(
            read_metrics(folder / "metrics.jsonl"), read_metrics(alone / "metrics.jsonl"), strict=True
        ):
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
            for key in ("step", "learning_rate", "samples_seen", "supervised_tokens"):
                assert line[key] == other[key]


def test_the_demo_at_toy_length_as_a_user_starts_it(learned_release: Path, tmp_path: Path) -> None:
    """`accelerate launch`, configs/demo.yaml, and a table whose rows scripts/evaluate_models.py shows again."""
    folder = tmp_path / "demo"
    command = [
        str(Path(sys.executable).parent / "accelerate"), "launch", "--num_processes", "1", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / "train" / "tune_projector.py"),
        "--model", str(learned_release), "--output_dir", str(folder), "--max_steps", "3", "--save_steps", "2",
        "--eval_steps", "2", "--data.demo_scenes.folder", str(tmp_path / "scenes"),
        "--data.demo_scenes.train_scenes", "200", "--data.demo_scenes.eval_scenes", "6", "--max_new_tokens", "3",
        "--shortv.calibration_samples", "4", "--global_batch_size", "8",
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT, check=False)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    for said in ("projector", "untrained", "all tokens", "reduced, untuned", "reduced + tuned", "what next"):
        assert said in shown.stdout
    rows = json.loads((folder / "evaluation.json").read_text())["rows"]
    names = ["all tokens", "reduced, untuned", "reduced + tuned", "all tokens + the same tuning"]
    assert [row["name"] for row in rows] == names
    budget = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())["visionzip"]
    assert [row["visual_tokens"] for row in rows] == [36, sum(budget.values()), sum(budget.values()), 36]
    layers = json.loads((folder / "layers.json").read_text())
    assert len(layers["layers"]) == 2
    assert ReducedLlavaForConditionalGeneration.from_pretrained(folder / "final").config.shortv == {
        "layers": layers["layers"]
    }
    assert AutoProcessor.from_pretrained(folder / "final").visionzip == budget
    kinds = [(line["kind"], line["step"]) for line in read_metrics(folder / "metrics.jsonl")]
    assert kinds == [("eval", 0), ("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("eval", 3)]
    assert (folder / "loss.png").stat().st_size > 5000
    assert (folder / "pictures" / "held-out.png").stat().st_size > 5000
    assert len((folder / "answers" / "all-tokens.jsonl").read_text().splitlines()) == rows[0]["questions"]
