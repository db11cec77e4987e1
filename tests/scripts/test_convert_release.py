"""scripts/convert_release.py: there and back, and what it says when it cannot."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from shortzip.data.errors import UserError
from shortzip.scripts.convert_release import main

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "llava_release"
RELEASE = str(GOLDEN / "llava-v1.5-tiny")
PRETRAIN = GOLDEN / "llava-v1.5-tiny-pretrain"


def convert(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The projector that comes back is the release's own, and the config is the one it began with."""
    convert(RELEASE, "--output", tmp_path / "tiny-hf")
    assert f"written: {tmp_path / 'tiny-hf'}" in capsys.readouterr().out
    convert(
        tmp_path / "tiny-hf", "--to", "llava", "--base", "liuhaotian/llava-tiny", "--output", tmp_path / "llava-back"
    )
    said = capsys.readouterr().out
    assert f"--model-path {tmp_path / 'llava-back'} --model-base liuhaotian/llava-tiny" in said
    back = torch.load(tmp_path / "llava-back" / "mm_projector.bin", weights_only=True)
    shard = torch.load(Path(RELEASE) / "pytorch_model-00002-of-00003.bin", weights_only=True)
    assert len(back) == 4
    assert all(torch.equal(tensor, shard[name]) for name, tensor in back.items())
    config = json.loads((tmp_path / "llava-back" / "config.json").read_text())
    original = json.loads((Path(RELEASE) / "config.json").read_text())
    assert {key for key in original if config[key] != original[key]} == {"_name_or_path", "tune_mm_mlp_adapter"}


def test_with_another_projector_and_dtype(tmp_path: Path) -> None:
    convert(RELEASE, "--mm_projector", PRETRAIN, "--dtype", "bfloat16", "--output", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    convert(tmp_path / "out", "--to", "llava", "--output", tmp_path / "llava-out")
    found = torch.load(tmp_path / "llava-out" / "mm_projector.bin", weights_only=True)
    wanted = torch.load(PRETRAIN / "mm_projector.bin", weights_only=True)
    assert all(torch.equal(found[name], wanted[name].bfloat16().float()) for name in wanted)


def test_a_tower_elsewhere(tmp_path: Path) -> None:
    release = shutil.copytree(RELEASE, tmp_path / "alone")
    path = release / "config.json"
    path.write_text(path.read_text().replace("openai/clip-vit-tiny-patch14-112", "/no/such/tower"))
    with pytest.raises(UserError, match=r"the vision tower .* was not found"):
        convert(release, "--output", tmp_path / "out")
    convert(release, "--vision_tower", GOLDEN / "openai" / "clip-vit-tiny-patch14-112", "--output", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_refusals(tmp_path: Path) -> None:
    convert(RELEASE, "--output", tmp_path / "hf")
    for arguments, said in (
        ([tmp_path / "hf", "--output", tmp_path / "x"], "is not in LLaVA's own layout .*: nothing to convert"),
        ([RELEASE, "--output", tmp_path / "hf"], "exists and is not empty"),
        ([tmp_path / "hf", "--to", "llava", "--output", tmp_path / "tuned"], "let it contain 'llava'"),
        ([tmp_path / "hf", "--to", "llava", "--dtype", "float16", "--output", tmp_path / "llava"], "--dtype is for"),
        ([tmp_path / "nowhere", "--output", tmp_path / "x"], "does not exist"),
    ):
        with pytest.raises(UserError, match=f"{said}"):
            convert(*arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_help_begins_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        convert("--help")
    assert stop.value.code == 0
    assert "\n  shortzip convert liuhaotian/llava-v1.5-7b --output llava-1.5-7b\n" in capsys.readouterr().out
