"""Runs whose images have a budget each, and what calibrates them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs import run_here, write_recipe
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from shortzip.data.dataset import Collator
from shortzip.data.errors import UserError
from shortzip.reduction.image_budgets import budgets_by_detail
from shortzip.reduction.reductions import Reductions
from shortzip.train.calibration.budget_choice import calibrate, parameter_for, scale_for
from shortzip.train.inputs.image_budgets import BudgetsByTower, budgets_by_picture
from shortzip.train.inputs.samples import training_set
from shortzip.train.release.loading import load_release
from shortzip.train.release.opening import open_release
from shortzip.train.run.run_folder import read_metrics
from shortzip.train.settings.calibrating import CalibrateBudgetConfig
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import dump_config, load_config
from shortzip.train.settings.config import DataConfig
from shortzip.train.step.visual_features import visual_features

MODEL = "modeling_reduced_llava.ReducedLlavaForConditionalGeneration"
BY_IMAGE = {"chooser": "image", "scale": 40.0, "min": 2, "max": 20}
COVERAGE = {"chooser": "coverage", "coverage": 0.5, "min": 2, "max": 30}


def by(per_image: dict[str, Any]) -> dict[str, Any]:
    return {"dominant": 4, "contextual": 2, "per_image": per_image}


@pytest.fixture
def recipe_of(tmp_path: Path, tiny_release: Path, tiny_instructions: Path, tiny_held_out: Path) -> Any:
    def write(per_image: dict[str, Any], **keys: Any) -> Path:
        data = {"eval_instructions": str(tiny_held_out), **keys.pop("data", {})}
        keys = {"max_steps": 2, "eval_steps": 2, "pictures": 0, **keys}
        path = tmp_path / "recipe.yaml"
        return write_recipe(path, tiny_release, tiny_instructions, data=data, visionzip=by(per_image), **keys)

    return write


@pytest.mark.slow
def test_a_run_whose_images_choose_by_the_picture(recipe_of: Any, tmp_path: Path) -> None:
    folder = run_here(recipe_of(BY_IMAGE), tmp_path / "run")
    saved = Reductions.from_config(json.loads((folder / "final" / "config.json").read_text()))
    assert saved.visionzip == by(BY_IMAGE)
    assert (folder / "final" / "image_budgets.py").is_file()
    rows = json.loads((folder / "evaluation.json").read_text())["rows"]
    assert rows[1]["visual_tokens"] == rows[2]["visual_tokens"] != 6
    assert 2 < rows[1]["visual_tokens"] < 20
    kept = run_here(recipe_of(BY_IMAGE, data={"cache_features": str(tmp_path / "features")}), tmp_path / "kept")
    losses = [[line["loss"] for line in read_metrics(run / "metrics.jsonl")] for run in (folder, kept)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_run_whose_images_choose_by_coverage(recipe_of: Any, tmp_path: Path) -> None:
    """Budgets and features come of one pass of the tower over each image."""
    recipe = recipe_of(COVERAGE, data={"cache_features": str(tmp_path / "features")}, final_evaluation=False)
    folder = run_here(recipe, tmp_path / "run")
    assert [line["kind"] for line in read_metrics(folder / "metrics.jsonl")] == ["eval", "train", "train", "eval"]
    again = run_here(recipe, tmp_path / "again")
    assert read_metrics(folder / "metrics.jsonl")[-1]["loss"] == read_metrics(again / "metrics.jsonl")[-1]["loss"]


@pytest.mark.slow
def test_code_of_budgets_travels_where_it_is_used(recipe_of: Any, tmp_path: Path, tiny_release: Path) -> None:
    recipe = recipe_of({"chooser": "fixed"}, eval_steps=None, final_evaluation=False)
    folder = run_here(recipe, tmp_path / "fixed", "--max_steps", "2")
    assert (folder / "final" / "image_budgets.py").is_file()
    final, names = str(folder / "final"), ("processing_reduced_llava.ReducedLlavaProcessor", MODEL)
    processor_class, model_class = (get_class_from_dynamic_module(name, final) for name in names)
    processor, model = processor_class.from_pretrained(final), model_class.from_pretrained(final)
    assert type(model).__module__.startswith("transformers_modules")
    pictures = [Image.new("RGB", (30, 20), (200, 40, 90)), Image.new("RGB", (20, 30))]
    asked = {"images": pictures, "text": ["<image> what colour?", "<image> hello"], "padding": True}
    inputs = processor(**asked, budgets=[3, 20], return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [3, 20]
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 2
    plain = run_here(recipe, tmp_path / "plain", "--max_steps", "2", "--visionzip.per_image", "null")
    assert not (plain / "final" / "image_budgets.py").exists()
    assert "per_image" not in (plain / "config.yaml").read_text()  # as runs wrote before


@pytest.mark.parametrize("per_image", [BY_IMAGE, COVERAGE], ids=["image", "coverage"])
def test_rows_and_features_have_the_budgets(tiny_release: Path, tiny_instructions: Path, per_image: Any) -> None:
    model, processor = load_release(open_release(str(tiny_release)), Reductions(by(per_image)))
    data = DataConfig(instructions=str(tiny_instructions))
    source = BudgetsByTower(model, processor.image_processor) if per_image is COVERAGE else None
    dataset = training_set(data, processor, 0, budget_of=source)
    samples: Any = [dataset[index] for index in range(12)]
    batch = Collator.of(dataset.supervision)(samples)
    budgets = batch.inputs["image_budgets"]
    assert budgets.tolist() == [budget for sample in samples for budget in sample.budgets]
    assert int((batch.inputs["input_ids"] == processor.image_token_id).sum()) == int(budgets.sum())
    assert dataset.lengths[:12].tolist() == [len(sample.encoded.input_ids) for sample in samples]
    with torch.no_grad():
        features, _ = visual_features(model, batch.inputs)
        alone = model.model.get_image_features(batch.inputs["pixel_values"]).pooler_output
    assert features is not None
    assert [len(image) for image in alone] == budgets.tolist()
    torch.testing.assert_close(features, torch.cat(list(alone)), rtol=0, atol=1e-5)


def test_a_picture_is_looked_at_once(tiny_release: Path, tiny_instructions: Path, monkeypatch: Any) -> None:
    _, processor = load_release(open_release(str(tiny_release)), Reductions(by(BY_IMAGE)))
    dataset = training_set(DataConfig(instructions=str(tiny_instructions)), processor, 0)
    again = budgets_by_picture(processor, dataset.known_images)
    assert again is not None
    monkeypatch.setattr("shortzip.train.inputs.image_budgets.open_image", None)
    for row in dataset.conversations:
        for image in row.images:
            assert 2 <= again(image, dataset.image_root) <= 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--visionzip.per_image.chooser", "coverage"], "coverage, min, max missing"),
        (["--visionzip.per_image", json.dumps(COVERAGE)], r"data\.cache_features is null"),
        (
            ["--visionzip.per_image", json.dumps(BY_IMAGE), "--distill.weight", "0.5"],
            "per_image and distill do not go",
        ),
        (
            ["--visionzip.per_image", json.dumps(BY_IMAGE), "--budget_schedule.start", "60"],
            "per_image and budget_schedule do not go",
        ),
        (
            ["--visionzip.per_image", json.dumps(BY_IMAGE), "--shortv", "null", "--fastv", "{layer: 2, keep: 0.5}"],
            "per_image and fastv do not go",
        ),
        (["--visionzip.per_image", json.dumps({**BY_IMAGE, "max": 1})], "got max: 1, with min: 2"),
    ],
)
def test_what_a_run_refuses_when_its_config_is_read(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(["--config", "demo", *arguments])


def test_a_config_is_written_as_it_is_read(tmp_path: Path) -> None:
    config = load_config(["--config", "demo", "--visionzip.per_image", json.dumps(BY_IMAGE)])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_a_budget_over_the_grid_is_refused_before_weights_are_read(recipe_of: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max is 38; an image has 37 tokens: it must be 2 to 37"):
        run_here(recipe_of({**BY_IMAGE, "max": 38}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_parameter_is_found_whose_mean_is_asked() -> None:
    details = torch.rand(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    limits = {"min": 4, "max": 64}
    for mean in (8, 16, 32, 60):
        scale, budgets = scale_for(mean, details, limits)
        assert budgets == budgets_by_detail(details, {**limits, "scale": scale})
        assert sum(budgets) / 300 == pytest.approx(mean, abs=0.1)
    with pytest.raises(UserError, match=r"mean is 3, and these images have 2\.0 at the most"):
        parameter_for(3, 1.0, lambda value: [1 + round(value)] * 5)
    with pytest.raises(UserError, match="all of one colour"):
        scale_for(8, [0.0, 0.0], limits)


@pytest.mark.parametrize("chooser", ["coverage", "image"])
def test_calibration_on_images(tiny_release: Path, tiny_instructions: Path, chooser: Any) -> None:
    settings = CalibrateBudgetConfig(
        mean=9, min=2, max=30, chooser=chooser, model=str(tiny_release), instructions=str(tiny_instructions),
        budget="4+2", samples=20,
    )  # fmt: skip
    found = calibrate(settings)
    assert len(found.budgets) == 20
    assert found.mean == pytest.approx(9, abs=1)
    assert Reductions(found.visionzip).visionzip == found.visionzip
    model, processor = load_release(open_release(str(tiny_release)), Reductions(found.visionzip))
    dataset = training_set(
        DataConfig(instructions=str(tiny_instructions)), processor, 0,
        budget_of=BudgetsByTower(model, processor.image_processor),
    )  # fmt: skip
    images = [(image, dataset.image_root) for row in dataset.conversations for image in row.images]
    assert dataset.budget_of is not None
    assert set(found.budgets) <= {dataset.budget_of(*image) for image in images}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"mean": 2}, "mean is 2: a number between min, 2, and max, 30"),
        ({"max": 2}, "max is 2: more than min"),
        ({"min": 0}, "min is 0: at least 1"),
        ({"samples": 0}, "samples is 0"),
        ({"method": "scope"}, "give the budget"),
    ],
)
def test_what_calibration_refuses(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CalibrateBudgetConfig(**{"mean": 9, "min": 2, "max": 30, **keys})
