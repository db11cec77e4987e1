"""Where tokens stand for the language model once visual tokens are left out: `positions: compact | original`.

compact     what is left is numbered 0, 1, 2, … (VisionZip, DivPrune and most others: none passes anything else)
original    every token has the position that it would have with all visual tokens (GAP, arXiv 2506.21873, which wins
            back what renumbering costs in grounding; SparseVLM+ keeps positions likewise)

With `original`, the text behind an image stands where it would behind all of the image's tokens, and new tokens follow
it; a kept patch stands at its own place, a merged token at that of the patch that it grew from, a cell of a
grid (pool, downsample) at that of the patch in its middle, CLS at the image's first. GAP says nothing of merged tokens
and CLS. Causality stays that of the order in which tokens come.

N is the number of images (tiles in LLaVA-NeXT), V of visual tokens of all images of a batch, in their order.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import LlavaModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_pruning import POSITIONS
from .errors import ReductionError
from .extras import extra

COMPACT, ORIGINAL = POSITIONS
ON_CELLS = ("pool", "downsample")
ATTENTION = ("eager", "sdpa")
_KEY = "_moved_by_images"  # what a cache's rows have moved, kept in the cache itself: copies of it have it too


class ImagePositions(NamedTuple):
    """Where the visual tokens of each image stand among all tokens that plain LLaVA would give of it.

    Attributes:
        tokens: of each image [its tokens] int64, from 0, the image's first position.
        lengths: how many positions each image takes.
    """

    tokens: list[Tensor]
    lengths: list[int]


@dataclass
class PlacedFeatures(BaseModelOutputWithPooling):
    """Features of images, with where they stand.

    Attributes:
        positions: an ImagePositions; None where tokens are numbered as they come.
    """

    positions: Any = None


def keeps_positions(config: Any) -> bool:
    """Whether the tokens that a config leaves stand elsewhere than where they are counted."""
    return bool(config.positions == ORIGINAL) and config.visionzip is not None


def takes_encoded_images() -> bool:
    """Whether transformers' LLaVA takes features in the place of pixels, from which positions are known: from 5.18 on.

    An earlier one swallows them, and its language model would read placeholders.
    """
    return "mm_encoder_outputs" in inspect.signature(LlavaModel.forward).parameters


def validate_positions(positions: Any) -> None:
    """Refuses what is no choice of positions, or none with this transformers. Raises ReductionError."""
    if positions not in POSITIONS:
        raise ReductionError(f"positions is {positions!r}; it must be one of {list(POSITIONS)}")
    if positions == ORIGINAL and not takes_encoded_images():
        raise ReductionError(
            f"positions is {ORIGINAL!r}: needed is transformers 5.18, this is {transformers.__version__}: "
            f"pip install 'transformers>=5.18', or choose {COMPACT!r}"
        )


def refuse_packing_attention(text_config: Any) -> None:
    """Refuses attention that takes a jump in positions for the beginning of another text."""
    if text_config._attn_implementation not in ATTENTION:
        raise ReductionError(
            f"positions: attention {text_config._attn_implementation!r} takes positions with gaps for several texts: "
            f"load the language model with attn_implementation one of {list(ATTENTION)}, or with positions='compact'"
        )


def patches_of_tokens(visionzip: Mapping[str, Any], kept: Tensor, targets: Tensor, side: int) -> Tensor:
    """The patch that each visual token stands for, [N, budget] int64, -1 for CLS.

    Args:
        visionzip: the config's key.
        kept: [N, D] and `targets`: [N, C], as in VisualTokens.
        side: patches in a row of the image.
    """
    method = visionzip.get("method")
    if method in ON_CELLS:
        baselines = extra("baselines", f"visionzip: method {method}")
        cells = baselines.grid_patches(baselines.grid_shape(visionzip["dominant"], side), side)
        return cells.to(kept.device, non_blocking=True).expand(len(kept), -1)
    cls = kept.new_full((len(kept), visionzip["dominant"] - kept.shape[1]), -1)
    return torch.cat([cls, kept, targets.to(kept)], dim=1)


def moves(images: ImagePositions) -> tuple[Tensor, Tensor]:
    """How far each visual token stands behind where it is counted in its image, and how many positions more than its
    tokens an image takes, told at the image's last token (0 at its others): [V] int64 each."""
    moved, gained = [], []
    for places, length in zip(images.tokens, images.lengths, strict=True):
        count = len(places)
        moved.append(places - torch.arange(count, device=places.device))
        gained.append(torch.nn.functional.pad(places.new_full((1,), length - count), (count - 1, 0)))
    return torch.cat(moved), torch.cat(gained)


