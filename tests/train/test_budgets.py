"""One projector for several budgets: drawn for each step, or read one after the other; the same however it is cut."""

import copy
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from mini_gemini_releases import copy_of_release
from runs import checkpoint_tensors, output_of, run_here, start_there, write_recipe
from tiny import write_next_release
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from shortzip.data.batching import BatchPlan
from shortzip.data.dataset import ConversationDataset, MicroBatch
from shortzip.data.errors import UserError
from shortzip.data.instructions import read_instructions
from shortzip.data.supervision import Supervision
from shortzip.reduction.families import family_of
from shortzip.reduction.reductions import Reductions
from shortzip.reduction.refusals import change_budget
from shortzip.reduction.selectors import settled
from shortzip.scripts.rehearse_memory import reduced_of, row_of, step_of, under_largest
from shortzip.train.finish import candidates_of
from shortzip.train.inputs.budgets import DrawnBudgets, budget_of, with_budget
from shortzip.train.inputs.feature_cache import FeatureCache, UnderOneBudget, features_identity
from shortzip.train.inputs.feature_filling import fill_cache
from shortzip.train.inputs.loading import step_inputs
from shortzip.train.release.loading import load_release
from shortzip.train.release.opening import open_release
from shortzip.train.run.processes import StopRequest
from shortzip.train.run.report import Reporter
from shortzip.train.run.run_folder import read_metrics
from shortzip.train.run.session import Session
from shortzip.train.settings.budget import VisionZipConfig
from shortzip.train.settings.budget_list import listed_budgets
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import dump_config, load_config
from shortzip.train.settings.commands import RehearseConfig
from shortzip.train.settings.distill import DistillConfig
from shortzip.train.step.flops import StepFlops
from shortzip.train.step.memory import CUDA_OVERHEAD_BYTES, training_step_memory
from shortzip.train.step.micro_batch import MicroBatchLimits, estimate_of
from shortzip.train.step.objective import (
    SupervisedLoss,
    count_supervised,
    projector_parameters,
    train_only_projector,
)
from shortzip.train.step.sandwich import readings_of
from shortzip.train.step.teacher import Teacher

OWN, SHORTV = {"dominant": 4, "contextual": 2}, {"layers": [1, 3]}
LISTED = [OWN, {"dominant": 8, "contextual": 4}, {"dominant": 16, "contextual": 8}]
WORDS = ["4+2", "8+4", "16+8"]


def drawn(sandwich: bool = False, seed: int = 0, dataset: Any = None, batch: int = 6) -> DrawnBudgets:
    return DrawnBudgets(OWN, batch, dataset, LISTED, seed, sandwich)


def test_budgets_are_written_as_anywhere_and_a_number_is_divided() -> None:
    own = VisionZipConfig(12, 4)
    found = [budget.as_key() for budget in listed_budgets([64, "12+4", "20+12", "8"], own)]
    assert found == [
        {"dominant": 6, "contextual": 2}, {"dominant": 12, "contextual": 4}, {"dominant": 20, "contextual": 12},
        {"dominant": 48, "contextual": 16},
    ]  # fmt: skip
    assert [budget_of({"dominant": 12, "contextual": 4}, tokens) for tokens in (8, 64)] == [found[0], found[3]]
    scope = VisionZipConfig(16, 0, method="scope", parameters={"alpha": 0.5})
    assert [budget.as_key()["dominant"] for budget in listed_budgets([16, 32], scope)] == [16, 32]
    assert all(budget.as_key()["alpha"] == 0.5 for budget in listed_budgets([16, 32], scope))


