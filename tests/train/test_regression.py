"""Losses of a short run as they were recorded: whatever changes them has changed what is trained."""

import json
from pathlib import Path

import pytest
from runs import run_here, write_recipe

from shortzip.train.run.run_folder import read_metrics

GOLDEN = Path(__file__).parents[1] / "golden" / "train" / "losses.json"


@pytest.mark.parametrize("reduction", ["both", "visionzip", "shortv", "none"])
def test_the_losses_are_those_recorded(
    tiny_release: Path, tiny_instructions: Path, tiny_held_out: Path, tmp_path: Path, reduction: str
) -> None:
    keys: dict[str, object] = {"max_steps": 6, "eval_steps": 6, "save_steps": 100, "final_evaluation": False}
    keys["data"] = {"eval_instructions": str(tiny_held_out)}
    if reduction in ("shortv", "none"):
        keys["visionzip"] = None
    if reduction in ("visionzip", "none"):
        keys["shortv"] = None
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_release, tiny_instructions, **keys)
    folder = run_here(recipe, tmp_path / "run")
    losses = [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())[reduction], rel=1e-4), losses
