"""Processors that write as many placeholders as the reduced models fill."""

from typing import Any

import torch
from transformers import LlavaNextProcessor, LlavaProcessor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.processing_utils import MultiModalData
from transformers.utils import is_numpy_array, is_torch_tensor

from .configuration_reduced_llava import validate_visionzip
from .errors import ReductionError
from .weight_files import check_json

_FILES = (
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def _as_bytes(images: Any) -> tuple[Any, bool]:
    """Pictures as floats from 0 to 1 (torchvision's ToTensor) in uint8, 0 to 255, and whether there are any such.

    The image processors pad with values from 0 to 255 before they rescale, so that is what they take. Anything else is
    left as it is.
    """
    if isinstance(images, (list, tuple)):
        found = [_as_bytes(image) for image in images]
        return [image for image, _ in found], any(scaled for _, scaled in found)
    if not is_torch_tensor(images) and not is_numpy_array(images):
        return images, False
    values = torch.as_tensor(images)
    if not values.is_floating_point() or not values.numel() or values.min() < 0 or values.max() > 1:
        return images, False
    whole = (values.float() * 255).round().to(torch.uint8)
    return whole if is_torch_tensor(images) else whole.numpy(), True


def _check_patch_size(patch_size: Any) -> None:
    if patch_size is not None and (not isinstance(patch_size, int) or patch_size < 1):
        raise ReductionError(f"processor: patch_size is {patch_size!r}; it must be a whole number from 1, or null")


class ReducedProcessorMixin:
    """What the reduced processors have in common; goes before the transformers class."""

    visionzip: dict[str, int] | None

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """As transformers' method. Pictures may be PIL images, tensors or arrays of 0 to 255, and also of floats from
        0 to 1, with `do_rescale=False` or without it."""
        whole, scaled = _as_bytes(images)
        if not scaled:
            return super().__call__(images=images, text=text, **kwargs)  # type: ignore[misc]
        kwargs = {key: value for key, value in kwargs.items() if key != "do_rescale"}
        if "images_kwargs" in kwargs:
            within = kwargs["images_kwargs"].items()
            kwargs["images_kwargs"] = {key: value for key, value in within if key != "do_rescale"}
        return super().__call__(images=whole, text=text, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' method; `visionzip`, if given, overrides what the folder says (None: every visual token).

        Code of the folder is run only with `trust_remote_code=True`, and nobody is asked.

        Raises:
            ValueError: `visionzip` is neither None nor a budget, a file is damaged, or a part is code of its own.
        """
        # Kept from transformers, which would also hand it to the tokenizer, to be saved in its config.
        override = {key: kwargs.pop(key) for key in ("visionzip",) if key in kwargs}
        kwargs = {"trust_remote_code": False, **kwargs}
        check_json(pretrained_model_name_or_path, _FILES, kwargs.get("subfolder"))
        try:
            processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        except ValueError as error:
            foreign = "trust_remote_code" in str(error) or str(error).startswith("Unrecognized image processor")
            if kwargs["trust_remote_code"] or not foreign:
                raise
            raise ReductionError(
                f"{pretrained_model_name_or_path}: its image processor or tokenizer is none of transformers' own, and "
                "code of a release (auto_map) is never run: take a release whose parts are"
            ) from None
        for visionzip in override.values():
            validate_visionzip(visionzip)
            processor.visionzip = visionzip
        return processor


class ReducedLlavaProcessor(ReducedProcessorMixin, LlavaProcessor):
    """LlavaProcessor that writes `dominant + contextual` placeholders per image; without `visionzip`, as it.

    Args:
        visionzip: the model's, {"dominant": int, "contextual": int} or None; saved in processor_config.json.

    Raises:
        ValueError: `visionzip` is anything else, or `patch_size` no number of pixels.
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
        _check_patch_size(patch_size)
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
        ValueError: `visionzip` is anything else, or `patch_size` no number of pixels.
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
        _check_patch_size(patch_size)
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
