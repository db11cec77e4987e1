"""The same of ShortZip's own readers: releases in either layout, towers, LoRAs; and outputs that are links."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import RELEASE, TOWER, copy_of_release, edit_config
from transformers import AutoProcessor

from shortzip.data.errors import FileInTheWay, UserError
from shortzip.reduction.reductions import Reductions
from shortzip.scripts.convert_release import main
from shortzip.train.release.convert import convert_to_transformers
from shortzip.train.release.loading import load_release
from shortzip.train.release.opening import open_release
from shortzip.train.release.tensor_files import open_tensors, read_specs, weight_files

DEEP = '{"a":' * 5000 + "1" + "}" * 5000
INDEX = "pytorch_model.bin.index.json"


def compress(path: Path, extra: int = 5_000_000) -> None:
    """Packs a .bin again, deflated, with so many bytes more in its pickle."""
    with zipfile.ZipFile(path) as given:
        held = {name: given.read(name) for name in given.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in held.items():
            target.writestr(name, data + bytes(extra if name.endswith("data.pkl") else 0))


def edit_index(release: Path, file: Any) -> None:
    index = json.loads((release / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (release / INDEX).write_text(json.dumps(index))


def without_mean(release: Path) -> None:
    path = release.parent / "openai" / TOWER.name / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    settings.pop("image_mean")
    path.write_text(json.dumps(settings))


def without_patches(release: Path) -> None:
    path = release.parent / "openai" / TOWER.name / "config.json"
    config = json.loads(path.read_text())
    config.get("vision_config", config)["patch_size"] = 0
    path.write_text(json.dumps(config))


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "deep config": (lambda r: (r / "config.json").write_text(DEEP), r"config\.json is nested too deeply"),
    "deep index": (lambda r: (r / INDEX).write_text(DEEP), r"bin\.index\.json is nested too deeply"),
    "text as index": (lambda r: (r / INDEX).write_text("hello"), r"bin\.index\.json is not readable as JSON"),
    "no weight_map": (lambda r: (r / INDEX).write_text("{}"), r"bin\.index\.json has no weight_map"),
    "a shard above": (
        lambda r: edit_index(r, "../x.bin"),
        r"weight_map says that model\.norm\.weight is in '\.\./x\.bin'",
    ),
    "an absolute shard": (lambda r: edit_index(r, "/tmp/x.bin"), r"model\.norm\.weight is in '/tmp/x\.bin'"),
    "deep tokenizer_config": (
        lambda r: (r / "tokenizer_config.json").write_text(DEEP),
        r"tokenizer_config\.json is nested too deeply",
    ),
    "a compressed shard": (
        lambda r: compress(r / "pytorch_model-00001-of-00003.bin"),
        r"00001-of-00003\.bin is refused: its \d+ bytes unpack to \d+",
    ),
    "no heads": (
        lambda r: edit_config(r, num_attention_heads=0),
        "num_attention_heads is 0, needed is a whole number",
    ),
    "a text as size": (lambda r: edit_config(r, hidden_size="64"), "hidden_size is '64', needed is a whole number"),
    "patches of no size": (without_patches, r"image_size \d+ and patch_size 0 are no squares"),
    "no image_mean": (without_mean, r"preprocessor_config\.json lacks image_mean"),
}


@pytest.mark.parametrize(("change", "message"), list(BAD.values()), ids=list(BAD))
def test_bad_releases_are_refused_by_the_files_name(
    tmp_path: Path, change: Callable[[Path], Any], message: str
) -> None:
    release = copy_of_release(tmp_path)
    change(release)
    with pytest.raises(ValueError, match=message):
        convert_to_transformers(release, tmp_path / "out", tower=tmp_path / "openai" / TOWER.name)
    assert not (tmp_path / "out").exists()


def test_a_compressed_projector_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "mm_projector.bin"
    torch.save({"model.mm_projector.0.weight": torch.zeros(4, 4)}, path)
    assert read_specs(path)["model.mm_projector.0.weight"].shape == (4, 4)
    compress(path)
    assert path.stat().st_size < 50_000
    for read in (read_specs, lambda given: open_tensors(given).__enter__()):
        with pytest.raises(ValueError, match=r"mm_projector\.bin is refused: .*torch\.save compresses nothing"):
            read(path)


def test_a_projector_that_claims_more_than_it_holds(tmp_path: Path) -> None:
    """A bias of one number, a trillion times in a row, would be written out when it is read."""
    path = tmp_path / "mm_projector.bin"
    torch.save(
        {
            "model.mm_projector.0.weight": torch.zeros(64, 48),
            "model.mm_projector.0.bias": torch.zeros(1).expand(10**12),
            "model.mm_projector.2.weight": torch.zeros(64, 64),
            "model.mm_projector.2.bias": torch.zeros(64),
        },
        path,
    )
    with pytest.raises(ValueError, match=r"the projector's linear_1.bias is \(1000000000000,\), needed is \(64,\)"):
        convert_to_transformers(RELEASE, tmp_path / "out", tower=TOWER, projector=path)


def test_the_weights_are_those_that_transformers_takes(tmp_path: Path) -> None:
    for name in ("model.safetensors", "a.safetensors", "pytorch_model.bin"):
        (tmp_path / name).touch()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors"}}')
    assert [path.name for path in weight_files(tmp_path)] == ["model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    assert [path.name for path in weight_files(tmp_path)] == ["a.safetensors"]


def make_lora(folder: Path, **config: Any) -> Path:
    """As LLaVA's own LoRA tuning leaves it."""
    folder.mkdir()
    shutil.copy(RELEASE / "config.json", folder)
    settings = {"peft_type": "LORA", "base_model_name_or_path": "lmsys/vicuna-7b-v1.5", **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.safetensors").touch()
    torch.save({"base_model.model.model.mm_projector.0.weight": torch.zeros(4, 4)}, folder / "non_lora_trainables.bin")
    return folder


def test_a_lora_is_recognised_and_said_what_to_do_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = make_lora(tmp_path / "llava-v1.5-7b-lora")
    said = (
        r"llava-v1.5-7b-lora is a LoRA over lmsys/vicuna-7b-v1.5 \(adapter_config.json\), not a whole release: merge "
        r"the two.*merge_lora_weights.py.*mm_projector .*non_lora_trainables.bin"
    )
    with pytest.raises(ValueError, match=said):
        open_release(str(lora), cache_dir=tmp_path)
    with pytest.raises(UserError, match="is a LoRA"):
        main([str(lora), "--output", str(tmp_path / "out")])
    assert "converting it once" not in caplog.text + capsys.readouterr().err
    (lora / "config.json").unlink()  # as PEFT leaves it, for any model
    (lora / "non_lora_trainables.bin").unlink()
    with pytest.raises(ValueError, match=r"is a LoRA over lmsys/vicuna-7b-v1.5 .*merge_and_unload\)$"):
        open_release(str(lora))
    (lora / "adapter_config.json").write_text(DEEP)
    with pytest.raises(ValueError, match=r"adapter_config\.json is nested too deeply"):
        open_release(str(lora))


def test_an_adapter_beside_whole_weights_is_no_lora(tiny_release: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_release, tmp_path / "whole"))
    (folder / "adapter_config.json").write_text("{}")
    assert open_release(str(folder)).folder == folder


