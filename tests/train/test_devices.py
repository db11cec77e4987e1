"""A run on a device that is not the CPU: no devices mixed, no waiting without need, nothing wide by accident.

The device is a stand-in (stand_in_device.py): what it shows of a GPU is where tensors lie and who waits for them.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, environment, write_recipe

STEP = ("train/step/", "train/tune_projector.py:accumulate", "a backward pass")


@pytest.mark.slow
def test_a_run_keeps_to_its_device_and_hardly_waits_for_it(
    tiny_release: Path, tiny_instructions: Path, tiny_held_out: Path, tmp_path: Path
) -> None:
    """Calibration, steps, held-out loss, checkpoint, the final table with its answers, pictures."""
    keys = {
        "max_steps": 2, "global_batch_size": 8, "per_device_train_batch_size": 4, "eval_steps": 2, "max_new_tokens": 4,
        "mixed_precision": "bf16", "shortv": {"freeze": "50%", "calibration_samples": 4},
        "data": {"eval_instructions": str(tiny_held_out)},
    }  # fmt: skip
    recipe, folder = write_recipe(tmp_path / "recipe.yaml", tiny_release, tiny_instructions, **keys), tmp_path / "run"
    probe = [sys.executable, str(ROOT / "tests" / "train" / "device_probe.py")]
    ended = subprocess.run(
        [*probe, "--config", str(recipe), "--output_dir", str(folder)],
        env=environment(), capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads((folder / "device.json").read_text())
    # Between the micro-batches of a step nothing waits: the loss and the norm are read once per step.
    assert [place for place in found["waits"] if place.startswith(STEP[:2])] == []
    assert found["waits"]["train/run/session.py:total aten._local_scalar_dense.default"] >= 2
    # Losses are added up in float64, and nothing else is.
    sums = ("train/tune_projector.py:accumulate", "train/evaluation/answers.py:held_out_loss", "train/run/session.py")
    assert [place for place in found["wide"] if not place.startswith(sums)] == []
    # In float32: the projector, what chooses visual tokens, and the LM head where LC or a loss is measured.
    meant = ("reduction/projector.py", "reduction/tower.py", "reduction/visionzip.py", "a backward pass",
             "reduction/layer_contribution.py")  # fmt: skip
    assert [place for place in found["products"] if not place.startswith(meant)] == []
