"""Calibration twice: what may be taken from before, what may not, and outputs that are in the way."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shortzip.data.errors import CannotWrite, FileInTheWay, UserError
from shortzip.reduction.reductions import Reductions
from shortzip.scripts.calibrate_shortv import calibrate
from shortzip.train.calibration import measuring as calibration
from shortzip.train.calibration.choosing import choose_layers
from shortzip.train.calibration.measuring import CalibrateConfig
from shortzip.train.release.loading import load_release
from shortzip.train.release.opening import open_release
from shortzip.train.settings.config import DataConfig, ShortVConfig, TuneConfig, VisionZipConfig


@pytest.fixture
def settings(tiny_release: Path, tiny_instructions: Path, tmp_path: Path) -> CalibrateConfig:
    shutil.copytree(tiny_release, tmp_path / "model")
    shutil.copytree(tiny_instructions.parent, tmp_path / "data")
    return CalibrateConfig(
        model=str(tmp_path / "model"),
        instructions=str(tmp_path / "data" / "instructions.json"),
        samples=4,
        budget="5+3",
        samples_per_batch=4,
        text_tokens=False,
        output=tmp_path / "layers.json",
    )


def alter_tensor(release: Path, part: str) -> None:
    path = release / "model.safetensors"
    times, tensors = path.stat(), load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    name = next(name for name in sorted(tensors) if part in name and tensors[name].is_floating_point())
    tensors[name].view(-1)[-1] += 1
    save_file(tensors, path, metadata)
    assert path.stat().st_size == times.st_size
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def alter_json(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def alter_images(data: Path) -> None:
    for file in (data / "images").iterdir():
        Image.new("RGB", Image.open(file).size, "yellow").save(file)


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "language model": (lambda root: alter_tensor(root / "model", "lm_head"), "model.safetensors of the release"),
    "tower": (lambda root: alter_tensor(root / "model", "vision_tower"), "model.safetensors"),
    "config": (
        lambda root: alter_json(root / "model" / "config.json", lambda c: c["text_config"].update(rms_norm_eps=0.1)),
        "config.json of the release",
    ),
    "image processor": (
        lambda root: alter_json(
            root / "model" / "processor_config.json", lambda c: c["image_processor"].update(image_mean=[0.1, 0.2, 0.3])
        ),
        "processor_config.json",
    ),
    "questions": (
        lambda root: alter_json(
            root / "data" / "instructions.json",
            lambda rows: [row["conversations"][0].update(value="<image>" * str(row).count(".png") + "yes?")
                          for row in rows],
        ),
        "the conversations' texts and images, the conversations' prompts",
    ),
    "images under their names": (lambda root: alter_images(root / "data"), "the conversations' texts and images"),
}  # fmt: skip


def test_what_was_measured_on_something_else_is_not_handed_out(
    settings: CalibrateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = calibrate(settings)
    monkeypatch.setattr(calibration, "load_release", None)
    for name in ("model", "data"):
        shutil.copytree(tmp_path / name, tmp_path / "kept" / name)
    for change, named in CHANGES.values():
        change(tmp_path)
        with pytest.raises(UserError, match=f"before these changed: .*{named}.*--overwrite"):
            calibrate(replace(settings, freeze="2"))
        assert json.loads(settings.output.read_text()) == first
        for name in ("model", "data"):
            shutil.rmtree(tmp_path / name)
            shutil.copytree(tmp_path / "kept" / name, tmp_path / name, copy_function=shutil.copyfile)
    again = calibrate(replace(settings, freeze="2"))
    assert again["measurements"] == first["measurements"], "a copy under the same names is the same"


def test_an_output_that_does_not_say_what_it_measured_on_is_taken_with_a_word(
    settings: CalibrateConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    first = calibrate(settings)
    alter_json(settings.output, lambda c: [c.pop("measured on"), c.pop("digest"), c["settings"].pop("load_in_4bit")])
    assert calibrate(replace(settings, freeze="1"))["layers"] == first["ranking"][:1]
    assert "is not known" in capsys.readouterr().out


@pytest.mark.parametrize(("length", "positions"), [(1, "compact"), (3, "compact"), (3, "original")])
def test_the_script_and_a_run_freeze_the_same_layers(
    settings: CalibrateConfig, tmp_path: Path, length: int, positions: Any
) -> None:
    """Though some conversations begin without an image, are too long to be trained on, or have two images."""
    rows = json.loads(Path(settings.instructions).read_text())
    for row in rows[::3]:
        row["conversations"] = [
            {"from": "human", "value": "hello"}, {"from": "gpt", "value": "yes no " * 3}, *row["conversations"]
        ]  # fmt: skip
    for row in rows[1::4]:
        row["conversations"][-1]["value"] = "a text without a picture " * 90
    Path(settings.instructions).write_text(json.dumps(rows))
    asked = replace(settings, samples=length, freeze="50%", seed=2, positions=positions)
    measured = calibrate(asked)
    config = TuneConfig(
        model=settings.model,
        data=DataConfig(instructions=settings.instructions, max_length=120),
        visionzip=VisionZipConfig(5, 3),
        shortv=ShortVConfig(freeze="50%", calibration_samples=length),
        positions=positions,
        mixed_precision="no",
        seed=2,
        output_dir=str(tmp_path / "run"),
    )
    (tmp_path / "run").mkdir()
    chosen, _ = choose_layers(config, open_release(settings.model), Accelerator(cpu=True))
    assert chosen == measured["layers"]
    found = json.loads((tmp_path / "run" / "layers.json").read_text())
    mean = measured["measurements"][0]["visual"]["full_to_frozen"]["mean"]
    assert found["layer_contributions"] == pytest.approx(mean, rel=1e-4, abs=1e-9)
    assert found["ranking"] == measured["ranking"]


def test_original_positions_are_measured_and_known_again(settings: CalibrateConfig, tmp_path: Path) -> None:
    compact = calibrate(settings)
    with pytest.raises(UserError, match=r"is of other settings: positions.*--overwrite"):
        calibrate(replace(settings, positions="original"))
    alter_json(settings.output, lambda result: [result["settings"].pop("positions")])
    assert calibrate(replace(settings, freeze="1"))["layers"] == compact["ranking"][:1], "of before there was a choice"
    original = replace(settings, positions="original", output=tmp_path / "original.json")
    measured = calibrate(original)
    assert measured["measurements"][0]["visual"] != compact["measurements"][0]["visual"]
    with pytest.raises(UserError, match=r"is of other settings: positions"):
        calibrate(replace(original, positions="compact"))
    # A model that was saved with them is measured with them.
    model, processor = load_release(settings.model, Reductions.parse("5+3", positions="original"))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "saved")
    own = calibrate(replace(settings, model=str(tmp_path / "saved"), budget=None, output=tmp_path / "own.json"))
    assert own["measurements"][0]["visual"] == measured["measurements"][0]["visual"]
    for budget in (None, "none"):
        with pytest.raises(UserError, match="positions 'original': give the budget, whose tokens have them"):
            replace(settings, positions="original", budget=budget)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever measures fails: refusals come before."""
    monkeypatch.setattr(calibration, "load_release", None)


