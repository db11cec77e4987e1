"""Video-LLaVA-hf: transformers' VideoLlava, whose video tower is a plain CLIP. Not Video-LLaVA, whose tower is not."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from .errors import ReductionError
from .families import Family

_CLIP = ("clip.image_processing_pil_clip", "CLIPImageProcessorPil")


class VideoLlava(Family):
    """One tower for images and one for videos, of one config; one token per patch of an image, and one more, CLS, of a
    frame."""

    name = "video_llava"
    title = "Video-LLaVA-hf"
    model_type = "video_llava"
    stem = "VideoLlava"
    configuration = "configuration_reduced_video_llava"
    modeling = "modeling_reduced_video_llava"
    processing = "processing_reduced_video_llava"
    inputs = frozenset({"image", "images", "video"})
    towers = ("image_tower", "video_tower")
    video_frames = 8  # of a video, as it was trained
    image_processors: ClassVar = {"": _CLIP, "VideoLlavaImageProcessor": _CLIP, "CLIPImageProcessor": _CLIP}

    def image_processor(self, kind: str, settings: Mapping[str, Any]) -> Any:
        """Pixels are those of transformers' VideoLlavaImageProcessor: the short side resized, the middle cut out."""
        named = "return_legacy_image_output"
        return super().image_processor(kind, {key: value for key, value in settings.items() if key != named})

    def refuse_weights(self, names: Iterable[str], where: str) -> None:
        """None for attention over time, which this model would leave out: they are Video-LLaVA's."""
        temporal = sorted(name for name in names if ".temporal_" in name)
        if temporal:
            raise ReductionError(
                f"{where}: {len(temporal)} weights are for attention over time ({', '.join(temporal[:3])} …), for "
                "which Video-LLaVA-hf (model_type video_llava) has no place; without them it is another model. They "
                "are Video-LLaVA's: give its release in the authors' layout (LanguageBind/Video-LLaVA-7B)"
            )

    def video_tokens(self, config: Any, visionzip: Any, frames: int) -> int:
        """Where every token is kept, CLS is among a frame's."""
        return super().video_tokens(config, visionzip, frames) + (frames if visionzip is None else 0)

    def more_tower_parameters(self, config: Any) -> int:
        """The video tower's."""
        return clip_parameters(config.vision_config)


def clip_parameters(vision: Any) -> int:
    """Parameters of a CLIP tower, by its config."""
    d, m = vision.hidden_size, vision.intermediate_size
    patches = (vision.image_size // vision.patch_size) ** 2
    block = 4 * (d * d + d) + 2 * d * m + d + m + 4 * d
    return int(vision.num_hidden_layers * block + 3 * vision.patch_size**2 * d + (patches + 1) * d + d + 4 * d)


FAMILY: Family = VideoLlava()