def test_each_step_draws_by_seed_and_step_alone() -> None:
    steps = [drawn().tokens(step) for step in range(300)]
    assert [drawn().tokens(step) for step in reversed(range(300))] == steps[::-1]
    assert Counter(steps) == {6: 100, 12: 100, 24: 100}, "each of them once in as many steps as there are budgets"
    assert len({tuple(steps[turn : turn + 3]) for turn in range(0, 300, 3)}) == 6, "in every order"
    assert [drawn(seed=1).tokens(step) for step in range(300)] != steps
    rows = [[key["dominant"] for key in drawn(sandwich=True).of_step(step)] for step in range(9)]
    assert rows == [[16, 8, 4]] * 9
    four = DrawnBudgets(OWN, 6, None, [*LISTED, {"dominant": 20, "contextual": 10}], 0, True)  # type: ignore[arg-type]
    between = Counter(four.of_step(step)[1]["dominant"] for step in range(20))
    assert between == {8: 10, 16: 10}
    two = DrawnBudgets(OWN, 6, None, LISTED[:2], 0, True)  # type: ignore[arg-type]
    assert [key["dominant"] for key in two.of_step(0)] == [8, 4]


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def parts(request: Any, tiny_release: Path, tiny_instructions: Path, tmp_path_factory: Any) -> tuple[Any, ...]:
    """A model whose projector has moved on, its rows under the largest budget, a config."""
    folder = tmp_path_factory.mktemp("parts")
    release = tiny_release if request.param == "llava" else write_next_release(folder / "next")
    model, processor = load_release(str(release), Reductions(OWN, SHORTV))
    train_only_projector(model, torch.float32)
    teacher = Teacher(model, torch.float32)
    with torch.no_grad():
        for parameter in projector_parameters(model).values():
            parameter.add_(torch.full_like(parameter, 0.01))
    rows = read_instructions(tiny_instructions)[:14]
    dataset = ConversationDataset(rows, with_budget(Supervision(processor), LISTED[-1]), tiny_instructions.parent)
    config = load_config(["--config", str(write_recipe(folder / "r.yaml", release, tiny_instructions))])
    return model, dataset, config, teacher


def batches_of(parts: tuple[Any, ...], budgets: DrawnBudgets, processes: int = 1, **limits: int) -> list[MicroBatch]:
    """All micro-batches of the first step, of all processes."""
    _, dataset, config, _ = parts
    found = []
    for process in range(processes):
        plan = BatchPlan(dataset.lengths.tolist(), 6, num_epochs=None, num_processes=processes, **limits)
        plan.in_time = budgets.lengths_of
        accelerator: Any = Accelerator(cpu=True)
        accelerator.state._shared_state["process_index"] = process
        try:
            found += next(step_inputs(dataset, plan, accelerator, config, 0, budgets))[1]
        finally:
            accelerator.state._shared_state["process_index"] = 0
    return found


def test_rows_and_model_have_the_budget_of_their_step(parts: tuple[Any, ...]) -> None:
    model, dataset, config, _ = parts
    budgets, module = drawn(dataset=dataset), SupervisedLoss(model)
    plan = BatchPlan(dataset.lengths.tolist(), 6, num_epochs=None, max_tokens_per_micro_batch=300)
    plan.in_time = budgets.lengths_of
    rows = dataset.conversations
    alone = {
        key["dominant"]: ConversationDataset(rows, with_budget(dataset.supervision, key), dataset.image_root)
        for key in LISTED
    }
    seen = set()
    inputs = step_inputs(dataset, plan, Accelerator(cpu=True), config, 0, budgets)
    for step in range(3):
        batch, micro_batches = next(inputs)
        dominant = budgets.at(step)["dominant"]
        expected = alone[dominant].lengths[batch.samples]
        assert sum(int(micro.inputs["attention_mask"].sum()) for micro in micro_batches) == expected.sum()
        assert all(torch.isfinite(module(micro)) for micro in micro_batches)
        assert model.config.visionzip == budgets.at(step)
        seen.add(dominant)
    assert seen == {4, 8, 16}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("taught", [False, True])
