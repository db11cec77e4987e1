"""Video-LLaVA as its authors released it, with visual tokens reduced: its video tower attends over time."""

from torch import Tensor

from .configuration_reduced_temporal_video_llava import ReducedTemporalVideoLlavaConfig, validate_video_frames
from .errors import ReductionError
from .modeling_reduced_llava import register_key_mapping
from .modeling_reduced_video_llava import ReducedVideoLlavaForConditionalGeneration, ReducedVideoLlavaModel
from .temporal_tower import TemporalTower, run_frames_to_block
from .visual_tokens import BlockStates


class ReducedTemporalVideoLlavaModel(ReducedVideoLlavaModel):
    """As ReducedVideoLlavaModel, of videos of `config.video_frames` frames, and of no others."""

    config: ReducedTemporalVideoLlavaConfig
    config_class = ReducedTemporalVideoLlavaConfig

    def __init__(self, config: ReducedTemporalVideoLlavaConfig) -> None:
        validate_video_frames(config)
        super().__init__(config)
        self.video_tower = TemporalTower(config.vision_config, config.video_frames)
        self.post_init()

    def _run_frames(self, pixels: Tensor, selected: int, reads_attention: bool) -> BlockStates:
        return run_frames_to_block(self.video_tower, pixels, selected, reads_attention)

    def _check_videos(self, pixel_values_videos: Tensor) -> None:
        super()._check_videos(pixel_values_videos)
        frames = self.config.video_frames
        if pixel_values_videos.shape[1] != frames:
            raise ReductionError(
                f"pixel_values_videos has shape {tuple(pixel_values_videos.shape)}, [videos, frames, 3, S, S]: of "
                f"{pixel_values_videos.shape[1]} frames; this tower has an embedding for each of {frames} frames in "
                f"every layer and reads no other number: sample {frames} evenly, such as np.linspace(0, length - 1, "
                f"{frames}).astype(int)"
            )


class ReducedTemporalVideoLlavaForConditionalGeneration(ReducedVideoLlavaForConditionalGeneration):
    """The original Video-LLaVA with the keys of the reductions; with all of them None, Video-LLaVA itself."""

    config: ReducedTemporalVideoLlavaConfig
    config_class = ReducedTemporalVideoLlavaConfig
    headless = ReducedTemporalVideoLlavaModel


register_key_mapping("ReducedTemporalVideoLlavaModel", "VideoLlavaModel")
register_key_mapping("reduced_temporal_video_llava", "video_llava")
register_key_mapping("TemporalTower", "CLIPVisionModel")
ReducedTemporalVideoLlavaModel.with_head = ReducedTemporalVideoLlavaForConditionalGeneration
ReducedTemporalVideoLlavaModel.register_for_auto_class("AutoModel")
ReducedTemporalVideoLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
