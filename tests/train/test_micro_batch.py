"""Micro-batches follow from the memory: for the real releases' configs, on smaller cards, and when a run goes on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ROOT, checkpoint_tensors, copy_until, run_here, write_recipe
from transformers import LlavaForConditionalGeneration

from shortzip.reduction.flops import parameter_counts
from shortzip.reduction.parsing import parse_bytes
from shortzip.reduction.reductions import Reductions
from shortzip.scripts.estimate_cost import known_release
from shortzip.train.inputs.samples import training_set
from shortzip.train.release.loading import load_release
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import load_config
from shortzip.train.settings.config import TuneConfig
from shortzip.train.step import micro_batch
from shortzip.train.step.memory import NF4_BYTES, TrainingStep, training_step_memory
from shortzip.train.step.micro_batch import ENOUGH_TOKENS, MicroBatchLimits, StepEstimate, choose_limits
from shortzip.train.step.objective import train_only_projector

GIB = 2**30


def estimate_for(recipe: str) -> tuple[StepEstimate, TuneConfig]:
    """The costliest row of a recipe on its release's config: `max_length` tokens, one image."""
    config = load_config(["--config", str(ROOT / "configs" / recipe)])
    assert config.visionzip is not None
    assert config.shortv is not None
    assert config.shortv.layers is not None
    visual = config.visionzip.dominant + config.visionzip.contextual
    row = TrainingStep(
        text_tokens=config.data.max_length - visual,
        visual_tokens=visual,
        frozen_layers=len(config.shortv.layers),
        micro_batch_size=1,
        weights="4bit" if config.load_in_4bit else "bfloat16",
    )
    release = known_release("llava-1.5-13b" if "13b" in recipe else "llava-1.5-7b")
    return StepEstimate(release, row, config.global_batch_size), config


@pytest.mark.parametrize(("recipe", "most"), [("llava-1.5-7b-3090.yaml", 22), ("llava-1.5-13b-3090-4bit.yaml", 20)])
def test_the_recipes_for_a_24_gib_card_fit_it_and_keep_it_busy(recipe: str, most: int) -> None:
    estimate, config = estimate_for(recipe)
    assert config.per_device_train_batch_size is config.max_tokens_per_micro_batch is None
    assert config.gradient_checkpointing is None
    assert config.max_memory is not None
    memory = parse_bytes(config.max_memory)
    assert memory <= most * GIB
    limits = choose_limits(estimate, memory, None)
    assert limits.tokens is not None
    assert limits.tokens >= max(ENOUGH_TOKENS, config.data.max_length)
    assert estimate.memory(limits) <= memory
    assert estimate.memory(replace(limits, tokens=limits.tokens + 64)) > memory, "more would have fit"
    # What a card sold as 24 GB has (3090: 23.7 GiB), less the margin.
    on_the_card = choose_limits(estimate, int(23.7 * GIB * (1 - micro_batch.MARGIN)), None)
    assert estimate.memory(on_the_card) <= 22 * GIB
    assert on_the_card.tokens is not None
    assert on_the_card.tokens >= ENOUGH_TOKENS


@pytest.mark.parametrize(("name", "weights"), [("llava-1.5-7b", "bfloat16"), ("llava-1.5-13b", "4bit")])
def test_the_weights_in_the_estimate_are_those_of_the_model(name: str, weights: str) -> None:
    config = known_release(name)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    expected = 0.0
    for part, parameter in model.named_parameters():
        if "multi_modal_projector" in part:
            continue
        quantised = weights == "4bit" and "language_model.layers" in part
        expected += parameter.numel() * (NF4_BYTES if quantised else 2)
    step = TrainingStep(text_tokens=100, visual_tokens=64, weights=weights)
    assert training_step_memory(config, step).weights == pytest.approx(expected, rel=1e-4)


def test_a_smaller_card_gives_a_smaller_micro_batch_then_recomputation_then_an_error_with_the_cure() -> None:
    estimate, _ = estimate_for("llava-1.5-7b-3090.yaml")
    found = [choose_limits(estimate, size * GIB, None) for size in (80, 40, 24, 18, 17, 16)]
    kept = [limits.tokens for limits in found if not limits.gradient_checkpointing]
    again = [limits.tokens for limits in found if limits.gradient_checkpointing]
    assert len(kept) == len(again) == 3
    for tokens in (kept, again):
        assert tokens == sorted(tokens, reverse=True)
        assert len(set(tokens)) == 3
    assert found[:3] == [choose_limits(estimate, size * GIB, False) for size in (80, 40, 24)]
    with pytest.raises(ConfigError, match=r"weights.* take 14.\d\d GiB, of 12.00 GiB.*set load_in_4bit to true"):
        choose_limits(estimate, 12 * GIB, None)
    with pytest.raises(ConfigError, match=r"2048 tokens takes 20.\d\d GiB.*set gradient_checkpointing to null, lower"):
        choose_limits(estimate, 16 * GIB, False)
    with pytest.raises(ConfigError, match=r"filled: lower data\.max_length, take a smaller release, set load_in_4bit"):
        choose_limits(estimate, 15 * GIB, None)
    four_bit, _ = estimate_for("llava-1.5-13b-3090-4bit.yaml")
    with pytest.raises(ConfigError, match=r"take a smaller release, or take a larger card"):
        choose_limits(four_bit, 6 * GIB, None)


