"""LLaVA-OneVision with visual tokens reduced per tile and per frame; what it shares with LLaVA-NeXT is there.

Frames are reduced instead of being pooled, and images are not shrunk where they have many tiles: what a budget keeps
is no grid. (VisionZip's authors published nothing for this family.)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionModel
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches
from transformers.utils import can_return_tuple

from .configuration_reduced_llava_onevision import ReducedLlavaOnevisionConfig, validate_onevision
from .errors import ReductionError
from .modeling_reduced_llava import ReducedForGenerationMixin, register_key_mapping
from .modeling_reduced_llava_next import ReducedLlavaNextModel, stack_tiles
from .modeling_videos import ReducedVideosMixin
from .positions import PlacedFeatures
from .refusals import refuse_changed

UNCUT = (0, 0)
"""In the place of an image's size: one of several in a prompt, which are not cut into tiles."""


class ReducedLlavaOnevisionModel(ReducedVideosMixin, LlavaOnevisionModel):  # type: ignore[misc]
    """LlavaOnevisionModel whose images come as `budget` visual tokens per tile, whose videos come as so many per
    frame, and whose decoder has frozen layers."""

    config: ReducedLlavaOnevisionConfig
    config_class = ReducedLlavaOnevisionConfig

    # Tiles in the authors' order, image_newline after an image of one tile: as in LLaVA-NeXT.
    project = ReducedLlavaNextModel.project
    _pack = ReducedLlavaNextModel._pack

    def __init__(self, config: ReducedLlavaOnevisionConfig) -> None:
        validate_onevision(config)
        super().__init__(config)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Any = None,
        vision_feature_layer: Any = None,
        vision_feature_select_strategy: str | None = None,
        vision_aspect_ratio: str | None = None,
        batch_num_images: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Projected visual tokens of N images: `pooler_output` is a list of N tensors, of `budget` tokens per tile in
        the order of ReducedLlavaNextModel's; an image of one tile is followed by image_newline.

        Args:
            pixel_values: [N, most tiles, 3, S, S], or [tiles of all images, 3, S, S].
            image_sizes: [N, 2] int, height and width of the images before tiling; (0, 0) for one of several in its
                prompt, which is one tile.
            batch_num_images: [B] int, how many images each prompt has: the same, as transformers says it.

        Raises:
            ValueError: the tiles in `pixel_values` are not those that `image_sizes` says, or there are no sizes.
        """
        refuse_changed(self.config, self._reductions)
        image_sizes = uncut_among_several(image_sizes, batch_num_images)
        tiles = self._tiles(image_sizes)
        pixel_values = stack_tiles(pixel_values, tiles)
        if self.config.visionzip is not None:
            visual: Any = self.get_visual_tokens(pixel_values, vision_feature_layer)
            features: Any = self.project(visual.tokens, visual.kept, image_sizes)  # type: ignore[misc]
            return PlacedFeatures(last_hidden_state=visual.tokens, pooler_output=features)
        hidden = self._patches(pixel_values, vision_feature_layer, vision_feature_select_strategy)
        packed, _ = self.pack_image_features(
            self.multi_modal_projector(hidden).split(tiles),
            image_sizes,
            image_newline=self.image_newline,
            vision_aspect_ratio=vision_aspect_ratio or self.config.vision_aspect_ratio,
        )
        return PlacedFeatures(last_hidden_state=hidden, pooler_output=packed)

    def _plain_videos(self, pixel_values_videos: Tensor, layer: Any, strategy: str | None) -> PlacedFeatures:
        hidden = self._patches(pixel_values_videos.flatten(0, 1), layer, strategy)
        frames = pixel_values_videos.shape[1]
        pooled: Any = self._joined(self.apply_pooling(self.multi_modal_projector(hidden)), frames)
        return PlacedFeatures(last_hidden_state=hidden, pooler_output=pooled)

    def _joined(self, tokens: Tensor, frames: int) -> list[Tensor]:
        """Frame after frame, with one image_newline at the end."""
        newline = self.image_newline[None].to(tokens)
        return [torch.cat([video, newline]) for video in super()._joined(tokens, frames)]

    def _patches(self, pixels: Tensor, layer: Any, strategy: str | None) -> Tensor:
        """All that the tower gives of images [N, 3, S, S], in the layer that is read: [N, T, H]."""
        layer = self.config.vision_feature_layer if layer is None else layer
        states = self.vision_tower(pixels, output_hidden_states=True, return_dict=True).hidden_states
        hidden = states[layer] if isinstance(layer, int) else torch.cat([states[number] for number in layer], dim=-1)
        strategy = strategy or self.config.vision_feature_select_strategy
        return hidden[:, 1:] if strategy == "default" else hidden

    def forward(self, *arguments: Any, image_sizes: Any = None, batch_num_images: Any = None, **kwargs: Any) -> Any:
        """As ReducedVideosMixin's. `batch_num_images`: see `get_image_features`."""
        image_sizes = uncut_among_several(image_sizes, batch_num_images)
        return super().forward(*arguments, image_sizes=image_sizes, **kwargs)

    def image_positions(self, kept: Tensor, targets: Tensor, image_sizes: Any = None, strategy: Any = None) -> None:
        """Nowhere: positions are compact."""

    def _token_counts(self, pixel_values: Tensor, image_sizes: Any, strategy: str | None) -> list[int]:
        """How many visual tokens each image gives."""
        tiles, visionzip = self._tiles(image_sizes), self.config.visionzip
        if visionzip is not None:
            budget = visionzip["dominant"] + visionzip["contextual"]
            return [count * budget + (count == 1) for count in tiles]
        nothing = [torch.empty(count, self._patches_given(strategy), 1, device="meta") for count in tiles]
        packed, _ = self.pack_image_features(
            nothing, image_sizes, torch.empty(1, device="meta"), self.config.vision_aspect_ratio
        )
        return [len(image) for image in packed]

    def _tiles(self, image_sizes: Any) -> list[int]:
        if image_sizes is None:
            raise ReductionError(
                "pixel_values are given without image_sizes, by which LLaVA-OneVision knows an image's tiles: pass "
                "both, as the processor gives them"
            )
        grids, side = self.config.image_grid_pinpoints, self.config.vision_config.image_size  # type: ignore[union-attr]
        return [
            1 if tuple(size) == UNCUT else image_size_to_num_patches(size, grids, side)
            for size in (image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes)
        ]