def test_the_sandwich_is_that_of_the_formula(parts: tuple[Any, ...], plain: bool, taught: bool) -> None:
    model, dataset, config, teacher = parts
    budgets, distill = drawn(sandwich=True, dataset=dataset), DistillConfig(0.4, 2.0) if taught else None
    parts = (model, dataset, replace(config, distill=distill), teacher)
    batch = batches_of(parts, budgets, micro_batch_size=6)[0]
    module = SupervisedLoss(model, plain=plain, teacher=teacher if taught else None, distill=distill)
    logits = []
    for reading in readings_of(batch):
        change_budget(model.model, reading.budget)  # type: ignore[arg-type]
        inputs = {key: reading.inputs[key] for key in reading.inputs if key != "labels"}
        with torch.no_grad():
            logits.append(model(**inputs).logits[:, :-1][reading.inputs["labels"][:, 1:] != -100])
    heat = 2.0 if taught else 1.0
    largest, *smaller = (log_softmax(of_one / heat, -1) for of_one in logits)
    first = SupervisedLoss(model, plain=plain, teacher=module.teacher, distill=distill)(replace(batch, narrower=[]))
    expected = first + heat**2 * sum(kl_div(of_one, largest, reduction="sum", log_target=True) for of_one in smaller)
    losses = [module(reading) for reading in readings_of(batch)]
    torch.testing.assert_close(sum(losses), expected, rtol=1e-4, atol=1e-4)
    assert all(loss > 0.01 for loss in losses)
    if not taught:
        targets = batch.inputs["labels"][:, 1:][batch.inputs["labels"][:, 1:] != -100]
        torch.testing.assert_close(losses[0], cross_entropy(logits[0], targets, reduction="sum"), rtol=1e-4, atol=1e-4)


def test_the_largest_does_not_learn_what_smaller_ones_can_follow(parts: tuple[Any, ...]) -> None:
    model, dataset, _, _ = parts
    batch = batches_of(parts, drawn(sandwich=True, dataset=dataset), micro_batch_size=6)[0]
    module, weights = SupervisedLoss(model), list(projector_parameters(model).values())
    first, *others = readings_of(batch)
    alone = torch.autograd.grad(module(replace(first, turn=None)), weights)
    together = torch.autograd.grad(module(first), weights)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    assert not others[0].turn.widest.said().requires_grad
    assert all(any(part.abs().max() > 1e-4 for part in torch.autograd.grad(module(o), weights)) for o in others)


def gradient(module: SupervisedLoss, batches: list[MicroBatch]) -> torch.Tensor:
    count = sum(count_supervised(batch.inputs["labels"]) for batch in batches)
    module.zero_grad()
    for batch in batches:
        for reading in readings_of(batch):
            (module(reading) / count).backward()
    return torch.cat([p.grad.flatten() for p in projector_parameters(module.model).values() if p.grad is not None])


@pytest.mark.parametrize("plain", [False, True])
def test_any_cut_gives_the_same_gradient(parts: tuple[Any, ...], plain: bool) -> None:
    model, dataset, _, _ = parts
    budgets, module = drawn(sandwich=True, dataset=dataset), SupervisedLoss(model, plain=plain)
    whole = gradient(module, batches_of(parts, budgets, micro_batch_size=6))
    for processes, limits in ((1, {"micro_batch_size": 1}), (2, {"max_tokens_per_micro_batch": 120})):
        found = gradient(module, batches_of(parts, budgets, processes, **limits))
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=2e-5 * whole.abs().max().item())


