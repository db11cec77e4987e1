"""LLaVA-NeXT-Video: LLaVA-NeXT's tiles for images, and videos frame by frame."""

from typing import ClassVar

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


FAMILY: Family = LlavaNextVideo()
