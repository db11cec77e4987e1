"""A tiny Video-LLaVA as its authors release it, and a tiny Video-LLaVA-hf, which is another model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

from shortzip.reduction.configuration_reduced_temporal_video_llava import ReducedTemporalVideoLlavaConfig
from shortzip.reduction.modeling_reduced_temporal_video_llava import ReducedTemporalVideoLlavaForConditionalGeneration
from shortzip.scripts.tiny.words import build_tokenizer
from shortzip.train.release.layout_temporal_video_llava import LAYOUT, VIDEO_TOWER

SIDE, PATCH, FRAMES = 20, 4, 4
PATCHES = (SIDE // PATCH) ** 2
IMAGE_TOWER = LAYOUT.usual_tower[1]
VISION: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIDE,
    "patch_size": PATCH, "projection_dim": 24, "hidden_act": "gelu", "initializer_range": 0.3,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip
_NAMES = (
    ("model.multi_modal_projector.linear_1", "model.mm_projector.0"),
    ("model.multi_modal_projector.linear_2", "model.mm_projector.2"),
    ("model.language_model.", "model."),
    ("model.image_tower.", "model.image_tower.image_tower."),
    ("model.video_tower.", "model.video_tower.video_tower."),
)


def config_keys(rows: int, image: int, video: int, side: int = SIDE, layers: int = 4, **text: Any) -> dict[str, Any]:
    """What both configs are made of. `rows`: of the embeddings; `image` and `video`: ids of the placeholders."""
    return {
        "vision_config": CLIPVisionConfig(**{**VISION, "image_size": side}).to_dict(),
        "text_config": LlamaConfig(**{**TEXT, "num_hidden_layers": layers, "vocab_size": rows, **text}).to_dict(),
        "image_token_index": image, "video_token_index": video, "image_seq_length": (side // PATCH) ** 2,
    }  # fmt: skip


def enlivened(model: Any, seed: int) -> Any:
    """Weights with which images move the logits, and what is 0 at first is not."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "projector" in name or "temporal_embedding" in name:
                parameter.normal_(0, 0.3, generator=generator)
            elif "temporal_attn" in name or name.endswith("bias"):
                parameter.normal_(0, 0.2, generator=generator)
    return model.eval()


def plain_video_llava(seed: int = 0, **keys: Any) -> Any:
    """transformers' own model."""
    torch.manual_seed(seed)
    return enlivened(VideoLlavaForConditionalGeneration(VideoLlavaConfig(**keys)), seed)


def temporal_video_llava(seed: int = 0, **keys: Any) -> Any:
    """The original, of videos of `FRAMES` frames."""
    torch.manual_seed(seed)
    config = ReducedTemporalVideoLlavaConfig(**{"video_frames": FRAMES, **keys})
    return enlivened(ReducedTemporalVideoLlavaForConditionalGeneration(config), seed)


def write_video_llava_hf(folder: Path, side: int = SIDE, layers: int = 4) -> Path:
    """A Video-LLaVA-hf with the files that such releases have."""
    tokenizer: Any = build_tokenizer()
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    ids = tokenizer.get_vocab()
    own = {f"{name}_token_id": ids[token] for name, token in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>"))}
    model = plain_video_llava(**config_keys(len(tokenizer), ids["<image>"], ids["<video>"], side, layers, **own))
    model.generation_config.eos_token_id = own["eos_token_id"]
    model.generation_config.pad_token_id = own["pad_token_id"]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images = {
        "image_processor_type": "VideoLlavaImageProcessor", "size": {"shortest_edge": side}, "do_center_crop": True,
        "crop_size": {"height": side, "width": side}, "resample": 3,
    }  # fmt: skip
    settings = {
        "processor_class": "VideoLlavaProcessor", "patch_size": PATCH, "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1, "image_token": "<image>", "video_token": "<video>",
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder


def write_original_video_llava(
    folder: Path, side: int = SIDE, layers: int = 4, *, tokenizer: Path | None = None, rows: int = 0, **changes: Any
) -> Path:
    """A release in its authors' layout, `folder/Video-LLaVA-tiny`, and the configs of its towers beside it.

    Args:
        tokenizer: a folder with another tokenizer for it, of so many `rows`.
        changes: other keys in its config.json.
    """
    target = folder / "Video-LLaVA-tiny"
    target.mkdir(parents=True)
    if tokenizer is None:
        words = build_tokenizer()
        words.save_pretrained(target)
        _set(target / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")  # no sentencepiece's
        rows = len(words)
    else:
        for path in tokenizer.glob("*token*"):
            shutil.copyfile(path, target / path.name)
    model = temporal_video_llava(**config_keys(rows, rows, rows + 1, side, layers, bos_token_id=1, eos_token_id=2))
    original = LAYOUT.to_original(model.config, IMAGE_TOWER, "tiny")
    (target / "config.json").write_text(json.dumps({**original, **changes}, indent=1))
    (target / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    write_shards(target, original_tensors(model))
    of_video = {"add_time_attn": True, "num_frames": FRAMES}
    for name, kind, more in ((IMAGE_TOWER, "Image", {}), (VIDEO_TOWER, "Video", of_video)):
        vision = {**CLIPVisionConfig(**{**VISION, "image_size": side}).to_dict(), "add_time_attn": False, **more}
        (folder / name).mkdir(parents=True)
        config = {"model_type": f"LanguageBind{kind}", "vision_config": vision}
        (folder / name / "config.json").write_text(json.dumps(config))
    return target


def _set(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **keys}, indent=1))


def original_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The model's weights under its authors' names."""
    found = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in _NAMES:
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
                break
        found[name] = tensor.clone()
    return found


def write_shards(target: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Two .bin shards and their index, as the release has them."""
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, target / shard)
        weight_map.update(dict.fromkeys(part, shard))
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))
