"""Whole runs with cached features: the same training, and from the second on nothing of the tower is loaded."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import checkpoint_tensors, output_of, run_here, start_there, wait_until, write_recipe
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import write_instructions, write_next_release, write_release
from transformers import CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from shortzip.train.release import towers
from shortzip.train.release.loading import load_release
from shortzip.train.release.opening import open_release
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.run.run_folder import read_metrics


@pytest.fixture
def release(tmp_path: Path) -> Path:
    return write_release(tmp_path / "release")


@pytest.fixture
def recipe(tmp_path: Path, release: Path, tiny_instructions: Path, tiny_held_out: Path) -> Path:
    data = {"eval_instructions": str(tiny_held_out), "cache_features": str(tmp_path / "features")}
    keys = {"max_steps": 4, "eval_steps": 2, "final_evaluation": False, "learning_rate": 0.001}
    return write_recipe(tmp_path / "recipe.yaml", release, tiny_instructions, data=data, **keys)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


def replace_the_tower(release: Path) -> None:
    """Other weights of the tower in the file, whose size and times stay, as `cp -p` of another release leaves them."""
    path = release / "model.safetensors"
    times = path.stat()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if "vision_tower" in name and tensor.is_floating_point():
            tensor.mul_(0.7)
    save_file(tensors, path, metadata)
    assert path.stat().st_size == times.st_size
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture
def blocks_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every forward pass of a block of a tower."""
    calls: list[int] = []
    forward = CLIPEncoderLayer.forward

    def counted(self: Any, *arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        return forward(self, *arguments, **keywords)

    monkeypatch.setattr(CLIPEncoderLayer, "forward", counted)
    return calls


def test_a_run_with_cached_features_is_the_uncached_run(recipe: Path, tmp_path: Path, blocks_run: list[int]) -> None:
    expected = run_here(recipe, tmp_path / "uncached", "--data.cache_features", "null")
    assert blocks_run
    cached = run_here(recipe, tmp_path / "cached")
    assert losses(cached) == pytest.approx(losses(expected), rel=1e-5)
    found = checkpoint_tensors(cached, 4)
    for name, tensor in checkpoint_tensors(expected, 4).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5 * tensor.abs().max().item())
    weights = [load_file(folder / "final" / "model.safetensors") for folder in (expected, cached)]
    assert weights[0].keys() == weights[1].keys(), "the reduced checkpoint has its tower"
    for name in weights[0]:
        if "vision_tower" in name:
            assert torch.equal(weights[0][name], weights[1][name])


