"""Video-LLaVA gives what its authors' own code gives on the same weights, and Video-LLaVA-hf what remains of it
without attention over time (goldens: their unmodified classes; VisionZip there is recomputed from their attention)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_video import GOLDEN, original_tensors

from shortzip.reduction.configuration_reduced_temporal_video_llava import ReducedTemporalVideoLlavaConfig
from shortzip.reduction.modeling_reduced_temporal_video_llava import ReducedTemporalVideoLlavaForConditionalGeneration
from shortzip.reduction.modeling_reduced_video_llava import ReducedVideoLlavaForConditionalGeneration
from shortzip.reduction.reductions import Reductions
from shortzip.train.release.loading import share_weights

FOLDER = GOLDEN / "video_llava"
HF = FOLDER / "video-llava-tiny-hf"
SAID = json.loads((FOLDER / "video_llava_tiny.json").read_text(encoding="utf-8"))
FRAMES = 8
IMAGE, VIDEO = SAID["config"]["image_token_index"], SAID["config"]["video_token_index"]


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "video_llava_tiny_io.safetensors")


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    keys = json.loads((HF / "config.json").read_text(encoding="utf-8"))
    own = {key: keys[key] for key in keys if key not in ("model_type", "architectures", "torch_dtype")}
    temporal = ReducedTemporalVideoLlavaForConditionalGeneration(ReducedTemporalVideoLlavaConfig(**own)).eval()
    theirs = load_file(FOLDER / "video_llava_tiny_weights.safetensors")
    names = dict(zip(temporal.state_dict(), original_tensors(temporal), strict=True))
    assert set(names.values()) == set(theirs), "the original's weights, all of them and no others"
    assert sum(".temporal_" in name for name in theirs) == 66
    temporal.load_state_dict({ours: theirs[name] for ours, name in names.items()})
    plain = ReducedVideoLlavaForConditionalGeneration.from_pretrained(HF).eval()
    for model in (plain, temporal):
        model.generation_config.eos_token_id = None
    return {"plain": plain, "temporal": temporal}


def apart(found: torch.Tensor, golden: torch.Tensor) -> float:
    assert found.shape == golden.shape
    return float((found - golden).abs().max())


def with_placeholders(ids: torch.Tensor, per_image: int, per_frame: int) -> torch.Tensor:
    """Ids of the original, -200 for an image and for each frame (8 in a row), as ids here."""
    found, row = [], ids[0].tolist()
    while row:
        if row[:FRAMES] == [-200] * FRAMES:
            found += [VIDEO] * FRAMES * per_frame
            row = row[FRAMES:]
        else:
            found += [IMAGE] * per_image if row[0] == -200 else row[:1]
            row = row[1:]
    return torch.tensor([found])


def greedy(model: Any, ids: torch.Tensor, **pixels: torch.Tensor) -> list[int]:
    mask = torch.ones_like(ids)
    found = model.generate(input_ids=ids, attention_mask=mask, **pixels, max_new_tokens=8, do_sample=False)
    return list(found[0, -8:].tolist())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "temporal"])
def test_features_of_frames_and_images(models: dict[str, Any], golden: dict[str, torch.Tensor], kind: str) -> None:
    inner = models[kind].model
    videos = inner.get_video_features(golden["pixel_values_videos"])
    assert apart(videos.last_hidden_state, golden[f"{kind}.hidden_m2"]) < 1e-4
    assert apart(videos.pooler_output[0].view(FRAMES, 37, 48), golden[f"{kind}.video_features"]) < 1e-4
    images = inner.get_image_features(golden["pixel_values"])
    assert apart(images.pooler_output[0], golden["plain.image_features"]) < 1e-4
    other = {"plain": "temporal", "temporal": "plain"}[kind]
    assert apart(videos.last_hidden_state, golden[f"{other}.hidden_m2"]) > 10, "one is never the other"


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["video", "both"])
@pytest.mark.parametrize("kind", ["plain", "temporal"])
def test_logits_and_greedy_tokens(
    models: dict[str, Any], golden: dict[str, torch.Tensor], kind: str, prompt: str
) -> None:
    ids = with_placeholders(golden[f"original_ids_{prompt}"], 36, 37)
    assert torch.equal(ids, golden[f"input_ids_{prompt}"])
    pixels = {"pixel_values_videos": golden["pixel_values_videos"]}
    if prompt == "both":
        pixels["pixel_values"] = golden["pixel_values"]
    logits = models[kind](input_ids=ids, **pixels).logits[0]
    assert apart(logits[-1], golden[f"{kind}.last_logits_{prompt}"]) < 5e-5
    if f"{kind}.logits_{prompt}" in golden:
        assert apart(logits, golden[f"{kind}.logits_{prompt}"]) < 5e-5
    assert greedy(models[kind], ids, **pixels) == golden[f"{kind}.generated_{prompt}"].tolist()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "temporal"])
def test_an_image_alone(models: dict[str, Any], golden: dict[str, torch.Tensor], kind: str) -> None:
    found = models[kind](input_ids=golden["input_ids_image"], pixel_values=golden["pixel_values"])
    assert apart(found.logits[0], golden["plain.logits_image"]) < 5e-5


@torch.no_grad()
@pytest.mark.parametrize(("dominant", "contextual"), [(12, 4), (14, 3)])
@pytest.mark.parametrize("kind", ["plain", "temporal"])
def test_visionzip_of_every_frame(
    models: dict[str, Any], golden: dict[str, torch.Tensor], kind: str, dominant: int, contextual: int
) -> None:
    """Of 14+3, which patches; of 12+4, what becomes of them too."""
    name, count = f"d{dominant}_c{contextual}", dominant + contextual
    model = share_weights(models[kind], Reductions({"dominant": dominant, "contextual": contextual}))
    model.generation_config.eos_token_id = None
    videos = golden["pixel_values_videos"]
    visual = model.model.get_frame_tokens(videos)
    for frame, said in enumerate(SAID["originals"][kind][name]["frames"]):
        assert visual.kept[frame].tolist() == said["dominant_spatial"]
        assert visual.targets[frame].tolist() == said["contextual_targets"]
        for place, target in enumerate(said["contextual_targets"]):
            members = (visual.groups[frame] == place).nonzero().flatten().tolist()
            assert set(members) == {target, *said["members"][str(target)]}
    assert visual.tokens.shape == (FRAMES, count, 32)
    if f"{kind}.tokens_{name}" not in golden:
        return
    assert apart(visual.tokens, golden[f"{kind}.tokens_{name}"]) < 1e-4
    features = model.model.get_video_features(videos).pooler_output[0]
    assert apart(features.view(FRAMES, count, 48), golden[f"{kind}.projected_{name}"]) < 1e-4
    ids = with_placeholders(golden["original_ids_video"], count, count)
    logits = model(input_ids=ids, pixel_values_videos=videos).logits[0, -1]
    assert apart(logits, golden[f"{kind}.last_logits_{name}"]) < 5e-5
    assert greedy(model, ids, pixel_values_videos=videos) == golden[f"{kind}.generated_{name}"].tolist()


def test_the_golden_is_the_authors_and_not_a_conversions() -> None:
    """What transformers' conversion drops is in one file and not in the other."""
    held = {name for path in Path(HF).glob("*.safetensors") for name in load_file(path)}
    assert not [name for name in held if "temporal" in name]
