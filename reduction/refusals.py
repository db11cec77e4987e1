"""Inputs and settings that a reduced model refuses before it computes anything: what does not fit, and the cure."""

import copy
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers.utils.import_utils import torch_compilable_check

from .configuration_reduced_llava import reductions_of, validate
from .engines import OFF
from .errors import ReductionError
from .selectors import has_own_budgets
from .shortv import SUPPORTED_ATTENTION


def refuse_changed(config: Any, loaded: dict[str, Any]) -> None:
    """Refuses a config whose reductions are not those that the model was built with (`reductions_of`).

    Turned off is allowed where the model then does as the config says: VisionZip and ShortV.
    """
    now = reductions_of(config)
    if now == loaded:
        return
    validate(config)
    for key, value in now.items():
        before = loaded[key]
        if value is None and key != "fastv":
            continue
        if key == "shortv":
            value, before = sorted(value["layers"]), [] if before is None else sorted(before["layers"])
        if value != before:
            was = f"{before} frozen" if key == "shortv" else before
            raise ReductionError(
                f"{key}: config.{key} now says {'layers ' if key == 'shortv' else ''}{value}, but this model was "
                f"loaded with {was}: load it again with from_pretrained(…, {key}=…)"
            )


def change_budget(model: Any, visionzip: dict[str, Any]) -> None:
    """Has a reduced model without a head keep another budget from now on, given as the config's key: the one change
    that `refuse_changed` lets pass.

    Raises:
        ValueError: a budget that the model cannot take; then nothing is changed.
    """
    config = copy.copy(model.config)
    config.visionzip = dict(visionzip)
    validate(config)
    model.config.visionzip = config.visionzip
    model._reductions = copy.deepcopy(reductions_of(config))


def refuse_mismatch(
    visionzip: Any, visual: Tensor, lengths: list[int], whole_images: bool, image_budgets: Any = None
) -> None:
    """Refuses prompts whose placeholders the images do not fill: in all, and row by row.

    Which image belongs to which row is nowhere said, so a row's placeholders must be those of whole images.

    Args:
        visionzip: the config's key, for the message.
        visual: [B, L] bool, the placeholders.
        lengths: visual tokens of each image, in the order of their placeholders.
        whole_images: False where a part of the images is all there is, and only the sum can be compared.
        image_budgets: those of the call, for the message.
    """
    held, total = visual.sum(dim=1), sum(lengths)
    fits = held.sum() == total
    if whole_images and len(visual) > 1:
        if len(set(lengths)) == 1:
            fits = fits & (held % lengths[0] == 0).all()
        else:
            ends = torch.tensor([0, *accumulate(lengths)]).to(held.device, non_blocking=True)
            fits = fits & torch.isin(held.cumsum(dim=0), ends).all()
    torch_compilable_check(fits, lambda: _mismatch(visionzip, held.tolist(), lengths, image_budgets))


def _mismatch(visionzip: Any, held: list[int], lengths: list[int], image_budgets: Any) -> str:
    ends = [0, *accumulate(lengths)]
    said = f"the prompts hold {sum(held)} image placeholders, the images give {ends[-1]} visual tokens"
    start = 0
    for row, count in enumerate(held):
        if len(held) > 1 and start + count not in ends:
            end = min((end for end in ends if end > start), key=lambda end: abs(end - start - count), default=start)
            said = (
                f"row {row} of the batch (the first is 0) holds {count} image placeholders, its images give "
                f"{end - start} visual tokens; all rows hold {sum(held)}, all images give {ends[-1]}"
            )
            break
        start += count
    if visionzip is None:
        budget = "every visual token"
    elif image_budgets is not None or has_own_budgets(visionzip):
        budget = "as many of each image as its own budget says (image_budgets, or visionzip.per_image)"
    else:
        budget = f"{visionzip['dominant'] + visionzip['contextual']} per image (per tile in LLaVA-NeXT)"
    return (
        f"{said}: this model keeps {budget}. Build the inputs with the processor saved beside this model or with "
        f"from_pretrained(…, visionzip={visionzip})"
    )


def refuse_missing_images(config: Any, input_ids: Tensor, past_key_values: Any) -> None:
    """Refuses placeholders in a pass that brings no image."""
    if input_ids.shape[1] == 1:
        return
    allowed = 0
    if past_key_values is not None and past_key_values.get_seq_length() > 0:
        # After the prompt, a few may be what the model itself wrote or assisted decoding guessed; an image is not.
        visionzip, tower = config.visionzip, config.vision_config
        patches = (tower.image_size // tower.patch_size) ** 2
        allowed = (patches if visionzip is None else visionzip["dominant"] + visionzip["contextual"]) - 1
    placeholders = (input_ids == config.image_token_id).sum()
    torch_compilable_check(
        placeholders <= allowed,
        lambda: (
            f"the prompts hold {int(placeholders)} image placeholders and there are 0 visual tokens: "
            "pass the pixel_values of their images"
        ),
    )


def refuse_videos(name: str, pixel_values_videos: Any) -> None:
    """Refuses videos for a model that would leave them out without a word. `name`: its class."""
    if pixel_values_videos is not None:
        raise ReductionError(
            f"pixel_values_videos: a {name} reads images, and no videos: take a release that does, such as "
            "LanguageBind/Video-LLaVA-7B or a LLaVA-OneVision, or give frames as images"
        )


def refuse_unmasked_attention(key: str, text_config: Any, output_attentions: bool | None) -> None:
    """Refuses attention that computes every query, and maps of attention that some tokens do not have.

    `key`: of the reduction in the language model, "shortv" or "fastv".
    """
    if text_config._attn_implementation not in SUPPORTED_ATTENTION:
        raise ReductionError(
            f"{key}: attention {text_config._attn_implementation!r} cannot leave out the queries of visual tokens: "
            f"load the language model with attn_implementation one of {list(SUPPORTED_ATTENTION)}"
        )
    if text_config.output_attentions if output_attentions is None else output_attentions:
        raise ReductionError(
            f"{key}: output_attentions is not available, visual tokens have no attention in some layers: "
            f"load the model with {key}=None to look at attention"
        )


def visual_of_token_types(key: str, mm_token_type_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
    """[B, L] bool, the visual positions of `inputs_embeds` [B, L, H] into which images are merged already.

    `key`: of the reduction that needs to know, for messages.
    """
    if mm_token_type_ids is None:
        raise ReductionError(
            f"{key}: inputs_embeds alone do not say which positions are visual: pass input_ids and pixel_values, or "
            f"mm_token_type_ids (0 where no visual token is) of the same length, or {OFF.format(key=key)}"
        )
    if mm_token_type_ids.shape != inputs_embeds.shape[:2]:
        raise ReductionError(
            f"{key}: mm_token_type_ids has shape {tuple(mm_token_type_ids.shape)}, "
            f"inputs_embeds is {tuple(inputs_embeds.shape[:2])} positions"
        )
    return mm_token_type_ids != 0  # processors write 1 at tokens of images, 2 at those of videos
