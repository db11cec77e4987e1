"""A run that cannot change the projector says so, before it starts or in its first step."""

import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import run_here, write_recipe
from safetensors.torch import load_file, save_file
from tiny import write_instructions
from transformers import get_scheduler

from shortzip.data.batching import BatchPlan
from shortzip.data.dataset import MicroBatch
from shortzip.train.inputs.preflight import (
    NothingToLearn,
    answer_images,
    check_learns,
    conversations_in_words,
    refuse_zero_gradient,
)
from shortzip.train.inputs.samples import training_set
from shortzip.train.release.loading import load_release
from shortzip.train.run.processes import FEW_THREADS, start_accelerator
from shortzip.train.run.run_folder import read_status
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.config import DataConfig, DemoScenesConfig, TuneConfig


@pytest.fixture(scope="module")
def processor(tiny_release: Path) -> Any:
    return load_release(str(tiny_release))[1]


@pytest.fixture(scope="module")
def dataset(processor: Any, tiny_instructions: Path) -> Any:
    """40 conversations, of which every fifth has no image."""
    return training_set(DataConfig(instructions=str(tiny_instructions)), processor, seed=0)


def test_conversations_without_a_single_image_are_refused(processor: Any, tmp_path: Path) -> None:
    path = write_instructions(tmp_path, 4, text_only_every=1)
    with pytest.raises(NothingToLearn, match=r"none of the 4 conversations has an image.* rows with image"):
        training_set(DataConfig(instructions=str(path)), processor, seed=0)


def test_images_that_nothing_is_answered_after_are_refused(processor: Any, tmp_path: Path) -> None:
    path = write_instructions(tmp_path, 3, text_only_every=0)
    rows = json.loads(path.read_text())
    for row in rows:
        first, *rest = row["conversations"]
        first["value"] = first["value"].replace("<image>", "").strip()
        row["conversations"] = [first, *rest, {"from": "human", "value": "<image>\nand this?"}]
    path.write_text(json.dumps(rows))
    with pytest.raises(NothingToLearn, match=r"none of the 3 conversations answers anything after an <image>"):
        training_set(DataConfig(instructions=str(path)), processor, seed=0)


def test_conversations_without_an_image_are_counted(dataset: Any) -> None:
    assert conversations_in_words(dataset).startswith("40 conversations, 8 of them without an image")


def schedule_of(name: str, rate: float, warmup_steps: int, steps: int) -> Any:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    return get_scheduler(name, optimizer, warmup_steps, steps)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant_with_warmup"])
def test_a_schedule_that_is_all_warm_up_from_0_is_refused(name: str, dataset: Any) -> None:
    plan = BatchPlan(dataset.lengths.tolist(), 128, micro_batch_size=8)
    assert plan.total_steps == 1
    with pytest.raises(NothingToLearn, match=r"the only step would have a learning rate of 0.* warmup_ratio to 0"):
        check_learns(schedule_of(name, 1e-3, 1, 1), plan, dataset, 1)
    check_learns(schedule_of(name, 1e-3, 0, 1), plan, dataset, 1)
    endless = BatchPlan(dataset.lengths.tolist(), 128, num_epochs=None, micro_batch_size=8)
    check_learns(schedule_of(name, 1e-3, 1, 2), endless, dataset, 2)


def test_images_that_only_the_void_first_step_sees_are_refused(dataset: Any) -> None:
    plan = BatchPlan(dataset.lengths.tolist(), 4, num_epochs=0.2, micro_batch_size=2)
    later = set(plan.samples(4, 4))
    only_first = replace_images(dataset, later)
    schedule = schedule_of("cosine", 1e-3, 1, 2)
    with pytest.raises(NothingToLearn, match=r"no conversation with an image comes up .*\(2 steps\)"):
        check_learns(schedule, plan, only_first, 2)
    check_learns(schedule_of("cosine", 1e-3, 0, 2), plan, only_first, 2)


def replace_images(dataset: Any, without: set[int]) -> Any:
    rows = [
        replace(row, images=() if number in without else ("some.png",))
        for number, row in enumerate(dataset.conversations)
    ]
    changed = copy.copy(dataset)
    changed.conversations = rows
    return changed


