"""Mini-Gemini's processor: LLaVA's at the high resolution, with as many placeholders as the model fills."""

from typing import Any

from transformers import LlavaProcessor
from transformers.processing_utils import MultiModalData

from .configuration_pruning import is_whole
from .configuration_reduced_llava import validate_visionzip
from .errors import ReductionError
from .processing_reduced_llava import ReducedProcessorMixin


class ReducedMiniGeminiProcessor(ReducedProcessorMixin, LlavaProcessor):
    """LlavaProcessor of images padded to a square of `image_size_aux`, from which the model makes CLIP's view.

    Args:
        tiles: how many views of an image CLIP sees (`tiles_of` the config).
        tile_patches: patches of each, which are all its tokens without `visionzip`.
        visionzip: the model's, {"dominant": int, "contextual": int} per tile, or None.

    Raises:
        ReductionError: `visionzip` is anything else, or a count no whole number from 1.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 1,
        visionzip: dict[str, int] | None = None,
        tiles: int = 1,
        tile_patches: int = 576,
        **kwargs: Any,
    ) -> None:
        for key, value in (("tiles", tiles), ("tile_patches", tile_patches)):
            if not is_whole(value) or value < 1:
                raise ReductionError(f"processor: {key} is {value!r}; it must be a whole number from 1")
        validate_visionzip(visionzip)
        self.visionzip, self.tiles, self.tile_patches = visionzip, tiles, tile_patches
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

    @property
    def tokens_per_image(self) -> int:
        """Placeholders of an image, whatever its size."""
        zipped = self.visionzip
        return self.tiles * (self.tile_patches if zipped is None else zipped["dominant"] + zipped["contextual"])

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        return str(self.image_token) * self.tokens_per_image

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        if image_sizes is None:
            return super()._get_num_multimodal_tokens(image_sizes=image_sizes, **kwargs)
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.tokens_per_image] * count, num_image_patches=[1] * count)


ReducedMiniGeminiProcessor.register_for_auto_class("AutoProcessor")