def store_of(root: Path, loaded: Any, dataset: ConversationDataset, budgets: Any) -> FeatureCache:
    cache = FeatureCache(root, features_identity(*loaded, None, budgets))
    session = Session(Accelerator(cpu=True), Reporter(is_main=False), StopRequest())
    fill_cache(cache, loaded[0], loaded[1], [dataset], session, budgets=budgets)
    return cache


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("method", ["visionzip", "scope", "pool"])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_one_pass_of_the_tower_gives_the_features_of_every_budget(
    family: str, method: str, positions: str, tiny_release: Path, tiny_instructions: Path, tmp_path: Path
) -> None:
    release = tiny_release if family == "llava" else write_next_release(tmp_path / "next")
    keys = LISTED if method == "visionzip" else [{"dominant": n, "contextual": 0, "method": method} for n in (6, 12)]
    keys = [settled(key) for key in keys]
    loaded = load_release(str(release), Reductions(keys[0], positions=positions))
    model, processor = loaded
    rows = read_instructions(tiny_instructions)[:6]
    dataset = ConversationDataset(rows, with_budget(Supervision(processor), keys[-1]), tiny_instructions.parent)
    calls: list[int] = []
    model.model.vision_tower.encoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    kept = store_of(tmp_path / "kept", loaded, dataset, keys)
    assert len(calls) == (len(keys) if method == "pool" else 1)
    for key in keys:
        change_budget(model.model, key)
        own = store_of(tmp_path / f"own-{key['dominant']}", loaded, dataset, ())
        for row in rows:
            for source in row.images:
                alone, one = (
                    features.find(source, dataset.image_root)
                    for features in (own, UnderOneBudget(kept, key["dominant"] + key["contextual"]))
                )
                assert alone is not None
                assert one is not None
                assert alone.keys() == one.keys()
                assert all(torch.equal(alone[name], one[name]) for name in alone)


def test_mini_gemini_mines_once_for_every_budget(tmp_path: Path) -> None:
    keys = [{"dominant": 3, "contextual": 1}, {"dominant": 6, "contextual": 2}]
    model, _ = load_release(open_release(str(copy_of_release(tmp_path)), cache_dir=tmp_path), Reductions(keys[0]))
    pixels = torch.rand(2, 3, model.config.image_size_aux, model.config.image_size_aux)
    found = family_of(model.config.model_type).tokens_of_budgets(model.model, pixels, keys)
    for key, visual in zip(keys, found, strict=True):
        change_budget(model.model, key)
        own = model.model.get_visual_tokens(pixels)
        assert all(torch.equal(own[name], visual[name]) for name in ("tokens", "kept", "targets"))


def test_another_list_has_its_own_features(tiny_release: Path, tmp_path: Path) -> None:
    loaded = load_release(str(tiny_release), Reductions(OWN))
    lists = [LISTED, LISTED[:2], [*LISTED[:2], {"dominant": 15, "contextual": 9}], ()]
    folders = {FeatureCache(tmp_path, features_identity(*loaded, None, budgets)).folder for budgets in lists}
    assert len(folders) == 4
    change_budget(loaded[0].model, LISTED[1])
    assert FeatureCache(tmp_path, features_identity(*loaded, None, LISTED)).folder in folders, "whichever is its own"


