"""What the pictures show is what VisionZip did, and it lies where it belongs."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from reduced_models import build
from transformers import LlavaImageProcessorPil, LlavaNextImageProcessorPil

from shortzip.reduction import pictures
from shortzip.reduction.pictures import draw_budgets, draw_images, map_tokens, under_budget

BUDGET = {"dominant": 5, "contextual": 3}
SIZE = {"shortest_edge": 16}
CROP = {"height": 16, "width": 16}
PROCESSOR = SimpleNamespace(image_processor=LlavaImageProcessorPil(do_pad=True, size=SIZE, crop_size=CROP))
PINPOINTS = [[16, 32], [32, 16], [32, 32]]
NEXT_PROCESSOR = SimpleNamespace(
    image_processor=LlavaNextImageProcessorPil(size=SIZE, crop_size=CROP, image_grid_pinpoints=PINPOINTS)
)


@pytest.fixture
def photograph() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (30, 60, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((60, 30), Image.Resampling.BICUBIC)


def test_map_is_what_the_model_does(photograph):
    model = build(reduction="visionzip")
    saved = copy.deepcopy(model.config.visionzip)
    (found,) = map_tokens(model, PROCESSOR, photograph, [BUDGET, {"dominant": 2, "contextual": 1}])
    assert [item.name for item in found] == ["5+3", "2+1"]
    assert model.config.visionzip == saved
    item = found[0]
    with under_budget(model, BUDGET):
        inputs = PROCESSOR.image_processor(photograph, return_tensors="pt")
        tokens = model.model.get_visual_tokens(inputs["pixel_values"])
    assert item.grid == (4, 4)
    assert item.kept.nonzero()[0].tolist() == tokens.kept[0].tolist()
    assert item.groups.tolist() == tokens.groups[0].tolist()
    assert item.targets.tolist() == tokens.targets[0].tolist()
    assert (item.visual_tokens, item.cls_tokens, int(item.kept.sum())) == (8, 1, 4)
    assert 0.5 < item.attention.sum() < 1  # the rest goes to CLS itself
    np.testing.assert_allclose(item.attention, tokens.attention[0] / 4)


def test_pixels_are_the_padded_square_that_the_tower_sees(photograph):
    (found,) = map_tokens(build(reduction="visionzip"), PROCESSOR, photograph)
    pixels = found[0].pixels
    assert pixels.shape == (16, 16, 3)
    mean = np.rint(255 * np.array(PROCESSOR.image_processor.image_mean))
    # 60 x 30 becomes 16 x 8 between two bands of the mean colour.
    assert np.abs(pixels[:3] - mean).max() <= 3
    assert np.abs(pixels[-3:] - mean).max() <= 3
    expected = np.asarray(photograph.resize((16, 8), Image.Resampling.BICUBIC), dtype=float)
    assert np.abs(pixels[5:11] - expected[1:7]).mean() < 8


def test_siglip_has_no_cls(photograph):
    (found,) = map_tokens(build(tower="siglip", reduction="visionzip"), PROCESSOR, photograph, [BUDGET])
    assert (found[0].cls_tokens, int(found[0].kept.sum())) == (0, 5)
    assert found[0].attention.sum() == pytest.approx(1, abs=1e-4)


def test_next_mosaic_is_in_the_places_of_the_tiles(photograph):
    model = build(reduction="visionzip", next_=True)
    base, mosaic = map_tokens(model, NEXT_PROCESSOR, photograph, [BUDGET])
    assert base[0].grid == (4, 4)
    item = mosaic[0]
    inputs = NEXT_PROCESSOR.image_processor(photograph, return_tensors="pt")
    tiles = inputs["pixel_values"][0]
    with under_budget(model, BUDGET):
        tokens = model.model.get_visual_tokens(tiles)
    # 60 x 30 fits 32 x 16 best: one row of two tiles behind the base tile.
    assert item.grid == (4, 8)
    assert item.pixels.shape == (16, 32, 3)
    assert (item.visual_tokens, item.cls_tokens) == (16, 2)
    kept, groups = item.kept.reshape(4, 8), item.groups.reshape(4, 8)
    for tile in (0, 1):
        columns = slice(4 * tile, 4 * tile + 4)
        assert kept[:, columns].reshape(-1).nonzero()[0].tolist() == tokens.kept[1 + tile].tolist()
        own = tokens.groups[1 + tile]
        assert groups[:, columns].reshape(-1).tolist() == torch.where(own < 0, -1, own + 3 * tile).tolist()
    # The two halves of the mosaic show the left and the right of the photograph.
    grey = np.asarray(photograph.resize((32, 16), Image.Resampling.BICUBIC), dtype=float)
    assert np.abs(item.pixels - grey).mean() < 8


def test_one_tile_beside_the_base_tile():
    model = build(reduction="visionzip", next_=True, image_grid_pinpoints=[[16, 16]])
    processor = SimpleNamespace(
        image_processor=LlavaNextImageProcessorPil(size=SIZE, crop_size=CROP, image_grid_pinpoints=[[16, 16]])
    )
    # One tile beside the base tile, in a grid of one.
    views = map_tokens(model, processor, Image.new("RGB", (16, 16), "red"), [BUDGET])
    assert [view[0].grid for view in views] == [(4, 4), (4, 4)]


@pytest.mark.parametrize(("method", "kept", "merged"), [("random", 6, 0), ("grid", 6, 0), ("pool", 0, 16)])
def test_baselines_have_no_attention_and_no_cls(method, kept, merged, photograph, tmp_path):
    budget = {"dominant": 6, "contextual": 0, "method": method}
    ((item,),) = map_tokens(build(reduction="visionzip"), PROCESSOR, photograph, [budget])
    assert item.attention is None
    assert (item.visual_tokens, item.cls_tokens, item.name) == (6, 0, f"6+0 ({method})")
    assert (int(item.kept.sum()), int((item.groups >= 0).sum())) == (kept, merged)
    draw_images([item], tmp_path / f"{method}.png")


@pytest.mark.parametrize(
    ("budget", "kept", "cls", "merged", "title"),
    [({"dominant": 6, "contextual": 0, "method": "scope", "alpha": 0.5}, 6, 0, 0, "SCOPE"),
     ({"dominant": 4, "contextual": 2, "method": "duet", "window": 2}, 3, 1, 4, "DUET-VLM"),
     ({"dominant": 6, "contextual": 0, "method": "divprune"}, 6, 0, 0, "DivPrune")],
    ids=str,
)  # fmt: skip
def test_every_method_is_named_and_shown(budget, kept, cls, merged, title, photograph, tmp_path):
    ((item,),) = map_tokens(build(reduction="visionzip"), PROCESSOR, photograph, [budget])
    assert (int(item.kept.sum()), item.cls_tokens, int((item.groups >= 0).sum())) == (kept, cls, merged)
    assert (item.attention is None) == (title == "DivPrune")
    if item.attention is not None:
        assert item.attention.sum() <= 1
    assert (item.title, item.name) == (title, {"SCOPE": "6+0 (scope:alpha=0.5)", "DUET-VLM": "4+2 (duet:window=2)",
                                               "DivPrune": "6+0 (divprune)"}[title])  # fmt: skip
    draw_images([item], tmp_path / "images.png")


def test_files_are_pictures(photograph, tmp_path):
    model = build(reduction="visionzip")
    budgets = [BUDGET, {"dominant": 5, "contextual": 0}, {"dominant": 1, "contextual": 2, "method": "duet"}]
    (maps,) = map_tokens(model, PROCESSOR, photograph, budgets)
    draw_budgets(maps, tmp_path / "new" / "budgets.png", "a photograph")
    draw_images([maps[0], maps[0], maps[0]], tmp_path / "images.png", ["one", "two", "three"])
    wide = Image.open(tmp_path / "new" / "budgets.png")
    high = Image.open(tmp_path / "images.png")
    assert wide.width > wide.height > 500
    assert high.height > 0.7 * high.width
    for item in (wide, high):
        assert len(item.convert("RGB").resize((150, 150)).getcolors(150 * 150) or []) > 200


def test_panels_show_kept_patches_bright_and_groups_in_their_colours(photograph):
    (maps,) = map_tokens(build(reduction="visionzip"), PROCESSOR, photograph, [BUDGET])
    item = maps[0]
    shown = pictures._dim(item.pixels, ~item.kept.reshape(item.grid))
    patches = shown.reshape(4, 4, 4, 4, 3).swapaxes(1, 2).reshape(16, -1)
    original = (item.pixels / 255).reshape(4, 4, 4, 4, 3).swapaxes(1, 2).reshape(16, -1)
    for patch in range(16):
        if item.kept[patch]:
            np.testing.assert_array_equal(patches[patch], original[patch])
        else:
            assert patches[patch].max() < 0.24
    colors = pictures._colors(12)
    assert len(np.unique(colors.round(3), axis=0)) == 12
    blown = pictures._blow_up(colors[np.arange(4).reshape(2, 2)], np.zeros((5, 6, 3), np.uint8))
    assert blown.shape == (5, 6, 3)
    np.testing.assert_array_equal(blown[0, 5], colors[1])
    np.testing.assert_array_equal(blown[4, 0], colors[2])


def test_borders_are_between_different_labels():
    segments = {tuple(sorted(segment)) for segment in pictures._borders(np.array([[0, 0], [0, 1]]))}
    # Around the one labelled patch; what has the lowest label is background.
    assert segments == {((1, 1), (2, 1)), ((1, 1), (1, 2)), ((2, 1), (2, 2)), ((1, 2), (2, 2))}


def test_refusals(photograph, tmp_path):
    model = build(reduction="none")
    with pytest.raises(ValueError, match="keeps every visual token: give a budget"):
        map_tokens(model, PROCESSOR, photograph)
    with pytest.raises(ValueError, match="the sum must be 1 to 17"):
        map_tokens(model, PROCESSOR, photograph, [{"dominant": 16, "contextual": 2}])
    assert model.config.visionzip is None
    with pytest.raises(ValueError, match="at least one image"):
        draw_images([], tmp_path / "x.png")
    with pytest.raises(ValueError, match="at least one image and one budget"):
        draw_budgets([], tmp_path / "x.png")
