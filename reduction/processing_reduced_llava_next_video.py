"""The processor of the reduced LLaVA-NeXT-Video: images as LLaVA-NeXT's, frames at the release's own sizes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import LlavaNextVideoProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.processing_utils import MultiModalData
from transformers.utils import cached_file

from .configuration_reduced_llava import validate_visionzip
from .errors import ReductionError
from .processing_reduced_llava import ReducedTilesProcessorMixin, check_patch_size
from .processing_videos import ReducedVideosProcessorMixin
from .weight_files import check_json

FRAMES_FILE = "video_preprocessor_config.json"
_OF_FRAMES = (
    "size",
    "crop_size",
    "resample",
    "image_mean",
    "image_std",
    "rescale_factor",
    "do_resize",
    "do_center_crop",
    "do_rescale",
    "do_normalize",
)
_ON_THE_HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")


class ReducedLlavaNextVideoProcessor(  # type: ignore[misc]
    ReducedVideosProcessorMixin, ReducedTilesProcessorMixin, LlavaNextVideoProcessor
):
    """LlavaNextVideoProcessor that writes `dominant + contextual` placeholders per tile, and per frame of a video.

    Without `visionzip`, as many as transformers' writes. A frame's short side is resized, and
    its middle is cut out, as transformers' video processor does it, by Pillow.

    Args:
        video_token: what stands for a video in a prompt.
        frames: settings of a frame's pixels, as in a release's video_preprocessor_config.json; None: an image's.
        visionzip: the model's, {"dominant": int, "contextual": int, …} or None; saved in processor_config.json.

    Raises:
        ValueError: `visionzip` is anything else, `patch_size` no number of pixels, or `frames` no settings.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        num_additional_image_tokens: int = 0,
        frames: Mapping[str, Any] | None = None,
        visionzip: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_patch_size(patch_size)
        validate_visionzip(visionzip)
        self.visionzip, self.frames = visionzip, settings_of_frames(frames)
        self.patch_size, self.num_additional_image_tokens = patch_size, num_additional_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.image_token, self.video_token = image_token, video_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(video_token)
        # Past LlavaNextVideoProcessor's own __init__, which asks for a video processor.
        super(LlavaNextVideoProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As the others' method; of a release, with the settings of its video processor."""
        where = {key: kwargs[key] for key in _ON_THE_HUB if kwargs.get(key) is not None}
        check_json(pretrained_model_name_or_path, (FRAMES_FILE,), kwargs.get("subfolder"))
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if processor.frames is None:
            processor.frames = settings_of_frames(_video_settings(pretrained_model_name_or_path, where))
        return processor

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of a frame's pixels."""
        crop = self._frame_processor().crop_size
        return int(crop["height"]), int(crop["width"])

    def _frame_processor(self) -> Any:
        """CLIP's."""
        own = self.image_processor.to_dict() if self.frames is None else self.frames
        return CLIPImageProcessorPil(**{key: own[key] for key in _OF_FRAMES if own.get(key) is not None})

    def _plain_video_tokens(self, frames: int) -> int:
        """A quarter of the patches of each frame, as transformers writes them whatever the stride of its pooling."""
        if self.patch_size is None:
            raise ReductionError("processor: patch_size is null, and a video is given: set it to the tower's")
        height, width = (length // self.patch_size for length in self.frame_size)
        return int(frames * (height * width // 4))

    def _get_num_multimodal_tokens(
        self, image_sizes: Any = None, budgets: Any = None, *, video_sizes: Any = None, **kwargs: Any
    ) -> MultiModalData:
        """As transformers' method. `video_sizes`: of each video, its number of frames first."""
        found = super()._get_num_multimodal_tokens(image_sizes=image_sizes, budgets=budgets, **kwargs)
        if video_sizes is not None:
            found.num_video_tokens = [self.video_tokens(int(frames)) for frames, *_ in video_sizes]
        return found


def settings_of_frames(frames: Any) -> dict[str, Any] | None:
    """Of a video processor's settings, those that a frame's pixels depend on. Raises ReductionError for others."""
    if frames is None:
        return None
    if not isinstance(frames, Mapping):
        raise ReductionError(f"processor: frames is {frames!r}; needed are settings of a video processor, or null")
    return {key: frames[key] for key in _OF_FRAMES if frames.get(key) is not None}


def _video_settings(name: Any, where: dict[str, Any]) -> Any:
    """What a release says of its video processor, in either place; None where it says nothing."""
    for file, key in (("processor_config.json", "video_processor"), (FRAMES_FILE, None)):
        path = cached_file(
            name,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **where,
        )
        if path is not None:
            held = json.loads(Path(path).read_text(encoding="utf-8"))
            found = held.get(key) if key is not None else held
            if found is not None:
                return found
    return None


ReducedLlavaNextVideoProcessor.register_for_auto_class("AutoProcessor")
