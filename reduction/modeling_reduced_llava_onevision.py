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
from .media import in_order
from .modeling_reduced_llava import ReducedForGenerationMixin, ReducedModelMixin, register_key_mapping
from .modeling_reduced_llava_next import ReducedLlavaNextModel, stack_tiles
from .positions import PlacedFeatures
from .refusals import refuse_changed
from .visual_tokens import VisualTokens

UNCUT = (0, 0)
"""In the place of an image's size: one of several in a prompt, which are not cut into tiles."""


class ReducedLlavaOnevisionModel(ReducedModelMixin, LlavaOnevisionModel):
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

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: Tensor,
        vision_feature_layer: Any = None,
        vision_feature_select_strategy: str | None = None,
        video_frames: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Projected visual tokens of V videos: `pooler_output` is a list of V tensors [F * budget + 1, H of the
        decoder], frame after frame, with one image_newline at the end.

        Args:
            pixel_values_videos: [V, F, 3, S, S]; or [frames of all videos, 3, S, S] with `video_frames`.
            video_frames: [V] int, how many frames each video has.
        """
        refuse_changed(self.config, self._reductions)
        frames = frames_of_each(pixel_values_videos, video_frames)
        pixels = pixel_values_videos.flatten(0, -4)
        if self.config.visionzip is not None:
            visual: Any = self.get_visual_tokens(pixels, vision_feature_layer)
            features: Any = self.project_videos(visual.tokens, frames)
            return PlacedFeatures(last_hidden_state=visual.tokens, pooler_output=features)
        hidden = self._patches(pixels, vision_feature_layer, vision_feature_select_strategy)
        pooled: Any = self._joined(self.apply_pooling(self.multi_modal_projector(hidden)), frames)
        return PlacedFeatures(last_hidden_state=hidden, pooler_output=pooled)

    def get_frame_tokens(self, pixel_values_videos: Tensor, vision_feature_layer: Any = None) -> VisualTokens:
        """What is chosen of every frame of videos [V, F, 3, S, S]: N is V * F, video after video."""
        return self.get_visual_tokens(pixel_values_videos.flatten(0, 1), vision_feature_layer)

    def project_videos(self, tokens: Tensor, frames: int | Sequence[int]) -> list[Tensor]:
        """Projected visual tokens [F * budget + 1, H of the decoder] of each video, of the tokens [V * F, budget, H of
        the tower] that `get_frame_tokens` gives of all frames. `frames`: F, or of each video its own."""
        counts = [frames] * (len(tokens) // frames) if isinstance(frames, int) else list(frames)
        return self._joined(self.multi_modal_projector(tokens), counts)

    def _joined(self, tokens: Tensor, frames: Sequence[int]) -> list[Tensor]:
        newline = self.image_newline[None].to(tokens)
        return [torch.cat([video.flatten(0, 1), newline]) for video in tokens.split(list(frames))]

    def _patches(self, pixels: Tensor, layer: Any, strategy: str | None) -> Tensor:
        """All that the tower gives of images [N, 3, S, S], in the layer that is read: [N, T, H]."""
        layer = self.config.vision_feature_layer if layer is None else layer
        states = self.vision_tower(pixels, output_hidden_states=True, return_dict=True).hidden_states
        hidden = states[layer] if isinstance(layer, int) else torch.cat([states[number] for number in layer], dim=-1)
        strategy = strategy or self.config.vision_feature_select_strategy
        return hidden[:, 1:] if strategy == "default" else hidden

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *,
        pixel_values_videos: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        image_sizes: Any = None,
        batch_num_images: Any = None,
        video_frames: Any = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' model, and see ReducedModelMixin. Images and videos may stand in one row.

        Raises:
            ValueError: a row's placeholders are not filled by whole images and videos, or what ReducedModelMixin
                refuses.
        """
        refuse_changed(self.config, self._reductions)
        found = {kind: held for kind, held in (mm_encoder_outputs or {}).items() if held is not None}
        image_sizes = uncut_among_several(image_sizes, batch_num_images)
        encoding = {
            key: kwargs[key]
            for key in ("vision_feature_layer", "vision_feature_select_strategy")
            if kwargs.get(key) is not None
        }
        if pixel_values_videos is not None and len(pixel_values_videos):
            if "video" in found:
                raise ReductionError("pixel_values_videos and mm_encoder_outputs['video'] are both given: give one")
            given = {"video_frames": video_frames, "return_dict": True, **encoding}
            found["video"] = self.get_video_features(pixel_values_videos, **given)
        if "video" in found:
            if pixel_values is not None and len(pixel_values):
                found["image"] = self.get_image_features(pixel_values, image_sizes, return_dict=True, **encoding)
            pixel_values = None
            found = {"image": self.encoded(input_ids, inputs_embeds, found)}
        # From here on a visual token is an image's or a video's alike.
        if found or self._checks_rows():
            input_ids, inputs_embeds = self._as_images(input_ids, inputs_embeds)
        if found:
            kwargs["mm_encoder_outputs"] = found
        return super().forward(input_ids, pixel_values, inputs_embeds=inputs_embeds, image_sizes=image_sizes, **kwargs)

    def encoded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, found: dict[str, Any]) -> Any:
        """Of `mm_encoder_outputs`, the features of all that placeholders stand for, in their order."""
        if "image" not in found or "video" not in found:
            return found.get("image", found.get("video"))
        is_video = self._placeholders_of(self.config.video_token_id, input_ids, inputs_embeds)
        visual = is_video | self._placeholders_of(self.config.image_token_id, input_ids, inputs_embeds)
        return in_order(is_video[visual], found["image"], found["video"])

    def get_placeholder_mask(  # type: ignore[override]
        self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if not self._checks_rows():
            plain: Any = super(ReducedModelMixin, self)
            return plain.get_placeholder_mask(input_ids, inputs_embeds, image_features, **kwargs)
        mask = self._placeholders(input_ids, inputs_embeds).unsqueeze(-1)
        return mask, mask

    def _as_images(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """A prompt whose placeholders of videos are those of images. (A token that was generated is what it is.)"""
        tokens: Any = inputs_embeds if input_ids is None else input_ids
        if tokens.shape[1] == 1:
            return input_ids, inputs_embeds
        video = self._placeholders_of(self.config.video_token_id, input_ids, inputs_embeds)
        if input_ids is not None:
            return input_ids.masked_fill(video, self.config.image_token_id), inputs_embeds
        image = self.get_input_embeddings()(torch.tensor(self.config.image_token_id, device=video.device))
        return None, torch.where(video.unsqueeze(-1), image, tokens)

    def _placeholders_of(self, number: int, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if input_ids is not None:
            return input_ids == number
        assert inputs_embeds is not None
        token = torch.tensor(number, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

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


def frames_of_each(pixel_values_videos: Tensor, video_frames: Any) -> list[int]:
    """The number of frames of each video. Raises ReductionError for pixels that are not those of such videos."""
    shape = tuple(pixel_values_videos.shape)
    if pixel_values_videos.dim() == 5:
        return [shape[1]] * shape[0]
    if pixel_values_videos.dim() != 4 or video_frames is None:
        raise ReductionError(
            f"pixel_values_videos has shape {shape}: needed is [videos, frames, 3, S, S], or [all frames, 3, S, S] "
            "with video_frames"
        )
    counts = [int(count) for count in video_frames]
    if sum(counts) != shape[0] or min(counts, default=1) < 1:
        raise ReductionError(f"video_frames is {counts}, and pixel_values_videos has {shape[0]} frames")
    return counts


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
