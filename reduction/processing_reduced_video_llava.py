"""The processor of the reduced Video-LLaVA-hf: placeholders as many as the model fills, pixels by Pillow."""

from typing import Any

from transformers import VideoLlavaProcessor
from transformers.processing_utils import MultiModalData

from .configuration_pruning import is_whole
from .configuration_reduced_llava import validate_visionzip
from .errors import ReductionError
from .processing_videos import ReducedVideosProcessorMixin


class ReducedVideoLlavaProcessor(ReducedVideosProcessorMixin, VideoLlavaProcessor):
    """VideoLlavaProcessor that writes `dominant + contextual` placeholders per image, and per frame of a video.

    Without `visionzip`, as many as transformers' writes: an image's patches, and of every frame its CLS too. Images
    and frames alike go through the image processor, whose pixels are those of transformers' VideoLlavaImageProcessor.

    Args:
        patch_size: of the towers.
        visionzip: the model's, {"dominant": int, "contextual": int} or None; saved in processor_config.json.

    Raises:
        ValueError: `visionzip` is anything else, or `patch_size` no number of pixels.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = 14,
        vision_feature_select_strategy: str | None = "default",
        chat_template: str | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        num_additional_image_tokens: int = 1,
        visionzip: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        if patch_size is not None and (not is_whole(patch_size) or patch_size < 1):
            raise ReductionError(f"processor: patch_size is {patch_size!r}; it must be a whole number from 1, or null")
        validate_visionzip(visionzip)
        self.visionzip = visionzip
        self.patch_size = patch_size
        self.num_additional_image_tokens = num_additional_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.image_token, self.video_token = image_token, video_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(video_token)
        # Past VideoLlavaProcessor's own __init__, which asks for a video processor.
        super(VideoLlavaProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)

    def _frame_processor(self) -> Any:
        return self.image_processor

    @property
    def _every_token(self) -> int:
        """All that a tower gives of an image or a frame, its CLS among them."""
        if self.patch_size is None:
            raise ReductionError("processor: patch_size is null, and visionzip too: set it to the towers'")
        crop = self.image_processor.crop_size
        height, width = crop["height"] // self.patch_size, crop["width"] // self.patch_size
        return int(height * width + self.num_additional_image_tokens)

    @property
    def tokens_per_image(self) -> int:
        """Placeholders of an image, whatever its size."""
        if self.visionzip is not None:
            return int(self.visionzip["dominant"] + self.visionzip["contextual"])
        return self._every_token - (self.vision_feature_select_strategy == "default")

    def _plain_video_tokens(self, frames: int) -> int:
        """Of each frame its CLS too, whatever the strategy, which is of images."""
        return frames * self._every_token

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        return str(self.image_token) * self.tokens_per_image

    # As the mixin's, and not VideoLlavaProcessor's, which reads sizes of pixels.
    replace_video_token = ReducedVideosProcessorMixin.replace_video_token

    def _get_num_multimodal_tokens(
        self, image_sizes: Any = None, video_sizes: Any = None, **kwargs: Any
    ) -> MultiModalData:
        """As transformers' method of other processors. `video_sizes`: of each video, its number of frames first."""
        found: dict[str, Any] = {}
        if image_sizes is not None:
            count = len(image_sizes)
            found |= {"num_image_tokens": [self.tokens_per_image] * count, "num_image_patches": [1] * count}
        if video_sizes is not None:
            found["num_video_tokens"] = [self.video_tokens(int(frames)) for frames, *_ in video_sizes]
        return MultiModalData(**found)


ReducedVideoLlavaProcessor.register_for_auto_class("AutoProcessor")