def test_a_second_run_and_a_sweep_neither_load_the_tower_nor_run_it(
    recipe: Path,
    tmp_path: Path,
    blocks_run: list[int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = run_here(recipe, tmp_path / "first")
    assert "0 images computed" not in capsys.readouterr().out
    blocks_run.clear()
    with_tower: list[bool] = []

    def load(*arguments: Any, **keywords: Any) -> Any:
        with_tower.append(keywords["with_tower"])
        return load_release(*arguments, **keywords)

    monkeypatch.setattr("shortzip.train.preparation.load_release", load)
    monkeypatch.setattr("shortzip.train.inputs.feature_filling.load_tower", None)
    again = run_here(recipe, tmp_path / "again")
    assert "features: 0 images computed" in capsys.readouterr().out
    torch.testing.assert_close(checkpoint_tensors(again, 4), checkpoint_tensors(first, 4), rtol=0, atol=0)
    assert losses(again) == losses(first)
    faster = run_here(recipe, tmp_path / "faster", "--learning_rate", "0.01")
    other_layers = run_here(recipe, tmp_path / "layers", "--shortv.layers", "[2]")
    assert len({losses(folder)[-1] for folder in (first, faster, other_layers)}) == 3
    assert all(torch.isfinite(torch.tensor(losses(folder))).all() for folder in (faster, other_layers))
    assert not blocks_run
    assert with_tower == [False] * 3


def test_a_tower_replaced_at_the_same_size_and_time_has_its_own_features(
    recipe: Path, release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though no image is new, so that nothing of the tower would have to be loaded."""
    first = run_here(recipe, tmp_path / "first")
    replace_the_tower(release)
    expected = run_here(recipe, tmp_path / "expected", "--data.cache_features", "null")
    capsys.readouterr()
    found = run_here(recipe, tmp_path / "found")
    assert "features: 0 images" not in capsys.readouterr().out
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    assert losses(found) != pytest.approx(losses(first), rel=1e-5)
    folders = [path for path in (tmp_path / "features").iterdir() if path.is_dir()]
    assert len({json.loads((path / "identity.json").read_text())["tower"] for path in folders}) == 2


def test_images_that_are_new_have_the_tower_loaded_alone(
    recipe: Path, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(recipe, tmp_path / "first")
    capsys.readouterr()
    more = write_instructions(tmp_path / "more", 12, seed=5)
    expected = run_here(
        recipe, tmp_path / "expected", "--data.instructions", str(more), "--data.cache_features", "null"
    )
    capsys.readouterr()
    found = run_here(recipe, tmp_path / "found", "--data.instructions", str(more))
    assert "images computed" in (said := capsys.readouterr().out)
    assert "features: 0 images" not in said
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    whole, _ = load_release(ReleaseSpec(str(release), dtype=torch.bfloat16))
    alone = towers.load_tower(open_release(str(release)).folder, whole.config, torch.bfloat16)
    assert isinstance(alone, CLIPVisionModel)
    assert towers.tower_digest(alone) == towers.tower_digest(whole.model.vision_tower)


OPENED: list[str] = []
WATCHED: list[str] = []


def note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: these cannot be taken away again."""
    if event == "open" and WATCHED and str(arguments[0]).startswith(WATCHED[0]):
        OPENED.append(str(arguments[0]))


sys.addaudithook(note_opened)


@pytest.mark.parametrize("family", ["llava", pytest.param("llava-next", marks=pytest.mark.slow)])
def test_a_second_run_opens_no_image(
    family: str, tmp_path: Path, tiny_instructions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor reads its header for its size, nor looks whether it is still the same."""
    release = (write_release if family == "llava" else write_next_release)(tmp_path / "release")
    shutil.copytree(tiny_instructions.parent, tmp_path / "rows")
    data = {"cache_features": str(tmp_path / "features"), "cache_dir": str(tmp_path / "lengths")}
    keys = {"max_steps": 3, "final_evaluation": False, "learning_rate": 0.001, "eval_steps": None}
    recipe = write_recipe(
        tmp_path / "recipe.yaml", release, tmp_path / "rows" / tiny_instructions.name, data=data, **keys
    )
    monkeypatch.setattr("shortzip.data.known_images.SETTLED", 0)
    WATCHED[:] = [str(tmp_path / "rows" / "images")]
    try:
        first = run_here(recipe, tmp_path / "first")
        assert OPENED
        OPENED.clear()
        second = run_here(recipe, tmp_path / "second")
        assert not OPENED
        assert losses(second) == losses(first)
        torch.testing.assert_close(checkpoint_tensors(second, 3), checkpoint_tensors(first, 3), rtol=0, atol=0)
    finally:
        WATCHED.clear()
        OPENED.clear()


@pytest.mark.slow
def test_two_processes_fill_the_cache_and_a_kill_in_between_does_no_harm(
    recipe: Path, tmp_path: Path, blocks_run: list[int]
) -> None:
    expected = run_here(recipe, tmp_path / "expected")
    features = tmp_path / "features"
    shutil.rmtree(features)
    killed = start_there(recipe, tmp_path / "killed", processes=2)
    wait_until(lambda: any(features.glob("*/*.safetensors")), killed)
    workers = [int(pid) for pid in Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()]
    for pid in (*workers, killed.pid):
        os.kill(pid, signal.SIGKILL)
    output_of(killed, 240)
    process = start_there(recipe, tmp_path / "both", processes=2)
    output = output_of(process)
    assert process.returncode == 0, output
    blocks_run.clear()
    alone = run_here(recipe, tmp_path / "alone")
    assert not blocks_run
    for folder in (alone, tmp_path / "both"):
        assert losses(folder) == pytest.approx(losses(expected), rel=1e-5)
