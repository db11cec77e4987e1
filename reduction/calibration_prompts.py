"""The prompts that layers are measured on, and in which batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import ReductionError
from .positions import shifts_of


class CalibrationSample(NamedTuple):
    """A prompt up to where the answer begins: what a model's forward takes, for one row without padding."""

    input_ids: Tensor  # [n] int64, placeholders included
    pixel_values: Tensor  # [images, 3, S, S], LLaVA-NeXT: [images, tiles, 3, S, S]
    image_sizes: Tensor | None = None  # [images, 2] int64 (height, width), LLaVA-NeXT only


class EmbeddedPrompt(NamedTuple):
    """A prompt as the language model reads it."""

    embeds: Tensor  # [n, H], visual tokens in their places
    visual: Tensor  # [n] bool, where they are
    positions: Tensor | None = None  # [n] int64; None: 0, 1, 2, …


def embed_prompt(model: Any, sample: CalibrationSample) -> EmbeddedPrompt:
    """The language model's input for a prompt: text embeddings and, in their places, projected visual tokens.

    `model` is a LLaVA or LLaVA-NeXT, reduced or not. Raises ValueError when its visual tokens do not fit the
    placeholders.
    """
    inner = model.model
    embeds = inner.get_input_embeddings()(sample.input_ids.to(model.device)[None])[0]
    visual = (sample.input_ids == model.config.image_token_id).to(embeds.device)
    sizes = {} if sample.image_sizes is None else {"image_sizes": sample.image_sizes}
    pixels = sample.pixel_values.to(model.device)
    images = inner.get_image_features(pixel_values=pixels, **sizes)
    features = torch.cat(list(images.pooler_output)).to(embeds)
    if len(features) != int(visual.sum()):
        raise ReductionError(
            f"the prompt has {int(visual.sum())} placeholders, but its images give {len(features)} visual tokens: "
            "build it with the processor that belongs to this model."
        )
    positions = images.get("positions")
    if positions is not None:
        counted = torch.arange(len(visual), device=visual.device)
        positions = counted + shifts_of(visual[None], positions)[0, :-1]
    return EmbeddedPrompt(embeds.masked_scatter(visual[:, None], features), visual, positions)


def plan_batches(prompts: Sequence[Tensor], image_token_id: int, samples_per_batch: int) -> list[list[int]]:
    """Which prompts ([n] token ids) go through the model together: same text before the image, similar length.

    Every index occurs once; the plan depends on nothing but the arguments. Raises ValueError for a prompt without
    placeholders or an empty list.
    """
    if samples_per_batch < 1:
        raise ReductionError(f"samples_per_batch={samples_per_batch}: must be at least 1.")
    if not prompts:
        raise ReductionError("no calibration samples: LC needs at least one prompt with an image.")
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, ids in enumerate(prompts):
        places = (ids == image_token_id).nonzero()
        if not len(places):
            raise ReductionError(f"calibration sample {index} has no placeholder: LC needs prompts with an image.")
        groups.setdefault(tuple(ids[: int(places[0])].tolist()), []).append(index)
    plan = []
    for group in groups.values():
        group.sort(key=lambda index: (len(prompts[index]), index))
        plan += [group[start : start + samples_per_batch] for start in range(0, len(group), samples_per_batch)]
    return plan