BAD = ["", "{", "[1, 2]", "{}", '{"measurements": []}', '{"settings": {}, "measurements": [{"visual": 3}]}', "\x00"]


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("content", BAD)
def test_an_output_that_is_no_calibration_is_refused_by_name(settings: CalibrateConfig, content: str) -> None:
    settings.output.write_text(content)
    with pytest.raises(UserError, match=r"layers\.json .*--overwrite true"):
        calibrate(settings)
    assert settings.output.read_text() == content


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    "content", ["\n", "x\n", "[]\n", "{}\n", '{"settings": 1}\n', '{"settings": {}}\n{"budget": 1}\n', "\xff\n"]
)
def test_a_partial_that_is_none_is_refused_by_name(settings: CalibrateConfig, content: str) -> None:
    partial = settings.output.with_name("layers.json.partial")
    partial.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"layers\.json\.partial is not what an interrupted calibration leaves"):
        calibrate(settings)
    assert partial.read_bytes() == content.encode("latin-1")


def test_changed_measurements_are_refused(settings: CalibrateConfig) -> None:
    calibrate(settings)
    alter_json(settings.output, lambda c: c["measurements"][0]["visual"]["full_to_frozen"]["ranking"].reverse())
    with pytest.raises(UserError, match="other measurements than were written"):
        calibrate(settings)


@pytest.mark.usefixtures("unmeasured")
def test_files_and_folders_in_the_way_are_refused_before_anything_is_measured(
    settings: CalibrateConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is the name of the chart"):
        calibrate(replace(settings, output=tmp_path / "chart.png", overwrite=True))
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"mine")
    with pytest.raises(FileInTheWay, match=r"photo\.png is another picture.*--overwrite true"):
        calibrate(replace(settings, output=tmp_path / "photo.json"))
    assert photo.read_bytes() == b"mine"
    for name in ("folder.json", "pictures.png"):
        (tmp_path / name).mkdir()
        with pytest.raises(FileInTheWay, match=f"{name} is a folder"):
            calibrate(replace(settings, output=tmp_path / name.replace(".png", ".json"), overwrite=True))
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="cannot be written"):
        calibrate(replace(settings, output=tmp_path / "file" / "layers.json"))
    with pytest.raises(UserError, match="the model has none"):
        calibrate(replace(settings, budget=None, compare_full=True))


def test_overwrite_replaces_the_chart_of_another(settings: CalibrateConfig) -> None:
    settings.output.with_suffix(".png").write_bytes(b"mine")
    calibrate(replace(settings, overwrite=True))
    assert Image.open(settings.output.with_suffix(".png")).size[0] > 400
    calibrate(replace(settings, freeze="1"))
    settings.output.with_suffix(".png").write_bytes(b"mine")
    with pytest.raises(FileInTheWay, match="is another picture"):
        calibrate(replace(settings, freeze="2"))


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """Lets files grow to so many bytes only, as a disk that fills up."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("unmeasured")
def test_a_full_disk_is_said_before_anything_is_measured(
    settings: CalibrateConfig, full_disk: Callable[[int], None]
) -> None:
    full_disk(0)
    with pytest.raises(CannotWrite, match=r"layers\.json cannot be written"):
        calibrate(settings)


def test_a_disk_that_fills_up_meanwhile_costs_nothing_of_what_was_measured(
    settings: CalibrateConfig, full_disk: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    full_disk(8192)  # the chart is larger
    with pytest.raises(CannotWrite, match=r"layers\.png cannot be written"):
        calibrate(settings)
    full_disk(resource.RLIM_INFINITY)
    calibrate(settings)
    assert "holds these measurements already" in capsys.readouterr().out
    assert settings.output.with_suffix(".png").stat().st_size > 8192