def shifts_of(visual: Tensor, images: ImagePositions | None, earlier: Tensor | None = None) -> Tensor:
    """How far each position of a batch moves, and what comes after it: [B, L + 1] int64.

    Args:
        visual: [B, L] bool, the placeholders of these images.
        images: None without any.
        earlier: [B, 1] int64, how far the images that stand in a cache have moved what follows.
    """
    shifts = torch.zeros(visual.shape[0], visual.shape[1] + 1, dtype=torch.long, device=visual.device)
    if images is not None:
        moved, gained = (part.to(visual.device) for part in moves(images))
        nothing = torch.zeros(visual.shape, dtype=torch.long, device=visual.device)
        gained = nothing.masked_scatter(visual, gained)
        shifts[:, 1:] = gained.cumsum(1)
        shifts[:, :-1] += nothing.masked_scatter(visual, moved)
    return shifts if earlier is None else shifts + rows_for(earlier, len(shifts))


def packed_shifts(images: ImagePositions, before: Tensor, before_row: Tensor, visual_count: int) -> Tensor:
    """As `shifts_of`, of tokens that are packed: [M] int64, the first `visual_count` of them visual.

    Args:
        images: those of all rows.
        before: [M] int64, how many visual tokens stand before each, in its row and in the rows before it.
        before_row: [M] int64, how many stand before its row.
    """
    moved, gained = (part.to(before.device) for part in moves(images))
    gained = torch.nn.functional.pad(gained.cumsum(0), (1, 0))
    shifts = gained[before] - gained[before_row]
    shifts[:visual_count] += moved[before[:visual_count]]
    return shifts


