"""Filling the cache of lessons: each row once, by all processes together, and no teacher made where it is full."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from shortzip.data.batching import cut_into_groups
from shortzip.data.dataset import Collator, ConversationDataset, MicroBatch, Sample
from shortzip.data.drops import BadSample
from shortzip.data.files import sweep
from shortzip.data.images import BadImage
from shortzip.data.instructions import Conversation
from shortzip.data.known_images import KnownImages
from shortzip.data.row_lengths import encode_unread
from shortzip.data.supervision import IGNORE_INDEX
from shortzip.reduction.families import family_of
from shortzip.reduction.projector import DtypeProjector
from shortzip.train.inputs.identity import release_identity
from shortzip.train.inputs.lesson_cache import LessonCache, answers, lessons_identity, row_key, tokens_kept
from shortzip.train.inputs.loading import layout_of
from shortzip.train.inputs.samples import left_out_tokens
from shortzip.train.inputs.shards import OpenShard, leave_out_damaged
from shortzip.train.release.opening import Release, release_projector
from shortzip.train.release.towers import load_tower, whole_tower
from shortzip.train.run.processes import on_main_process
from shortzip.train.run.session import Session
from shortzip.train.settings.config import TuneConfig
from shortzip.train.step.objective import SupervisedLoss
from shortzip.train.step.teacher import Teacher, top_tokens

TOKENS_AT_ONCE = 4096  # that the teacher reads, of rows with all their visual tokens, padding included
AT_ONCE_CUT = 1024  # rows that are cut into groups together


class _Rows(NamedTuple):
    """Rows that are read together: the keys of those that have no lesson yet, and what the teacher reads of them."""

    keys: list[str]
    batch: MicroBatch | None
    files: dict[str, dict[str, Any]]


class _Groups(Dataset[_Rows]):
    """What a worker sees of groups of rows. Rows that cannot be read are left out: they are dropped, or refused, when
    their turn comes."""

    def __init__(self, groups: Sequence[Sequence[int]], dataset: ConversationDataset, cache: LessonCache) -> None:
        self.groups, self.dataset, self.cache = groups, dataset, cache
        self.collate = Collator.of(dataset.supervision, layout_of(dataset.supervision, taught=True))

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> _Rows:
        samples: dict[str, Sample] = {}
        dataset, files = self.dataset, {}
        for row in self.groups[index]:
            conversation = dataset.conversations[row]
            try:
                key = self._missing(conversation)
                if key is not None:
                    samples[key] = dataset.load(conversation)
            except (BadImage, BadSample):
                continue
            files.update(dataset.known_images.of(conversation.images, dataset.image_root))
        batch = self.collate(list(samples.values())) if samples else None
        return _Rows(list(samples), batch, files)

    def _missing(self, conversation: Conversation) -> str | None:
        """The key of a row whose lesson is not there; its images are not opened where they are known."""
        dataset = self.dataset
        encoded = encode_unread(conversation, dataset.supervision, dataset.image_root, dataset.known_images)
        images, sizes = conversation.images[: encoded.images], [(0, 0)] * encoded.images
        if dataset.supervision.needs_image_sizes:
            every = [dataset.known_images.size(source, dataset.image_root) for source in conversation.images]
            sizes = dataset.supervision.sizes_in_row(every)[: encoded.images]
        sample = Sample(conversation.id, encoded, [], sizes)
        if not answers(sample, dataset):
            return None
        key = row_key(sample, images, dataset)
        return None if key in self.cache else key


class Asked(NamedTuple):
    """Who is asked if a row has no lesson yet: the release, whose model is at hand, whatever it carries by now."""

    model: Any
    release: Release
    device: torch.device
    temperature: float

    def loss(self) -> SupervisedLoss:
        """The model with a teacher made for it, on the device; the tower is loaded if the model came without."""
        model, inner = self.model, self.model.model
        weight = model.get_input_embeddings().weight
        if isinstance(inner.vision_tower, nn.Identity):
            for name in family_of(model.config.model_type).towers:
                setattr(inner, name, load_tower(self.release.folder, model.config, weight.dtype, name))
        projector = DtypeProjector(model.config)
        projector.load_state_dict({name: tensor.float() for name, tensor in release_projector(self.release).items()})
        teacher = Teacher(model, weight.dtype, projector)
        if weight.device != self.device:
            model.to(self.device)
        for part in (whole_tower(model), teacher.projector):
            part.to(self.device)
        return SupervisedLoss(model, teacher=teacher)

    def lessons(self, loss: SupervisedLoss, batch: MicroBatch) -> Iterator[dict[str, Tensor]]:
        """The lesson of each row."""
        states = loss.teacher_states(batch.to(self.device))
        count = tokens_kept(self.model.config.text_config.vocab_size)
        said = top_tokens(self.model.lm_head, states, self.temperature, count)
        counts = (batch.inputs["labels"][:, 1:] != IGNORE_INDEX).sum(1).tolist()
        parts = zip(said.log_probs.cpu().split(counts), said.ids.int().cpu().split(counts), strict=True)
        return ({"log_probs": log_probs, "ids": ids} for log_probs, ids in parts)


def fill_lessons(
    cache: LessonCache, dataset: ConversationDataset, asked: Asked, session: Session, *, num_workers: int = 0
) -> int:
    """Stores the lesson of every row of the dataset that has none yet; gives how many were computed.

    Each process takes its share of the rows, and goes on when all are done or one was asked to stop.
    """
    sweep(cache.folder)
    leave_out_damaged(cache, session.accelerator)
    share = _share(dataset, session.accelerator)
    loader: Any = DataLoader(_Groups(share, dataset, cache), batch_size=None, num_workers=num_workers)
    loss: SupervisedLoss | None = None
    computed, shard, files = 0, OpenShard(cache), {}
    for number, rows in enumerate(loader):
        session.report.progress("lessons", number, len(share))
        files.update(rows.files)
        if rows.batch is not None:
            loss = loss or asked.loss()
            computed += len(rows.keys)
            shard.add(dict(zip(rows.keys, asked.lessons(loss, rows.batch), strict=True)))
        if shard.is_due():
            shard.write()
        if session.stop.signal is not None:
            break
    session.report.end_progress()
    shard.write()
    session.accelerator.wait_for_everyone()
    for learned in gather_object([files]):
        dataset.known_images.learn(learned)
    cache.refresh()
    cache.drop([])  # what was written since it was looked at is whole
    return int(session.total(computed)[0])


def _share(dataset: ConversationDataset, accelerator: Accelerator) -> list[list[int]]:
    """This process's groups of rows, of similar lengths."""
    with_image = np.asarray([number for number, row in enumerate(dataset.conversations) if row.images], dtype=np.int64)
    lengths = (dataset.lengths + left_out_tokens(dataset))[with_image]
    falling = np.argsort(-lengths, kind="stable")
    order, lengths = with_image[falling], lengths[falling]
    groups = [
        (first + start, first + end)
        for first in range(0, len(order), AT_ONCE_CUT)
        for start, end in cut_into_groups(lengths[first : first + AT_ONCE_CUT], None, TOKENS_AT_ONCE)
    ]
    rows = [order[start:end].tolist() for start, end in groups]
    return rows[accelerator.process_index :: accelerator.num_processes]