def test_cached_features_and_plain_modules_change_the_estimate() -> None:
    estimate, _ = estimate_for("llava-1.5-7b-3090.yaml")
    cached = replace(estimate, row=replace(estimate.row, cached_features=True))
    plain = replace(estimate, row=replace(estimate.row, every_token=True))
    tokens = [choose_limits(each, 22 * GIB, False).tokens or 0 for each in (cached, estimate)]
    assert tokens[0] > tokens[1]
    limits = MicroBatchLimits(None, 4096, False)
    assert plain.memory(limits) > estimate.memory(limits) > cached.memory(limits)


def test_rows_and_tokens_that_are_given_bound_the_estimate() -> None:
    estimate, _ = estimate_for("llava-1.5-7b-3090.yaml")
    two_rows = estimate.memory(MicroBatchLimits(2, None, True))
    assert two_rows == estimate.memory(MicroBatchLimits(None, 4096, True))
    assert two_rows == estimate.memory(MicroBatchLimits(2, 100_000, True))
    assert estimate.memory(MicroBatchLimits(8, 4096, True)) == two_rows
    alone = estimate.memory(MicroBatchLimits(8, 100, True))
    assert alone == estimate.memory(MicroBatchLimits(1, None, True))


@pytest.fixture
def recipe(tmp_path: Path, tiny_release: Path, tiny_instructions: Path) -> Path:
    keys: dict[str, Any] = {"per_device_train_batch_size": None, "max_steps": 4, "global_batch_size": 16}
    return write_recipe(tmp_path / "recipe.yaml", tiny_release, tiny_instructions, **keys)


def limits_of(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((folder / f"step-{step:06d}" / "state.json").read_text())["run"]["micro_batch"]


def memory_for(estimate: StepEstimate, tokens: int) -> str:
    """What micro-batches of so many tokens fit, and hardly more."""
    return f"{estimate.memory(MicroBatchLimits(None, tokens, False)) / 2**20 + 1e-6}MiB"


def estimate_of_run(recipe: Path) -> StepEstimate:
    config = load_config(["--config", str(recipe)])
    model, processor = load_release(config.model, Reductions({"dominant": 4, "contextual": 2}, {"layers": [1, 3]}))
    train_only_projector(model, torch.float32)
    dataset = training_set(config.data, processor, 0)
    return micro_batch.estimate_of(config, model, dataset)


def test_a_run_says_what_it_chose_and_a_continued_one_is_cut_the_same_way(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    estimate = estimate_of_run(recipe)
    kept = ("--gradient_checkpointing", "false")
    folder = run_here(recipe, tmp_path / "run", *kept, "--max_memory", memory_for(estimate, 3 * estimate.longest))
    said = capsys.readouterr().out
    recorded = limits_of(folder, 4)
    assert estimate.longest <= recorded["tokens"] <= 3 * estimate.longest + 40
    assert f"{recorded['rows']} rows and {recorded['tokens']} tokens: estimated 1.00 GiB of 1.00 GiB" in said
    # On a larger card the continued run keeps its cut: bit for bit the same. On one too small for it, it does not.
    for memory, same in (("2GiB", True), (memory_for(estimate, estimate.longest), False)):
        again = copy_until(folder, tmp_path / f"again-{same}", 2)
        run_here(recipe, again, *kept, "--max_memory", memory, "--resume_from_checkpoint", "latest")
        assert (limits_of(again, 4) == recorded) is same
        expected, found = checkpoint_tensors(folder, 4), checkpoint_tensors(again, 4)
        for name, tensor in expected.items():
            tolerance = 0 if same else 1e-4 * tensor.abs().max().item()
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance)


def test_without_a_limit_a_cpu_takes_its_default_and_the_result_is_any_other_cut_s(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_here(recipe, tmp_path / "default")
    assert "micro-batches of at most 8 rows\n" in capsys.readouterr().out
    assert limits_of(found, 4) == {"rows": 8, "tokens": None, "gradient_checkpointing": False}
    expected = run_here(recipe, tmp_path / "explicit", "--per_device_train_batch_size", "8")
    torch.testing.assert_close(checkpoint_tensors(found, 4), checkpoint_tensors(expected, 4), rtol=0, atol=0)


def test_too_little_memory_ends_the_run_before_its_first_step(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"take 1.00 GiB, of 0.49 GiB that may be filled"):
        run_here(recipe, tmp_path / "run", "--max_memory", "500MiB")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_cuda_device_keeps_a_margin_and_what_others_use(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GIB)
    for free, limit, expected in ((23, None, 21.6), (10, None, 12), (23, "20GiB", 20), (23, "80GiB", 21.6)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free * GIB, 24 * GIB))
        assert micro_batch.usable_memory(device, limit) == int(expected * GIB)
    assert micro_batch.usable_memory(torch.device("cpu"), None) is None


def test_weights_that_are_spread_leave_room_for_a_model_that_no_card_holds() -> None:
    estimate, _ = estimate_for("llava-1.5-13b-3090-4bit.yaml")
    whole = replace(estimate, row=replace(estimate.row, weights="bfloat16", every_token=True))
    with pytest.raises(ConfigError, match=r"weights, the projector's moments .* take 2\d\.\d\d GiB"):
        choose_limits(whole, int(21.6 * GIB), None)
    for share in (0.25, 0.0):
        spread = replace(whole, row=replace(whole.row, weights_share=share))
        limits = choose_limits(spread, int(21.6 * GIB), None)
        assert limits.tokens is not None
        assert spread.memory(limits) <= 21.6 * GIB
        rest = share * (parameter_counts(whole.config).llm_layers + parameter_counts(whole.config).embeddings) * 2
        assert rest < spread.fixed < rest + 4.5 * GIB
    with pytest.raises(ValueError, match=r"weights_share=1\.5: must be 0 to 1"):
        replace(whole.row, weights_share=1.5)
