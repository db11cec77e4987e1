"""A run on a device that is not the CPU: no devices mixed, no waiting without need, nothing wide by accident.

The device is a stand-in (stand_in_device.py): what it shows of a GPU is where tensors lie and who waits for them.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT, environment, write_recipe

STEP = ("train/step/", "train/tune_projector.py", "a backward pass")
ONCE_A_STEP = ["train/step/engine.py:update aten._local_scalar_dense.default"]  # the norm


WAYS: dict[str, dict[str, Any]] = {
    "pixels": {},
    "features are cached, layers chosen": {"data": {"cache_features": "features"}, "shortv": {"freeze": 1}},
    "taught": {"distill": {"weight": 0.5, "temperature": 1.0}},
    "taught by what was cached": {
        "distill": {"weight": 0.5, "temperature": 1.0},
        "data": {"cache_teacher": "lessons", "cache_features": "features"},
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_run_keeps_to_its_device_and_hardly_waits_for_it(
    way: str, tiny_release: Path, tiny_instructions: Path, tiny_held_out: Path, tmp_path: Path
) -> None:
    """Steps, held-out loss, checkpoint, the final table with its answers, pictures, the reduced checkpoint."""
    held_out = tiny_held_out.with_name("few.json")
    held_out.write_text(json.dumps(json.loads(tiny_held_out.read_text())[:3]))
    keys: dict[str, Any] = {
        "max_steps": 2, "global_batch_size": 8, "per_device_train_batch_size": 4, "eval_steps": 2, "max_new_tokens": 4,
        "mixed_precision": "bf16", "pictures": 1, "data": {"eval_instructions": str(held_out)},
    }  # fmt: skip
    for name, value in WAYS[way].items():
        keys[name] = {**keys.get(name, {}), **value}
    for name in set(keys["data"]) & {"cache_features", "cache_teacher"}:
        keys["data"][name] = str(tmp_path / keys["data"][name])
    recipe, folder = write_recipe(tmp_path / "recipe.yaml", tiny_release, tiny_instructions, **keys), tmp_path / "run"
    probe = [sys.executable, str(ROOT / "tests" / "train" / "device_probe.py")]
    variables = {name: value for name, value in environment().items() if name != "ACCELERATE_USE_CPU"}
    ended = subprocess.run(
        [*probe, "--config", str(recipe), "--output_dir", str(folder)],
        env=variables, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads((folder / "device.json").read_text())
    waits, steps = found["waits"], 2
    assert [place for place in waits if place.startswith(STEP)] == ONCE_A_STEP
    assert waits[ONCE_A_STEP[0]] == steps, "micro-batches are not waited for"
    assert sum(count for place, count in waits.items() if place.startswith("train/run/session.py")) == steps
    # Losses are added up in float64, and nothing else is.
    sums = ("train/tune_projector.py:accumulate", "train/evaluation/answers.py")
    assert [place for place in found["wide"] if not place.startswith(sums)] == []
    # The projector, the scores that choose visual tokens, and the logits whose divergence is a layer's contribution.
    # (Attention's bmm is the CPU's own way to compute it.)
    lc = "reduction/layer_contribution.py:_log_probabilities"
    meant = ("reduction/projector.py", "reduction/tower.py:_project_in_float32", lc, "a backward pass")
    linear = [place for place in found["products"] if place.endswith(("mm.default",)) and "bmm" not in place]
    assert [place for place in linear if not place.startswith(meant)] == []