def store_lessons(
    config: TuneConfig,
    release: Release,
    model: Any,
    dataset: ConversationDataset,
    session: Session,
) -> None:
    """Computes what `config.data.cache_teacher` lacks for a run, whose dataset then gives the rows' lessons.

    The model is left where it was, with the tower that it had, or without. While a row has no lesson it
    is whole on each device, also where an engine will spread it. Raises `StopRequested` on every process if one was
    asked to stop.
    """
    assert config.distill is not None
    assert config.data.cache_teacher is not None
    parts: Mapping[str, str] = on_main_process(session.accelerator, lambda: release_identity(release))
    temperature = config.distill.temperature
    identity = lessons_identity(parts, model, dataset.supervision.processor, temperature, config.load_in_4bit)
    cache = LessonCache(config.data.cache_teacher, identity)
    dataset.known_images.learn(KnownImages(config.data.cache_teacher).files)
    home = model.get_input_embeddings().weight.device
    towers = {name: getattr(model.model, name) for name in family_of(model.config.model_type).towers}
    asked = Asked(model, release, session.accelerator.device, temperature)
    computed = fill_lessons(cache, dataset, asked, session, num_workers=config.data.num_workers)
    for name, tower in towers.items():
        setattr(model.model, name, tower)
    if model.get_input_embeddings().weight.device != home:
        model.to(home)
    if session.accelerator.is_main_process:
        dataset.known_images.keep(config.data.cache_teacher)
    if session.asked_to_stop():
        raise session.stopped()
    dataset.lessons = cache
    session.report.say(f"lessons: {computed} rows computed, {len(cache)} in {cache.folder}; the teacher is not needed")
