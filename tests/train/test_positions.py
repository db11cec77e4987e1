"""Rows longer than the language model has positions are neither trained on nor evaluated without a word."""

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from PIL import Image

from shortzip.reduction.reductions import Reductions
from shortzip.train.evaluation.answers import evaluate
from shortzip.train.inputs.samples import check_positions, held_out_set, training_set
from shortzip.train.release.loading import load_release
from shortzip.train.settings.config import DataConfig


@pytest.fixture(scope="module")
def release(tiny_release: Path) -> tuple[Any, Any]:
    """512 positions."""
    return load_release(str(tiny_release), Reductions({"dominant": 3, "contextual": 1}))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rows of one exchange; one of them has an answer of some thousand tokens."""
    said = [("short", "yes"), ("endless", "it is red " * 500), ("other", "no")]
    file = tmp_path_factory.mktemp("rows") / "rows.json"
    Image.new("RGB", (8, 8)).save(file.with_name("image.png"))
    turns = [(name, [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": text}]) for name, text in said]
    rows = [{"id": name, "image": "image.png", "conversations": found} for name, found in turns]
    file.write_text(json.dumps(rows))
    return file


def test_training_names_max_length_and_the_models_limit(release: tuple[Any, Any], rows: Path) -> None:
    model, processor = release
    dataset = training_set(DataConfig(str(rows), max_length=5000), processor, 0)
    with pytest.raises(ValueError, match=r"1 of 3 rows.* 512 .*'endless'.*max_length \(now 5000\) to 512 or less"):
        check_positions(model.config, dataset)
    for limit in (512, 100):
        check_positions(model.config, training_set(DataConfig(str(rows), max_length=limit), processor, 0))


def test_evaluation_names_the_row_and_the_models_limit(release: tuple[Any, Any], rows: Path) -> None:
    model, processor = release
    held_out = held_out_set(DataConfig(str(rows), eval_instructions=str(rows)), processor)
    with pytest.raises(ValueError, match=r"'endless'.*held-out rows are not cut.*data\.eval_instructions"):
        evaluate("x", model, held_out, Accelerator(), batch_size=2, max_new_tokens=4)


def test_original_positions_reach_further_than_tokens(tiny_release: Path, rows: Path) -> None:
    """By the 32 of 36 that an image leaves out."""
    for positions, limit in (("compact", 512), ("original", 480)):
        reductions = Reductions({"dominant": 3, "contextual": 1}, positions=positions)
        model, processor = load_release(str(tiny_release), reductions)
        check_positions(model.config, training_set(DataConfig(str(rows), max_length=limit), processor, 0))
        said = rf"1 of 3 rows.* 512 .*'endless' has 513.*max_length \(now {limit + 1}\) to {limit} or less"
        with pytest.raises(ValueError, match=said):
            check_positions(model.config, training_set(DataConfig(str(rows), max_length=limit + 1), processor, 0))


def test_scaled_positions_reach_further(release: tuple[Any, Any], rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = release
    held_out = held_out_set(DataConfig(str(rows), eval_instructions=str(rows)), processor)
    rope = model.config.text_config.rope_parameters
    monkeypatch.setattr(model.config.text_config, "rope_parameters", rope | {"rope_type": "linear", "factor": 100.0})
    check_positions(model.config, held_out, held_out=True)