class ReducedLlavaOnevisionForConditionalGeneration(  # type: ignore[misc]
    ReducedForGenerationMixin, LlavaOnevisionForConditionalGeneration
):
    """LlavaOnevisionForConditionalGeneration with the keys of the reductions; with all of them None, exactly that.

    Its forward takes what transformers' takes; ValueError where placeholders and visual tokens do not match.
    """

    config: ReducedLlavaOnevisionConfig
    config_class = ReducedLlavaOnevisionConfig

    def __init__(self, config: ReducedLlavaOnevisionConfig) -> None:
        # Past LlavaOnevisionForConditionalGeneration's own __init__, which would build a plain model first.
        super(LlavaOnevisionForConditionalGeneration, self).__init__(config)
        self.model = ReducedLlavaOnevisionModel(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()


def uncut_among_several(image_sizes: Any, batch_num_images: Any) -> Any:
    """Sizes of images, with UNCUT for those that are one of several in their prompt.

    Args:
        image_sizes: [N, 2], or None.
        batch_num_images: how many images each prompt has; None: what `image_sizes` says already.
    """
    if image_sizes is None or batch_num_images is None:
        return image_sizes
    sizes: Sequence[Any] = image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes
    several = [count != 1 for count in [int(number) for number in batch_num_images] for _ in range(count)]
    if len(several) != len(sizes):
        raise ReductionError(f"batch_num_images adds up to {len(several)} images, image_sizes has {len(sizes)}")
    return [list(UNCUT) if one else list(size) for one, size in zip(several, sizes, strict=True)]


register_key_mapping("ReducedLlavaOnevisionModel", "LlavaModel")
register_key_mapping("reduced_llava_onevision", "llava_next")
ReducedLlavaOnevisionModel.with_head = ReducedLlavaOnevisionForConditionalGeneration
ReducedLlavaOnevisionModel.register_for_auto_class("AutoModel")
ReducedLlavaOnevisionForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
