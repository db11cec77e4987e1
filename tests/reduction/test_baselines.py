"""The ways to fewer visual tokens that VisionZip is compared with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import IMAGE_SIZE, PATCH_SIZE, PATCHES
from torch import Tensor

from shortzip.reduction import ReducedLlavaForConditionalGeneration, ReducedLlavaProcessor
from shortzip.reduction.baselines import (
    cells_of_patches,
    downsample_images,
    grid_counts,
    grid_patches,
    grid_shape,
    pool_patches,
    random_patches,
)
from shortzip.reduction.configuration_reduced_llava import validate_visionzip
from shortzip.reduction.selectors import BASELINES

SIDE = IMAGE_SIZE // PATCH_SIZE


def load(folder: Path, method: str, count: int = 9, **more: Any) -> Any:
    visionzip = {"dominant": count, "contextual": 0, "method": method, **more}
    return ReducedLlavaForConditionalGeneration.from_pretrained(folder, visionzip=visionzip).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def patches(tiny_release: Path, images: Tensor) -> Tensor:
    """[3, P, H], what plain LLaVA gives its projector."""
    model = ReducedLlavaForConditionalGeneration.from_pretrained(tiny_release).eval()
    with torch.no_grad():
        return model.model.vision_tower(images, output_hidden_states=True).hidden_states[-2][:, 1:]


@pytest.mark.parametrize("method", ["random", "grid"])
def test_kept_patches_are_plain_llavas(tiny_release: Path, images: Tensor, patches: Tensor, method: str) -> None:
    visual = load(tiny_release, method).model.get_visual_tokens(images)
    assert visual.kept.shape == (3, 9)
    assert (visual.kept.diff(dim=1) > 0).all()
    torch.testing.assert_close(visual.tokens, patches.gather(1, visual.kept[..., None].expand(-1, -1, 24)))


def test_pooled_features_are_means_of_their_cells(tiny_release: Path, images: Tensor, patches: Tensor) -> None:
    visual = load(tiny_release, "pool").model.get_visual_tokens(images)
    expected = patches.unflatten(1, (3, 2, 3, 2)).mean(dim=(2, 4)).flatten(1, 2)
    torch.testing.assert_close(visual.tokens, expected)
    for cell in range(9):
        of_cell = patches[0, visual.groups[0] == cell]
        torch.testing.assert_close(of_cell.mean(0), visual.tokens[0, cell])


def test_downsampling_happens_before_the_tower(tiny_release: Path, images: Tensor) -> None:
    model = load(tiny_release, "downsample")
    visual = model.model.get_visual_tokens(images)
    small = downsample_images(images, (3, 3), PATCH_SIZE)
    assert small.shape[-2:] == (3 * PATCH_SIZE, 3 * PATCH_SIZE)
    tower = model.model.vision_tower(small, interpolate_pos_encoding=True, output_hidden_states=True)
    torch.testing.assert_close(visual.tokens, tower.hidden_states[-2][:, 1:])
    assert visual.groups[0].bincount().tolist() == [4] * 9


def test_a_flat_image_is_flat_when_downsampled() -> None:
    small = downsample_images(torch.full((1, 3, 24, 24), 0.7, dtype=torch.bfloat16), (2, 3), 4)
    assert small.shape == (1, 3, 8, 12)
    assert small.dtype == torch.bfloat16
    torch.testing.assert_close(small, torch.full_like(small, 0.7))


def test_random_patches_follow_image_and_seed_alone(images: Tensor) -> None:
    together = random_patches(images, 9, PATCHES, seed=3)
    alone = torch.cat([random_patches(image[None], 9, PATCHES, seed=3) for image in images.flip(0)]).flip(0)
    assert torch.equal(together, alone)
    assert not torch.equal(together, random_patches(images, 9, PATCHES, seed=4))
    assert not torch.equal(together[0], together[1])
    changed = images.clone()
    changed[0, 0, 0, 0] += 1e-3
    assert not torch.equal(random_patches(changed, 9, PATCHES, seed=3)[0], together[0])


def test_random_patches_are_even() -> None:
    drawn = random_patches(torch.randn(400, 3, 8, 8, generator=torch.Generator().manual_seed(1)), 9, 36, seed=0)
    counts = drawn.flatten().bincount(minlength=36)
    assert counts.min() > 60  # 100 on average, 8.7 their deviation
    assert counts.max() < 140


@pytest.mark.parametrize(("side", "count", "shape"), [(24, 64, (8, 8)), (24, 128, (8, 16)), (24, 192, (12, 16)),
                                                     (12, 16, (4, 4)), (6, 36, (6, 6)), (6, 1, (1, 1))])  # fmt: skip
def test_grids_of_the_papers_budgets(side: int, count: int, shape: tuple[int, int]) -> None:
    assert grid_shape(count, side) == shape
    places = grid_patches(shape, side)
    assert len(places.unique()) == count
    assert places.max() < side * side
    # The patch in a cell's middle lies in that cell.
    assert cells_of_patches(shape, side)[places].tolist() == list(range(count))


@pytest.mark.parametrize("count", sorted(grid_counts(12)))
def test_every_grid_spreads_over_the_image(count: int) -> None:
    shape = grid_shape(count, 12)
    places = grid_patches(shape, 12)
    rows, columns = (places // 12).unique(), (places % 12).unique()
    for used, cells in ((rows, shape[0]), (columns, shape[1])):
        assert len(used) == cells
        assert abs((used.float().mean() - 5.5).item()) <= 0.5
    sizes = cells_of_patches(shape, 12).bincount(minlength=count)
    assert sizes.min() >= 1


def test_all_cells_are_all_patches() -> None:
    hidden = torch.randn(2, 36, 5)
    torch.testing.assert_close(pool_patches(hidden, (6, 6)), hidden)


@pytest.mark.parametrize("method", BASELINES)
def test_a_baseline_answers_with_its_own_processor(tiny_release: Path, method: str) -> None:
    model = load(tiny_release, method)
    processor = ReducedLlavaProcessor.from_pretrained(tiny_release, visionzip=model.config.visionzip)
    image = torch.randint(0, 255, (3, 30, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    inputs = processor(images=image, text="USER: <image>\nname the colour ASSISTANT:", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 9
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize("method", BASELINES)
def test_a_baseline_is_saved_and_loaded(tiny_release: Path, tmp_path: Path, images: Tensor, method: str) -> None:
    model = load(tiny_release, method, **({"seed": 5} if method == "random" else {}))
    model.save_pretrained(tmp_path)
    again = ReducedLlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.visionzip == model.config.visionzip
    with torch.no_grad():
        assert torch.equal(again.model.get_visual_tokens(images).tokens, model.model.get_visual_tokens(images).tokens)


def test_the_projector_learns_through_every_baseline(tiny_release: Path, images: Tensor) -> None:
    for method in BASELINES:
        model = load(tiny_release, method)
        features = model.model.get_image_features(images).pooler_output
        torch.stack(list(features)).square().sum().backward()
        assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0, method


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "best"}, r"'best'; it must be one of \['visionzip'"),
        ({"method": "pool", "contextual": 2}, "give all 11 tokens as dominant"),
        ({"method": "pool", "seed": 1}, "method pool has no parameter .seed.: it takes no parameters"),
        ({"method": "random", "seed": -1}, "seed is -1; at least 0 is needed"),
        ({"method": "random", "seed": 1.5}, "seed is 1.5; a whole number is needed"),
        ({"method": "random", "sed": 1}, "method random has no parameter .sed.: it takes seed"),
        ({"method": ["pool"]}, "must be one of"),
        ({"seed": 1}, "no parameter .seed."),
        ({"size": 1}, "no parameter .size."),
    ],
)
def test_bad_keys_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_visionzip({"dominant": 9, "contextual": 0, **change})


@pytest.mark.parametrize(
    ("method", "count", "message"),
    [("pool", 11, r"11 tokens make no grid over 6 by 6 patches: choose one of \[8, 9, 12, 15\]"),
     ("grid", 37, "the sum must be 1 to 36"), ("random", 37, "the sum must be 1 to 36")],
)  # fmt: skip
def test_impossible_counts_are_refused(tiny_release: Path, method: str, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(tiny_release, method, count)
