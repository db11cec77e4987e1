"""From the config to what a run starts from: training and held-out conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shortzip.data.dataset import ConversationDataset
from shortzip.data.drops import DropLog
from shortzip.data.errors import FileInTheWay, UserError
from shortzip.data.files import written_whole
from shortzip.data.generated.scene_questions import write_scenes
from shortzip.data.images import ImageSource
from shortzip.data.instructions import Conversation, read_instructions
from shortzip.data.known_images import KnownImages
from shortzip.data.row_lengths import BudgetSource
from shortzip.data.strata import draw
from shortzip.data.subset_folder import subset_report
from shortzip.data.supervision import Supervision
from shortzip.data.tables import check_source
from shortzip.reduction.positions import keeps_positions
from shortzip.train.inputs.image_budgets import budgets_by_picture
from shortzip.train.inputs.preflight import check_sees_images
from shortzip.train.inputs.prompts import LeftOut
from shortzip.train.inputs.videos import configured_sampling
from shortzip.train.settings.config import DEMO, DataConfig, DemoScenesConfig


class TrainingRows(NamedTuple):
    """Conversations as they were read, before any is tokenized."""

    conversations: list[Conversation]
    image_root: str
    """The folder that image paths start from."""
    drops: DropLog
    """The rows that could not be read."""


def training_rows(config: DataConfig, seed: int) -> TrainingRows:
    """`training_conversations` with a log of their own. Raises as `training_set` does."""
    drops = DropLog(config.on_bad_sample, config.max_bad_fraction)
    return TrainingRows(*training_conversations(config, seed, drops), drops)


def training_set(
    config: DataConfig,
    processor: Any,
    seed: int,
    rows: TrainingRows | None = None,
    budget_of: BudgetSource | None = None,
) -> ConversationDataset:
    """The conversations to train on, `config.fraction` of them, as `processor` renders and tokenizes them.

    `rows`: those of `training_rows`, where they have been read already; the dataset goes on with their log.
    `budget_of`: each image's budget, where the picture alone does not tell it.
    Raises `FileNotFoundError`, `shortzip.data.drops.BadSample` and `ValueError` for instructions that cannot be used.
    """
    conversations, root, drops = rows or training_rows(config, seed)
    sampling = configured_sampling(config, processor)
    supervision = Supervision(processor, max_length=config.max_length, sampling=sampling)
    known_images = KnownImages(config.cache_features or config.cache_teacher)
    dataset = ConversationDataset(
        conversations,
        supervision,
        root,
        drops=drops,
        cache_dir=config.cache_dir,
        known_images=known_images,
        budget_of=budget_of or budgets_by_picture(processor, known_images),
    )
    check_sees_images(dataset)
    return dataset


def training_conversations(config: DataConfig, seed: int, drops: DropLog) -> tuple[list[Conversation], str]:
    """The conversations to train on, `config.fraction` of them, and the folder that image paths start from.

    Raises as `training_set` does.
    """
    if config.instructions == DEMO:
        folder = demo_folder(config.demo_scenes, held_out=False, fraction=config.fraction)
        conversations, root = read_instructions(folder / "instructions.json", drops=drops), str(folder / "images")
    else:
        root = config.image_root or folder_of(config.instructions)
        conversations = read_instructions(config.instructions, drops=drops)
        if config.fraction < 1:
            _refuse_a_part_of_a_subset(config)
            conversations = draw(
                conversations, config.fraction, seed, drops=drops, source=config.instructions, image_root=root
            )
    return conversations, root


def _refuse_a_part_of_a_subset(config: DataConfig) -> None:
    report = subset_report(config.instructions)
    if report is not None and report["fraction"] < 1:
        raise UserError(
            f"{config.instructions} is a subset already, {report['fraction']:g} of {report['instructions']}, and "
            f"data.fraction {config.fraction:g} would train on a part of that: set data.fraction to 1.0"
        )


def held_out_set(config: DataConfig, processor: Any, budget_of: BudgetSource | None = None) -> ConversationDataset:
    """The held-out conversations, whole: `max_length` would cut them at other places for another budget. `budget_of`:
    as of `training_set`.

    Raises as `training_set` does.
    """
    drops = DropLog(config.on_bad_sample, config.max_bad_fraction)
    conversations, root = held_out_conversations(config, drops)
    supervision = Supervision(processor, max_length=None, sampling=configured_sampling(config, processor))
    known_images = KnownImages(config.cache_features)
    budget_of = budget_of or budgets_by_picture(processor, known_images)
    return ConversationDataset(
        conversations, supervision, root, drops=drops, known_images=known_images, budget_of=budget_of
    )


def held_out_conversations(config: DataConfig, drops: DropLog) -> tuple[list[Conversation], str]:
    """The held-out conversations, `config.eval_samples` of them, and the folder that image paths start from.

    Raises as `training_set` does.
    """
    assert config.eval_instructions is not None
    if config.eval_instructions == DEMO:
        folder = demo_folder(config.demo_scenes, held_out=True)
        conversations, root = read_instructions(folder / "instructions.json", drops=drops), str(folder / "images")
    else:
        root = config.eval_image_root or config.image_root or folder_of(config.eval_instructions)
        conversations = read_instructions(config.eval_instructions, drops=drops)
    return conversations[: config.eval_samples], root


def check_positions(
    model_config: Any, dataset: ConversationDataset | None, *, held_out: bool = False, taught: bool = False
) -> None:
    """Refuses rows of more tokens than the language model has positions: what it says there means nothing. `taught`: a
    teacher reads them too, with all their visual tokens.

    Raises `UserError`, naming the longest row, the limit and the cure.
    """
    if dataset is None:
        return
    text = model_config.text_config
    rope = text.rope_parameters or {}
    # Scaled positions reach further than the model was first trained for.
    factor = rope.get("factor", 1) if rope.get("rope_type") in ("linear", "dynamic", "yarn") else 1
    limit = int(text.max_position_embeddings * factor)
    kept = keeps_positions(model_config)
    left_out = left_out_tokens(dataset) if kept or taught else 0 * dataset.lengths
    lengths = dataset.lengths + left_out
    longest = int(lengths.argmax())
    if lengths[longest] <= limit:
        return
    lower = limit - int(left_out[longest])
    cure = f"set data.max_length (now {dataset.supervision.max_length}) to {lower} or less"
    if held_out:
        cure = "held-out rows are not cut: leave them out of data.eval_instructions"
    counted = " that positions: original counts" if kept else " that the teacher reads (distill)" if taught else ""
    raise UserError(
        f"{int((lengths > limit).sum())} of {len(dataset)} rows are longer than the language model's {limit} "
        f"positions (max_position_embeddings); {dataset.conversations[longest].id!r} has {lengths[longest]} "
        f"tokens, visual ones included{counted}: {cure}"
    )


def left_out_tokens(dataset: ConversationDataset) -> np.ndarray:
    """How many visual tokens the images of each row have beyond those of the budget, [n] int64: the positions that
    they take where tokens keep theirs, and what a teacher reads besides."""
    left_out, needed = LeftOut(dataset.supervision), dataset.supervision.needs_image_sizes

    def of_source(source: ImageSource) -> int:
        size = dataset.known_images.size(source, dataset.image_root) if needed else (0, 0)
        return left_out(size, None if dataset.budget_of is None else dataset.budget_of(source, dataset.image_root))

    of_images = np.asarray([sum(map(of_source, row.images)) for row in dataset.conversations], dtype=np.int64)
    if not dataset.has_videos:
        return of_images
    counts = [dataset.frames_seen(row)[:left] for row, left in zip(dataset.conversations, dataset.videos, strict=True)]
    return of_images + np.asarray([sum(map(left_out.of_video, seen)) for seen in counts], dtype=np.int64)


def check_instructions(config: DataConfig) -> None:
    """Raises FileNotFoundError for conversations that are not there: before a release is fetched, which takes long."""
    for source in (config.instructions, config.eval_instructions):
        if source not in (DEMO, None):
            check_source(source)


def draw_demo_scenes(config: DataConfig) -> None:
    """Draws the scenes that `demo` stands for, where the config names it and they are not there yet.

    For one process of a run; afterwards every process can read them. Of two runs that draw the same ones at a time,
    the one that ends later takes what the other has written.
    """
    scenes = config.demo_scenes
    folders = []
    if config.instructions == DEMO:
        folders.append((demo_folder(scenes, False, config.fraction), scenes.train_seed, scenes.train_scenes))
    if config.eval_instructions == DEMO:
        folders.append((demo_folder(scenes, True), scenes.eval_seed, scenes.eval_scenes))
    for folder, seed, count in folders:
        drawn = folder / "instructions.json"
        if drawn.is_file():
            continue
        fraction = config.fraction if seed == scenes.train_seed else 1.0
        try:
            with written_whole(folder) as partial:
                write_scenes(partial, seed, count, fraction)
        except FileInTheWay:
            if not drawn.is_file():
                raise


def demo_folder(scenes: DemoScenesConfig, held_out: bool, fraction: float = 1.0) -> Path:
    """Where the scenes that `demo` stands for are drawn: instructions.json and images/."""
    if held_out:
        return Path(scenes.folder) / f"held-out-{scenes.eval_seed}-{scenes.eval_scenes}"
    return Path(scenes.folder) / f"train-{scenes.train_seed}-{scenes.train_scenes}-{fraction:g}"


def folder_of(instructions: str) -> str:
    """Where image paths start from when nothing else is said: beside the instructions."""
    path = Path(instructions)
    return str(path if path.is_dir() else path.parent)
