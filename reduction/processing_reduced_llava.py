"""Processors that write as many placeholders as the reduced models fill."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from transformers import LlavaNextProcessor, LlavaProcessor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.processing_utils import MultiModalData
from transformers.utils import is_numpy_array, is_torch_tensor

from .configuration_reduced_llava import validate_visionzip
from .errors import ReductionError
from .extras import extra
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

_PIXELS = ("pixel_values", "image_sizes")


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


def check_patch_size(patch_size: Any) -> None:
    if patch_size is not None and (not isinstance(patch_size, int) or patch_size < 1):
        raise ReductionError(f"processor: patch_size is {patch_size!r}; it must be a whole number from 1, or null")


class ReducedProcessorMixin:
    """What the reduced processors have in common; goes before the transformers class."""

    takes_budgets: ClassVar[bool] = False  # for each image, in a call
    takes_videos: ClassVar[bool] = False

    visionzip: dict[str, Any] | None
    image_processor: Any
    image_token: str
    patch_size: int | None
    num_additional_image_tokens: int
    _choose: Callable[[Any], tuple[list[int], list[int]]] | None = None

    def __call__(
        self, images: Any = None, text: Any = None, *, budgets: Any = None, model: Any = None, **kwargs: Any
    ) -> Any:
        """As transformers' method. Pictures may be PIL images, tensors or arrays of 0 to 255, and also of floats from
        0 to 1, with `do_rescale=False` or without it.

        Where budgets are per image, what is returned tells the model of them: it holds `image_budgets` [N] int64, or,
        with a `model`, `mm_encoder_outputs` in the place of pixels.

        Args:
            budgets: visual tokens of each of the N images (in LLaVA-NeXT, of each of its tiles), over all texts in
                the order of their placeholders; None: as `visionzip` says.
            model: with `per_image` chooser coverage, the model whose tower finds them. It runs once, on the model's
                device: its tokens are among what is returned.

        Raises:
            ReductionError: `budgets` are not one whole number in range for each image, or `visionzip` is None; chooser
                coverage without a `model`; videos where the model reads images alone.
        """
        if kwargs.get("videos") is not None and not self.takes_videos:
            raise ReductionError(
                f"videos: {type(self).__name__} is of a model that reads images, and no videos: take a release that "
                "does, such as LanguageBind/Video-LLaVA-7B or a LLaVA-OneVision, or give frames as images"
            )
        called, encoded = self._for_call(images, budgets, model)
        images, scaled = _as_bytes(images)
        if scaled:
            kwargs = {key: value for key, value in kwargs.items() if key != "do_rescale"}
            if "images_kwargs" in kwargs:
                within = kwargs["images_kwargs"].items()
                kwargs["images_kwargs"] = {key: value for key, value in within if key != "do_rescale"}
        made = super(ReducedProcessorMixin, called).__call__(images=images, text=text, **kwargs)  # type: ignore[misc]
        if encoded:
            made = type(made)({key: made[key] for key in made if key not in _PIXELS})
            made["mm_encoder_outputs"] = {"image": encoded[0]}
        return made

    def _for_call(self, images: Any, budgets: Any, model: Any) -> tuple[Any, list[Any]]:
        """This processor, or a copy that gives the images of one call their budgets; and a list that holds their
        features afterwards, where a model has encoded them."""
        encoded: list[Any] = []
        if budgets is not None and not self.takes_budgets:
            raise ReductionError(f"budgets is {budgets!r}: {type(self).__name__} takes one budget for all images")
        if budgets is not None and self.visionzip is None:
            raise ReductionError(f"budgets is {budgets!r}, and visionzip is null, which keeps every visual token")
        if self.visionzip is None or images is None:
            if budgets:
                raise ReductionError(f"budgets is {budgets!r}, and there are no images")
            return self, encoded
        if budgets is None and self.visionzip.get("per_image") is None:
            return self, encoded
        by_image = extra("image_budgets", "budgets" if budgets is not None else "visionzip.per_image")
        chooser = by_image.chooser_of(self.visionzip)
        if budgets is None and chooser == by_image.FIXED:
            return self, encoded
        called = copy.copy(self)
        if budgets is not None:
            called._choose = lambda processed: self._given(by_image, budgets, processed)
        elif chooser == by_image.IMAGE:
            called._choose = lambda processed: self._by_detail(by_image, processed)
        elif model is None:
            raise ReductionError(
                "visionzip.per_image: chooser coverage finds an image's budget in a pass of the tower, and the prompt "
                "is written before that: call the processor with model=…, with budgets=[…], or choose chooser image"
            )
        else:
            called._choose = lambda processed: self._encoded_by(model, processed, encoded)
        return called, encoded

    def _process_images(self, images: Any, **kwargs: Any) -> Any:
        if self._choose is None:
            return super()._process_images(images, **kwargs)  # type: ignore[misc]
        processed = self.image_processor(images, **kwargs)
        budgets, counts = self._choose(processed)
        if budgets:
            processed["image_budgets"] = budgets
        return processed, [self.image_token * count for count in counts]

    def _given(self, by_image: Any, budgets: Any, processed: Any) -> tuple[list[int], list[int]]:
        """Budgets and placeholders of images by the budgets of a call."""
        if self.patch_size is None:
            raise ReductionError("processor: patch_size is null, and budgets is given: set it to the tower's")
        side = int(torch.as_tensor(processed["pixel_values"][0]).shape[-1]) // self.patch_size
        limit = by_image.most_tokens(self.visionzip, side, self.num_additional_image_tokens > 0)
        values = by_image.check_budgets(budgets, len(processed["pixel_values"]), limit)
        by_image.check_shapes(self.visionzip, values, side)
        return values, self._placeholders(processed, values)

    def _by_detail(self, by_image: Any, processed: Any) -> tuple[list[int], list[int]]:
        """Budgets and placeholders of images by what is to be seen in them."""
        assert self.visionzip is not None
        pixels = [torch.as_tensor(image) for image in processed["pixel_values"]]
        whole = torch.stack([image[0] if image.dim() == 4 else image for image in pixels])
        values = by_image.budgets_by_detail(by_image.detail(whole).tolist(), self.visionzip["per_image"])
        return values, self._placeholders(processed, values)

    def _encoded_by(self, model: Any, processed: Any, encoded: list[Any]) -> tuple[list[int], list[int]]:
        """Placeholders of images as a model's tower and its chooser find them; what they give goes to `encoded`."""
        if model.config.visionzip != self.visionzip:
            raise ReductionError(
                f"model: its visionzip is {model.config.visionzip}, the processor's is {self.visionzip}: take the "
                "processor that belongs to the model"
            )
        pixels = [torch.as_tensor(image) for image in processed["pixel_values"]]
        stacked = torch.nn.utils.rnn.pad_sequence(pixels, batch_first=True)  # of LLaVA-NeXT, whose tiles differ
        sizes = {"image_sizes": torch.as_tensor(processed["image_sizes"])} if "image_sizes" in processed else {}
        with torch.no_grad():
            pixels_there = stacked.to(model.device, model.dtype)
            encoded.append(model.get_image_features(pixels_there, **sizes, return_dict=True))
        return [], [len(image) for image in encoded[0].pooler_output]

    def _placeholders(self, processed: Any, budgets: Sequence[int]) -> list[int]:
        """Placeholders of each image of these budgets."""
        raise NotImplementedError

    def _budgets_of_sizes(self, image_sizes: Sequence[Any], budgets: Sequence[int] | None) -> list[int]:
        """The budget of each image of which no more than its size is known."""
        assert self.visionzip is not None
        if budgets is not None:
            return list(budgets)
        if self.visionzip.get("per_image") is not None:
            by_image = extra("image_budgets", "visionzip.per_image")
            if by_image.chooser_of(self.visionzip) != by_image.FIXED:
                raise ReductionError(
                    f"visionzip.per_image: {self.visionzip['per_image']} gives an image a number of tokens that its "
                    "size alone does not tell, and no more is known here (an engine that builds the model, a file "
                    "of questions, a chat, lmms-eval): give all images one budget (visionzip.per_image: null)"
                )
        return [self.visionzip["dominant"] + self.visionzip["contextual"]] * len(image_sizes)

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
        visionzip: the model's, {"dominant": int, "contextual": int, …} or None; saved in processor_config.json.

    Raises:
        ValueError: `visionzip` is anything else, or `patch_size` no number of pixels.
    """

    takes_budgets = True

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        visionzip: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_patch_size(patch_size)
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

    def _placeholders(self, processed: Any, budgets: Sequence[int]) -> list[int]:
        return list(budgets)

    def _get_num_multimodal_tokens(
        self, image_sizes: Any = None, budgets: Any = None, **kwargs: Any
    ) -> MultiModalData:
        """As transformers' method. `budgets`: of each image, where they are per image."""
        if self.visionzip is None or image_sizes is None:
            return super()._get_num_multimodal_tokens(image_sizes=image_sizes, **kwargs)
        counts = self._budgets_of_sizes(image_sizes, budgets)
        return MultiModalData(num_image_tokens=counts, num_image_patches=[1] * len(counts))