def test_the_default_batch_over_a_handful_of_rows_is_refused_with_the_cure(
    tiny_release: Path, tiny_instructions: Path, tmp_path: Path
) -> None:
    keys = {"max_steps": None, "num_train_epochs": 1, "global_batch_size": 128}
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_release, tiny_instructions, **keys)
    with pytest.raises(NothingToLearn, match=r"a global_batch_size below 128 \(40 conversations\)"):
        run_here(recipe, tmp_path / "run")
    assert not list((tmp_path / "run").glob("step-*"))


def test_a_first_step_without_gradient_ends_the_run(
    tiny_release: Path, tiny_instructions: Path, tmp_path: Path
) -> None:
    """Here for a head of zeros, through which no gradient comes."""
    release = tmp_path / "release"
    release.mkdir()
    for path in tiny_release.iterdir():
        os.link(path, release / path.name)
    tensors = load_file(release / "model.safetensors")
    tensors = {name: torch.zeros_like(held) if "lm_head" in name else held for name, held in tensors.items()}
    (release / "model.safetensors").unlink()
    save_file(tensors, release / "model.safetensors", metadata={"format": "pt"})
    recipe = write_recipe(tmp_path / "recipe.yaml", release, tiny_instructions)
    with pytest.raises(NothingToLearn, match="step 1 gave the projector no gradient"):
        run_here(recipe, tmp_path / "run")
    assert read_status(tmp_path / "run")["state"] == "failed"


def test_only_answers_after_an_image_must_give_a_gradient() -> None:
    def micro_batch(ids: list[int], labels: list[int]) -> MicroBatch:
        return MicroBatch({"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}, ["a"])

    image, none = 9, -100
    assert answer_images([micro_batch([1, 9, 2, 3], [none, none, none, 3])], image)
    assert not answer_images([micro_batch([1, 2, 3, 9], [none, none, 3, none])], image)
    assert not answer_images([micro_batch([1, 2, 3, 4], [none, none, 3, 4])], image)
    assert refuse_zero_gradient(1e-20, 1)
    assert not refuse_zero_gradient(float("nan"), 1)


SETTINGS: dict[str, Any] = {"model": "m", "data": DataConfig(instructions="i")}


@pytest.mark.parametrize("key", ["learning_rate", "lora_alpha"])
def test_settings_with_which_nothing_is_learned_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is 0, with which nothing is learned"):
        TuneConfig(**SETTINGS, **{key: 0.0})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("global_batch_size", 10**12),
        ("cpu_threads", 100_000),
        ("max_steps", 10**15),
        ("eval_batch_size", 10**9),
        ("max_new_tokens", 10**9),
        ("pictures", 10**9),
        ("lora_r", 10**9),
        ("data.num_workers", 100_000),
        ("data.worker_timeout", 10**12),
        ("data.max_length", 10**9),
        ("data.demo_scenes.train_scenes", 10**12),
        ("data.demo_scenes.eval_scenes", 10**12),
    ],
)
def test_sizes_that_no_machine_has_are_refused_with_the_range(key: str, value: int) -> None:
    section, _, name = key.rpartition(".")
    make: Any = {
        "": lambda **given: TuneConfig(**SETTINGS, **given),
        "data": lambda **given: DataConfig("i", **given),
        "data.demo_scenes": lambda **given: DemoScenesConfig(**given),
    }[section]
    with pytest.raises(ConfigError, match=rf"^{key} is {value}: at least \d+, and at most \d+, is needed"):
        make(**{name: value})


def test_epochs_without_end_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_train_epochs is 1e\+300: more than 0, up to 100000"):
        TuneConfig(**SETTINGS, num_train_epochs=1e300)


def test_threads_are_held_against_the_machine_s_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the run starts: the recipe may be read on any machine."""
    most = max(os.cpu_count() or 1, FEW_THREADS)
    if most < 1024:
        config = TuneConfig(**SETTINGS, output_dir=str(tmp_path), cpu_threads=most + 1)
        with pytest.raises(ConfigError, match=rf"cpu_threads is {most + 1}.* 1 to {most} are allowed here"):
            start_accelerator(config)
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    start_accelerator(TuneConfig(**SETTINGS, output_dir=str(tmp_path), cpu_threads=most))