def rows_for(earlier: Tensor, rows: int) -> Tensor:
    """`earlier` [B, 1] for `rows` rows: beams may have come, or gone, since it was kept."""
    known = len(earlier)
    if rows % known == 0:
        return earlier.repeat_interleave(rows // known, dim=0)
    if known % rows == 0:
        return earlier[:: known // rows]
    raise ReductionError(f"positions: the cache was filled by {known} rows, and {rows} go on with it")


def earlier_shifts(cache: Any) -> Tensor | None:
    """How far the images in a cache have moved what follows, [B, 1] int64; None without a cache or without images."""
    if cache is None or not cache.get_seq_length():
        return None
    found: Tensor | None = vars(cache).get(_KEY)
    return found


def remember_shifts(outputs: Any, shifts: Tensor) -> None:
    """Keeps with the cache among a forward pass's outputs (or the cache itself) how far what follows moves.

    `shifts`: as `shifts_of` gives them.
    """
    held = [outputs] if isinstance(outputs, Cache) else outputs if isinstance(outputs, tuple) else outputs.values()
    for cache in held:
        if isinstance(cache, Cache):
            vars(cache)[_KEY] = shifts[:, -1:]


def shifts_of_prompt(visual: Tensor, images: Any, length: int, cache: Any) -> Tensor:
    """As `shifts_of` for a prompt that is generated from, [B, length + 1]: what a cache holds may be left out of it.

    Args:
        visual: [B, L] bool, where the placeholders of the prompt stand, or of its end that is not in the cache.
        images: features of the images that are not in the cache, or None.
        length: of the prompt, with what is in the cache.
    """
    cached = 0 if cache is None else int(cache.get_seq_length())
    visual = torch.nn.functional.pad(visual, (length - visual.shape[1], 0))
    visual[:, :cached] = False
    return shifts_of(visual, None if images is None else positions_of(images), earlier_shifts(cache))


def shifts_of_pass(shifts: Tensor, count: int, cache: Any) -> Tensor:
    """Of a prompt's shifts [B, length + 1], those of the `count` tokens that a pass gives the language model next:
    [B, count]. New tokens move as what comes after the prompt."""
    start: Any = 0 if cache is None else cache.get_seq_length()
    places = torch.arange(count, device=shifts.device) + start
    return shifts[:, places.clamp(max=shifts.shape[1] - 1)]


def positions_of(images: Any) -> ImagePositions:
    """The positions that come with features of images.

    Raises:
        ReductionError: features that do not tell, such as those of another model or a part of an image's.
    """
    found = images.positions if isinstance(images, PlacedFeatures) else None
    if found is None or list(map(len, found.tokens)) != list(map(len, images.pooler_output)):
        raise ReductionError(
            "positions: mm_encoder_outputs do not say where their tokens stand: give those of this model's "
            "get_image_features, pixel_values, or position_ids"
        )
    return found


def encode_first(encode: Any, pixel_values: Tensor | None, image_sizes: Any, keys: dict[str, Any]) -> Tensor | None:
    """Has a pass's images encoded before anything else, since where tokens stand is for the tower to say.

    Puts the features into `keys["mm_encoder_outputs"]`; gives the pixel values that are left to encode.
    """
    if pixel_values is None or not len(pixel_values) or keys.get("mm_encoder_outputs") is not None:
        return pixel_values
    of_tower = ("vision_feature_layer", "vision_feature_select_strategy", "image_budgets")
    encoding = {key: keys[key] for key in of_tower if key in keys}
    images = encode(pixel_values, image_sizes=image_sizes, return_dict=True, **encoding)
    keys["mm_encoder_outputs"] = {"image": images}
    return None


def moved_pass(
    text_config: Any,
    tokens: Tensor,
    visual: Tensor | None,
    images: Any,
    token_types: Tensor | None,
    keys: Mapping[str, Any],
) -> tuple[dict[str, Any], Tensor | None]:
    """The keyword arguments of a pass through the language model, with `position_ids` of kept positions, and the
    shifts to remember with its cache; None where `position_ids` are given, which are taken as they are.

    Args:
        text_config: the language model's.
        tokens: [B, L] ids, or [B, L, H] embeddings.
        visual: [B, L] bool, where the placeholders of `images` stand; None without.
        images: features with their positions, or None.
        token_types: [B, L], 1 or 2 at visual tokens, for embeddings into which images are merged.
        keys: past_key_values, attention_mask and position_ids, or none of them.
    """
    refuse_packing_attention(text_config)
    moved, cache, (batch, length) = dict(keys), keys.get("past_key_values"), tokens.shape[:2]
    if cache is None and keys.get("attention_mask") is None:
        # transformers takes a jump in positions for the beginning of another text, unless a mask says what is one.
        moved["attention_mask"] = torch.ones(batch, length, dtype=torch.long, device=tokens.device)
    if keys.get("position_ids") is not None:
        return moved, None
    if images is None and tokens.dim() == 3:
        refuse_merged(token_types)
    if visual is None:
        visual = torch.zeros(batch, length, dtype=torch.bool, device=tokens.device)
    shifts = shifts_of(visual, None if images is None else positions_of(images), earlier_shifts(cache))
    start: Any = 0 if cache is None else cache.get_seq_length()
    moved["position_ids"] = torch.arange(length, device=tokens.device) + start + shifts[:, :-1]
    return moved, shifts


def refuse_merged(token_types: Tensor | None) -> None:
    """Refuses embeddings into which images may be merged: where their tokens stand cannot be seen from them."""
    if token_types is None or bool((token_types != 0).any()):
        raise ReductionError(
            "positions: inputs_embeds do not say where the visual tokens that are merged into them stand: pass "
            "input_ids and pixel_values, or position_ids; for text alone, mm_token_type_ids that are all 0"
        )


class CountsPositions:
    """What generation needs of a model whose tokens may keep their positions; goes before transformers' class.

    transformers goes on counting tokens (an image may end the prompt, so the last position does not tell the next).
    How far each one moves is a keyword argument beside its `position_ids`, and is added where a pass is prepared.
    """

    config: Any
    model: Any

    def _visual_of_prompt(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, encoded: Mapping[str, Any]
    ) -> tuple[Tensor, Any]:
        """Where the placeholders of a prompt stand, [B, L] bool, and the features that take their places, if any."""
        return self.model._placeholders(input_ids, inputs_embeds), encoded.get("image")

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """As transformers' method, which is called unless `generate` is given `position_ids`."""
        positions: Tensor = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)  # type: ignore[misc]
        if keeps_positions(self.config):
            self._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)  # type: ignore[attr-defined]
            embeds, cache = model_kwargs.get("inputs_embeds"), model_kwargs.get("past_key_values")
            ids = model_kwargs.get("input_ids", inputs_tensor) if embeds is None else None
            visual, images = self._visual_of_prompt(ids, embeds, model_kwargs["mm_encoder_outputs"])
            if images is None and embeds is not None:
                refuse_merged(model_kwargs.get("mm_token_type_ids"))
            model_kwargs["position_shifts"] = shifts_of_prompt(visual, images, positions.shape[-1], cache)
        return positions

    def prepare_inputs_for_generation(self, *args: Any, position_shifts: Tensor | None = None, **kwargs: Any) -> Any:
        """As transformers' method. `position_shifts`: of the whole prompt, as `shifts_of` gives them."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        if position_shifts is not None:
            tokens = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
            cache = kwargs.get("past_key_values")
            inputs["position_ids"] = inputs["position_ids"] + shifts_of_pass(position_shifts, tokens.shape[1], cache)
            if cache is not None and kwargs.get("is_first_iteration"):
                remember_shifts(cache, position_shifts)
        return inputs

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        if "position_shifts" in model_kwargs:  # an assistant counts for itself
            counted = ("position_shifts", "position_ids")
            model_kwargs = {key: value for key, value in model_kwargs.items() if key not in counted}
        return super()._get_candidate_generator(*args, model_kwargs=model_kwargs, **kwargs)  # type: ignore[misc]