class ReducedTilesProcessorMixin(ReducedProcessorMixin):
    """A reduced processor that writes `dominant + contextual` placeholders per tile; goes before the transformers
    class."""

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        if self.visionzip is None:
            return super().replace_image_token(image_inputs, image_idx, **kwargs)  # type: ignore[misc]
        side = image_inputs["pixel_values"][image_idx].shape[-1]
        budget = self.visionzip["dominant"] + self.visionzip["contextual"]
        return self.image_token * self._count(image_inputs["image_sizes"][image_idx], side, budget)

    def _placeholders(self, processed: Any, budgets: Sequence[int]) -> list[int]:
        side = processed["pixel_values"][0].shape[-1]
        sizes = processed["image_sizes"]
        return [self._count(size, side, budget) for size, budget in zip(sizes, budgets, strict=True)]

    def _get_num_multimodal_tokens(
        self, image_sizes: Any = None, budgets: Any = None, **kwargs: Any
    ) -> MultiModalData:
        """As transformers' method. `budgets`: of each image, where they are per image."""
        if self.visionzip is None or image_sizes is None:
            return super()._get_num_multimodal_tokens(image_sizes=image_sizes, **kwargs)  # type: ignore[misc]
        side, of_images = self.image_processor.crop_size["height"], self._budgets_of_sizes(image_sizes, budgets)
        counts = [self._count(size, side, budget) for size, budget in zip(image_sizes, of_images, strict=True)]
        return MultiModalData(num_image_tokens=counts, num_image_patches=[1] * len(counts))

    def _count(self, image_size: Any, side: int, budget: int) -> int:
        """Placeholders of an image (height, width) cut into tiles of `side` pixels, `budget` tokens each."""
        size = [int(length) for length in image_size]
        tiles = image_size_to_num_patches(size, self.image_processor.image_grid_pinpoints, side)
        return tiles * budget + (tiles == 1)  # an image of one tile ends in image_newline


class ReducedLlavaNextProcessor(ReducedTilesProcessorMixin, LlavaNextProcessor):
    """LlavaNextProcessor that writes `dominant + contextual` placeholders per tile; without `visionzip`, as it.

    Args:
        visionzip: the model's, {"dominant": int, "contextual": int, …} or None; saved in processor_config.json.

    Raises:
        ValueError: `visionzip` is anything else, or `patch_size` no number of pixels.
    """

    takes_budgets = True

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        visionzip: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_patch_size(patch_size)
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


ReducedLlavaProcessor.register_for_auto_class("AutoProcessor")
ReducedLlavaNextProcessor.register_for_auto_class("AutoProcessor")
