"""Mini-Gemini with its visual tokens reduced: chosen by what CLIP says, of patches to which what they mine is added.

The authors of VisionZip measured it in Mini-Gemini and published no code of that. Here the choice and the merging are
those of CLIP alone, and are carried out on the sums: merging is linear, so a contextual token is its target and the
mean of what was assigned to it, of both parts. CLS has no window, and nothing is mined for it. With tiles (HD, which
their paper does not mention) every tile has the budget.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from transformers.utils import can_return_tuple

from .configuration_reduced_llava import selected_block, validate
from .configuration_reduced_mini_gemini import ReducedMiniGeminiConfig, tiles_of, validate_mini_gemini
from .errors import ReductionError
from .extras import extra
from .mini_gemini import MiniGeminiProjector, MiniGeminiTower
from .modeling_reduced_llava import (
    ReducedLlavaForConditionalGeneration,
    ReducedLlavaModel,
    register_key_mapping,
)
from .positions import ImagePositions, PlacedFeatures, keeps_positions
from .refusals import refuse_changed
from .selectors import BASELINES, VISIONZIP, selector_of
from .tower import embed_patches
from .visual_tokens import VisualTokens, run_to_block, tokens_of_block


class ReducedMiniGeminiModel(ReducedLlavaModel):
    """As ReducedLlavaModel, of images [N, 3, A, A] at the high resolution; CLIP's view is made of them."""

    config: ReducedMiniGeminiConfig
    config_class = ReducedMiniGeminiConfig

    def __init__(self, config: ReducedMiniGeminiConfig) -> None:
        validate_mini_gemini(config)
        super().__init__(config)
        self.vision_tower: Any = MiniGeminiTower(config)
        self.multi_modal_projector = MiniGeminiProjector(config)
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: Any = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Projected visual tokens of N images: `pooler_output` is a list of N tensors [tiles * budget, H of the
        decoder], tile after tile, a global view first.

        Raises:
            ReductionError: images of another size, or `vision_feature_select_strategy` other than the config's.
        """
        refuse_changed(self.config, self._reductions)
        if vision_feature_select_strategy not in (None, "default"):
            raise ReductionError(
                f"vision_feature_select_strategy is {vision_feature_select_strategy!r}: CLS has no window to mine in; "
                "leave it out"
            )
        if self.config.visionzip is not None:
            visual: Any = self.get_visual_tokens(pixel_values, vision_feature_layer)
            tokens, positions = visual.tokens, self.image_positions(visual.kept, visual.targets)
        else:
            tokens, positions = self._refined(pixel_values, vision_feature_layer), None
        features: Any = self.project(tokens)  # as ReducedLlavaModel's
        return PlacedFeatures(last_hidden_state=tokens, pooler_output=features, positions=positions)

    def get_visual_tokens(self, pixel_values: Tensor, vision_feature_layer: Any = None) -> VisualTokens:
        """As ReducedModelMixin's, of N images [N, 3, A, A] with T tiles each, tile after tile: `tokens` are [N, T *
        budget, H], `kept`, `targets`, `groups` and `attention` likewise. Patches are counted through the tiles, patch
        p of tile t as t * P + p, and so are contextual tokens."""
        zipped = self.config.visionzip
        if zipped is None:
            raise ReductionError("visionzip is null: this model keeps every visual token and chooses none")
        validate(self.config)
        validate_mini_gemini(self.config)
        return self.visual_tokens_under([zipped], pixel_values, vision_feature_layer)[0]

    def visual_tokens_under(
        self, budgets: Sequence[dict[str, Any]], pixel_values: Tensor, vision_feature_layer: Any = None
    ) -> list[VisualTokens]:
        """As `get_visual_tokens`, under each of several `visionzip` keys of one method; both towers run once."""
        tower, selected = self.vision_tower, self._block(vision_feature_layer)
        self._check_pixels(pixel_values)
        low = tower.low_resolution(pixel_values)
        method = budgets[0].get("method", VISIONZIP)
        if method in BASELINES:
            patches = self._clip_patches(low, selected)
            refined = self._add_mined(patches, pixel_values)
            baselines = extra("baselines", f"visionzip: method {method}")
            kept = (
                baselines.keep_patches(refined, low, method, zipped["dominant"], zipped.get("seed", 0))
                for zipped in budgets
            )
            return [self._of_images(VisualTokens(targets=part.kept[:, :0], **part._asdict())) for part in kept]
        selector = selector_of(budgets[0])
        states = run_to_block(tower.clip, low, selected, True, bool(selector.reads & {"attention", "keys"}))
        refined = self._add_mined(states.hidden[:, 1:], pixel_values)
        projector = self.multi_modal_projector
        return [
            self._of_images(tokens_of_block(*states, selector, zipped, True, projector, low, refined))
            for zipped in budgets
        ]

    def image_positions(
        self, kept: Tensor, targets: Tensor, image_sizes: Any = None, strategy: str | None = None
    ) -> ImagePositions | None:
        """As ReducedLlavaModel's: of all tokens of Mini-Gemini, tile after tile; CLS stands at its tile's first."""
        if not keeps_positions(self.config):
            return None
        tiles, count = tiles_of(self.config), super()._patches_given("default")
        starts = torch.arange(tiles, device=kept.device).unsqueeze(-1) * count
        kept, targets = (part.unflatten(1, (tiles, -1)) - starts for part in (kept, targets.to(kept)))
        places = self._places_in_image(kept.flatten(0, 1), targets.flatten(0, 1), "default")
        places = (places.unflatten(0, (-1, tiles)) + starts).flatten(1)
        return ImagePositions(list(places), [tiles * count] * len(places))

    def _token_counts(self, pixel_values: Tensor, image_sizes: Any, strategy: str | None) -> list[int]:
        """How many visual tokens each image gives."""
        return [tiles_of(self.config) * count for count in super()._token_counts(pixel_values, image_sizes, "default")]

    def _refined(self, pixel_values: Tensor, vision_feature_layer: Any) -> Tensor:
        """[N, T * P, H], every patch of every image, with what it mined."""
        selected = self._block(vision_feature_layer)
        self._check_pixels(pixel_values)
        patches = self._clip_patches(self.vision_tower.low_resolution(pixel_values), selected)
        refined = self._add_mined(patches, pixel_values)
        return refined.unflatten(0, (-1, tiles_of(self.config))).flatten(1, 2)

    def _clip_patches(self, low: Tensor, selected: int) -> Tensor:
        """[N * T, P, H], the output of CLIP's block `selected` without CLS."""
        hidden = embed_patches(self.vision_tower.clip, low)
        for block in self.vision_tower.clip.encoder.layers[: selected + 1]:
            hidden = block(hidden, None)
        return hidden[:, 1:]

    def _add_mined(self, patches: Tensor, pixel_values: Tensor) -> Tensor:
        """CLIP's patches [N * T, P, H] and what each mines in the images [N, 3, A, A]."""
        tower, mining = self.vision_tower, self.multi_modal_projector.mining
        mined = []
        # One image after the other: the ConvNeXt fills a device with one, and its features take 200 MB in bfloat16.
        for image, own in zip(pixel_values.split(1), patches.split(tower.tiles), strict=True):
            mined.append(mining(own, tower.views(tower.high_resolution(image))))
        return patches + torch.cat(mined)

    def _of_images(self, visual: VisualTokens) -> VisualTokens:
        """What was chosen of tiles [N * T, …] as of images [N, T * …]."""
        tiles, count = tiles_of(self.config), super()._patches_given("default")

        def joined(part: Any, step: int = 0) -> Any:
            """`step`: by how much an index of a tile is more than that of the tile before."""
            if part is None or tiles == 1:
                return part
            part = part.unflatten(0, (-1, tiles))
            if step:
                starts = torch.arange(tiles, device=part.device).view(-1, 1) * step
                part = torch.where(part < 0, part, part + starts)
            return part.flatten(1, 2)

        assert visual.tokens is not None
        assert visual.targets is not None
        merged = visual.targets.shape[1] or visual.tokens.shape[1]
        return VisualTokens(
            tokens=joined(visual.tokens),
            kept=joined(visual.kept, count),
            targets=joined(visual.targets, count),
            groups=joined(visual.groups, merged),
            attention=joined(visual.attention),
        )

    def _block(self, vision_feature_layer: Any) -> int:
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        vision: Any = self.config.vision_config
        return selected_block(layer, vision.num_hidden_layers)

    def _check_pixels(self, pixel_values: Tensor) -> None:
        side = self.config.image_size_aux
        if pixel_values.dim() != 4 or pixel_values.shape[-2:] != (side, side):
            raise ReductionError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, needed is [images, 3, {side}, {side}]: the "
                "high-resolution pixels, as the processor gives them; CLIP's are made of them"
            )


class ReducedMiniGeminiForConditionalGeneration(ReducedLlavaForConditionalGeneration):
    """Mini-Gemini with `config.visionzip` and `config.shortv`; with both None, Mini-Gemini itself."""

    config: ReducedMiniGeminiConfig
    config_class = ReducedMiniGeminiConfig

    def __init__(self, config: ReducedMiniGeminiConfig) -> None:
        # Past the LLaVA's own __init__, which would build its model first.
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = ReducedMiniGeminiModel(config)
        text: Any = config.text_config
        self.lm_head = torch.nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()


register_key_mapping("ReducedMiniGeminiModel", "LlavaModel")
register_key_mapping("reduced_mini_gemini", "llava")
ReducedMiniGeminiModel.with_head = ReducedMiniGeminiForConditionalGeneration
ReducedMiniGeminiModel.register_for_auto_class("AutoModel")
ReducedMiniGeminiForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
