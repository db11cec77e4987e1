"""The torch side: a dataset of conversations and the micro-batches that a training loop takes."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from shortzip.data.drops import IMAGE_REASONS, BadSample, Drop, DropLog
from shortzip.data.errors import UserError
from shortzip.data.images import (
    HINTS,
    BadImage,
    ImageSource,
    check_image_file,
    image_name,
    open_image,
    resolve_image_path,
)
from shortzip.data.instructions import Conversation
from shortzip.data.kept import Kept, identity_of
from shortzip.data.known_images import KnownImages
from shortzip.data.micro_batches import Collator as Collator
from shortzip.data.micro_batches import MicroBatch as MicroBatch
from shortzip.data.micro_batches import Sample as Sample
from shortzip.data.pixels import frames_pixels, pixels_of_row
from shortzip.data.row_lengths import BudgetSource, Counted, encode_unread, lengths_depend_on
from shortzip.data.supervision import Supervision
from shortzip.data.video_files import require_pyav
from shortzip.data.video_frames import frames_seen as frames_of
from shortzip.data.video_frames import read_frames
from shortzip.data.videos import Sampling, VideoSource, check_video, frame_paths, video_name


class FeatureSource(Protocol):
    """Where features of images and videos are kept, for a dataset that gives them instead of pixels."""

    def find(self, source: ImageSource, image_root: str | os.PathLike[str] | None) -> dict[str, torch.Tensor] | None:
        """Tensors [tiles of the image, …] by name, or None if there are none for this image."""

    def find_video(
        self, source: VideoSource, image_root: str | os.PathLike[str] | None, sampling: Sampling
    ) -> dict[str, torch.Tensor] | None:
        """Tensors [frames, …] by name, of a video whose frames are seen as `sampling` says; None if there are none."""


class LessonSource(Protocol):
    """Where what a teacher says of rows is kept."""

    def find(self, sample: Sample, images: Sequence[ImageSource], dataset: "ConversationDataset") -> dict[str, Any]:
        """The lesson of a row of the dataset, loaded from these images; empty for one that answers none.

        Raises:
            BadImage: there is no lesson for this row.
        """


class ConversationDataset(Dataset[Sample | Drop]):
    """Conversations that can be trained on, with their lengths known.

    Every row is tokenized once when the dataset is built; rows without supervised tokens, rows that are too long and
    rows whose image or video files are not there are dropped and counted then. Images and videos are opened when a row
    is asked for, and it is tokenized again, by a worker: 1.3 ms of CPU in the mix, a tenth of its image's, for no
    tokens kept (1.5 kB).

    Args:
        conversations: what to train on.
        supervision: how they become tokens.
        image_root: the folder that image paths are relative to.
        drops: where rows that cannot be used go; None: the first bad one raises.
        cache_dir: where the lengths are kept for the next run with the same rows, tokenizer, template and limits, and
            as many placeholders for each image; None: nowhere.
        known_images: what is known of the images' files; None: nothing yet.
        budget_of: the budget of an image, where each has its own; None: as the processor says.
        progress: called with the rows tokenized so far and with their number; not called for rows from the cache.

    Attributes:
        conversations: the rows that are left.
        lengths: [n] int64, tokens of each, visual tokens included.
        supervised: [n] int64, supervised tokens of each.
        images: [n] int64, images left of each.
        videos: [n] int64, videos left of each.
        cut: rows cut off at `max_length`, by what: {"turn": …, "answer": …}.
        features: where images' features are taken from instead of their pixels; None, the default: nowhere.
        lessons: where what a teacher says of the rows is taken from; None, the default: nowhere.

    Raises:
        BadSample: a bad row, where `drops` does not skip them.
        ValueError: no row is left.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        supervision: Supervision,
        image_root: str | os.PathLike[str] | None = None,
        *,
        drops: DropLog | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        known_images: KnownImages | None = None,
        budget_of: BudgetSource | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.supervision = supervision
        self.image_root = image_root
        self.known_images = known_images or KnownImages()
        self.budget_of = budget_of
        self.features: FeatureSource | None = None
        self.lessons: LessonSource | None = None
        self.drops = DropLog() if drops is None else drops
        counted, unusable = self._counted(conversations, cache_dir, progress or (lambda done, total: None))
        self.drops.extend(unusable)
        rows = self._present(conversations, counted)
        self.drops.check(len(conversations), minimum=1)
        if not rows:
            raise UserError(f"no row is left to train on. {self.drops.summary()}.")
        self.conversations = [conversations[row.number] for row in rows]
        self.drops.placed = sum(conversation.is_placed for conversation in self.conversations)
        self.lengths = np.asarray([row.tokens for row in rows], dtype=np.int64)
        self.supervised = np.asarray([row.supervised for row in rows], dtype=np.int64)
        self.images = np.asarray([row.images for row in rows], dtype=np.int64)
        self.videos = np.asarray([row.videos for row in rows], dtype=np.int64)
        self.cut = dict(Counter(row.cut for row in rows if row.cut))

    def __len__(self) -> int:
        return len(self.conversations)

    @property
    def has_videos(self) -> bool:
        """Whether any row has a video that is left."""
        return bool(self.videos.any())

    @cached_property
    def frames(self) -> np.ndarray:
        """[n] int64, frames of its videos that are seen, of each row."""
        left = zip(self.conversations, self.videos.tolist(), strict=True)
        return np.asarray([sum(self.frames_seen(row)[:videos]) if videos else 0 for row, videos in left], np.int64)

    @property
    def mean_budget(self) -> int | None:
        """Of the images that rows hold, rounded; None where images have none of their own."""
        images = [source for row in self.conversations for source in row.images]
        if self.budget_of is None or not images:
            return None
        return round(sum(self.budget_of(source, self.image_root) for source in images) / len(images))

    def __getitem__(self, index: int) -> Sample | Drop:
        """A row with its images, or why it could not be read, where bad samples are skipped.

        In a worker process it is the latter in any case, and `DropLog.extend`, given the micro-batch's `dropped`,
        raises where bad samples are not skipped: torch would make a RuntimeError with a traceback for a message of it.

        Raises:
            BadSample: an image or video is missing or unreadable, outside a worker and where bad samples are not
                skipped.
        """
        conversation = self.conversations[index]
        try:
            return self.load(conversation)
        except BadSample as error:
            if self.drops.on_bad_sample == "raise" and get_worker_info() is None:
                raise
            return Drop.of(error)

    def load(self, conversation: Conversation) -> Sample:
        """A conversation as tokens and pixels, or features, with its lesson.

        Raises:
            BadSample: it, or an image of it, cannot be used.
        """
        if self.features is not None:
            sample = self._load_features(conversation, self.features)
        else:
            sample = self._load_pixels(conversation)
        if self.lessons is not None:
            try:
                sample.lesson = self.lessons.find(sample, conversation.images[: sample.encoded.images], self)
            except BadImage as error:
                raise BadSample(error.problem, conversation.id, str(error), error.file) from error
        return sample

    def _load_pixels(self, conversation: Conversation) -> Sample:
        images: list[Image.Image] = []
        processor = self.supervision.processor.image_processor
        try:
            budgets, seen = self._budgets(conversation), self.frames_seen(conversation)
            if self.supervision.needs_image_sizes:
                images = [open_image(source, self.image_root) for source in conversation.images]
                sizes = self.supervision.sizes_in_row([(image.height, image.width) for image in images])
                encoded = self.supervision.encode(conversation, sizes, budgets, seen)
                images = images[: encoded.images]
            else:
                encoded = self.supervision.encode(conversation, None, budgets, seen)
                images = [open_image(source, self.image_root) for source in conversation.images[: encoded.images]]
                sizes = [(image.height, image.width) for image in images]
            pixels = pixels_of_row(images, processor, several=len(conversation.images) > 1)
            frames = [self._frames(source) for source in conversation.videos[: encoded.videos]]
        except BadImage as error:
            raise BadSample(error.problem, conversation.id, str(error), error.file) from error
        left = (budgets or [])[: encoded.images]
        return Sample(conversation.id, encoded, pixels, sizes[: encoded.images], budgets=left, frames=frames)

    def frames_seen(self, conversation: Conversation) -> list[int]:
        """How many frames of each video of a row are seen. Raises BadImage."""
        of = self.image_root, self._sampling(conversation), self.known_images
        return [frames_of(source, *of) for source in conversation.videos]

    def _sampling(self, conversation: Conversation) -> Sampling:
        if self.supervision.sampling is None and conversation.videos:
            raise UserError(f"row {conversation.id!r} has videos, and how many frames of one are seen is not said")
        return self.supervision.sampling or Sampling(1)

    def _frames(self, source: VideoSource) -> torch.Tensor:
        """The pixels of the frames of a video, [F, 3, H, W] float32. Raises BadImage."""
        sampling = self.supervision.sampling
        assert sampling is not None
        return frames_pixels(read_frames(source, self.image_root, sampling), self.supervision.processor)

    def _budgets(self, conversation: Conversation) -> list[int] | None:
        if self.budget_of is None:
            return None
        return [self.budget_of(source, self.image_root) for source in conversation.images]

    def _load_features(self, conversation: Conversation, features: FeatureSource) -> Sample:
        try:
            sizes = [(0, 0)] * len(conversation.images)  # of LLaVA-1.5 nobody asks, and files need not be opened
            if self.supervision.needs_image_sizes:
                sizes = [self.known_images.size(source, self.image_root) for source in conversation.images]
                sizes = self.supervision.sizes_in_row(sizes)
            budgets = self._budgets(conversation)
            encoded = self.supervision.encode(conversation, sizes, budgets, self.frames_seen(conversation))
            tensors, of_videos = [], []
            for source in conversation.images[: encoded.images]:
                stored = features.find(source, self.image_root)
                if stored is None:
                    open_image(source, self.image_root)
                    name, problem = image_name(source), "has changed since its features were stored: start anew"
                    raise BadImage("unreadable_image", name, problem)
                tensors.append(stored)
            for video in conversation.videos[: encoded.videos]:
                stored = features.find_video(video, self.image_root, self._sampling(conversation))
                if stored is None:
                    problem = "has changed since its features were stored: start anew"
                    raise BadImage("unreadable_video", video_name(video), problem)
                of_videos.append(stored)
        except BadImage as error:
            raise BadSample(error.problem, conversation.id, str(error), error.file) from error
        left = (budgets or [])[: encoded.images]
        sizes = sizes[: encoded.images]
        return Sample(conversation.id, encoded, [], sizes, tensors, budgets=left, video_features=of_videos)

    def _counted(
        self,
        conversations: Sequence[Conversation],
        cache_dir: str | os.PathLike[str] | None,
        progress: Callable[[int, int], None],
    ) -> tuple[list[Counted], list[Drop]]:
        """What `_count` gives: as kept in `cache_dir`, or counted now and kept there."""
        if cache_dir is None:
            return self._count(conversations, progress)
        images = self.image_root, self.known_images, self.budget_of
        parts = lengths_depend_on(conversations, self.supervision, *images)
        store, name = Kept(cache_dir), f"lengths-{identity_of(parts)[:24]}"
        result = store.find(name, parts)
        if result is not None:
            return [Counted(*row) for row in result["rows"]], [Drop(**drop) for drop in result["drops"]]
        rows, drops = self._count(conversations, progress)
        # An image that is missing today may be there tomorrow.
        if not any(drop.reason in IMAGE_REASONS for drop in drops):
            store.keep(name, parts, {"rows": rows, "drops": [asdict(drop) for drop in drops]})
        return rows, drops

    def _count(
        self, conversations: Sequence[Conversation], progress: Callable[[int, int], None]
    ) -> tuple[list[Counted], list[Drop]]:
        """The rows that can be used, and those that cannot."""
        rows: list[Counted] = []
        drops: list[Drop] = []
        for number, conversation in enumerate(conversations):
            if number % 500 == 0:
                progress(number, len(conversations))
            try:
                images = self.image_root, self.known_images, self.budget_of
                encoded = encode_unread(conversation, self.supervision, *images)
            except BadSample as error:
                drops.append(Drop.of(error))
            else:
                size = len(encoded.input_ids)
                rows.append(Counted(number, size, encoded.supervised, encoded.images, encoded.cut, encoded.videos))
        progress(len(conversations), len(conversations))
        return rows, drops

    def _present(self, conversations: Sequence[Conversation], rows: Sequence[Counted]) -> list[Counted]:
        """The rows whose image files are there: one that is missing is better found now than in an hour."""
        present: list[Counted] = []
        missing: list[Drop] = []
        for row in rows:
            conversation = conversations[row.number]
            try:
                for source in conversation.images[: row.images]:
                    if isinstance(source, str):
                        check_image_file(resolve_image_path(source, self.image_root), hint=len(missing) < HINTS)
                for video in conversation.videos[: row.videos]:
                    check_video(video, self.image_root, hint=len(missing) < HINTS)
                    if frame_paths(video, self.image_root) is None:
                        require_pyav()
            except BadImage as error:
                missing.append(Drop(conversation.id, error.problem, str(error), error.file))
            else:
                present.append(row)
        more = ""
        if len(missing) > 1 and self.drops.on_bad_sample == "raise":  # at the first one
            more = (
                f" (and the images of {len(missing) - 1} more of {len(conversations)} rows are not there either: "
                "scripts/prepare_subset.py lists them, on_bad_sample: skip leaves them out)"
            )
        self.drops.extend(replace(drop, detail=drop.detail + more) for drop in missing)
        return present
