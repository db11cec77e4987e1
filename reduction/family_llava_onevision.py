"""LLaVA-OneVision: LLaVA-NeXT's tiles for one image, a tile for each of several, and videos frame by frame."""

import math
from typing import Any, ClassVar

from .families import Family
from .family_llava_next import LlavaNext

_ONEVISION = ("llava_onevision.image_processing_pil_llava_onevision", "LlavaOnevisionImageProcessorPil")


class LlavaOnevision(LlavaNext):
    """SigLIP's patches; a whole image and up to 36 tiles, counted as the nine that are not shrunk without a budget."""

    name = "llava_onevision"
    title = "LLaVA-OneVision"
    model_type = "llava_onevision"
    stem = "LlavaOnevision"
    configuration = "configuration_reduced_llava_onevision"
    modeling = "modeling_reduced_llava_onevision"
    processing = "processing_reduced_llava_onevision"
    inputs = frozenset({"image", "images", "video"})
    usual_tiles = 10
    video_frames = 32  # of a video, as it was trained
    releases: ClassVar = {}
    image_processors: ClassVar = {"": _ONEVISION, "LlavaOnevisionImageProcessor": _ONEVISION}

    def complete_processor(self, processor: Any, own: Any, config: Any) -> None:
        if own.get("num_image_tokens") is None:
            vision = config.vision_config
            processor.num_image_tokens = (vision.image_size // vision.patch_size) ** 2
        if own.get("vision_feature_select_strategy") is None:
            processor.vision_feature_select_strategy = config.vision_feature_select_strategy

    def video_tokens(self, config: Any, visionzip: Any, frames: int) -> int:
        side = math.ceil(config.vision_config.image_size // config.vision_config.patch_size / 2)  # frames are pooled
        per_frame = side * side if visionzip is None else visionzip["dominant"] + visionzip["contextual"]
        return int(frames * per_frame + 1)


FAMILY: Family = LlavaOnevision()
