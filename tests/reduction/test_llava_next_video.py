"""LLaVA-NeXT-Video: what is not as in other models that take videos (test_models_with_videos.py)."""

import pytest
import torch
from reduced_models import REDUCTIONS
from video_rows import FRAMES, READS, build_with_videos

from shortzip.reduction import ReducedLlavaNextConfig, ReducedLlavaNextForConditionalGeneration

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


def test_what_it_has_no_such_thing_of_is_refused() -> None:
    with pytest.raises(ValueError, match="positions: 'original' is not known for LLaVA-NeXT-Video"):
        build_with_videos("llava_next_video", "visionzip", positions="original")
    zipped = {"dominant": 4, "contextual": 2, "per_image": {"chooser": "fixed"}}
    with pytest.raises(ValueError, match="a llava_next_video has one budget for all images"):
        build_with_videos("llava_next_video", "none", visionzip=zipped)
    with pytest.raises(ValueError, match=r"pixel_values_videos has shape \(3, 3, 24, 24\), not \[videos, frames"):
        build_with_videos("llava_next_video", "none").model.get_video_features(torch.zeros(3, 3, SIDE, SIDE))
