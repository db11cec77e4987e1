"""A tiny release in its authors' layout, of the same one in transformers'."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from shortzip.train.release.layouts import layout_for

TOWER = "tower"  # its folder, and its name in config.json
INSIDE = "model.vision_tower.vision_tower."  # of a tower's tensors that lie in the release
_NAMES = (  # transformers' name, older or newer, and LLaVA's
    (r"^(?:model\.)?language_model\.lm_head\.", "lm_head."),
    (r"^(?:model\.)?language_model\.(?:model\.)?", "model."),
    (r"^(?:model\.)?multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^(?:model\.)?multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", f"{INSIDE}vision_model."),
    (r"^(?:model\.)?image_newline$", "model.image_newline"),
)


def plain_tower(config: Any) -> dict[str, Any]:
    """config.json of a tower that is taken whole."""
    found: dict[str, Any] = config.vision_config.to_dict()
    return found


def original_name(name: str) -> str:
    """LLaVA's name of a tensor of a release in transformers' layout."""
    for pattern, theirs in _NAMES:
        found, count = re.subn(pattern, theirs, name)
        if count:
            return found
    return name


def write(
    folder: Path,
    seed: int,
    write_release: Callable[[Path, int], Path],
    config_class: Any,
    tokenizer: Any,
    *,
    inside: bool,
    tower_of: Callable[[Any], Mapping[str, Any]] = plain_tower,
) -> Path:
    """Writes what `write_release` writes in transformers' layout.

    Args:
        folder: to be made; the tower's own folder is in it.
        config_class: transformers' class of its config.
        tokenizer: the release's.
        inside: whether the release's own file holds the tower's weights; else the tower's folder does.
        tower_of: config.json of the tower's folder, of the release's config.
    """
    with TemporaryDirectory() as scratch:
        release = write_release(Path(scratch) / "release", seed)
        config, pixels = config_class.from_pretrained(release), _pixels(release)
        found = load_file(release / "model.safetensors")
    tensors = {original_name(name): tensor for name, tensor in found.items()}
    towers = {name: tensors.pop(name) for name in list(tensors) if name.startswith(INSIDE) and not inside}
    named = {name.removeprefix(INSIDE): tensor for name, tensor in towers.items()}
    write_tower(folder / TOWER, tower_of(config), pixels, named)
    return write_parts(folder, config, tokenizer, tensors)


def write_parts(folder: Path, config: Any, tokenizer: Any, tensors: Mapping[str, Tensor]) -> Path:
    """Writes config.json, a tokenizer and tensors under LLaVA's names into a folder. `config`: transformers'."""
    folder.mkdir(parents=True, exist_ok=True)
    found = layout_for(config.model_type).to_original(config, TOWER, folder.name)
    (folder / "config.json").write_text(json.dumps({**found, "vocab_size": config.text_config.vocab_size}, indent=1))
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"  # names no class of sentencepiece's, whose file is not there
    own = {**json.loads(path.read_text(encoding="utf-8")), "tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(own, indent=1))
    return folder


def write_tower(
    folder: Path, config: Mapping[str, Any], pixels: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Writes a tower's own folder: config.json, what its pixels are, and weights, unless the release holds them."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    if tensors:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def _pixels(release: Path) -> dict[str, Any]:
    """Settings of a release's image processor, which stand in either place."""
    path = release / "preprocessor_config.json"
    held = json.loads((path if path.is_file() else release / "processor_config.json").read_text(encoding="utf-8"))
    settings = held if path.is_file() else held["image_processor"]
    return {key: settings[key] for key in ("image_mean", "image_std", "size", "crop_size") if key in settings}
