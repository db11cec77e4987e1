"""Releases in LLaVA's own layout, made from the golden one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "llava_release"
RELEASE = GOLDEN / "llava-v1.5-tiny"
TOWER = GOLDEN / "openai" / "clip-vit-tiny-patch14-112"
PRETRAIN = GOLDEN / "llava-v1.5-tiny-pretrain"
EXPECTED = json.loads((GOLDEN / "A_expected.json").read_text(encoding="utf-8"))
SHARDS = sorted(path.name for path in RELEASE.glob("*.bin"))


def copy_of_release(folder: Path) -> Path:
    """A writable copy of the golden release with its tower beside it, as `folder/llava-v1.5-tiny`."""
    shutil.copytree(GOLDEN / "openai", folder / "openai")
    shutil.copytree(RELEASE, folder / RELEASE.name)
    return folder / RELEASE.name


def edit_config(release: Path, **changes: Any) -> None:
    """Sets keys of a config.json; None removes one."""
    path = release / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_shard(release: Path, number: int, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Lets `change` work on the tensors of a shard, and updates the index."""
    path = release / SHARDS[number]
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)
    index_path = release / "pytorch_model.bin.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != path.name}
    index["weight_map"].update(dict.fromkeys(tensors, path.name))
    index_path.write_text(json.dumps(index))


def all_tensors(release: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder in LLaVA's layout."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(release.glob("*.bin")):
        found.update(torch.load(path, weights_only=True))
    return found
