"""A tiny release in its authors' layout, of the same one in transformers'."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from shortzip.train.release.layouts import layout_for

INSIDE = "model.vision_tower.vision_tower."  # of a tower's tensors that lie in the release
_NAMES = (  # transformers' name, older or newer, and LLaVA's
    (r"^(?:model\.)?language_model\.lm_head\.", "lm_head."),
    (r"^(?:model\.)?language_model\.(?:model\.)?", "model."),
    (r"^(?:model\.)?multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^(?:model\.)?multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", f"{INSIDE}vision_model."),
    (r"^(?:model\.)?image_newline$", "model.image_newline"),
)


def original_name(name: str) -> str:
    """LLaVA's name of a tensor of a release in transformers' layout."""
    for pattern, theirs in _NAMES:
        found, count = re.subn(pattern, theirs, name)
        if count:
            return found
    return name


def write_original(
    folder: Path,
    release: Path,
    config: Any,
    tokenizer: Any,
    tower: Mapping[str, Any],
    *,
    inside: bool,
    **changes: Any,
) -> Path:
    """Writes `folder` and, beside it, the tower's folder.

    Args:
        folder: to be made; LLaVA's own code wants "llava" in its name.
        release: the same release in transformers' layout.
        config: transformers' config of it.
        tokenizer: the release's.
        tower: config.json of the tower's folder.
        inside: whether the release's own file holds the tower; else the tower's does.
        changes: keys of config.json beside those that the layout gives.
    """
    folder.mkdir(parents=True)
    beside = folder.parent / f"{folder.name}-tower"
    beside.mkdir()
    original = layout_for(config.model_type).to_original(config, beside.name, folder.name)
    original |= {"vocab_size": config.text_config.vocab_size, **changes}
    (folder / "config.json").write_text(json.dumps(original, indent=1))
    tensors = {original_name(name): tensor for name, tensor in load_file(release / "model.safetensors").items()}
    towers = {name: tensors.pop(name) for name in list(tensors) if name.startswith(INSIDE) and not inside}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    _named(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")  # no sentencepiece's
    (beside / "config.json").write_text(json.dumps(tower, indent=1))
    pixels = json.loads(_settings(release))
    keys = ("image_mean", "image_std", "size", "crop_size")
    settings = {key: pixels[key] for key in keys if key in pixels}
    (beside / "preprocessor_config.json").write_text(json.dumps(settings))
    if towers:
        named = {name.removeprefix(INSIDE): tensor for name, tensor in towers.items()}
        save_file(named, beside / "model.safetensors", metadata={"format": "pt"})
    return folder


def _settings(release: Path) -> str:
    """Of the image processor, in either place."""
    path = release / "preprocessor_config.json"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    return json.dumps(json.loads((release / "processor_config.json").read_text(encoding="utf-8"))["image_processor"])


def _named(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **keys}, indent=1))
