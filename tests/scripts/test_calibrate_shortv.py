"""`python scripts/calibrate_shortv.py`: what it writes, what it refuses, and that an interruption costs nothing."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from shortzip.reduction.layer_contribution import measure_layer_contributions
from shortzip.reduction.reductions import Reductions
from shortzip.scripts.calibrate_shortv import calibrate, report
from shortzip.train.calibration import measuring as calibration
from shortzip.train.calibration.choosing import load_sample
from shortzip.train.calibration.measuring import CalibrateConfig, Partial, budget_name, calibration_set, measure
from shortzip.train.release.loading import load_release

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "calibrate_shortv.py"


@pytest.fixture
def settings(tiny_release: Path, tiny_instructions: Path, tmp_path: Path) -> CalibrateConfig:
    return CalibrateConfig(
        model=str(tiny_release),
        instructions=str(tiny_instructions),
        samples=12,
        budget="5+3",
        samples_per_batch=2,
        output=tmp_path / "lc" / "layers.json",
    )


def changed(settings: CalibrateConfig, **values: Any) -> CalibrateConfig:
    other = copy.copy(settings)
    for name, value in values.items():
        setattr(other, name, value)
    return other


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in result.items() if key not in ("date", "seconds", "settings")}
    rest["measurements"] = [
        {key: value for key, value in item.items() if key != "seconds"} for item in result["measurements"]
    ]
    return rest


def test_file_chart_and_choice(settings, tiny_release, tiny_instructions):
    result = calibrate(changed(settings, freeze="60%", compare_full=True))
    assert json.loads(settings.output.read_text()) == result
    chart = Image.open(settings.output.with_suffix(".png"))
    assert min(chart.size) > 400
    assert not settings.output.with_name("layers.json.partial").exists()
    assert (result["model"], result["instructions"]) == (str(tiny_release), str(tiny_instructions))
    assert (result["samples"], result["seed"], result["num_layers"]) == (12, 0, 4)
    assert result["seconds"] > 0
    reduced, full = result["measurements"]
    assert (reduced["budget"], full["budget"]) == ({"dominant": 5, "contextual": 3}, None)
    # Some of the conversations have two images.
    assert 8 <= reduced["visual_tokens_per_prompt"] < 16 < 36 <= full["visual_tokens_per_prompt"]
    for item in (reduced, full):
        for kind in ("visual", "text"):
            for direction in ("full_to_frozen", "frozen_to_full"):
                found = item[kind][direction]
                assert len(found["mean"]) == len(found["std"]) == 4
                assert sorted(found["ranking"], key=lambda layer: found["mean"][layer]) == found["ranking"]
        assert item["visual"]["full_to_frozen"]["mean"][-1] == 0 < item["text"]["full_to_frozen"]["mean"][-1]
    assert reduced["visual"] != full["visual"]
    assert result["ranking"] == reduced["visual"]["full_to_frozen"]["ranking"]
    assert result["layers"] == sorted(result["ranking"][:2])
    text = report(result, settings.output)
    assert f"shortv: {{layers: {result['layers']}}}" in text
    assert "budget 5+3" in text
    assert "all visual tokens" in text


def test_values_are_those_of_the_prompts_up_to_the_first_answer(settings):
    result = calibrate(changed(settings, text_tokens=False))
    budget = Reductions({"dominant": 5, "contextual": 3})
    model, processor = load_release(settings.model, budget)
    asked = calibration_set(settings, budget)
    assert len(asked.prompts) == 12
    for item in asked.prompts:
        text = processor.tokenizer.decode(item.prompt, skip_special_tokens=True)
        assert text.endswith("ASSISTANT:")
        assert item.conversation.images
    samples = [load_sample(item, asked.dataset) for item in asked.prompts]
    expected = measure_layer_contributions(model, samples).visual[:, 0].mean(dim=0)
    found = torch.tensor(result["measurements"][0]["visual"]["full_to_frozen"]["mean"], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)
    assert "text" not in result["measurements"][0]


def test_seed_draws_other_conversations(settings, tmp_path):
    first = calibrate(settings)
    again = calibrate(changed(settings, output=tmp_path / "again.json"))
    assert without_times(again) == without_times(first)
    other = calibrate(changed(settings, seed=1, output=tmp_path / "other.json"))
    assert other["measurements"][0]["visual"] != first["measurements"][0]["visual"]


def test_a_reduced_model_keeps_its_own_budget_and_direction_is_a_choice(settings, tmp_path):
    model, processor = load_release(settings.model, Reductions({"dominant": 4, "contextual": 1}, {"layers": [2]}))
    model.save_pretrained(tmp_path / "reduced")
    processor.save_pretrained(tmp_path / "reduced")
    own = changed(
        settings, model=str(tmp_path / "reduced"), budget=None, direction="frozen_to_full", text_tokens=False
    )
    result = calibrate(own)
    item = result["measurements"][0]
    assert item["budget"] == {"dominant": 4, "contextual": 1}
    assert result["ranking"] == item["visual"]["frozen_to_full"]["ranking"]
    # The layer that this model freezes is measured like any other.
    assert item["visual"]["full_to_frozen"]["mean"][2] > 0
    unreduced = calibrate(changed(own, budget="none", output=tmp_path / "unreduced.json"))
    assert unreduced["measurements"][0]["budget"] is None


# ------------------------------------------------------------------------------------------------ going on


SLOWED = """
import runpy, sys, time
from shortzip.train.calibration import measuring as calibration
load_sample = calibration.load_sample
calibration.load_sample = lambda *arguments: time.sleep(0.1) or load_sample(*arguments)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_killed_and_started_again(settings, tmp_path):
    expected = calibrate(changed(settings, samples=30, samples_per_batch=1, output=tmp_path / "expected.json"))
    arguments = ["--model", settings.model, "--instructions", settings.instructions, "--samples", "30",
                 "--samples_per_batch", "1", "--budget", "5+3", "--output", str(settings.output)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", SLOWED, str(SCRIPT), *arguments], cwd=ROOT, env=environment)
    partial = settings.output.with_name("layers.json.partial")
    while process.poll() is None and (not partial.exists() or partial.read_bytes().count(b"\n") < 5):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not settings.output.exists(), "it was finished before it could be killed"
    done = partial.read_bytes().count(b"\n") - 2
    assert 3 <= done < 30
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert f"going on after {done} of 30 batches" in ended.stdout
    assert without_times(json.loads(settings.output.read_text())) == without_times(expected)


def test_finished_batches_are_not_measured_again(settings, monkeypatch):
    expected = calibrate(settings)
    settings.output.unlink()
    loaded: list[str] = []
    load = calibration.load_sample

    def load_some(chosen, dataset):
        loaded.append(chosen.conversation.id)
        if len(loaded) == 8:
            raise KeyboardInterrupt
        return load(chosen, dataset)

    monkeypatch.setattr(calibration, "load_sample", load_some)
    with pytest.raises(KeyboardInterrupt):
        calibrate(settings)
    partial = settings.output.with_name("layers.json.partial")
    # The last line was being written when it stopped.
    partial.write_bytes(partial.read_bytes() + b'{"budget": "5+3", "batch": 3, "visu')
    first, loaded[:] = loaded[:6], ["", *loaded[9:]]
    result = calibrate(settings)
    assert without_times(result) == without_times(expected)
    assert not set(first) & set(loaded)
    assert len(loaded) - 1 == 12 - 6


def test_picking_again_measures_nothing(settings, monkeypatch):
    first = calibrate(settings)
    assert first["layers"] is None
    monkeypatch.setattr(calibration, "load_release", None)
    again = calibrate(changed(settings, freeze="1"))
    assert again["layers"] == first["ranking"][:1]
    assert again["measurements"] == first["measurements"]
    none = calibrate(changed(settings, freeze="0"))
    assert none["layers"] is None
    assert "shortv: null" in report(none, settings.output).splitlines()


def test_other_settings_are_refused(settings):
    calibrate(settings)
    with pytest.raises(ValueError, match=r"layers.json is of other settings: samples was 12 and is 10.*--overwrite"):
        calibrate(changed(settings, samples=10))
    with pytest.raises(ValueError, match=r"method was 'visionzip' and is 'duet:window=2'"):
        calibrate(changed(settings, method="duet:window=2"))
    replaced = calibrate(changed(settings, samples=10, method="duet:window=2", overwrite=True))
    assert replaced["samples"] == 10
    (measured,) = replaced["measurements"]
    assert measured["budget"] == {"dominant": 5, "contextual": 3, "method": "duet", "window": 2}
    assert budget_name(measured["budget"]) == "budget 5+3, duet:window=2"


def test_partial_of_other_settings_or_other_weights_is_refused(settings, tmp_path):
    path = tmp_path / "x.partial"
    partial = Partial(path, {"seed": 0}, overwrite=False)
    assert partial.begin("5+3", "abc", 4) == {}
    partial.add("5+3", 2, {"visual": []})
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        Partial(path, {"seed": 1}, overwrite=False)
    again = Partial(path, {"seed": 0}, overwrite=False)
    with pytest.raises(ValueError, match="other conversations or weights"):
        again.begin("5+3", "abd", 4)
    assert list(again.begin("5+3", "abc", 4)) == [2]
    assert again.begin("all visual tokens", "abd", 4) == {}
    assert Partial(path, {"seed": 1}, overwrite=True).begin("5+3", "abc", 4) == {}


# ------------------------------------------------------------------------------------------------ bad input


def test_bad_images_raise_or_are_left_out(settings, tiny_instructions, tmp_path):
    rows = [row for row in json.loads(tiny_instructions.read_text()) if "image" in row][:6]
    for row in rows:
        row["image"] = str(row["image"][0] if isinstance(row["image"], list) else row["image"])
        row["conversations"] = row["conversations"][:2]
        row["conversations"][0]["value"] = "<image>\nname the colour"
    rows[2]["image"] = "images/missing.png"
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    bad = changed(settings, instructions=str(path), image_root=str(tiny_instructions.parent), text_tokens=False)
    with pytest.raises(ValueError, match=r"missing\.png"):
        calibrate(bad)
    result = calibrate(changed(bad, on_bad_sample="skip", output=tmp_path / "skipped.json"))
    assert result["samples"] == 5
    assert result["measurements"][0]["dropped"] == {"missing_image": 1}


def test_no_images_at_all(settings, tmp_path):
    row = {"id": "1", "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "yes"}]}
    path = tmp_path / "text.json"
    path.write_text(json.dumps([row]))
    with pytest.raises(ValueError, match="none of the 1 conversations answers something after an image"):
        calibrate(changed(settings, instructions=str(path)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"samples": 0}, "samples=0"),
        ({"budget": "64"}, r"54\+10"),
        ({"freeze": "1,2"}, "LC picks the layers"),
        ({"freeze": "many"}, "a number of layers"),
        ({"compare_full": True, "budget": "none"}, "give a budget"),
        ({"method": "scope"}, "method 'scope': give the budget that is met by it"),
    ],
)
def test_settings_refused(values, message):
    with pytest.raises(ValueError, match=message):
        CalibrateConfig(**values)


def test_compare_full_needs_a_budget(settings):
    with pytest.raises(ValueError, match="the model has none"):
        calibrate(changed(settings, budget=None, compare_full=True))


def test_measure_alone(settings, tmp_path):
    found = measure(changed(settings, text_tokens=False), None, Partial(tmp_path / "p", {}, False))
    assert found.visual.shape == (12, 2, 4)
    assert found.text is None
    assert budget_name(found.budget) == "all visual tokens"
