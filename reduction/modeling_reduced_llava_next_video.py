"""LLaVA-NeXT-Video with visual tokens reduced per tile and per frame: images as in LLaVA-NeXT, frames as in
LLaVA-OneVision, without a newline at a video's end.

Frames are reduced instead of being pooled: what a budget keeps is no grid. (VisionZip's authors published nothing for
this family.)
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaNextVideoForConditionalGeneration, LlavaNextVideoModel

from .configuration_reduced_llava_next_video import ReducedLlavaNextVideoConfig
from .modeling_reduced_llava import register_key_mapping
from .modeling_reduced_llava_next import ReducedTilesMixin
from .modeling_videos import ReducedVideosForGenerationMixin, ReducedVideosMixin
from .positions import ImagePositions, PlacedFeatures, keeps_positions, patches_of_tokens


class ReducedLlavaNextVideoModel(ReducedVideosMixin, ReducedTilesMixin, LlavaNextVideoModel):  # type: ignore[misc]
    """LlavaNextVideoModel whose images come as `budget` visual tokens per tile, whose videos come as so many per
    frame, and whose decoder has frozen layers."""

    config: ReducedLlavaNextVideoConfig
    config_class = ReducedLlavaNextVideoConfig

    def _plain_videos(self, pixel_values_videos: Tensor, layer: Any, strategy: str | None) -> PlacedFeatures:
        plain: Any = LlavaNextVideoModel.get_video_features(
            self,
            pixel_values_videos,
            vision_feature_layer=layer,
            vision_feature_select_strategy=strategy,
            return_dict=True,
        )
        features: Any = list(plain.pooler_output)
        return PlacedFeatures(last_hidden_state=plain.last_hidden_state, pooler_output=features)

    def video_positions(self, kept: Tensor, targets: Tensor, frames: int) -> ImagePositions | None:
        """As `image_positions`, of all pooled patches of a video, frame after frame: a patch stands where the cell
        does that it was pooled into, CLS at the first cell of its frame."""
        if not keeps_positions(self.config):
            return None
        tower: Any = self.config.vision_config
        side, stride = tower.image_size // tower.patch_size, self.config.spatial_pool_stride
        cells = side // stride
        patches = patches_of_tokens(self.config.visionzip, kept, targets, side).clamp(min=0)
        row, column = ((part // stride).clamp(max=cells - 1) for part in (patches // side, patches % side))
        first = torch.arange(frames, device=kept.device)[:, None] * cells * cells
        places = (row * cells + column).unflatten(0, (-1, frames)) + first
        return ImagePositions(list(places.flatten(1)), [frames * cells * cells] * len(places))


class ReducedLlavaNextVideoForConditionalGeneration(  # type: ignore[misc]
    ReducedVideosForGenerationMixin, LlavaNextVideoForConditionalGeneration
):
    """LlavaNextVideoForConditionalGeneration with the keys of the reductions; with all of them None, exactly that.

    Its forward takes what transformers' takes; ValueError where placeholders and visual tokens do not match.
    """

    config: ReducedLlavaNextVideoConfig
    config_class = ReducedLlavaNextVideoConfig

    def __init__(self, config: ReducedLlavaNextVideoConfig) -> None:
        # Past LlavaNextVideoForConditionalGeneration's own __init__, which would build a plain model first.
        super(LlavaNextVideoForConditionalGeneration, self).__init__(config)
        self.model = ReducedLlavaNextVideoModel(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()


register_key_mapping("ReducedLlavaNextVideoModel", "LlavaNextVideoModel")
register_key_mapping("reduced_llava_next_video", "llava_next_video")
ReducedLlavaNextVideoModel.with_head = ReducedLlavaNextVideoForConditionalGeneration
ReducedLlavaNextVideoModel.register_for_auto_class("AutoModel")
ReducedLlavaNextVideoForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
