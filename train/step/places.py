"""Which tokens of a micro-batch a training step computes, and where they stand: integers only, laid out on the CPU.

Data workers do it (`lay_out` is what the collator is given), so that no integer travels to a device and back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from shortzip.data.supervision import IGNORE_INDEX, Supervision
from shortzip.reduction.errors import ReductionError
from shortzip.reduction.positions import ImagePositions, packed_shifts
from shortzip.reduction.shortv import active_rows
from shortzip.train.step.wide_rows import expand_images


class _Laid:
    """Small tensors, and what holds such. To another process they go by value: each of them would otherwise take a
    file descriptor of shared memory, twenty for a micro-batch."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with every tensor changed."""
        changed: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                changed[name] = change(value)
            elif isinstance(value, _Laid):
                changed[name] = value.each(change)
        return replace(self, **changed)  # type: ignore[type-var]  # its subclasses are dataclasses

    def to(self, device: torch.device) -> Self:
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        return self.each(Tensor.pin_memory)

    def __getstate__(self) -> dict[str, Any]:
        return {name: held.numpy() if isinstance(held, Tensor) else held for name, held in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, held in state.items():
            vars(self)[name] = torch.from_numpy(held) if isinstance(held, np.ndarray) else held


@dataclass(frozen=True)
class Padded(_Laid):
    """Where some of the packed tokens stand in rows that are padded for attention.

    Attributes:
        slots: [M] int64, each token's place in the rows, flat.
        rows: [B, W] int64, the position of the token in each slot; L, beyond every real one, where a slot is empty.
    """

    slots: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Places(_Laid):
    """The tokens that are computed, and where they stand. All tensors are int64.

    One row, of which the first token is shared with all others, `v` is visual and A, B, C are supervised::

        position        0   1   2   3   4   5   6   7
        token           s   t   v   v   u   A   B   C
        computed            t   v   v   u   A   B          C is only predicted, s is in a FixedText
        packed          v   v | t   u   A   B              all rows' visual tokens, then all rows' text
        every.rows      2   3   1   4   5   6              the row's visual tokens first
        text.rows       1   4   5   6
        ends.rows       4   5   6                          u predicts A, A predicts B, B predicts C

    Attributes:
        shared: number of tokens at the beginning of every row that are not computed but taken from a FixedText.
        ids: [T] token ids of the text tokens.
        positions: [N] each packed token's position in its row.
        images: [N] how many placeholders of the micro-batch stand before each packed token, and `images_before_row`
            [N], how many before its row: they tell how far images move it, where positions are kept.
        every: all N packed tokens in padded rows.
        text: the T text tokens in padded rows.
        ends: the S supervised positions in padded rows, in the order of the targets.
        packed_ends: [S] where these are among the packed tokens.
        targets: [S] the token that follows each of them.
    """

    shared: int
    ids: Tensor
    positions: Tensor
    images: Tensor
    images_before_row: Tensor
    every: Padded
    text: Padded
    ends: Padded
    packed_ends: Tensor
    targets: Tensor

    @property
    def visual_count(self) -> int:
        return len(self.positions) - len(self.ids)


@dataclass(frozen=True)
class Rows(_Laid):
    """Rows that are computed together: the text [p] that all begin with, p ≥ 0, its bytes, by which it is known again,
    and the places of the rest."""

    beginning: Tensor
    key: bytes
    places: Places


@dataclass(frozen=True)
class EveryToken(_Laid):
    """What is looked up where every token goes through every layer, of rows [B, L].

    Attributes:
        ends: [S] int64, the supervised positions, counted through all rows.
        targets: [S] int64, the token that follows each of them.
        active: [B, A] int64 and
        is_active: [B, A] bool, positions that are not visual (shortzip.reduction.shortv.ActiveRows).
        taught: [T] int64, which of the supervised positions are those of rows that answer an image.
    """

    ends: Tensor
    targets: Tensor
    active: Tensor
    is_active: Tensor
    taught: Tensor


@dataclass(frozen=True)
class Layout(_Laid):
    """What a training step computes of a micro-batch.

    Attributes:
        every_token: where all of it is computed.
        placeholders: visual tokens that the images must give.
        used: [U] int64, which of them are computed further; None: all.
        with_image: rows with a supervised position after an image; None without such.
        text_only: rows with supervised positions and no image before the last of them, which give the projector no
            gradient; None without such.
        taught: whether what a teacher says counts in the loss.
        full: the rows with all visual tokens, as a teacher reads them; None where none is asked.
        is_video: [placeholders] bool, which of them are those of videos, in the order of the rows; None: none.
    """

    every_token: EveryToken
    placeholders: int
    used: Tensor | None
    with_image: Rows | None
    text_only: Rows | None
    taught: bool = False
    full: FullRows | None = None
    is_video: Tensor | None = None


@dataclass(frozen=True)
class FullRows(_Laid):
    """Rows whose images stand with all their visual tokens: [B, L'] int64 each, and the layout of these."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    layout: Layout


def unreduced(supervision: Supervision) -> Supervision:
    """The same for a model that keeps every visual token."""
    processor: Any = copy.copy(supervision.processor)
    processor.visionzip = None
    return Supervision(processor, supervision.template, supervision.max_length, supervision.sampling)


@dataclass(frozen=True)
class LayOut:
    """What a collator makes of a micro-batch's integers.

    Attributes:
        image_token_id: of the placeholder.
        reduced: how many placeholders an image of (height, width) has in the rows.
        full: how many it has with all visual tokens, where a teacher reads the rows; None: none does.
        taught: whether what a teacher says counts in the loss.
        video_token_id: of the placeholder of a video, of a family that takes videos. From here on visual tokens are
            those of images and videos alike.
        videos: how many placeholders a video of so many frames has in the rows, and with all visual tokens, where a
            teacher reads them.
    """

    image_token_id: int
    reduced: Callable[[tuple[int, int]], int] | None = None
    full: Callable[[tuple[int, int]], int] | None = None
    taught: bool = False
    video_token_id: int | None = None
    videos: tuple[Callable[[int], int], Callable[[int], int]] | None = None

    def __call__(self, inputs: Mapping[str, Tensor]) -> Layout:
        """The layout of input_ids, attention_mask, labels [B, L] and, where images differ in size, image_sizes; with
        videos, video_frames."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        of_videos = torch.zeros_like(ids, dtype=torch.bool)
        if self.video_token_id is not None:
            of_videos = (ids == self.video_token_id) & mask.bool()
        rows = (ids.masked_fill(of_videos, self.image_token_id), mask, inputs["labels"])
        visual = (rows[0] == self.image_token_id) & mask.bool()
        is_video = of_videos[visual] if bool(of_videos.any()) else None
        layout = replace(lay_out(*rows, image_token_id=self.image_token_id), taught=self.taught, is_video=is_video)
        if self.full is None or self.reduced is None:
            return layout
        counts = self._counts(inputs, [] if is_video is None else is_video.tolist())
        wide = expand_images(*rows, [count[:2] for count in counts], image_token_id=self.image_token_id)
        kinds = [kind for _, wanted, kind in counts for _ in range(wanted)]
        of_wide = lay_out(*wide, image_token_id=self.image_token_id)
        full = replace(of_wide, is_video=None if is_video is None else torch.tensor(kinds))
        return replace(layout, full=FullRows(*wide, full))

    def _counts(self, inputs: Mapping[str, Tensor], is_video: list[bool]) -> list[tuple[int, int, bool]]:
        """Placeholders of each image and video of the micro-batch, in the rows and with all visual tokens, and whether
        it is a video; in the order of the rows."""
        assert self.reduced is not None
        assert self.full is not None
        images = [(self.reduced(size), self.full(size), False) for size in self._sizes(inputs)]
        if not is_video:
            return images
        assert self.videos is not None
        within, whole = self.videos
        videos = [(within(count), whole(count), True) for count in inputs["video_frames"].tolist()]
        kinds, counts, at = (iter(images), iter(videos)), list[tuple[int, int, bool]](), 0
        while at < len(is_video):
            counts.append(next(kinds[is_video[at]]))
            at += counts[-1][0]
        return counts

    def _sizes(self, inputs: Mapping[str, Tensor]) -> list[tuple[int, int]]:
        """(height, width) of each image of the micro-batch, where it matters."""
        assert self.reduced is not None
        placeholders = int((inputs["input_ids"] == self.image_token_id).sum())
        if not placeholders:
            return []
        if "image_sizes" in inputs:
            return [(int(height), int(width)) for height, width in inputs["image_sizes"].tolist()]
        return [(0, 0)] * (placeholders // self.reduced((0, 0)))  # images that all have as many


def answers_image(input_ids: Tensor, attention_mask: Tensor, labels: Tensor, image_token_id: int) -> Tensor:
    """[B] bool, the rows with a supervised position after a visual token. Arguments [B, L]."""
    return (needed_tokens(attention_mask, labels) & (input_ids == image_token_id)).any(1)


def lay_out(input_ids: Tensor, attention_mask: Tensor, labels: Tensor, *, image_token_id: int) -> Layout:
    """The layout of a micro-batch; every argument [B, L] int64 on the CPU, padded on either side.

    Raises ReductionError where a supervised position would be predicted from padding.
    """
    needed = needed_tokens(attention_mask, labels)
    visual = (input_ids == image_token_id) & attention_mask.bool()
    sees = answers_image(input_ids, attention_mask, labels, image_token_id)
    before = visual.flatten().cumsum(0).view_as(visual) - visual.long()

    def rows_of(chosen: Tensor) -> Rows | None:
        if not bool(chosen.any()):
            return None
        rows = (input_ids[chosen], attention_mask[chosen], labels[chosen])
        shared = shared_beginning(rows[0], needed[chosen], rows[2], image_token_id)
        beginning = rows[0][0, :shared].clone()
        places = place_tokens(*rows, image_token_id, shared, before[chosen])
        return Rows(beginning, beginning.numpy().tobytes(), places)

    used = (needed & sees[:, None])[visual]
    taught = sees.repeat_interleave(predicting(labels).sum(1)).nonzero()[:, 0]
    ends, active = predicting(labels).flatten().nonzero()[:, 0], active_rows(input_ids == image_token_id)
    return Layout(
        every_token=EveryToken(ends, labels.flatten()[ends + 1], active.positions, active.is_active, taught),
        placeholders=len(used),
        used=None if bool(used.all()) else used.nonzero()[:, 0],
        with_image=rows_of(sees),
        text_only=rows_of(~sees & needed.any(1)),
    )


def keep_positions(places: Places, images: ImagePositions) -> Places:
    """Places on a device whose tokens stand where they would with all visual tokens of the micro-batch's `images`: for
    rotary positions alone, since masks follow the order of the tokens that are there."""
    shifts = packed_shifts(images, places.images, places.images_before_row, places.visual_count)
    return replace(places, positions=places.positions + shifts)


def predicting(labels: Tensor) -> Tensor:
    """[B, L] bool: tokens whose next one is supervised. `labels` [B, L]."""
    predicts = torch.zeros_like(labels, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    return predicts


def needed_tokens(attention_mask: Tensor, labels: Tensor) -> Tensor:
    """[B, L] bool: real tokens up to the one before the last supervised token of their row. Arguments [B, L]."""
    after = predicting(labels).flip(1).cumsum(1).flip(1) > 0
    return after & attention_mask.bool()


def shared_beginning(input_ids: Tensor, needed: Tensor, labels: Tensor, image_token_id: int) -> int:
    """How many tokens all rows [B, L] begin with alike, before the first image and the first supervised position."""
    alike = (input_ids == input_ids[0]) & needed & (input_ids != image_token_id) & ~predicting(labels)
    return int(alike.all(0).to(torch.uint8).cumprod(0).sum())


def place_tokens(
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    image_token_id: int,
    shared: int = 0,
    before: Tensor | None = None,
) -> Places:
    """Places for rows; every argument [B, L] int64 on the CPU, padded on either side.

    `shared`: what `shared_beginning` allows at most. `before`: placeholders of the micro-batch before each token;
    None: the rows are all of it.

    Raises:
        ReductionError: no supervised position, or one whose place to predict from is padding or shared.
    """
    batch, length = input_ids.shape
    walked = needed_tokens(attention_mask, labels) & (torch.arange(length) >= shared)
    is_visual = input_ids == image_token_id
    visual, text, predicts = walked & is_visual, walked & ~is_visual, predicting(labels)
    if not bool(predicts.any()) or bool((predicts & ~walked).any()):
        raise ReductionError(
            f"{int(predicts.sum())} supervised positions, {int((predicts & ~walked).sum())} of them predicted from "
            f"padding or from the {shared} shared tokens: give at least one, and a smaller shared beginning"
        )

    def padded(tokens: tuple[Tensor, ...], place: Tensor) -> Padded:
        """Of tokens, (rows, positions); `place` [B, L]: where each is to stand in its padded row."""
        rows, positions = tokens
        places = place[rows, positions]
        width = int(places.max()) + 1 if len(places) else 0
        slots = rows * width + places
        filled = torch.full((batch * width,), length).index_copy(0, slots, positions)
        return Padded(slots, filled.view(batch, width))

    of_visual, of_text = visual.nonzero(as_tuple=True), text.nonzero(as_tuple=True)
    everything = tuple(torch.cat(both) for both in zip(of_visual, of_text, strict=True))
    behind_visual = visual.sum(1, keepdim=True) + text.cumsum(1) - 1
    if before is None:
        before = (is_visual & attention_mask.bool()).flatten().cumsum(0).view_as(is_visual) - is_visual.long()
    packed = torch.full_like(input_ids, -1).index_put(everything, torch.arange(len(everything[0])))
    return Places(
        shared=shared,
        ids=input_ids[text],
        positions=everything[1],
        images=before[everything],
        images_before_row=before[everything[0], 0],
        every=padded(everything, torch.where(is_visual, visual.cumsum(1) - 1, behind_visual)),
        text=padded(of_text, text.cumsum(1) - 1),
        ends=padded(predicts.nonzero(as_tuple=True), predicts.cumsum(1) - 1),
        packed_ends=packed[predicts],
        targets=labels[:, 1:][predicts[:, :-1]],
    )
