"""Micro-batches from data workers, and the shared memory that they are handed over in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice, tee
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.utils.data import DataLoader, get_worker_info

from shortzip.data.batching import BatchPlan, GlobalBatch, micro_batches_of
from shortzip.data.dataset import Collator, ConversationDataset, MicroBatch, Sample
from shortzip.data.errors import UserError
from shortzip.data.supervision import Supervision
from shortzip.train.inputs.budgets import Budgets, CollatorInTime, RowsInTime, under_one_budget
from shortzip.train.run.processes import watched
from shortzip.train.settings.config import TuneConfig
from shortzip.train.step.places import LayOut, unreduced

SHARED_MEMORY = Path("/dev/shm")
PREFETCH = 2  # micro-batches that each worker has under way: DataLoader's default
_CURE = (
    "give the container more (docker run --shm-size 8g, or --ipc=host), lower data.num_workers or the micro-batch "
    "(per_device_train_batch_size), or set data.num_workers to 0"
)


def loader_of(
    dataset: ConversationDataset,
    batches: Iterable[GlobalBatch],
    accelerator: Accelerator,
    config: TuneConfig,
    taught: bool = False,
    budgets: Budgets | None = None,
) -> Iterator[MicroBatch]:
    """This process's micro-batches of global batches; `taught`: what a teacher says counts in their loss. `budgets`:
    those of the steps, where they change."""
    workers, patience = config.data.num_workers, config.data.worker_timeout if config.data.num_workers else 0
    lay_out_of = partial(layout_of, taught=taught, asked=taught and dataset.lessons is None)
    process, supervision = accelerator.process_index, dataset.supervision
    rows: Any = dataset
    collate: Any = Collator.of(supervision, lay_out_of(supervision))
    sampler: Any = micro_batches_of(batches, process)
    if budgets is not None:
        rows, collate = RowsInTime(budgets), CollatorInTime(budgets, lay_out_of)
        sampler = _in_time(batches, process, budgets)
    loader: DataLoader[MicroBatch] = DataLoader(
        rows,  # samples become micro-batches in the collator
        batch_sampler=sampler,
        collate_fn=SharingCollator(collate),
        num_workers=workers,
        timeout=patience,
        pin_memory=accelerator.device.type == "cuda",
    )
    micro_batches = watched(iter(loader), patience) if patience else iter(loader)
    return _told_of_shared_memory(micro_batches) if workers else micro_batches


def _in_time(batches: Iterable[GlobalBatch], process: int, budgets: Budgets) -> Iterator[list[tuple[int, int]]]:
    """As `micro_batches_of`, each row with its step."""
    for batch in batches:
        step = budgets.step_at(batch.position)
        for rows in batch.micro_batches[process]:
            yield [(row, step) for row in rows]


def layout_of(supervision: Supervision, taught: bool = False, asked: bool = True) -> LayOut:
    """What lays out the integers of a micro-batch. `taught`: what a teacher says counts; if it is `asked` in the step,
    also as it reads the rows: with all their visual tokens."""
    processor: Any = supervision.processor
    image, video = processor.image_token_id, processor.video_token_id if supervision.takes_videos else None
    if not (taught and asked):
        return LayOut(image, taught=taught, video_token_id=video)
    every = unreduced(supervision)
    videos = (supervision.video_placeholders, every.video_placeholders)
    return LayOut(image, supervision.placeholders, every.placeholders, True, video, videos)


def step_inputs(
    dataset: ConversationDataset,
    plan: BatchPlan,
    accelerator: Accelerator,
    config: TuneConfig,
    position: int,
    budgets: Budgets | None = None,
) -> Iterator[tuple[GlobalBatch, list[MicroBatch]]]:
    """Each global batch of the plan from a position on, with this process's micro-batches of it.

    A global batch is cut once: when data workers are told of it, some steps ahead.
    """
    ahead, batches = tee(plan.batches(position))
    micro_batches = loader_of(dataset, ahead, accelerator, config, config.distill is not None, budgets)
    process = accelerator.process_index
    return ((batch, list(islice(micro_batches, len(batch.micro_batches[process])))) for batch in batches)


class SharingCollator:
    """A collator whose micro-batches, in a data worker, lie in shared memory when it returns.

    Otherwise torch moves them there in a thread of the worker's: where that fails, the micro-batch is lost, and is
    waited for until data.worker_timeout.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], MicroBatch]) -> None:
        self.collate = collate

    def __call__(self, rows: Sequence[Any]) -> MicroBatch:
        micro_batch = self.collate(rows)
        if get_worker_info() is not None:
            for batch in (micro_batch, *micro_batch.narrower):
                for tensor in batch.inputs.values():
                    tensor.share_memory_()
        return micro_batch


def check_shared_memory(dataset: ConversationDataset, plan: BatchPlan, num_workers: int) -> None:
    """Raises `UserError` if the shared memory is too small for what data workers have under way.

    That is judged by one conversation with images or a video, which is loaded for it.
    """
    if not num_workers or not SHARED_MEMORY.is_dir():
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    size = _micro_batch_bytes(dataset, plan)
    needed, free = processes * num_workers * PREFETCH * size, shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise UserError(
            f"the shared memory ({SHARED_MEMORY}) is too small: {free / 1e6:,.1f} MB are free, {needed / 1e6:,.1f} MB "
            f"are needed ({processes} processes x {num_workers} data workers x {PREFETCH} micro-batches of "
            f"{size / 1e6:,.1f} MB): {_CURE}"
        )


def _micro_batch_bytes(dataset: ConversationDataset, plan: BatchPlan) -> int:
    """Bytes of pixels, or cached features, in the largest micro-batch of the first step; 0 without images and videos.
    An image counts as much as a frame."""
    batch = plan.global_batch(0)
    pictures = {sample: int(dataset.images[sample] + dataset.frames[sample]) for sample in batch.samples}
    most = max(sum(pictures[sample] for sample in rows) for process in batch.micro_batches for rows in process)
    for number in sorted(batch.samples, key=lambda sample: -dataset.frames[sample]):
        sample = dataset[number] if pictures[number] else None
        if isinstance(sample, Sample):
            loosest = dataset.supervision.processor.visionzip
            held = Collator.of(dataset.supervision)([under_one_budget(sample, loosest)]).inputs
            floats = sum(tensor.nbytes for tensor in held.values() if tensor.is_floating_point())
            return most * floats // pictures[number]
    return 0


def _told_of_shared_memory(batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """`batches`, whose failure for want of shared memory is a `UserError`."""
    try:
        yield from batches
    except RuntimeError as error:  # a worker's own, or torch's word of a worker that a bus error killed
        if "shared memory" not in str(error):
            raise
        free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
        raise UserError(
            f"the shared memory ({SHARED_MEMORY}, {free / 1e6:,.1f} MB free) is too small for what data workers hand "
            f"over: {_CURE}"
        ) from error
