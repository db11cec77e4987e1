"""Which prompts LC is measured on: one choice behind scripts/calibrate_shortv.py and shortv.freeze of a run.

With the same conversations, number and seed both measure the same prompts, and so freeze the same layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from shortzip.data.batching import permutation
from shortzip.data.dataset import Collator, ConversationDataset, Sample, encode_unread
from shortzip.data.drops import BadSample, DropLog
from shortzip.data.errors import UserError
from shortzip.data.instructions import Conversation
from shortzip.data.supervision import Supervision
from shortzip.reduction.layer_contribution import CalibrationSample


class Chosen(NamedTuple):
    """A conversation and its prompt: token ids up to the first answer after an image."""

    conversation: Conversation
    prompt: list[int]


def choose_prompts(
    conversations: Sequence[Conversation],
    supervision: Supervision,
    image_root: str | None,
    drops: DropLog,
    *,
    count: int,
    seed: int,
    source: str,
) -> list[Chosen]:
    """The first `count` conversations, in an order drawn with `seed`, that answer something after an image.

    `source`: what messages call the conversations. Raises ValueError if there is none, BadSample for a bad row where
    bad samples raise.
    """
    chosen: list[Chosen] = []
    image_token = supervision.processor.image_token_id
    for index in permutation(len(conversations), seed, 0).tolist():
        if len(chosen) == count:
            break
        conversation = conversations[index]
        if not conversation.images:
            continue
        try:
            encoded = encode_unread(conversation, supervision, image_root)
        except BadSample as error:
            drops.add(error)
            continue
        first_image = encoded.input_ids.index(image_token) if image_token in encoded.input_ids else len(encoded.labels)
        starts = [start for start, _ in encoded.answers if start > first_image]
        if starts:
            chosen.append(Chosen(conversation, encoded.input_ids[: starts[0]]))
    if not chosen:
        raise UserError(
            f"{source}: none of the {len(conversations)} conversations answers something after an image, so LC cannot "
            "be measured on them. Give others, or shortv.layers"
        )
    return chosen


def dataset_of(chosen: Sequence[Chosen], supervision: Supervision, image_root: str | None) -> ConversationDataset:
    """What `load_sample` takes the conversations' images from."""
    conversations = [item.conversation for item in chosen]
    return ConversationDataset(conversations, supervision, image_root, drops=DropLog("skip", 1))


def load_sample(chosen: Chosen, dataset: ConversationDataset) -> CalibrationSample:
    """Its prompt with the pixels of the images in it. Raises BadSample for an image that cannot be read."""
    sample = with_prompt(dataset.load(chosen.conversation), dataset.supervision, chosen.prompt)
    inputs = Collator.of(dataset.supervision)([sample]).inputs
    return CalibrationSample(torch.tensor(chosen.prompt), inputs["pixel_values"], inputs.get("image_sizes"))


def with_prompt(sample: Sample, supervision: Supervision, prompt: list[int]) -> Sample:
    """The sample with only the images that stand in `prompt`, a beginning of its tokens."""
    left, images = prompt.count(supervision.processor.image_token_id), 0
    while left > 0:
        left -= supervision.placeholders(sample.image_sizes[images])
        images += 1
    return Sample(sample.id, sample.encoded, sample.pixels[:images], sample.image_sizes[:images])