@pytest.mark.parametrize("dangling", [False, True], ids=["to an empty folder", "dangling"])
@pytest.mark.parametrize("to", ["transformers", "llava"])
def test_an_output_that_is_a_link(tmp_path: Path, to: str, dangling: bool) -> None:
    target, link = tmp_path / "disk" / "llava-there", tmp_path / "llava-here"
    (target.parent if dangling else target).mkdir(parents=True)
    link.symlink_to(target)
    main([str(RELEASE), "--output", str(link), "--to", to])
    assert link.is_symlink()
    assert (target / "config.json").is_file()
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    with pytest.raises(FileInTheWay):
        main([str(RELEASE), "--output", str(link), "--to", to])


def test_a_link_to_a_folder_that_holds_something_is_left_as_it_is(tmp_path: Path) -> None:
    target, link = tmp_path / "there", tmp_path / "here"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    link.symlink_to(target)
    with pytest.raises(FileInTheWay):
        main([str(RELEASE), "--output", str(link)])
    assert [path.name for path in target.iterdir()] == ["mine.txt"]


def test_code_of_a_release_is_neither_run_nor_handed_on(
    tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved is trusted by whoever loads it: a name of somebody's code in it would be run then."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    release = Path(shutil.copytree(tiny_release, tmp_path / "release"))
    path, tokenizer = release / "processor_config.json", release / "tokenizer_config.json"
    content = json.loads(path.read_text())
    strange = {"AutoImageProcessor": "somebody/code--stranger.Stranger", "AutoProcessor": "somebody/code--stranger.P"}
    content["image_processor"]["auto_map"] = content["auto_map"] = strange
    path.write_text(json.dumps(content))
    settings = {
        **json.loads(tokenizer.read_text()),
        "auto_map": {"AutoTokenizer": ["somebody/code--stranger.T", None]},
    }
    tokenizer.write_text(json.dumps(settings))
    _, processor = load_release(str(release), Reductions({"dominant": 4, "contextual": 2}))
    processor.save_pretrained(tmp_path / "saved")
    for file in (tmp_path / "saved").glob("*.json"):
        assert "somebody" not in file.read_text(), file.name
    AutoProcessor.from_pretrained(tmp_path / "saved", trust_remote_code=True)

    content["image_processor"]["image_processor_type"] = "StrangerImageProcessor"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="never run") as caught:
        load_release(str(release))
    assert "trust_remote_code" not in str(caught.value)
    del content["image_processor"]["auto_map"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is none of transformers' own"):
        load_release(str(release))


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", {"vision_feature_select_strategy": "most"}, "vision_feature_select_strategy"),
        ("config.json", {"vision_feature_layer": "last"}, "vision_feature_layer"),
        ("config.json", {"vision_feature_layer": -99}, "has 4 layers: -5 to 4 are allowed"),
        ("config.json", {"vision_feature_layer": 5}, "has 4 layers: -5 to 4 are allowed"),
        ("config.json", {"projector_hidden_act": "boom"}, "KeyError: 'boom'"),
        ("processor_config.json", {"image_processor": 3}, "AttributeError"),
        ("tokenizer.json", {"added_tokens": None}, "tokenizer"),
    ],
)
def test_what_transformers_stumbles_over_names_the_release(
    tiny_release: Path, tmp_path: Path, file: str, change: dict[str, Any], said: str
) -> None:
    release = tmp_path / "release"
    shutil.copytree(tiny_release, release)
    content = json.loads((release / file).read_text())
    (release / file).write_text(json.dumps({**content, **change}))
    with pytest.raises(UserError, match=f"^{re.escape(str(release))}: .*{re.escape(said)}"):
        load_release(str(release))


def test_a_release_without_its_tokenizer_is_named(tiny_release: Path, tmp_path: Path) -> None:
    release = tmp_path / "release"
    shutil.copytree(tiny_release, release, ignore=shutil.ignore_patterns("tokenizer.json"))
    with pytest.raises(UserError, match=r"release: .*tokenizer.*download the release again"):
        load_release(str(release))
