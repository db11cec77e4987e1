"""Kept conversions: another one for every file that changes what is written, and none that is damaged."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import PRETRAIN, SHARDS, copy_of_release
from safetensors.torch import save_file
from transformers import GenerationConfig

from shortzip.data.files import written_whole
from shortzip.train.release import conversions
from shortzip.train.release.content import content_digest
from shortzip.train.release.convert import convert_to_transformers
from shortzip.train.release.layout_llava import LlavaLayout
from shortzip.train.release.opening import open_release
from shortzip.train.release.spec import ReleaseSpec


@pytest.fixture
def release(tmp_path: Path) -> Path:
    return copy_of_release(tmp_path)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The conversions that were asked for, which hold nothing but a config here."""
    targets: list[Path] = []

    def stub(source: Path, target: Path, **_: Any) -> None:
        targets.append(target)
        with written_whole(target) as folder:
            (folder / "config.json").write_text("{}")

    monkeypatch.setattr(conversions, "convert_to_transformers", stub)
    return targets


def tower_of(release: Path) -> Path:
    return next((release.parent / "openai").iterdir())


def with_key(path: Path, key: str, value: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), key: value}))


def alter(path: Path) -> None:
    """Another value in the middle of a file, at the same size and time."""
    times, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], Any]] = {
    "tokenizer": lambda release: with_key(release / "tokenizer_config.json", "model_max_length", 77),
    "added tokens": lambda release: with_key(release / "added_tokens.json", "<x>", 999),
    "generation config": lambda release: with_key(release / "generation_config.json", "max_length", 55),
    "config": lambda release: with_key(release / "config.json", "rope_theta", 5000.0),
    "weights of the same size and time": lambda release: alter(release / SHARDS[0]),
    "the tower's image processor": lambda release: with_key(
        tower_of(release) / "preprocessor_config.json", "image_std", [0.1, 0.2, 0.3]
    ),
    "the tower's config": lambda release: with_key(tower_of(release) / "config.json", "layer_norm_eps", 0.1),
    "the tower's weights": lambda release: alter(tower_of(release) / "pytorch_model.bin"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_every_file_that_a_conversion_reads_gives_another_one(what: str, release: Path, made: list[Path]) -> None:
    cache = release.parent / "cache"
    first = open_release(str(release), cache_dir=cache).folder
    assert open_release(str(release), cache_dir=cache).folder == first
    CHANGES[what](release)
    assert open_release(str(release), cache_dir=cache).folder != first
    assert len(made) == 2


def test_another_converter_projector_or_template_gives_another_one(
    release: Path, made: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = release.parent / "cache"
    open_release(str(release), cache_dir=cache)
    projector = release.parent / "projector"
    shutil.copytree(PRETRAIN, projector)
    open_release(ReleaseSpec(str(release), mm_projector=str(projector)), cache_dir=cache)
    alter(projector / "mm_projector.bin")
    open_release(ReleaseSpec(str(release), mm_projector=str(projector)), cache_dir=cache)
    monkeypatch.setattr(conversions, "FORMAT", conversions.FORMAT + 1)
    open_release(str(release), cache_dir=cache)
    template = release.parent / "other.jinja"
    template.write_text("{{ messages }}")
    monkeypatch.setattr(LlavaLayout, "template", template)
    open_release(str(release), cache_dir=cache)
    assert len(set(made)) == len(made) == 5


def test_a_copy_elsewhere_shares_the_conversion(release: Path, made: list[Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = open_release(str(release), cache_dir=cache).folder
    (tmp_path / "moved").mkdir()
    assert open_release(str(copy_of_release(tmp_path / "moved")), cache_dir=cache).folder == first
    assert len(made) == 1


def test_mended_values_reach_the_model(release: Path, tmp_path: Path) -> None:
    open_release(str(release), cache_dir=tmp_path / "cache")
    with_key(release / "generation_config.json", "eos_token_id", 9)
    with_key(tower_of(release) / "preprocessor_config.json", "image_mean", [0.5, 0.25, 0.125])
    folder = open_release(str(release), cache_dir=tmp_path / "cache").folder
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 9
    assert "0.125" in (folder / "processor_config.json").read_text()


def test_what_is_damaged_or_half_there_is_converted_anew(
    release: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = open_release(str(release), cache_dir=tmp_path / "cache").folder
    shard = sorted(folder.glob("*.safetensors"))[0]
    expected = shard.read_bytes()
    times = shard.stat()
    shard.write_bytes(expected[:-40] + bytes(40))
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert open_release(str(release), cache_dir=tmp_path / "cache").folder == folder
    assert shard.read_bytes() == expected
    assert "is not as it was written" in caplog.text
    (folder / "config.json").unlink()
    open_release(str(release), cache_dir=tmp_path / "cache")
    assert (folder / "config.json").is_file()
    (tmp_path / "cache" / f"{folder.name}.json").write_text("[")
    assert open_release(str(release), cache_dir=tmp_path / "cache").folder == folder


@pytest.mark.parametrize("locks", [True, False])
def test_of_two_that_ask_at_once_one_converts_and_both_use_it(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    both_convert = threading.Barrier(2)

    def convert(*arguments: Any, **keywords: Any) -> None:
        if not locks:
            both_convert.wait(30)
        convert_to_transformers(*arguments, **keywords)

    def no_locks(self: Any, *_: Any, **__: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(conversions, "convert_to_transformers", convert)
    if not locks:
        monkeypatch.setattr(conversions.FileLock, "acquire", no_locks)
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(open_release(str(release), cache_dir=tmp_path / "c").folder))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 2
    assert len(set(folders)) == 1
    assert (folders[0] / "config.json").is_file()
    assert not list((tmp_path / "c").glob(".partial-*"))


def test_what_killed_conversions_of_other_content_left_is_removed(release: Path, made: list[Path]) -> None:
    cache = release.parent / "cache"
    with written_whole(cache / "other-0123456789abcdef") as left:
        shutil.copytree(left, cache / "kept")
        name = left.name
    (cache / "kept").rename(cache / name)  # whose owner holds no lock on it any more
    with written_whole(cache / "another-0123456789abcdef") as living:
        open_release(str(release), cache_dir=cache)
        assert living.is_dir()
        assert not (cache / name).exists()


@pytest.mark.parametrize("kind", ["safetensors", "zip", "old"])
def test_a_large_file_is_known_by_every_tensor(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shortzip.train.release.content.READ_WHOLE", 0)
    monkeypatch.setattr("shortzip.train.release.content._STRIDE", 1 << 12)
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.bin")

    def digest(change: str | None) -> str:
        tensors = {name: torch.zeros(3000) for name in ("a", "b", "c")}
        if change:
            tensors[change][1] = 1.0
        if kind == "safetensors":
            save_file(tensors, path)
        else:
            torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
        return content_digest(path)

    assert len({digest(change) for change in (None, "a", "b", "c")}) == 4
    assert content_digest(path) == content_digest(path)
