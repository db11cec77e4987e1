"""Processors that write as many placeholders as the reduced models fill."""

from typing import Any

from transformers import LlavaNextProcessor, LlavaProcessor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.processing_utils import MultiModalData

from .configuration_reduced_llava import validate_visionzip


class ReducedProcessorMixin:
    """What the reduced processors have in common; goes before the transformers class."""

    visionzip: dict[str, int] | None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' method; `visionzip`, if given, overrides what the folder says (None: every visual token).

        Raises:
            ValueError: `visionzip` is neither None nor a budget.
        """
        # Kept from transformers, which would also hand it to the tokenizer, to be saved in its config.
        override = {key: kwargs.pop(key) for key in ("visionzip",) if key in kwargs}
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        for visionzip in override.values():
            validate_visionzip(visionzip)
            processor.visionzip = visionzip
        return processor


class ReducedLlavaProcessor(ReducedProcessorMixin, LlavaProcessor):
    """LlavaProcessor that writes `dominant + contextual` placeholders per image; without `visionzip`, as it.

    Args:
        visionzip: the model's, {"dominant": int, "contextual": int} or None; saved in processor_config.json.

    Raises:
        ValueError: `visionzip` is anything else.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        visionzip: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        validate_visionzip(visionzip)
        self.visionzip = visionzip
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        if self.visionzip is None:
            return super().replace_image_token(image_inputs, image_idx, **kwargs)
        return self.image_token * (self.visionzip["dominant"] + self.visionzip["contextual"])

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        if self.visionzip is None or image_sizes is None:
            return super()._get_num_multimodal_tokens(image_sizes=image_sizes, **kwargs)
        budget = self.visionzip["dominant"] + self.visionzip["contextual"]
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[budget] * count, num_image_patches=[1] * count)


class ReducedLlavaNextProcessor(ReducedProcessorMixin, LlavaNextProcessor):
    """LlavaNextProcessor that writes `dominant + contextual` placeholders per tile; without `visionzip`, as it.

    Args:
        visionzip: the model's, {"dominant": int, "contextual": int} or None; saved in processor_config.json.

    Raises:
        ValueError: `visionzip` is anything else.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        visionzip: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        validate_visionzip(visionzip)
        self.visionzip = visionzip
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        if self.visionzip is None:
            return super().replace_image_token(image_inputs, image_idx, **kwargs)
        side = image_inputs["pixel_values"][image_idx].shape[-1]
        return self.image_token * self._count(image_inputs["image_sizes"][image_idx], side)

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        if self.visionzip is None or image_sizes is None:
            return super()._get_num_multimodal_tokens(image_sizes=image_sizes, **kwargs)
        side = self.image_processor.crop_size["height"]
        counts = [self._count(size, side) for size in image_sizes]
        return MultiModalData(num_image_tokens=counts, num_image_patches=[1] * len(counts))

    def _count(self, image_size: Any, side: int) -> int:
        """Placeholders of an image (height, width) cut into tiles of `side` pixels."""
        assert self.visionzip is not None
        size = [int(length) for length in image_size]
        tiles = image_size_to_num_patches(size, self.image_processor.image_grid_pinpoints, side)
        budget = self.visionzip["dominant"] + self.visionzip["contextual"]
        return tiles * budget + (tiles == 1)  # an image of one tile ends in image_newline


ReducedLlavaProcessor.register_for_auto_class("AutoProcessor")
ReducedLlavaNextProcessor.register_for_auto_class("AutoProcessor")
