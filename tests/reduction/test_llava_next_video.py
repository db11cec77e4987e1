"""LLaVA-NeXT-Video: what is not as in other models that take videos (test_models_with_videos.py)."""

from typing import Any

import pytest
import torch
from reduced_models import REDUCTIONS
from video_rows import FRAMES, IMAGE, READS, VIDEO, batch_of, build_with_videos, logits, row_of

from shortzip.reduction import ReducedLlavaNextConfig, ReducedLlavaNextForConditionalGeneration
from shortzip.reduction.flops import parameter_counts, usual_tiles

SIDE = READS["llava_next_video"].side


def test_images_are_those_of_llava_next() -> None:
    """The same weights give the same features of tiles, newlines and all, with and without a budget."""
    for reduction in ("none", "visionzip"):
        model = build_with_videos("llava_next_video", reduction)
        keys = {key: held for key, held in model.config.to_dict().items() if not key.startswith(("model_", "video_"))}
        other = ReducedLlavaNextForConditionalGeneration(ReducedLlavaNextConfig(**{**keys, **REDUCTIONS[reduction]}))
        other.load_state_dict(model.state_dict())
        sizes = torch.tensor([[50, 58], [20, 44]])
        pixels = torch.randn(2, 5, 3, SIDE, SIDE)
        with torch.no_grad():
            ours = model.model.get_image_features(pixels, sizes).pooler_output
            theirs = other.eval().model.get_image_features(pixels, sizes).pooler_output
        assert [len(image) for image in ours] == [len(image) for image in theirs]
        assert all(torch.equal(image, expected) for image, expected in zip(ours, theirs, strict=True))


def test_a_frame_is_reduced_as_an_image_and_nothing_stands_between_or_behind_frames() -> None:
    model = build_with_videos("llava_next_video", "visionzip")
    video = torch.randn(2, FRAMES, 3, SIDE, SIDE)
    with torch.no_grad():
        found = model.model.get_video_features(video).pooler_output
        for number in range(2):
            frames = model.model.get_visual_tokens(video[number])
            expected = model.model.multi_modal_projector(frames.tokens).flatten(0, 1)
            torch.testing.assert_close(found[number], expected, rtol=0, atol=1e-6)


def test_parameters_are_counted_as_they_are() -> None:
    model = build_with_videos("llava_next_video", "none")
    counted = parameter_counts(model.config)
    assert counted.total == sum(weight.numel() for weight in model.parameters())
    assert usual_tiles(model.config) == 5


def test_what_it_has_no_such_thing_of_is_refused() -> None:
    zipped = {"dominant": 4, "contextual": 2, "per_image": {"chooser": "fixed"}}
    with pytest.raises(ValueError, match="a llava_next_video has one budget for all images"):
        build_with_videos("llava_next_video", "none", visionzip=zipped)
    with pytest.raises(ValueError, match=r"pixel_values_videos has shape \(3, 3, 24, 24\), not \[videos, frames"):
        build_with_videos("llava_next_video", "none").model.get_video_features(torch.zeros(3, 3, SIDE, SIDE))


def places_by_hand(model: Any, row: dict[str, Any]) -> list[int]:
    """Where the tokens of a row stand: a patch of a frame where the cell of 2 by 2 does, of nine, that it is in."""
    images = model.model.get_image_features(torch.stack(row["images"]), torch.tensor(row["sizes"])).positions
    chosen = [model.model.get_visual_tokens(video) for video in row["videos"]]
    videos = []
    for visual in chosen:
        places = []
        for frame in range(FRAMES):
            patches = [0, *visual.kept[frame].tolist(), *visual.targets[frame].tolist()]  # CLS, dominant, contextual
            places += [9 * frame + patch // 6 // 2 * 3 + patch % 6 // 2 for patch in patches]
        videos.append((places, 9 * FRAMES))
    found = {IMAGE: list(zip((places.tolist() for places in images.tokens), images.lengths, strict=True)),
             VIDEO: videos}  # fmt: skip
    positions: list[int] = []
    following = 0
    while len(positions) < len(row["ids"]):
        token = row["ids"][len(positions)]
        places, length = found[token].pop(0) if token in found else ([0], 1)
        positions += [following + place for place in places]
        following += length
    return positions


@torch.no_grad()
def test_original_positions() -> None:
    """Logits are those of compact positions with each token's own position given; generate counts by itself."""
    model = build_with_videos("llava_next_video", "visionzip", positions="original")
    compact = build_with_videos("llava_next_video", "visionzip")
    row = row_of(READS["llava_next_video"], model, "tItVttVt", 0)
    batch = batch_of([row])
    positions = torch.tensor([places_by_hand(model, row)])
    assert positions[0].tolist() != list(range(len(row["ids"])))
    expected = logits(compact, batch, position_ids=positions)
    assert not torch.allclose(logits(compact, batch), expected, atol=1e-3)
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-5)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    said = model.generate(**batch, **options)
    assert torch.equal(said, model.generate(**batch, **options, use_cache=False))
    assert model.generate(**batch, **options).shape[1] == len(row["ids"]) + 4
    first = int(expected[0, -1].index_fill(0, torch.tensor(2), -torch.inf).argmax())
    assert int(said[0, len(row["ids"])]) == first


@torch.no_grad()
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_beams_over_rows_of_images_and_videos(positions: str) -> None:
    """Two beams and a best one give what each row gives alone, with and without a cache."""
    model = build_with_videos("llava_next_video", "visionzip", positions=positions)
    rows = [row_of(READS["llava_next_video"], model, layout, seed) for seed, layout in enumerate(["tItVtt", "tVtSt"])]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 2}
    batch = batch_of(rows, "left")
    together = model.generate(**batch, **options)[:, -4:]
    assert torch.equal(together, model.generate(**batch, **options, use_cache=False)[:, -4:])
    for number, row in enumerate(rows):
        assert torch.equal(together[number], model.generate(**batch_of([row]), **options)[0, -4:])
