"""Video-LLaVA with visual tokens reduced per image and per frame: the -hf release, and what the original shares.

Frames are images to the selection: each is reduced by itself, and CLS counts in its budget as in an image's.
(VisionZip's authors measured it in Video-LLaVA, at 17 tokens a frame, and published no code of that.) Where every
token is kept, a frame gives its CLS too, and an image does not.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import VideoLlavaForConditionalGeneration, VideoLlavaModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .configuration_reduced_llava import selected_block, validate
from .configuration_reduced_video_llava import ReducedVideoLlavaConfig, validate_video_llava
from .errors import ReductionError
from .extras import extra
from .modeling_reduced_llava import register_key_mapping
from .modeling_videos import ReducedVideosForGenerationMixin, ReducedVideosMixin
from .positions import ImagePositions, PlacedFeatures, keeps_positions
from .refusals import refuse_changed
from .selectors import BASELINES, VISIONZIP, selector_of
from .visual_tokens import BlockStates, VisualTokens, run_to_block, tokens_of_block


class _OfLists(VideoLlavaModel):
    """VideoLlavaModel that is given each item's features, as other LLaVAs are, and not one tensor of all."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *,
        vision_feature_layer: Any = None,
        vision_feature_select_strategy: str | None = None,
        mm_encoder_outputs: Any = None,
        **kwargs: Any,
    ) -> Any:
        found = (mm_encoder_outputs or {}).get("image")
        if found is None and pixel_values is not None and len(pixel_values):
            layer, strategy = vision_feature_layer, vision_feature_select_strategy
            found = self.get_image_features(
                pixel_values, vision_feature_layer=layer, vision_feature_select_strategy=strategy, return_dict=True
            )
        if found is not None:
            every = torch.cat(list(found.pooler_output)).unsqueeze(0)
            mm_encoder_outputs = {"image": BaseModelOutputWithPooling(pooler_output=every)}
        return super().forward(input_ids, mm_encoder_outputs=mm_encoder_outputs, **kwargs)


