"""Runs, their checkpoints and their continuation with `positions: original`."""

import json
from pathlib import Path

import pytest
import torch
from runs import run_here, write_recipe

from shortzip.reduction.reductions import Reductions
from shortzip.train.release.loading import load_release, share_weights
from shortzip.train.run.checkpoint import CheckpointError
from shortzip.train.run.run_folder import read_metrics
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.comparing import EvaluateConfig, HeldOut
from shortzip.train.settings.config import DataConfig, TuneConfig


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.slow
def test_a_run_keeps_them_to_its_checkpoint(tiny_release: Path, tiny_instructions: Path, tmp_path: Path) -> None:
    keys = {"max_steps": 3, "final_evaluation": False, "positions": "original"}
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_release, tiny_instructions, **keys)
    run = run_here(recipe, tmp_path / "run")
    cached = run_here(recipe, tmp_path / "cached", "--data.cache_features", str(tmp_path / "features"))
    assert losses(cached) == pytest.approx(losses(run), rel=1e-5)
    again = run_here(recipe, tmp_path / "again", "--gradient_checkpointing", "true")
    assert losses(again) == pytest.approx(losses(run), rel=1e-5)
    with pytest.raises(CheckpointError, match="other settings: positions was 'original' and is 'compact'"):
        run_here(recipe, tmp_path / "run", "--positions", "compact", "--resume_from_checkpoint", "latest")
    compact = run_here(recipe, tmp_path / "compact", "--positions", "compact")
    assert losses(compact)[0] != pytest.approx(losses(run)[0], rel=1e-3)

    final = run / "final"
    assert json.loads((final / "config.json").read_text())["positions"] == "original"
    assert "def keeps_positions" in (final / "positions.py").read_text()
    model, _ = load_release(str(final))
    assert model.config.positions == "original"
    assert load_release(str(final), Reductions.parse("4+2"))[0].config.positions == "compact"
    assert share_weights(model, Reductions.parse("4+2")).config.positions == "compact"
    weights = [model.state_dict(), load_release(str(compact / "final"))[0].state_dict()]
    projector = "model.multi_modal_projector.linear_1.weight"
    assert not torch.equal(*(found[projector] for found in weights))


def test_they_are_refused_where_no_token_is_left_out() -> None:
    said = "positions is 'original', and no visual token is left out"
    with pytest.raises(ConfigError, match=said):
        TuneConfig(model="m", data=DataConfig("rows.json"), positions="original")
    with pytest.raises(ConfigError, match=said):
        EvaluateConfig(["m"], HeldOut("rows.json"), positions="original")
