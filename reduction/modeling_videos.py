"""What models that also take videos share: each frame is reduced as an image is, by the tokens that its tower gives.

Images and videos then go the same way: to the merge, to frozen layers and to pruning a visual token is one or the
other alike (media.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils import can_return_tuple

from .errors import ReductionError
from .media import in_order
from .modeling_reduced_llava import ReducedForGenerationMixin, ReducedModelMixin
from .positions import ImagePositions, PlacedFeatures
from .refusals import refuse_changed
from .visual_tokens import VisualTokens


class ReducedVideosMixin(ReducedModelMixin):
    """A reduced model whose videos come as `budget` visual tokens per frame; goes before the transformers class.

    A family says what plain transformers makes of a video (`_plain_videos`), and what stands between and behind the
    frames (`_joined`).
    """

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: Tensor,
        vision_feature_layer: Any = None,
        vision_feature_select_strategy: str | None = None,
        video_frames: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Projected visual tokens of V videos: `pooler_output` is a list of V tensors [tokens, H of the decoder],
        frame after frame, as `_joined` joins them.

        Args:
            pixel_values_videos: [V, F, 3, S, S]; or [frames of all videos, 3, S, S] with `video_frames`, of families
                whose frames are read one by one.
            video_frames: [V] int, how many frames each video has.

        Raises:
            ValueError: pixels of another shape.
        """
        refuse_changed(self.config, self._reductions)
        layer, strategy = vision_feature_layer, vision_feature_select_strategy
        frames = frames_of_each(pixel_values_videos, video_frames)
        if pixel_values_videos.dim() == 4:
            pixel_values_videos = pixel_values_videos[None]
        if self.config.visionzip is None:
            if isinstance(frames, int):
                return self._plain_videos(pixel_values_videos, layer, strategy)
            parts = pixel_values_videos.split(frames, dim=1)
            each: list[Any] = [self._plain_videos(part, layer, strategy) for part in parts]
            return PlacedFeatures(pooler_output=[tokens for of_one in each for tokens in of_one.pooler_output])  # type: ignore[arg-type]
        visual: Any = self.get_frame_tokens(pixel_values_videos, layer)
        features: Any = self.project_videos(visual.tokens, frames)
        return PlacedFeatures(
            last_hidden_state=visual.tokens,
            pooler_output=features,
            positions=self.positions_of_videos(visual.kept, visual.targets, frames),
        )

    def get_frame_tokens(self, pixel_values_videos: Tensor, vision_feature_layer: Any = None) -> VisualTokens:
        """What is chosen of every frame of videos [V, F, 3, S, S]: N is V * F, video after video."""
        return self.get_visual_tokens(pixel_values_videos.flatten(0, 1), vision_feature_layer)

    def project_videos(self, tokens: Tensor, frames: int | Sequence[int]) -> list[Tensor]:
        """Projected visual tokens of each video, joined, of the tokens [V * F, budget, H of the tower] that
        `get_frame_tokens` gives of all frames. `frames`: F, or of each video its own."""
        projected = self.multi_modal_projector(tokens)
        if isinstance(frames, int):
            return self._joined(projected, frames)
        parts = zip(projected.split(list(frames)), frames, strict=True)
        return [video for part, count in parts for video in self._joined(part, count)]

    def positions_of_videos(self, kept: Tensor, targets: Tensor, frames: int | Sequence[int]) -> ImagePositions | None:
        """As `video_positions`, of videos that may have their own numbers of frames."""
        if isinstance(frames, int):
            return self.video_positions(kept, targets, frames)
        of_each = zip(kept.split(list(frames)), targets.split(list(frames)), frames, strict=True)
        placed = [self.video_positions(*of_video) for of_video in of_each]
        found = [positions for positions in placed if positions is not None]
        if len(found) < len(placed):
            return None
        tokens = [tokens for positions in found for tokens in positions.tokens]
        return ImagePositions(tokens, [length for positions in found for length in positions.lengths])

    def video_positions(self, kept: Tensor, targets: Tensor, frames: int) -> ImagePositions | None:
        """Where the tokens of each video stand among all that the plain model gives of it; None where they are
        numbered as they come. `kept` [V * F, D] and `targets` [V * F, C], as in VisualTokens."""
        return None

    def _plain_videos(self, pixel_values_videos: Tensor, layer: Any, strategy: str | None) -> PlacedFeatures:
        """What transformers' model makes of videos, every token kept: `pooler_output` a list of [tokens, H]."""
        raise NotImplementedError

    def _joined(self, tokens: Tensor, frames: int) -> list[Tensor]:
        """The tokens of each video, of those of all frames [V * F, n, H]: one after another."""
        return list(tokens.unflatten(0, (-1, frames)).flatten(1, 2))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *,
        pixel_values_videos: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        image_sizes: Any = None,
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
        # From here on a visual token is an image's or a video's alike. Embeddings into which they are merged already
        # hold no placeholder, though a text may look like one: a new token begins with the embedding of <unk>.
        if found or (input_ids is not None and self._checks_rows()):
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

    def get_placeholder_mask(
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


class ReducedVideosForGenerationMixin(ReducedForGenerationMixin):
    """What these models with a head have in common; goes before the transformers class."""

    def _visual_of_prompt(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, encoded: Mapping[str, Any]
    ) -> tuple[Tensor, Any]:
        found = {kind: held for kind, held in encoded.items() if held is not None}
        visual = self.model._placeholders(*self.model._as_images(input_ids, inputs_embeds))
        return visual, self.model.encoded(input_ids, inputs_embeds, found)


def frames_of_each(pixel_values_videos: Tensor, video_frames: Any) -> int | list[int]:
    """The number of frames of all videos, or of each. Raises ReductionError for pixels that are not those of such."""
    shape = tuple(pixel_values_videos.shape)
    if pixel_values_videos.dim() == 5:
        return int(shape[1])
    if pixel_values_videos.dim() != 4 or video_frames is None:
        raise ReductionError(
            f"pixel_values_videos has shape {shape}, not [videos, frames, 3, S, S], nor (with video_frames) "
            "[all frames, 3, S, S]"
        )
    counts = [int(count) for count in video_frames]
    if sum(counts) != shape[0] or min(counts, default=1) < 1:
        raise ReductionError(f"video_frames is {counts}, and pixel_values_videos has {shape[0]} frames")
    return counts
