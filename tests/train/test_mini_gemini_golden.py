"""Mini-Gemini gives what MGM's own code gives with the same release (goldens: their unmodified code; VisionZip there
is the extension that the golden describes)."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from mini_gemini_releases import EXPECTED, RELEASE, VOCABULARY, expected, high_definition, photograph

from shortzip.reduction.reductions import Reductions
from shortzip.train.release.loading import load_release, share_weights
from shortzip.train.release.opening import open_release

BUDGETS = {"": None, "_d12_c4": (12, 4), "_d20_c5": (20, 5)}


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return expected()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("converted")


@pytest.fixture(scope="module")
def plain(cache: Path) -> tuple[Any, Any]:
    return load_release(open_release(str(RELEASE), cache_dir=cache))


def reduced(plain: tuple[Any, Any], budget: tuple[int, int] | None, **keys: Any) -> tuple[Any, Any]:
    model, processor = plain
    visionzip = None if budget is None else {"dominant": budget[0], "contextual": budget[1], **keys}
    processor.visionzip = visionzip
    return share_weights(model, Reductions(visionzip)), processor


def apart(found: torch.Tensor, golden: torch.Tensor) -> float:
    assert found.shape == golden.shape
    return float((found - golden).abs().max())


@torch.no_grad()
def test_pixels_towers_and_mining(plain: tuple[Any, Any], golden: dict[str, torch.Tensor]) -> None:
    model, processor = plain
    inner, pixels = model.model, processor.image_processor(photograph(), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, golden["pixel_values_aux"])
    low = inner.vision_tower.low_resolution(pixels)
    assert apart(low, golden["pixel_values"]) < 1e-6
    assert apart(inner._clip_patches(low, 4), golden["low_features"]) < 1e-4
    features = inner.vision_tower.high_resolution(pixels)
    assert apart(features, golden["aux_features"]) < 1e-5
    assert apart(inner.multi_modal_projector.mining(golden["low_features"], features), golden["mined_features"]) < 1e-5
    images = inner.get_image_features(pixels)
    assert apart(images.last_hidden_state, golden["sum_features"]) < 1e-4
    assert apart(images.pooler_output[0], golden["projected"][0]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", ["", "_d12_c4"])
def test_ids_logits_and_greedy_tokens(plain: tuple[Any, Any], golden: dict[str, torch.Tensor], name: str) -> None:
    model, processor = reduced(plain, BUDGETS[name])
    inputs = processor(images=photograph(), text=EXPECTED["prompt"], return_tensors="pt")
    ids, count = inputs["input_ids"][0].tolist(), EXPECTED["visual_tokens"][name.lstrip("_") or "vanilla"]
    without = [token for token in ids if token != model.config.image_token_id]
    assert without == [token for token in golden["input_ids"][0].tolist() if token != -200]
    assert len(ids) - len(without) == count
    if BUDGETS[name] is not None:
        images = model.model.get_image_features(inputs["pixel_values"])
        assert apart(images.pooler_output[0], golden[f"projected{name}"][0]) < 1e-4
    assert apart(model(**inputs).logits[:, -1, :VOCABULARY], golden[f"last_logits{name}"]) < 2e-5
    model.generation_config.eos_token_id = None
    written = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, -8:]
    assert written.tolist() == golden[f"generated{name}"].tolist()


@torch.no_grad()
@pytest.mark.parametrize(("case", "name"), [(0, "_d12_c4"), (1, "_d20_c5")])
def test_kept_patches_and_merged_groups_are_those_of_clip_alone(
    plain: tuple[Any, Any], golden: dict[str, torch.Tensor], case: int, name: str
) -> None:
    model, _ = reduced(plain, BUDGETS[name])
    said = EXPECTED["visionzip"][case]["image0"]
    visual = model.model.get_visual_tokens(golden["pixel_values_aux"])
    assert visual.kept[0].tolist() == said["dominant_spatial"]
    assert visual.targets[0].tolist() == said["contextual_targets"]
    for place, target in enumerate(said["contextual_targets"]):
        members = (visual.groups[0] == place).nonzero().flatten().tolist()
        assert set(members) == {target, *said["members"][str(target)]}


@torch.no_grad()
def test_high_definition(cache: Path, tmp_path: Path, golden: dict[str, torch.Tensor]) -> None:
    model, processor = load_release(open_release(str(high_definition(tmp_path)), cache_dir=cache))
    inputs = processor(images=photograph(), text=EXPECTED["prompt"], return_tensors="pt")
    said = EXPECTED["hd_pixels"]
    assert list(inputs["pixel_values"].shape) == said["aux_shape"]
    assert hashlib.sha256(inputs["pixel_values"].numpy().tobytes()).hexdigest() == said["aux_sha256"]
    images = model.model.get_image_features(inputs["pixel_values"])
    assert apart(images.pooler_output[0], golden["hd_projected"][0]) < 1e-4
    assert apart(model(**inputs).logits[:, -1, :VOCABULARY], golden["hd_last_logits"]) < 2e-5
    model.generation_config.eos_token_id = None
    written = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, -8:]
    assert written.tolist() == golden["hd_generated"].tolist()


@torch.no_grad()
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_the_budget_of_high_definition_is_per_tile(cache: Path, tmp_path: Path, positions: str) -> None:
    release = open_release(str(high_definition(tmp_path)), cache_dir=cache)
    reductions = Reductions({"dominant": 12, "contextual": 4}, positions=positions)
    model, processor = load_release(release, reductions)
    inputs = processor(images=photograph(), text=EXPECTED["prompt"], return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 5 * 16
    visual = model.model.get_visual_tokens(inputs["pixel_values"])
    assert visual.tokens.shape == (1, 5 * 16, 32)
    # Each tile as if it were an image of its own.
    tower = model.model.vision_tower
    low, features = (
        tower.low_resolution(inputs["pixel_values"]),
        tower.views(tower.high_resolution(inputs["pixel_values"])),
    )
    plain = share_weights(model, Reductions())
    sums = plain.model.get_image_features(inputs["pixel_values"]).last_hidden_state.view(5, 64, 32)
    for tile in range(5):
        kept = visual.kept[0, tile * 11 : (tile + 1) * 11] - tile * 64
        assert torch.allclose(visual.tokens[0, tile * 16 + 1 : tile * 16 + 12], sums[tile, kept], atol=1e-4)
    assert len(low) == len(features) == 5
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
