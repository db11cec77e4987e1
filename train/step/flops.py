"""What a training step must compute, and what it could be held against.

FLOPs count a multiply-add as two and attention as if it were not causal, as in reduction/flops.py. Two counts of the
same row stand side by side: :func:`plain_flops` is what transformers' LLaVA computes, :func:`needed_flops` what the
loss and the projector's gradient need, which train/step/objective.py computes. In the backward pass an untrained
matrix costs its forward once more (the gradient of its input) and attention twice its forward.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from shortzip.data.dataset import ConversationDataset
from shortzip.reduction.flops import (
    llm_layer_flops_grouped,
    lm_head_flops,
    projector_flops,
    projector_training_flops,
    tower_blocks_run,
    usual_tiles,
    vision_tower_flops,
)
from shortzip.train.step.places import unreduced


@dataclass(frozen=True)
class RowShape:
    """One conversation in tokens."""

    text: int
    """Text tokens."""
    visual: int
    """Visual tokens that the language model reads; 0 without an image."""
    supervised: int
    """Tokens of its answers."""
    tiles: int = 1
    """Images, tiles, or frames of videos, that the tower reads; counted only where `visual` is above 0."""


def plain_flops(
    config: Any, row: RowShape, *, checkpointing: bool, whole_tower: bool = True, backward: bool = True
) -> int:
    """FLOPs of a forward and backward pass of all tokens through all layers, logits at every position.

    `config`: of a LLaVA. `whole_tower`: count blocks of the tower that come after the selected one too. `backward`:
    False for a row whose micro-batch has no image.
    """
    text, tokens = config.text_config, row.text + row.visual
    matrices, attention = llm_layer_flops_grouped(text, tokens, tokens, tokens)
    forwards = 2 if checkpointing else 1
    layers = text.num_hidden_layers * ((forwards + 1) * matrices + (forwards + 2) * attention)
    if not backward:
        layers = text.num_hidden_layers * (matrices + attention)
    total = layers + (1 + backward) * lm_head_flops(text, tokens)
    if row.visual:
        tower = vision_tower_flops(config, row.tiles)
        if whole_tower:
            tower = round(tower * config.vision_config.num_hidden_layers / tower_blocks_run(config))
        total += tower + projector_training_flops(config, row.visual)
    return total


def needed_flops(
    config: Any, row: RowShape, *, shared: int, frozen_layers: Collection[int], tower: bool = True
) -> int:
    """FLOPs that the loss and the projector's gradient need of a row.

    `shared`: text tokens at the beginning whose keys and values are constants. `tower`: False with cached features.
    A row without an image has no backward pass: the projector gets no gradient from it.
    """
    text, last = config.text_config, config.text_config.num_hidden_layers - 1
    shared = min(shared, row.text)
    queries = row.text - shared
    tokens = queries + row.visual
    frozen = len(set(frozen_layers) - {last}) if row.visual else 0

    def layer(asking: int) -> int:
        matrices, attention = llm_layer_flops_grouped(text, asking, tokens, tokens + shared)
        return 2 * matrices + 3 * attention if row.visual else matrices + attention

    passes = 2 if row.visual else 1
    total = (last - frozen) * layer(tokens) + frozen * layer(queries) + layer(row.supervised)
    total += passes * lm_head_flops(text, row.supervised)
    if row.visual:
        total += projector_training_flops(config, row.visual) + (vision_tower_flops(config, row.tiles) if tower else 0)
    return total


def teacher_flops(config: Any, row: RowShape, *, shared: int = 0) -> int:
    """FLOPs of its forward pass over a row: tower, projector, every layer, logits at supervised positions.

    `row`: with all its visual tokens; one without an image is not read. `shared`: as of `needed_flops`.
    """
    if not row.visual:
        return 0
    text = config.text_config
    tokens = row.text - min(shared, row.text) + row.visual
    attended = row.text + row.visual
    every = sum(llm_layer_flops_grouped(text, tokens, tokens, attended))
    last = sum(llm_layer_flops_grouped(text, row.supervised, tokens, attended))
    llm = (text.num_hidden_layers - 1) * every + last + lm_head_flops(text, row.supervised)
    return llm + projector_flops(config, row.visual) + vision_tower_flops(config, row.tiles)


class StepFlops:
    """The FLOPs that a step over samples of `dataset` needs with `model`, for MFU.

    LLaVA-NeXT's images, whose tiles differ, are counted as five each, budgets per image as their mean, and videos by
    the frames that are seen. `taught`: a
    teacher is asked in the step.
    """

    def __init__(self, model: Any, dataset: ConversationDataset, taught: bool = False) -> None:
        supervision, config = dataset.supervision, model.config
        self.config, self.dataset = config, dataset
        self.tower = not isinstance(model.model.vision_tower, nn.Identity)
        self.frozen = config.shortv["layers"] if config.shortv else []
        self.tiles = usual_tiles(config)
        if supervision.needs_image_sizes:
            side = config.vision_config.image_size
            size = (2 * side, 2 * side)
        else:
            size = (0, 0)
        own = dataset.mean_budget
        self.size, self.visual = size, supervision.placeholders(size, own)
        every = unreduced(supervision)
        self.taught, self.every_video = every.placeholders(size) if taught else None, every.video_placeholders
        self.shared = 0
        if self.tiles == 1:
            with_image = (row for row in dataset.conversations if row.images and not row.videos)
            first = next(with_image, None)
            if first is not None:
                budgets = None if own is None else [own] * len(first.images)
                ids = supervision.encode(first, None, budgets).input_ids
                image = supervision.processor.image_token_id
                self.shared = ids.index(image) if image in ids else 0

        self.of_videos = np.zeros(len(dataset), dtype=np.int64)  # visual tokens
        if dataset.has_videos:
            counts = [supervision.video_placeholders(count) if count else 0 for count in dataset.frames.tolist()]
            self.of_videos = np.asarray(counts)

    @property
    def most(self) -> tuple[int, int]:
        """Visual tokens, and tiles or frames, of one image, or of the row with most frames of videos."""
        if not self.dataset.has_videos:
            return self.visual, self.tiles
        row = int(self.dataset.frames.argmax())
        return max(self.visual, int(self.of_videos[row])), max(self.tiles, int(self.dataset.frames[row]))

    def __call__(self, samples: Sequence[int], *visual: int) -> int:
        """`visual`: tokens of an image in this step, where they are others than the dataset's; several where the rows
        are read several times."""
        return sum(self._of(sample, visual or (self.visual,)) for sample in samples)

    def _of(self, sample: int, of_images: Sequence[int]) -> int:
        length, images = int(self.dataset.lengths[sample]), len(self.dataset.conversations[sample].images)
        videos, frames = int(self.of_videos[sample]), int(self.dataset.frames[sample])
        visual = min(length, images * self.visual + videos)
        supervised = int(self.dataset.supervised[sample])
        tiles = (images if frames else max(1, images)) * self.tiles + frames
        rows = [
            RowShape(length - visual, min(visual, images * of_image + videos), supervised, tiles)
            for of_image in (of_images if images else of_images[:1])  # from text alone all say the same
        ]
        needed = sum(
            needed_flops(self.config, row, shared=self.shared, frozen_layers=self.frozen, tower=self.tower)
            for row in rows
        )
        if self.taught is None:
            return needed
        row = rows[0]
        of_frames = self.every_video(frames) if frames else 0
        whole = replace(row, visual=images * self.taught + of_frames)
        return needed + teacher_flops(self.config, whole, shared=self.shared)
