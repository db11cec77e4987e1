"""Video-LLaVA as its authors released it: LanguageBind's towers, of which the one for videos attends over time."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from .errors import ReductionError
from .families import Family
from .family_llava import SIZES_7B
from .family_video_llava import VideoLlava

_PADDED = ("llava.image_processing_pil_llava", "LlavaImageProcessorPil")


class TemporalVideoLlava(VideoLlava):
    """As Video-LLaVA-hf, with a step over time in every layer of the video tower, and images padded to a square."""

    name = "temporal_video_llava"
    title = "Video-LLaVA"
    model_type = "temporal_video_llava"
    stem = "TemporalVideoLlava"
    configuration = "configuration_reduced_temporal_video_llava"
    modeling = "modeling_reduced_temporal_video_llava"
    processing = "processing_reduced_temporal_video_llava"
    releases: ClassVar = {"video-llava-7b": ("LlamaConfig", SIZES_7B)}
    releases_side = 224
    any_frames = False
    image_processors: ClassVar = {"": _PADDED, "LlavaImageProcessor": _PADDED}

    @property
    def plain_config_class(self) -> Any:
        """Its own: transformers has no Video-LLaVA that attends over time."""
        return self.config_class

    def image_processor(self, kind: str, settings: Mapping[str, Any]) -> Any:
        """LLaVA's, which pads to a square; settings that name none are of a release that does."""
        return super().image_processor(kind, {"do_pad": True, **settings})

    def refuse_weights(self, names: Iterable[str], where: str) -> None:
        """Not none for attention over time."""
        held = list(names)
        if held and not any(".temporal_" in name for name in held):
            raise ReductionError(
                f"{where}: none of {len(held)} weights is for attention over time (temporal_attn and so on), which "
                "Video-LLaVA's video tower has in every layer: they are another model's, such as Video-LLaVA-hf's"
            )

    def complete_processor(self, processor: Any, own: Mapping[str, Any], config: Any) -> None:
        super().complete_processor(processor, own, config)
        processor.video_frames = config.video_frames

    def frames_read(self, release: Any) -> int:
        return int(release.video_frames)

    def build_tower(self, config: Any, name: str) -> Any:
        if name != "video_tower":
            return super().build_tower(config, name)
        from .temporal_tower import TemporalTower

        return TemporalTower(config.vision_config, config.video_frames)

    def more_tower_parameters(self, config: Any) -> int:
        """The video tower's, with what attends over time: of each layer an attention, its norm and an embedding."""
        vision = config.vision_config
        d = vision.hidden_size
        over_time = 4 * (d * d + d) + 2 * d + config.video_frames * d
        return int(super().more_tower_parameters(config) + vision.num_hidden_layers * over_time)


FAMILY: Family = TemporalVideoLlava()
