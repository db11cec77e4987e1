"""LLaVA-OneVision: what is not as in other models that take videos (test_models_with_videos.py)."""

import pytest
import torch
from video_rows import FRAMES, READS, build_with_videos

SIDE = READS["llava_onevision"].side


def test_a_frame_is_reduced_as_an_image_and_a_video_ends_in_one_newline() -> None:
    model = build_with_videos("llava_onevision", "visionzip")
    video = torch.randn(2, FRAMES, 3, SIDE, SIDE)
    with torch.no_grad():
        found = model.model.get_video_features(video).pooler_output
        for number in range(2):
            frames = model.model.get_visual_tokens(video[number])
            expected = model.model.multi_modal_projector(frames.tokens).flatten(0, 1)
            torch.testing.assert_close(found[number][:-1], expected, rtol=0, atol=1e-6)
            assert torch.equal(found[number][-1], model.model.image_newline)


def test_several_images_are_a_tile_and_a_newline_each() -> None:
    model = build_with_videos("llava_onevision", "visionzip")
    assert model.model._token_counts(None, [[50, 58], [0, 0]], None) == [10 * 6, 6 + 1]
    assert build_with_videos("llava_onevision", "none").model._token_counts(None, [[0, 0]], None) == [25 + 1]


def test_original_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="positions: 'original' is not known for LLaVA-OneVision"):
        build_with_videos("llava_onevision", "visionzip", positions="original")
