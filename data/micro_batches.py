"""Rows that are ready to be collated, and the micro-batches that they become."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from shortzip.data.drops import Drop
from shortzip.data.pixels import joined, stacked
from shortzip.data.supervision import IGNORE_INDEX, Encoded, Supervision

LayOut = Callable[[dict[str, torch.Tensor]], Any]


@dataclass(slots=True)
class Sample:
    """One row, ready to be collated.

    Attributes:
        id: the row's id.
        encoded: its tokens.
        pixels: per image a float32 tensor: [3, H, W], for LLaVA-NeXT [tiles, 3, H, W].
        image_sizes: (height, width) of each image in pixels, before it was resized.
        features: instead of pixels, what is known of each image: tensors [tiles, …] by name.
        lesson: what a teacher says at the row's supervised positions: tensors [positions, …] by name.
        budgets: of each image, where it has its own.
        frames: per video its frames' pixels, float32 [F, 3, H, W].
        video_features: instead of these, what is known of each video: tensors [F, …] by name.
    """

    id: str
    encoded: Encoded
    pixels: list[torch.Tensor]
    image_sizes: list[tuple[int, int]]
    features: list[dict[str, torch.Tensor]] = field(default_factory=list)
    lesson: dict[str, torch.Tensor] = field(default_factory=dict)
    budgets: list[int] = field(default_factory=list)
    frames: list[torch.Tensor] = field(default_factory=list)
    video_features: list[dict[str, torch.Tensor]] = field(default_factory=list)

    @property
    def frame_counts(self) -> list[int]:
        """Frames of each video."""
        held = self.frames or [next(iter(of_video.values())) for of_video in self.video_features]
        return [len(of_video) for of_video in held]


@dataclass(slots=True)
class MicroBatch:
    """What one forward pass takes.

    Attributes:
        inputs: keyword arguments of the model: input_ids, attention_mask, labels, each [B, L] int64 and padded on the
            right; pixel_values [N, 3, H, W] float32 (LLaVA-NeXT: [N, tiles, 3, H, W]) and, for LLaVA-NeXT, image_sizes
            [N, 2] int64, both absent without images; image_budgets [N] int64, where images have their own;
            pixel_values_videos [frames of all videos, 3, H, W] float32 and video_frames [V] int64, the frames of each,
            both absent without videos; in place of pixels, what is kept of them, by name. `labels` are -100 where
            nothing is supervised, not shifted. And the rows' lessons, one behind the other.
        sample_ids: the rows' ids; empty for a micro-batch that only keeps a process in step.
        dropped: rows of this micro-batch that could not be read: hand them to `DropLog.extend`.
        layout: what the collator was told to make of the integers, for the loss.
        budget: the model config's `visionzip` key that the rows are laid out for, where it changes in a run.
        narrower: the same rows under budgets of fewer tokens, where the step reads them so too, without what they
            share with this one: pixels, lessons.
        turn: which of these readings it is, for the loss.
    """

    inputs: dict[str, torch.Tensor]
    sample_ids: list[str]
    dropped: list[Drop] = field(default_factory=list)
    layout: Any = None
    budget: dict[str, Any] | None = None
    narrower: list["MicroBatch"] = field(default_factory=list)
    turn: Any = None

    def to(self, device: torch.device | str) -> "MicroBatch":
        """The same with pixels and features on a device.

        Integers stay: the loss lays out its work from them on the CPU, and to read them back from a device is to wait
        until it has done everything before.
        """
        moved = {
            key: tensor.to(device, non_blocking=True) if tensor.is_floating_point() else tensor
            for key, tensor in self.inputs.items()
        }
        return replace(self, inputs=moved, narrower=[batch.to(device) for batch in self.narrower])

    def pin_memory(self) -> "MicroBatch":
        """The same in page-locked memory (what DataLoader's `pin_memory` calls)."""
        pinned = {key: tensor.pin_memory() for key, tensor in self.inputs.items()}
        narrower = [batch.pin_memory() for batch in self.narrower]
        return replace(self, inputs=pinned, layout=self.layout and self.layout.pin_memory(), narrower=narrower)


class Collator:
    """Rows to a `MicroBatch`: DataLoader's `collate_fn`.

    Args:
        pad_token_id: what the rows are filled up with (they are masked there).
        lay_out: makes `MicroBatch.layout` of the inputs' integers, here, where data workers are: what has a
            `pin_memory` of its own. None: nothing is made of them.

    An empty list, or one of rows that all had to be dropped, gives one row of one token and no supervised one: the
    process takes part in the step and adds nothing to it.
    """

    def __init__(self, pad_token_id: int, lay_out: LayOut | None = None) -> None:
        self.pad_token_id, self.lay_out = pad_token_id, lay_out

    @classmethod
    def of(cls, supervision: Supervision, lay_out: LayOut | None = None) -> "Collator":
        """The collator for a tokenizer; its end token fills up where it has no padding token."""
        tokenizer = supervision.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return cls(int(pad), lay_out)

    def __call__(self, rows: Sequence[Sample | Drop]) -> MicroBatch:
        """Pad and stack."""
        samples = [row for row in rows if isinstance(row, Sample)]
        dropped = [row for row in rows if isinstance(row, Drop)]
        length = max((len(sample.encoded.input_ids) for sample in samples), default=1)
        shape = max(len(samples), 1), length
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        for row, sample in enumerate(samples):
            filled = len(sample.encoded.input_ids)
            input_ids[row, :filled] = torch.tensor(sample.encoded.input_ids)
            labels[row, :filled] = torch.tensor(sample.encoded.labels)
            attention_mask[row, :filled] = 1
        if not samples:
            attention_mask[:] = 1
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        pixels = [image for sample in samples for image in sample.pixels]
        if pixels:
            inputs["pixel_values"] = stacked(pixels)
            if pixels[0].dim() == 4:
                inputs["image_sizes"] = torch.tensor([size for sample in samples for size in sample.image_sizes])
        features = [of_image for sample in samples for of_image in sample.features]
        if features:
            inputs |= {name: joined([of_image[name] for of_image in features]) for name in features[0]}
            inputs["image_sizes"] = torch.tensor([size for sample in samples for size in sample.image_sizes])
        inputs |= _videos(samples)
        budgets = [budget for sample in samples for budget in sample.budgets]
        if budgets:
            inputs["image_budgets"] = torch.tensor(budgets)
        lessons = [sample.lesson for sample in samples if sample.lesson]
        if lessons:
            inputs |= {name: torch.cat([lesson[name] for lesson in lessons]) for name in lessons[0]}
        layout = None if self.lay_out is None else self.lay_out(inputs)
        return MicroBatch(inputs, [sample.id for sample in samples], dropped, layout)


def _videos(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """The videos of all rows, frames one behind the other: pixels or features, and the frames of each."""
    counts = [count for sample in samples for count in sample.frame_counts]
    if not counts:
        return {}
    inputs = {"video_frames": torch.tensor(counts)}
    frames = [video for sample in samples for video in sample.frames]
    if frames:
        inputs["pixel_values_videos"] = torch.cat(frames)
    features = [of_video for sample in samples for of_video in sample.video_features]
    if features:
        inputs |= {name: joined([of_video[name] for of_video in features]) for name in features[0]}
    return inputs
