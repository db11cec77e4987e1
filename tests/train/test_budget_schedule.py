"""A budget for every step: from a loose one to the run's own, known ahead, the same when a run is continued."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import checkpoint_tensors, run_here, write_recipe
from tiny import write_next_release

from shortzip.data.batching import BatchPlan
from shortzip.data.dataset import ConversationDataset
from shortzip.data.instructions import read_instructions
from shortzip.data.supervision import Encoded, Supervision
from shortzip.reduction.errors import ReductionError
from shortzip.reduction.reductions import Reductions
from shortzip.reduction.refusals import change_budget
from shortzip.train.inputs.budgets import ScheduledBudgets, budget_of, with_budget, with_placeholders
from shortzip.train.inputs.loading import step_inputs
from shortzip.train.release.loading import load_release
from shortzip.train.release.opening import open_release
from shortzip.train.settings.budget import BudgetScheduleConfig
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import load_config
from shortzip.train.step.objective import SupervisedLoss, train_only_projector

TARGET = {"dominant": 4, "contextual": 2}


def budgets_of(
    steps: int, start: int = 24, share: float = 0.5, dataset: Any = None, batch: int = 6
) -> ScheduledBudgets:
    return ScheduledBudgets(TARGET, batch, dataset, BudgetScheduleConfig(start, share), steps)


def test_the_budget_falls_linearly_and_ends_as_the_runs_own() -> None:
    assert [budgets_of(8).tokens(step) for step in range(8)] == [24, 20, 15, 10, 6, 6, 6, 6]
    for steps in range(1, 9):
        assert budgets_of(steps, share=0.99).tokens(steps - 1) == 6, "whatever the rounding"
    staged = ScheduledBudgets(TARGET, 6, None, BudgetScheduleConfig(24, 0.5, stages=2), 12)  # type: ignore[arg-type]
    assert [staged.tokens(step) for step in range(12)] == [24, 24, 24, 15, 15, 15, 6, 6, 6, 6, 6, 6]
    more = ScheduledBudgets(TARGET, 6, None, BudgetScheduleConfig(24, 0.5, stages=9), 4)  # type: ignore[arg-type]
    assert [more.tokens(step) for step in range(4)] == [24, 16, 6, 6], "more stages than steps: those it meets"
    assert budget_of(TARGET, 24) == {"dominant": 16, "contextual": 8}
    assert budget_of({**TARGET, "contextual": 0, "method": "random", "seed": 3}, 9) == {
        "dominant": 9, "contextual": 0, "method": "random", "seed": 3,
    }  # fmt: skip


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1, max_size=3), st.integers(1, 4), st.integers(1, 6))
def test_a_row_keeps_all_but_its_placeholders(turns: list[list[int]], there: int, wanted: int) -> None:
    """0 stands for an image; each turn is followed by an answer of two tokens."""

    def row(count: int) -> Encoded:
        ids, labels, answers = list[int](), list[int](), []
        for turn in turns:
            for token in turn:
                ids += [9] * count if token == 0 else [token]
            answers.append((len(ids), len(ids) + 2))
            labels += [-100] * (len(ids) - len(labels)) + [5, 6]
            ids += [5, 6]
        return Encoded(ids, labels, answers, sum(turn.count(0) for turn in turns), "turn")

    images = row(there).images
    assert with_placeholders(row(there), [(there, wanted)] * images, 9) == row(wanted)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_rows_model_and_cut_have_the_budget_of_their_step(
    family: str, tiny_release: Path, tiny_instructions: Path, tmp_path: Path
) -> None:
    release = tiny_release if family == "llava" else write_next_release(tmp_path / "next")
    model, processor = load_release(str(release), Reductions(TARGET))
    train_only_projector(model, torch.float32)
    loose = with_budget(Supervision(processor), budget_of(TARGET, 24))
    rows = read_instructions(tiny_instructions)[:14]
    dataset = ConversationDataset(rows, loose, tiny_instructions.parent)
    budgets = budgets_of(4, dataset=dataset)
    plan = BatchPlan(dataset.lengths.tolist(), 6, num_epochs=None, max_tokens_per_micro_batch=300)
    plan.in_time = budgets.lengths_of
    recipe = write_recipe(tmp_path / "r.yaml", release, tiny_instructions, distill={"weight": 0.5})
    config, module = load_config(["--config", str(recipe)]), SupervisedLoss(model)
    alone = {
        tokens: ConversationDataset(rows, with_budget(loose, budget_of(TARGET, tokens)), tiny_instructions.parent)
        for tokens in (24, 15, 6)
    }
    inputs = step_inputs(dataset, plan, Accelerator(cpu=True), config, 0, budgets)
    for step, tokens in enumerate((24, 15, 6, 6)):
        batch, micro_batches = next(inputs)
        change_budget(model.model, budgets.at(step))
        expected = alone[tokens].lengths[batch.samples]
        assert plan.lengths_of(batch.position, batch.samples).tolist() == expected.tolist()
        assert sum(int(micro.inputs["attention_mask"].sum()) for micro in micro_batches) == expected.sum()
        for micro in micro_batches:
            assert micro.inputs["input_ids"].numel() <= 300
            assert torch.isfinite(module(micro))  # the model fills the placeholders
            ids = [row.id for row in dataset.conversations]
            own = [alone[tokens].lengths[ids.index(name)] for name in micro.sample_ids]
            assert micro.inputs["attention_mask"].sum(1).tolist() == own
            assert bool((micro.layout.full.attention_mask.sum(1) >= torch.tensor(own)).all())


def test_a_model_takes_another_budget_in_one_way_only(tiny_release: Path) -> None:
    model, _ = load_release(str(tiny_release), Reductions(TARGET))
    pixels = torch.randn(1, 3, 24, 24)
    change_budget(model.model, {"dominant": 8, "contextual": 4})
    assert len(model.model.get_image_features(pixel_values=pixels).pooler_output[0]) == 12
    with pytest.raises(ReductionError, match="dominant"):
        change_budget(model.model, {"dominant": 800, "contextual": 4})
    assert len(model.model.get_image_features(pixel_values=pixels).pooler_output[0]) == 12
    model.config.visionzip = TARGET
    with pytest.raises(ReductionError, match="load it again"):
        model.model.get_image_features(pixel_values=pixels)


def test_a_run_with_a_schedule_goes_on_bit_for_bit(
    tiny_release: Path, tiny_instructions: Path, tiny_held_out: Path, tmp_path: Path
) -> None:
    data = {"eval_instructions": str(tiny_held_out), "cache_teacher": str(tmp_path / "lessons"), "num_workers": 0}
    keys: dict[str, Any] = {"budget_schedule": {"start": 20, "share": 0.8}, "distill": {"weight": 0.5}}
    keys |= {"max_steps": 4, "eval_steps": 2, "final_evaluation": False}
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_release, tiny_instructions, data=data, **keys)
    whole = run_here(recipe, tmp_path / "whole")
    broken = run_here(recipe, tmp_path / "broken")
    for step in ("step-000004", "final"):
        (broken / step).rename(tmp_path / step)
    run_here(recipe, broken, "--resume_from_checkpoint", "latest")
    ours, theirs = checkpoint_tensors(broken, 4), checkpoint_tensors(whole, 4)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert open_release(str(whole)).saved_reductions.visionzip == TARGET
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    again = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [line["loss"] for line in again]


def test_kept_features_of_every_stage_change_nothing(
    tiny_release: Path, tiny_instructions: Path, tiny_held_out: Path, tmp_path: Path
) -> None:
    data = {"eval_instructions": str(tiny_held_out), "num_workers": 0}
    keys: dict[str, Any] = {"budget_schedule": {"start": 20, "share": 0.8, "stages": 3}, "max_steps": 5}
    keys |= {"eval_steps": 2, "final_evaluation": False}
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_release, tiny_instructions, data=data, **keys)
    cached = ("--data.cache_features", str(tmp_path / "features"))
    plain, kept = run_here(recipe, tmp_path / "plain"), run_here(recipe, tmp_path / "kept", *cached)
    ours, theirs = checkpoint_tensors(kept, 5), checkpoint_tensors(plain, 5)
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-6) for name in theirs)
    saved = json.loads((kept / "final" / "config.json").read_text())
    assert saved.get("budgets") is None, "a schedule's stages are no budgets to load it with"
    assert saved["visionzip"] == TARGET

    def folders() -> int:
        return sum(path.is_dir() for path in (tmp_path / "features").iterdir())

    assert folders() == 1
    run_here(recipe, tmp_path / "other", *cached, "--budget_schedule.stages", "2", "--max_steps", "2")
    assert folders() == 2, "other stages, other features"
    older = {**load_config(["--config", str(recipe), "--budget_schedule.stages", "null"]).shaping_settings()}
    assert older["budget_schedule"] == {"start": 20, "share": 0.8}, "as before there were stages"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("--budget_schedule.stages", "0"), "budget_schedule.stages is 0: at least 1 is needed"),
        (("--budget_schedule.stages", "15"), "budget_schedule.stages is 15: from 20 to 6 tokens there are at most 14"),
        (("--budget_schedule.share", "1"), r"budget_schedule.share is 1.0: a share between 0 and 1"),
        (("--budget_schedule.start", "6"), "budget_schedule.start is 6: more than the budget's 6"),
        (("--visionzip", "null"), "budget_schedule ends with the budget, and visionzip is null"),
        (("--data.cache_features", "x"), "budget_schedule and data.cache_features .* do not go together"),
    ],
)
def test_bad_schedules_are_refused(
    tiny_release: Path, tiny_instructions: Path, tmp_path: Path, keys: tuple[str, ...], message: str
) -> None:
    schedule = {"start": 20, "share": 0.5}
    recipe = write_recipe(tmp_path / "r.yaml", tiny_release, tiny_instructions, budget_schedule=schedule)
    config = load_config(["--config", str(recipe)])
    assert replace(config, budget_schedule=None).shaping_settings() != config.shaping_settings()
    with pytest.raises(ConfigError, match=message):
        load_config(["--config", str(recipe), *keys])


def test_a_start_over_the_grid_is_refused_before_the_run(
    tiny_release: Path, tiny_instructions: Path, tmp_path: Path
) -> None:
    schedule = {"start": 200, "share": 0.5}
    recipe = write_recipe(tmp_path / "r.yaml", tiny_release, tiny_instructions, budget_schedule=schedule)
    with pytest.raises(ConfigError, match=r"budget_schedule.start is 200: of 200 tokens, visionzip"):
        run_here(recipe, tmp_path / "run")