class ReducedVideoLlavaModel(ReducedVideosMixin, _OfLists):  # type: ignore[misc]
    """VideoLlavaModel whose images come as `budget` visual tokens, whose videos come as so many per frame, and whose
    decoder has frozen layers."""

    config: ReducedVideoLlavaConfig
    config_class = ReducedVideoLlavaConfig

    def __init__(self, config: ReducedVideoLlavaConfig) -> None:
        validate_video_llava(config)
        super().__init__(config)

    @property
    def vision_tower(self) -> Any:
        """What reads images, under the name that it has in other families."""
        return self.image_tower

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__("image_tower" if name == "vision_tower" else name, value)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Any = None,
        vision_feature_layer: Any = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Projected visual tokens of N images: `pooler_output` is a list of N tensors [budget, H of the decoder].

        `image_sizes` is not read: an image is one tile. `vision_feature_select_strategy`: see ReducedLlavaModel.
        """
        refuse_changed(self.config, self._reductions)
        layer, strategy = vision_feature_layer, vision_feature_select_strategy
        if self.config.visionzip is None:
            hidden = self._hidden(self.image_tower, pixel_values, layer)
            cut = (strategy or self.config.vision_feature_select_strategy) == "default"
            hidden = hidden[:, 1:] if cut else hidden
            features: Any = list(self.multi_modal_projector(hidden))
            return PlacedFeatures(last_hidden_state=hidden, pooler_output=features)
        visual: Any = self.get_visual_tokens(pixel_values, layer)
        features = self.project(visual.tokens)
        positions = self.image_positions(visual.kept, visual.targets, strategy=strategy)
        return PlacedFeatures(last_hidden_state=visual.tokens, pooler_output=features, positions=positions)

    def project(self, tokens: Tensor, kept: Tensor | None = None, image_sizes: Tensor | None = None) -> list[Tensor]:
        """Projected visual tokens of each image, [budget, H of the decoder], of `get_visual_tokens`' tokens."""
        return list(self.multi_modal_projector(tokens))

    def image_positions(
        self, kept: Tensor, targets: Tensor, image_sizes: Any = None, strategy: str | None = None
    ) -> ImagePositions | None:
        """As ReducedLlavaModel's."""
        if not keeps_positions(self.config):
            return None
        places = self._places_in_image(kept, targets, strategy)
        return ImagePositions(list(places), [self._patches_given(strategy)] * len(places))

    def video_positions(self, kept: Tensor, targets: Tensor, frames: int) -> ImagePositions | None:
        """As ReducedVideosMixin's: frame after frame, each with its CLS."""
        if not keeps_positions(self.config):
            return None
        each = self._patches_given("full")
        starts = torch.arange(frames, device=kept.device).unsqueeze(-1) * each
        places = self._places_in_image(kept, targets, "full").unflatten(0, (-1, frames)) + starts
        return ImagePositions(list(places.flatten(1)), [frames * each] * len(places))

    def _token_counts(self, pixel_values: Tensor, image_sizes: Any, strategy: str | None) -> list[int]:
        """How many visual tokens each image gives."""
        zipped = self.config.visionzip
        each = self._patches_given(strategy) if zipped is None else zipped["dominant"] + zipped["contextual"]
        return [each] * pixel_values.shape[0]

    def get_frame_tokens(self, pixel_values_videos: Tensor, vision_feature_layer: Any = None) -> VisualTokens:
        """As ReducedVideosMixin's, by the video tower."""
        zipped = self.config.visionzip
        if zipped is None:
            raise ReductionError("visionzip is null: this model keeps every visual token and chooses none")
        validate(self.config)
        self._check_videos(pixel_values_videos)
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        selected = selected_block(layer, len(self.video_tower.encoder.layers))
        pixels, method = pixel_values_videos.flatten(0, 1), zipped.get("method", VISIONZIP)
        if method in BASELINES:
            baselines = extra("baselines", f"visionzip: method {method}")
            found = baselines.baseline_tokens(self.video_tower, pixels, selected, zipped, True)
            return VisualTokens(targets=found.kept[:, :0], **found._asdict())
        selector = selector_of(zipped)
        states = self._run_frames(pixels, selected, bool(selector.reads & {"attention", "keys"}))
        return tokens_of_block(*states, selector, zipped, True, self.multi_modal_projector, pixels)

    def _run_frames(self, pixels: Tensor, selected: int, reads_attention: bool) -> BlockStates:
        """What the video tower's block `selected` gives of frames [N, 3, S, S]."""
        return run_to_block(self.video_tower, pixels, selected, True, reads_attention)

    def _plain_videos(self, pixel_values_videos: Tensor, layer: Any, strategy: str | None) -> PlacedFeatures:
        """Every token of every frame, its CLS first, whatever the strategy, which is of images."""
        self._check_videos(pixel_values_videos)
        hidden = self._hidden(self.video_tower, pixel_values_videos.flatten(0, 1), layer)
        features: Any = self.project_videos(hidden, pixel_values_videos.shape[1])
        return PlacedFeatures(last_hidden_state=hidden, pooler_output=features)

    def _hidden(self, tower: Any, pixels: Tensor, layer: Any) -> Tensor:
        """[N, T, H], all that a tower gives of [N, 3, S, S] in the layer (or layers, side by side) that is read."""
        layer = self.config.vision_feature_layer if layer is None else layer
        states = tower(pixels, output_hidden_states=True, return_dict=True).hidden_states
        return states[layer] if isinstance(layer, int) else torch.cat([states[number] for number in layer], dim=-1)

    def _check_videos(self, pixel_values_videos: Tensor) -> None:
        """Refuses what are no videos that the tower can read."""
        if pixel_values_videos.dim() != 5:
            raise ReductionError(
                f"pixel_values_videos has shape {tuple(pixel_values_videos.shape)}, not [videos, frames, 3, S, S]"
            )


class ReducedVideoLlavaForConditionalGeneration(  # type: ignore[misc]
    ReducedVideosForGenerationMixin, VideoLlavaForConditionalGeneration
):
    """VideoLlavaForConditionalGeneration with the keys of the reductions; with all of them None, exactly that.

    Its forward takes what transformers' takes; ValueError where placeholders and visual tokens do not match.
    """

    config: ReducedVideoLlavaConfig
    config_class = ReducedVideoLlavaConfig
    headless: Any = ReducedVideoLlavaModel

    def __init__(self, config: ReducedVideoLlavaConfig) -> None:
        # Past VideoLlavaForConditionalGeneration's own __init__, which would build a plain model first.
        super(VideoLlavaForConditionalGeneration, self).__init__(config)
        self.model = self.headless(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()


register_key_mapping("ReducedVideoLlavaModel", "VideoLlavaModel")
register_key_mapping("reduced_video_llava", "video_llava")
ReducedVideoLlavaModel.with_head = ReducedVideoLlavaForConditionalGeneration
ReducedVideoLlavaModel.register_for_auto_class("AutoModel")
ReducedVideoLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
