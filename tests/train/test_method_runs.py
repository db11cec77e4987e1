"""A run with another selection: LC, features, steps, the checkpoint and the command that repeats it, by its method."""

import json
import shlex
from pathlib import Path

import pytest
import yaml
from runs import run_here, write_recipe

from shortzip.reduction.reductions import Reductions
from shortzip.train.publish.card_command import command_of
from shortzip.train.release.opening import open_release
from shortzip.train.run.checkpoint import CheckpointError
from shortzip.train.settings.command_line import load_config

DUET = {"dominant": 5, "contextual": 3, "method": "duet", "window": 2}


def test_a_run_is_of_its_method_from_calibration_to_resuming(
    tiny_release: Path, tiny_instructions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml", tiny_release, tiny_instructions, visionzip=DUET, max_steps=2, save_steps=1,
        shortv={"freeze": 2, "calibration_samples": 4}, data={"cache_features": str(tmp_path / "features")},
    )  # fmt: skip
    run = run_here(recipe, tmp_path / "run")
    assert "5+3 visual tokens (duet:window=2)" in capsys.readouterr().out
    (identity,) = (tmp_path / "features").glob("*/identity.json")
    assert json.loads(identity.read_text())["visionzip"] == DUET
    found = open_release(str(run)).saved_reductions
    assert found == Reductions(DUET, {"layers": json.loads((run / "layers.json").read_text())["layers"]})
    code = {path.stem for path in (run / "final").glob("*.py")}
    assert "duet" in code
    assert not {"scope", "divprune", "baselines"} & code
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["visionzip"] == {**DUET, "seed": 0}
    command = shlex.split(command_of(written).replace("\\\n", ""))
    assert load_config(command[3:]).visionzip == load_config(["--config", str(run / "config.yaml")]).visionzip
    half = str(run / "step-000001")
    for other in (["--visionzip.window", "3"], ["--method", "visionzip"]):
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        with pytest.raises(CheckpointError, match="visionzip"):
            run_here(recipe, run, "--resume_from_checkpoint", half, *other)
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