@pytest.mark.parametrize("sandwich", [False, True])
@pytest.mark.slow
def test_a_run_with_kept_features_and_lessons_is_the_same(
    sandwich: bool, tiny_release: Path, tiny_instructions: Path, tiny_held_out: Path, tmp_path: Path
) -> None:
    data = {"eval_instructions": str(tiny_held_out), "cache_teacher": str(tmp_path / "lessons")}
    keys: dict[str, Any] = {
        "sandwich": sandwich,
        "final_evaluation": False,
        "eval_steps": 2,
        "distill": {"weight": 0.5},
    }
    recipe = recipe_of(tmp_path, tiny_release, tiny_instructions, data=data, **keys)
    seen = run_here(recipe, tmp_path / "seen")
    kept = run_here(recipe, tmp_path / "kept", "--data.cache_features", str(tmp_path / "features"))
    losses = [[line["loss"] for line in read_metrics(run / "metrics.jsonl")] for run in (seen, kept)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    again = run_here(recipe, tmp_path / "again", "--data.cache_features", str(tmp_path / "features"))
    ours, theirs = checkpoint_tensors(again, 4), checkpoint_tensors(kept, 4)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def recipe_of(folder: Path, release: Path, instructions: Path, **keys: Any) -> Path:
    return write_recipe(folder / "recipe.yaml", release, instructions, **{"budgets": WORDS, "max_steps": 4, **keys})


@pytest.mark.parametrize("sandwich", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_goes_on_bit_for_bit_and_its_checkpoint_names_the_budgets(
    sandwich: bool, tiny_release: Path, tiny_instructions: Path, tiny_held_out: Path, tmp_path: Path
) -> None:
    data = {"eval_instructions": str(tiny_held_out)}
    keys: dict[str, Any] = {"sandwich": sandwich, "final_evaluation": False, "eval_steps": 2}
    recipe = recipe_of(tmp_path, tiny_release, tiny_instructions, data=data, **keys)
    whole = run_here(recipe, tmp_path / "whole")
    broken = run_here(recipe, tmp_path / "broken")
    for step in ("step-000004", "final"):
        (broken / step).rename(tmp_path / step)
    run_here(recipe, broken, "--resume_from_checkpoint", "latest")
    ours, theirs = checkpoint_tensors(broken, 4), checkpoint_tensors(whole, 4)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    lines = [[line["loss"] for line in read_metrics(run / "metrics.jsonl")] for run in (whole, broken)]
    assert lines[0] == lines[1]
    saved = json.loads((whole / "final" / "config.json").read_text())
    assert (saved["visionzip"], saved["budgets"]) == (OWN, LISTED)
    if sandwich:
        return
    alone = run_here(recipe, tmp_path / "alone", "--budgets", "null")
    assert any(not torch.equal(tensor, ours[name]) for name, tensor in checkpoint_tensors(alone, 4).items())
    assert json.loads((alone / "final" / "config.json").read_text())["budgets"] is None


@pytest.mark.slow
def test_the_final_table_shows_each_budget(
    tiny_release: Path, tiny_instructions: Path, tiny_held_out: Path, tmp_path: Path
) -> None:
    data = {"eval_instructions": str(tiny_held_out), "eval_samples": 4}
    recipe = recipe_of(tmp_path, tiny_release, tiny_instructions, data=data, pictures=0, max_steps=2, max_new_tokens=2)
    folder = run_here(recipe, tmp_path / "run")
    rows = json.loads((folder / "evaluation.json").read_text())["rows"]
    assert [(row["name"], row["visual_tokens"]) for row in rows] == [
        ("all tokens", 36), ("reduced, untuned", 6), ("reduced + tuned", 6),
        ("8+4, untuned", 12), ("8+4, tuned", 12), ("16+8, untuned", 24), ("16+8, tuned", 24),
    ]  # fmt: skip
    assert all(rows[at]["loss"] != rows[at + 1]["loss"] for at in (1, 3, 5))
    config = load_config(["--config", str(folder / "config.yaml")])
    assert len(candidates_of(config, folder, open_release(str(folder)))) == 7


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("--budgets", "[4+2]"), r"budgets is \['4\+2'\]: two or more are needed"),
        (("--budgets", "4+2,8+4,6"), r"budgets: 6 has 6 tokens, and so has another one: give it once"),
        (("--budgets", "4+2,3+3"), r"budgets: 3\+3 has 6 tokens, and so has another one \(as 4\+2\): give it once"),
        (("--budgets", "4+2,0"), "budgets: 0 is no number of tokens: at least 1"),
        (("--budgets", "4+2,0+3"), r"budgets: 0\+3 has no dominant token: at least 1"),
        (("--budgets", "4+2,many"), "budgets: budget 'many': write it as dominant"),
        (("--budgets", "8+4,16+8"), r"visionzip is 4\+2, and budgets are 8\+4, 16\+8: .* must be one of them"),
        (("--visionzip", "null"), "budgets is .*, and visionzip is null: set visionzip to one of them"),
        (("--budget_schedule.start", "30"), "budgets and budget_schedule do not go together"),
        (
            ("--visionzip.per_image", '{"chooser": "image", "scale": 4.0, "min": 2, "max": 9}'),
            "budgets and visionzip.per_image do not go together",
        ),
        (
            ("--shortv", "null", "--fastv", "{method: sparsevlm, layers: [1, 2], keep: [5, 3]}"),
            r"budgets and fastv.method sparsevlm do not go together: fastv.keep \[5, 3\]",
        ),
        (
            ("--shortv", "null", "--fastv", "{layer: 1, keep: 0.5}", "--sandwich", "true"),
            "sandwich and fastv do not go together",
        ),
        (("--budgets", "null", "--sandwich", "true"), "sandwich is true, and budgets is empty"),
        (("--method", "scope"), r"method scope merges nothing"),
    ],
)
def test_bad_lists_are_refused(
    tiny_release: Path, tiny_instructions: Path, tmp_path: Path, keys: tuple[str, ...], message: str
) -> None:
    recipe = recipe_of(tmp_path, tiny_release, tiny_instructions)
    with pytest.raises(ConfigError, match=message):
        load_config(["--config", str(recipe), *keys])


