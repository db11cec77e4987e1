"""The processor that belongs to a release: its tokenizer, its images at its sizes, its chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.image_processing_utils import BaseImageProcessor

from shortzip.data.errors import UserError
from shortzip.data.files import read_json
from shortzip.data.supervision import choose_template
from shortzip.reduction.families import family_of
from shortzip.reduction.processing_videos import ReducedVideosProcessorMixin
from shortzip.train.release.opening import Release, model_classes, understood
from shortzip.train.release.original_layout import split_after_images


def release_processor(release: Release, model_config: Any) -> Any:
    """The processor of a release, for its model whose config is `model_config`.

    It writes as many placeholders as that model fills, pads images as the release was trained, and carries the chat
    template that the release's `spec` names.
    """
    folder, model_type, chat_template = release.folder, str(release.config["model_type"]), release.spec.chat_template
    _, _, processor_class = model_classes(model_type)
    with understood(folder):
        processor = processor_class.from_pretrained(folder, visionzip=model_config.visionzip, trust_remote_code=False)
    # What is saved would otherwise name the release's code, to be run where the saved processor is trusted.
    processor.tokenizer.init_kwargs.pop("auto_map", None)
    combined = folder / "processor_config.json"
    own = read_json(combined) if combined.is_file() else {}
    settings = own.get("image_processor")
    if settings is None:
        settings = read_json(folder / "preprocessor_config.json")
    processor.image_processor = build_image_processor(settings, model_type, str(folder))
    family_of(model_type).complete_processor(processor, own, model_config)
    if chat_template == "auto" and model_type.startswith("reduced_"):
        chat_template = "release"  # a reduced checkpoint carries the one that it was tuned with
    processor.chat_template = choose_template(processor, chat_template)
    marks = [processor.image_token, *([processor.video_token] if takes_videos(processor) else [])]
    processor.tokenizer = split_after_images(processor.tokenizer, *marks)
    return processor


def takes_videos(processor: Any) -> bool:
    """Whether a prompt of this processor may hold videos."""
    return isinstance(processor, ReducedVideosProcessorMixin)


def build_image_processor(settings: Mapping[str, Any], model_type: str, where: str = "release") -> BaseImageProcessor:
    """The image processor that gives the pixels a release was trained on, at its sizes.

    Which that is, is its family's to say, and not always what the release ships. The backend is always Pillow:
    torchvision's differs from the original's in 0.12 % of values.

    Args:
        settings: of the release's own image processor, as its JSON gives them.
        model_type: of the release's config.
        where: what messages call it.

    Raises:
        UserError: a kind of image processor that is not known; code that a release brings along is never run.
    """
    kind = str(settings.get("image_processor_type", settings.get("feature_extractor_type", "")))
    kind = kind.removesuffix("Pil").removesuffix("Fast")
    dropped = ("image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "backend")
    plain = {key: value for key, value in settings.items() if key not in dropped}
    family = family_of(model_type, where)
    if kind not in family.image_processors:
        known = ", ".join(name for name in family.image_processors if name)
        raise UserError(f"{where}: image_processor_type is {kind!r}, known for {family.title} are {known}")
    return family.image_processor(kind, plain)
