"""A tiny Video-LLaVA, whose own layout is what there is first: transformers has none that attends over time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig

from shortzip.reduction.configuration_reduced_temporal_video_llava import ReducedTemporalVideoLlavaConfig
from shortzip.reduction.modeling_reduced_temporal_video_llava import ReducedTemporalVideoLlavaForConditionalGeneration
from shortzip.scripts.tiny.video_llava import SIDE, VISION, config_keys, enlivened
from shortzip.scripts.tiny.words import build_tokenizer
from shortzip.train.release.convert import convert_to_transformers
from shortzip.train.release.layout_temporal_video_llava import LAYOUT, VIDEO_TOWER

FRAMES = 8  # as the release has
IMAGE_TOWER = LAYOUT.usual_tower[1]
_NAMES = (
    ("model.multi_modal_projector.linear_1", "model.mm_projector.0"),
    ("model.multi_modal_projector.linear_2", "model.mm_projector.2"),
    ("model.language_model.", "model."),
    ("model.image_tower.", "model.image_tower.image_tower."),
    ("model.video_tower.", "model.video_tower.video_tower."),
)


def temporal_video_llava(seed: int = 0, **keys: Any) -> Any:
    """A model of videos of `FRAMES` frames; `keys`: as `config_keys` gives them."""
    torch.manual_seed(seed)
    config = ReducedTemporalVideoLlavaConfig(**{"video_frames": FRAMES, **keys})
    return enlivened(ReducedTemporalVideoLlavaForConditionalGeneration(config), seed)


def write_release(folder: Path, seed: int = 0) -> Path:
    """As ShortZip converts one: transformers' layout, with the tower that transformers lacks."""
    with TemporaryDirectory() as scratch:
        made = write_original(Path(scratch) / "video-llava-tiny", seed)
        convert_to_transformers(made, folder, tower=made / IMAGE_TOWER, more_towers=[made / VIDEO_TOWER])
    return folder


def write_original(
    folder: Path,
    seed: int = 0,
    side: int = SIDE,
    layers: int = 4,
    *,
    tokenizer: Path | None = None,
    rows: int = 0,
    **changes: Any,
) -> Path:
    """A release in its authors' layout, for frames of `side` pixels; the configs of its towers are in it too.

    Args:
        tokenizer: a folder with another tokenizer for it, of so many `rows`.
        changes: other keys in its config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is None:
        words = build_tokenizer()
        words.save_pretrained(folder)
        path = folder / "tokenizer_config.json"  # names no class of sentencepiece's, whose file is not there
        own = {**json.loads(path.read_text(encoding="utf-8")), "tokenizer_class": "PreTrainedTokenizerFast"}
        path.write_text(json.dumps(own, indent=1))
        rows = len(words)
    else:
        for path in tokenizer.glob("*token*"):
            shutil.copyfile(path, folder / path.name)
    text = {"bos_token_id": 1, "eos_token_id": 2}
    model = temporal_video_llava(seed, **config_keys(rows, rows, rows + 1, side, layers, **text))
    original = LAYOUT.to_original(model.config, IMAGE_TOWER, "tiny")
    (folder / "config.json").write_text(json.dumps({**original, **changes}, indent=1))
    (folder / "generation_config.json").write_text(json.dumps(text))
    write_shards(folder, original_tensors(model))
    of_video = {"add_time_attn": True, "num_frames": FRAMES}
    for name, kind, more in ((IMAGE_TOWER, "Image", {}), (VIDEO_TOWER, "Video", of_video)):
        vision = {**CLIPVisionConfig(**{**VISION, "image_size": side}).to_dict(), "add_time_attn": False, **more}
        (folder / name).mkdir(parents=True)
        config = {"model_type": f"LanguageBind{kind}", "vision_config": vision}
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


def original_tensors(model: Any) -> dict[str, Tensor]:
    """The model's weights under its authors' names."""
    found = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in _NAMES:
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
                break
        found[name] = tensor.clone()
    return found


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Two .bin shards and their index, as the release has them."""
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / shard)
        weight_map.update(dict.fromkeys(part, shard))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
