"""The micro-batch of a recipe's own conversations that holds most tokens, as integers: what a rehearsal walks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from shortzip.data.batching import BatchPlan
from shortzip.data.dataset import Collator, ConversationDataset, Sample, encode_unread
from shortzip.data.errors import UserError
from shortzip.data.known_images import KnownImages
from shortzip.train.inputs.samples import training_set
from shortzip.train.rehearsal.rows import Integers, integers_from
from shortzip.train.release.loading import load_processor
from shortzip.train.release.opening import open_release
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.settings.config import TuneConfig
from shortzip.train.settings.reduced import reductions_of

STEPS = 100  # that are looked through


def recipe_conversations(config: TuneConfig) -> ConversationDataset:
    """The conversations that a recipe trains on. Raises what its run would."""
    release = open_release(ReleaseSpec.of(config))
    layers = config.shortv.layers if config.shortv else None
    processor: Any = load_processor(release, reductions_of(config.visionzip, layers, None).largest_budget)
    dataset = training_set(config.data, processor, config.seed)
    if dataset.has_videos:
        count = int((dataset.videos > 0).sum())
        raise UserError(f"{count} conversations have videos, which are not rehearsed: shortzip estimate has --frames")
    return dataset


def largest_micro_batch(dataset: ConversationDataset, plan: BatchPlan) -> list[int]:
    """The conversations of the micro-batch with most tokens, padding included, of the first `STEPS` steps."""
    found: list[int] = []
    for batch in islice(plan.batches(), STEPS):
        for rows in batch.micro_batches[0]:
            found = max(found, rows, key=lambda rows: len(rows) * max(plan.lengths[rows], default=0))
    return found


def integers_of_conversations(
    dataset: ConversationDataset, numbers: Sequence[int]
) -> tuple[Integers, list[tuple[int, int]]]:
    """Integers of these conversations, and the sizes of their images where tokens depend on them."""
    known, supervision = KnownImages(None), dataset.supervision
    samples = []
    for number in numbers:
        conversation = dataset.conversations[number]
        encoded = encode_unread(conversation, supervision, dataset.image_root, known)
        sizes = (
            [known.size(source, dataset.image_root) for source in conversation.images[: encoded.images]]
            if supervision.needs_image_sizes
            else []
        )
        samples.append(Sample(conversation.id, encoded, [], sizes))
    inputs = Collator.of(supervision)(samples).inputs
    integers = integers_from(
        inputs["input_ids"], inputs["attention_mask"], inputs["labels"], supervision.processor.image_token_id
    )
    return integers, [size for sample in samples for size in sample.image_sizes]