def test_the_list_is_part_of_what_shapes_a_run_and_is_written_as_it_is_read(
    tiny_release: Path, tiny_instructions: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, tiny_release, tiny_instructions, budgets=[24, "8+4", 6])
    config = load_config(["--config", str(recipe)])
    assert config.budgets == WORDS
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(["--config", str(tmp_path / "again.yaml")]) == config
    for other in (replace(config, budgets=[]), replace(config, budgets=WORDS[:2]), replace(config, sandwich=True)):
        assert other.shaping_settings() != config.shaping_settings()


def test_a_budget_over_the_grid_is_refused_before_the_run(
    tiny_release: Path, tiny_instructions: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, tiny_release, tiny_instructions, budgets=["4+2", "30+8"])
    with pytest.raises(ConfigError, match=r"budgets: 30\+8: .* exceeds the 37 tokens .*: the sum must be 1 to 37"):
        run_here(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@given(st.lists(st.integers(1, 60), min_size=2, max_size=5, unique=True), st.integers(0, 2**32 - 1), st.booleans())
def test_whatever_is_listed_every_step_has_budgets_of_it(tokens: list[int], seed: int, sandwich: bool) -> None:
    keys = [budget_of(OWN, count) for count in sorted(tokens)]
    budgets = DrawnBudgets(keys[0], 6, None, keys, seed, sandwich)  # type: ignore[arg-type]
    for step in (0, 1, 7, 100_000):
        found = [key["dominant"] + key["contextual"] for key in budgets.of_step(step)]
        assert set(found) <= set(tokens)
        assert found == sorted(found, reverse=True)
        assert len(found) == (min(len(tokens), 3) if sandwich else 1)
        if sandwich:
            assert (found[0], found[-1]) == (max(tokens), min(tokens))


TOGETHER: dict[str, dict[str, Any]] = {
    "drawn": {},
    "sandwich": {"sandwich": True},
    "with everything": {
        "sandwich": True, "tuning": "lora", "lora_r": 4, "distill": {"weight": 0.5, "temperature": 2.0},
        "positions": "original", "data": {"num_workers": 2, "cache_features": "features", "cache_teacher": "lessons"},
    },
    "with everything in each step": {
        "tuning": "dora", "lora_r": 4, "distill": {"weight": 0.5}, "visionzip": {**OWN, "method": "duet", "window": 2},
        "data": {"num_workers": 2},
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("how", TOGETHER)
def test_two_processes_give_the_same_run_and_go_on_bit_for_bit(
    how: str, tiny_release: Path, tiny_instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(tmp_path, tiny_release, tiny_instructions, **copy.deepcopy(TOGETHER[how]))
    one = run_here(recipe, tmp_path / "one")
    said = output_of(start_there(recipe, tmp_path / "two", processes=2))
    assert (tmp_path / "two" / "final").is_dir(), said
    ours, theirs = checkpoint_tensors(tmp_path / "two", 4), checkpoint_tensors(one, 4)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)
    for step in ("step-000004", "final"):
        (tmp_path / "two" / step).rename(tmp_path / step)
    said = output_of(start_there(recipe, tmp_path / "two", "--resume_from_checkpoint", "latest", processes=2))
    assert (tmp_path / "two" / "final").is_dir(), said
    again = checkpoint_tensors(tmp_path / "two", 4)
    assert all(torch.equal(again[name], ours[name]) for name in ours)
    saved = json.loads((tmp_path / "two" / "final" / "config.json").read_text())
    assert saved["budgets"] == LISTED


def test_a_rehearsal_is_of_the_largest_and_of_a_sandwichs_others(
    tiny_release: Path, tiny_instructions: Path, tmp_path: Path
) -> None:
    path = recipe_of(tmp_path, tiny_release, tiny_instructions)
    recipe, asked = load_config(["--config", str(path)]), RehearseConfig()
    alone, narrower = under_largest(recipe, asked)
    assert (reduced_of(asked, alone).visionzip, narrower) == (LISTED[-1], [])
    largest, narrower = under_largest(replace(recipe, sandwich=True), asked)
    assert (largest.visionzip, narrower) == (alone.visionzip, [*LISTED[-2:-1], LISTED[0]])
    two = replace(recipe, sandwich=True, budgets=recipe.budgets[:2])
    assert under_largest(two, asked)[1] == LISTED[:1], "there is none between"
    step, _, _ = step_of(RehearseConfig(recipe=str(path), rows=2, text_tokens=40))
    assert step.narrower == ()
    with path.open("a") as file:
        file.write("sandwich: true\n")
    step, estimate, _ = step_of(RehearseConfig(recipe=str(path), rows=2, text_tokens=40))
    assert [key for key, _ in step.narrower] == narrower
    lengths = [integers.input_ids.shape[1] for integers in (step.integers, *(own for _, own in step.narrower))]
    tokens = [sum(key[name] for name in ("dominant", "contextual")) for key in (LISTED[-1], *narrower)]
    assert len({length - own for length, own in zip(lengths, tokens, strict=True)}) == 1, "the text is the same"
    row = row_of("kept", step, estimate, "24GiB")
    alone = training_step_memory(step.config, estimate).total - CUDA_OVERHEAD_BYTES
    assert row.rehearsed.peak.total > 0
    assert row.estimated > alone, "what the other readings add is in the estimate"
    for flags in ({"budget": "4+2"}, {"conversations": True}):
        with pytest.raises(UserError, match=f"--{next(iter(flags))}: the recipe's sandwich has rows under several"):
            step_of(RehearseConfig(recipe=str(path), **flags))  # type: ignore[arg-type]


def test_flops_and_memory_know_of_every_reading(tiny_release: Path, tiny_instructions: Path, tmp_path: Path) -> None:
    model, processor = load_release(str(tiny_release), Reductions(OWN, SHORTV))
    recipe = load_config(["--config", str(recipe_of(tmp_path, tiny_release, tiny_instructions))])
    rows = read_instructions(tiny_instructions)[:5]
    dataset = ConversationDataset(rows, with_budget(Supervision(processor), LISTED[-1]), tiny_instructions.parent)
    flops, text = StepFlops(model, dataset), [4]
    assert not rows[4].images
    each = [flops([0], tokens) for tokens in (24, 12, 6)]
    assert each == sorted(each, reverse=True)
    assert flops([0]) == each[0], "rows have the largest"
    assert flops([0], 24, 12, 6) == sum(each)
    assert flops(text, 24, 12, 6) == flops(text), "from text alone nothing is learned"
    drawn_only, sandwiched = (
        estimate_of(replace(recipe, sandwich=sandwich), model, dataset) for sandwich in (False, True)
    )
    limits = MicroBatchLimits(2, None, False)
    assert drawn_only.row.visual_tokens == 24
    assert sandwiched.memory(limits) > drawn_only.memory(limits)
