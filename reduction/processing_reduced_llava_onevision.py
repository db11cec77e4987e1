"""The processor of the reduced LLaVA-OneVision: placeholders as many as the model fills, frames by Pillow."""

import math
from typing import Any

from transformers import LlavaOnevisionProcessor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.processing_utils import MultiModalData

from .configuration_reduced_llava import validate_visionzip
from .processing_videos import ReducedVideosProcessorMixin

_OF_FRAMES = ("size", "resample", "image_mean", "image_std", "rescale_factor", "do_rescale", "do_normalize")


class ReducedLlavaOnevisionProcessor(ReducedVideosProcessorMixin, LlavaOnevisionProcessor):
    """LlavaOnevisionProcessor that writes `dominant + contextual` placeholders per tile, and per frame of a video.

    Without `visionzip`, as many as transformers' writes. Several images of a prompt are given as a list within the
    list of images, as there: they are one tile each. Frames are resized by Pillow: transformers' video processors need
    torchvision.

    Args:
        num_image_tokens: patches of a tile.
        visionzip: the model's, {"dominant": int, "contextual": int} or None; saved in processor_config.json.

    Raises:
        ValueError: `visionzip` is anything else.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        vision_aspect_ratio: str = "anyres_max_9",
        visionzip: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        validate_visionzip(visionzip)
        self.visionzip = visionzip
        self.num_image_tokens = num_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.image_token, self.video_token = image_token, video_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(video_token)
        self.vision_aspect_ratio = vision_aspect_ratio
        # Past LlavaOnevisionProcessor's own __init__, which asks for a video processor.
        super(LlavaOnevisionProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)

    def _frame_processor(self) -> Any:
        """SigLIP's, which resizes to the tower's square."""
        own = self.image_processor.to_dict()
        return SiglipImageProcessorPil(**{key: own[key] for key in _OF_FRAMES if own.get(key) is not None})

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        counts = [int(count) for count in image_inputs["batch_num_images"]]
        several = [count != 1 for count in counts for _ in range(count)]
        size = [int(length) for length in image_inputs["image_sizes"][image_idx]]
        return self.image_token * self.image_tokens((0, 0) if several[image_idx] else (size[0], size[1]))

    def _get_num_multimodal_tokens(
        self, image_sizes: Any = None, video_sizes: Any = None, **kwargs: Any
    ) -> MultiModalData:
        """As transformers' method; an image of size (0, 0) is one of several in its prompt."""
        found: dict[str, Any] = {}
        if image_sizes is not None:
            counts = [self.image_tokens((int(height), int(width))) for height, width in image_sizes]
            found |= {"num_image_tokens": counts, "num_image_patches": [1] * len(counts)}
        if video_sizes is not None:
            found["num_video_tokens"] = [self.video_tokens(int(frames)) for frames, *_ in video_sizes]
        return MultiModalData(**found)

    def image_tokens(self, size: tuple[int, int]) -> int:
        """Placeholders of an image of (height, width) pixels; of one of several in its prompt, which is not cut, with
        (0, 0)."""
        side = self.image_processor.size["height"]
        if self.visionzip is None:
            assert self.num_image_tokens is not None
            uncut = size == (0, 0)
            every = self.num_image_tokens + 1 if uncut else self._get_number_of_features(*size, side, side)
            return every - (self.vision_feature_select_strategy == "default")
        pinpoints = self.image_processor.image_grid_pinpoints
        tiles = 1 if size == (0, 0) else image_size_to_num_patches(list(size), pinpoints, side)
        # An image of one tile ends in image_newline.
        return int(tiles * (self.visionzip["dominant"] + self.visionzip["contextual"]) + (tiles == 1))

    def _plain_video_tokens(self, frames: int) -> int:
        """Every other patch of a row, of every other row."""
        assert self.num_image_tokens is not None
        return int(frames * math.ceil(math.isqrt(self.num_image_tokens) / 2) ** 2)

    def _beside_frames(self) -> int:
        """A video ends in image_newline."""
        return 1


ReducedLlavaOnevisionProcessor.register_for_auto_class("AutoProcessor")
