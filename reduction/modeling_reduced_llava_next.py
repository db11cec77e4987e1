"""LLaVA-NeXT with visual tokens reduced per tile; what it shares with LLaVA is in modeling_reduced_llava."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaNextForConditionalGeneration, LlavaNextModel
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)
from transformers.utils import can_return_tuple

from .configuration_reduced_llava import ReducedLlavaNextConfig
from .errors import ReductionError
from .extras import extra
from .modeling_reduced_llava import ReducedForGenerationMixin, ReducedModelMixin, register_key_mapping
from .positions import ImagePositions, PlacedFeatures, keeps_positions, patches_of_tokens
from .refusals import refuse_changed
from .selectors import has_own_budgets


class ReducedTilesMixin(ReducedModelMixin):
    """A reduced model whose images come as `budget` visual tokens per tile; goes before the transformers class."""

    image_newline: Any
    pack_image_features: Any

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Any = None,
        vision_feature_layer: Any = None,
        vision_feature_select_strategy: str | None = None,
        image_budgets: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Projected visual tokens of N images: `pooler_output` is a list of N tensors [budget * tiles, H of decoder].

        Order per image, as the authors': the base tile's tokens; the other tiles' dominant patches in row-major order
        of the whole grid; their CLS tokens; their contextual tokens. Nothing is unpadded and there is no
        image_newline, but for one at the end of an image of a single tile.

        Args:
            pixel_values: [N, most tiles, 3, S, S], or [tiles of all images, 3, S, S]; [1, 1, tiles, 3, S, S], as
                engines give an image whose padding differs from its neighbours'.
            image_sizes: [N, 2] int, height and width of the images before tiling.
            image_budgets: [N], visual tokens of each tile of an image; None: as the config says.

        Raises:
            ValueError: the tiles in `pixel_values` are not those that `image_sizes` says, or there are no sizes.
        """
        refuse_changed(self.config, self._reductions)
        tiles = self._tiles(image_sizes)
        if pixel_values.dim() == 6:
            pixel_values = pixel_values.flatten(0, 1)
        layer, strategy = vision_feature_layer, vision_feature_select_strategy
        if self.config.visionzip is None and image_budgets is None:
            return super().get_image_features(
                pixel_values,
                image_sizes,
                vision_feature_layer=layer,
                vision_feature_select_strategy=strategy,
                **kwargs,
            )
        pixel_values = stack_tiles(pixel_values, tiles)
        if image_budgets is not None or has_own_budgets(self.config.visionzip):
            own = extra("image_budgets", "image_budgets")
            return own.features_of_images(
                self, pixel_values, image_budgets, tiles, image_sizes, layer=layer, strategy=strategy
            )
        visual: Any = self.get_visual_tokens(pixel_values, layer)
        features: Any = self.project(visual.tokens, visual.kept, image_sizes)
        return PlacedFeatures(
            last_hidden_state=visual.tokens,
            pooler_output=features,
            positions=self.image_positions(visual.kept, visual.targets, image_sizes, strategy),
        )

    def project(self, tokens: Tensor, kept: Tensor, image_sizes: Tensor) -> list[Tensor]:
        """Projected visual tokens of each image, [budget * tiles, H of the decoder], ordered as above.

        Args:
            tokens: [tiles of all images, budget, H of the tower], as `get_visual_tokens` gives them.
            kept: [tiles of all images, D], likewise.
            image_sizes: [N, 2] int, height and width of the images before tiling.
        """
        tower: Any = self.config.vision_config
        tiles, side = self._tiles(image_sizes), tower.image_size // tower.patch_size
        projected = self.multi_modal_projector(tokens).split(tiles)
        return [
            self._pack(image, places, size, side)
            for image, places, size in zip(projected, kept.split(tiles), image_sizes, strict=True)
        ]

    def image_positions(
        self, kept: Tensor, targets: Tensor, image_sizes: Any = None, strategy: str | None = None
    ) -> ImagePositions | None:
        """As ReducedLlavaModel's, in the order of `project`: of all tokens of plain LLaVA-NeXT, the base tile's come
        first, then the rows of the whole grid without its padding, an image_newline after each.

        A patch that plain LLaVA-NeXT cuts away with the padding stands where the nearest one that it leaves does; CLS
        stands at the first patch of its tile.
        """
        if not keeps_positions(self.config):
            return None
        tower: Any = self.config.vision_config
        tiles, side = self._tiles(image_sizes), tower.image_size // tower.patch_size
        in_tile = self._places_in_image(kept, targets, strategy)
        patches = patches_of_tokens(self.config.visionzip, kept, targets, side).clamp(min=0)
        first, found, lengths = self._patches_given(strategy), [], []
        for base, tile, chosen, size in zip(
            in_tile.split(tiles), patches.split(tiles), kept.split(tiles), image_sizes, strict=True
        ):
            if len(tile) == 1:
                found.append(torch.cat([base[0], base.new_full((1,), first)]))
                lengths.append(first + 1)
                continue
            places, length = self._places_in_grid(tile[1:], size, side)
            whole = torch.cat([base[:1], places + first])
            found.append(self._pack(whole.unsqueeze(-1), chosen, size, side).squeeze(-1))
            lengths.append(first + length)
        return ImagePositions(found, lengths)

    def _places_in_grid(self, patches: Tensor, image_size: Any, side: int) -> tuple[Tensor, int]:
        """Where patches [tiles, n] of the tiles after the base tile stand among the rows of the grid without padding,
        each with its newline, and how many places these are."""
        tower: Any = self.config.vision_config
        rows, columns = get_anyres_image_grid_shape(image_size, self.config.image_grid_pinpoints, tower.image_size)
        grid = torch.arange(rows * columns * side * side).view(1, rows * side, columns * side)
        left = unpad_image(grid, image_size)[0]
        height, width = left.shape
        top, start = divmod(int(left[0, 0]), columns * side) if left.numel() else (0, 0)
        tile = torch.arange(len(patches), device=patches.device)[:, None]
        row = (tile // columns * side + patches // side - top).clamp(max=height - 1).clamp(min=0)
        column = (tile % columns * side + patches % side - start).clamp(max=width - 1).clamp(min=0)
        return row * (width + 1) + column, height * (width + 1)

    def _token_counts(self, pixel_values: Tensor, image_sizes: Any, strategy: str | None) -> list[int]:
        """How many visual tokens each image gives."""
        tiles, visionzip = self._tiles(image_sizes), self.config.visionzip
        if visionzip is not None:
            budget = visionzip["dominant"] + visionzip["contextual"]
            return [count * budget + (count == 1) for count in tiles]  # one tile alone is followed by image_newline
        strategy = strategy or self.config.vision_feature_select_strategy
        nothing = [torch.empty(count, self._patches_given(strategy), 1, device="meta") for count in tiles]
        packed, _ = self.pack_image_features(nothing, image_sizes, strategy, torch.empty(1, device="meta"))
        return [len(image) for image in packed]

    def _tiles(self, image_sizes: Any) -> list[int]:
        if image_sizes is None:
            raise ReductionError(
                "pixel_values are given without image_sizes, by which LLaVA-NeXT knows an image's tiles: pass both, "
                "as the processor gives them"
            )
        tower: Any = self.config.vision_config
        return [
            image_size_to_num_patches(size, self.config.image_grid_pinpoints, tower.image_size) for size in image_sizes
        ]

    def _pack(self, tokens: Tensor, kept: Tensor, image_size: Any, side: int) -> Tensor:
        """Tokens [tiles, budget, H] of one image in the authors' order, [budget * tiles, H]."""
        if tokens.shape[0] == 1:
            return torch.cat([tokens[0], self.image_newline[None].to(tokens)])
        tower: Any = self.config.vision_config
        _, columns = get_anyres_image_grid_shape(image_size, self.config.image_grid_pinpoints, tower.image_size)
        dominant = kept.shape[1]
        cls = self.config.visionzip["dominant"] - dominant
        kept = kept[1:]
        tile = torch.arange(kept.shape[0], device=kept.device)[:, None]
        row = tile // columns * side + kept // side
        column = tile % columns * side + kept % side
        order = (row * columns * side + column).flatten().argsort()
        parts = tokens[1:].split([cls, dominant, tokens.shape[1] - cls - dominant], dim=1)
        cls_tokens, patches, contextual = (part.flatten(0, 1) for part in parts)
        return torch.cat([tokens[0], patches[order], cls_tokens, contextual])


class ReducedLlavaNextModel(ReducedTilesMixin, LlavaNextModel):
    """LlavaNextModel whose images come as `budget` visual tokens per tile and whose decoder has frozen layers."""

    config: ReducedLlavaNextConfig
    config_class = ReducedLlavaNextConfig


class ReducedLlavaNextForConditionalGeneration(  # type: ignore[misc]
    ReducedForGenerationMixin, LlavaNextForConditionalGeneration
):
    """LlavaNextForConditionalGeneration with `config.visionzip` and `config.shortv`; with both None, exactly that.

    Its forward takes what transformers' takes; ValueError where placeholders and visual tokens do not match.
    """

    config: ReducedLlavaNextConfig
    config_class = ReducedLlavaNextConfig

    def __init__(self, config: ReducedLlavaNextConfig) -> None:
        # Past LlavaNextForConditionalGeneration's own __init__, which would build a plain model first.
        super(LlavaNextForConditionalGeneration, self).__init__(config)
        self.model = ReducedLlavaNextModel(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()


def stack_tiles(pixel_values: Tensor, tiles: list[int]) -> Tensor:
    """The tiles of all images, [sum of tiles, 3, S, S], of stacked [N, most tiles, 3, S, S] or flat pixel values."""
    if pixel_values.dim() == 5 and pixel_values.shape[0] == len(tiles) and pixel_values.shape[1] >= max(tiles):
        return torch.cat([image[:count] for image, count in zip(pixel_values, tiles, strict=True)])
    if pixel_values.dim() == 4 and pixel_values.shape[0] == sum(tiles):
        return pixel_values
    raise ReductionError(
        f"pixel_values has shape {tuple(pixel_values.shape)}, image_sizes says {len(tiles)} images of {tiles} tiles: "
        "pass both as the processor gives them"
    )


register_key_mapping("ReducedLlavaNextModel", "LlavaNextModel")
register_key_mapping("reduced_llava_next", "llava_next")
ReducedLlavaNextModel.with_head = ReducedLlavaNextForConditionalGeneration
ReducedLlavaNextModel.register_for_auto_class("AutoModel")
ReducedLlavaNextForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
