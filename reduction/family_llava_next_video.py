"""LLaVA-NeXT-Video: LLaVA-NeXT's tiles for images, and videos frame by frame."""

from collections.abc import Mapping
from typing import Any, ClassVar

from .errors import ReductionError
from .families import Family
from .family_llava import SIZES_7B
from .family_llava_next import LlavaNext


class LlavaNextVideo(LlavaNext):
    """LLaVA-NeXT, with videos."""

    name = "llava_next_video"
    title = "LLaVA-NeXT-Video"
    model_type = "llava_next_video"
    stem = "LlavaNextVideo"
    configuration = "configuration_reduced_llava_next_video"
    modeling = "modeling_reduced_llava_next_video"
    processing = "processing_reduced_llava_next_video"
    inputs = frozenset({"image", "images", "video"})
    video_frames = 32  # of a video, as it was trained
    releases: ClassVar = {"llava-next-video-7b": ("LlamaConfig", SIZES_7B)}

    def complete_processor(self, processor: Any, own: Mapping[str, Any], config: Any) -> None:
        """As LLaVA-NeXT's. Raises ReductionError for frames of another size than the tower reads."""
        super().complete_processor(processor, own, config)
        side, found = config.vision_config.image_size, processor.frame_size
        if found != (side, side):
            raise ReductionError(
                f"video_preprocessor_config.json: frames are cut to {found[0]} by {found[1]} pixels, and the vision "
                f"tower reads {side} by {side}: set size and crop_size to its"
            )

    def video_tokens(self, config: Any, visionzip: Any, frames: int) -> int:
        """Where every token is kept, patches are pooled, by two and two of a row and a column."""
        every = super().video_tokens(config, visionzip, frames)
        return every // 4 if visionzip is None else every


FAMILY: Family = LlavaNextVideo()
