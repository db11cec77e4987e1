"""How frozen layers are chosen: the prompts that LC is measured on, and the layers that a run freezes by it.

One choice of prompts stands behind scripts/calibrate_shortv.py and `shortv.freeze` of a run.

With the same conversations, number and seed both measure the same prompts, and so freeze the same layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from shortzip.data.batching import permutation
from shortzip.data.dataset import Collator, ConversationDataset, Sample
from shortzip.data.drops import BadSample, DropLog
from shortzip.data.errors import UserError
from shortzip.data.files import write_atomically
from shortzip.data.instructions import Conversation
from shortzip.data.known_images import KnownImages
from shortzip.data.row_lengths import encode_unread
from shortzip.data.supervision import Supervision
from shortzip.reduction.calibration_prompts import CalibrationSample
from shortzip.reduction.layer_choice import pick_layers, rank_layers
from shortzip.reduction.layer_contribution import measure_layer_contributions
from shortzip.reduction.layer_cosine import cosine_changes
from shortzip.reduction.reductions import Reductions
from shortzip.train.inputs.samples import TrainingRows, training_conversations, training_rows
from shortzip.train.release.loading import load_release, share_weights
from shortzip.train.release.opening import Release
from shortzip.train.release.towers import leave_out_towers
from shortzip.train.run.run_folder import LAYERS
from shortzip.train.settings.config import TuneConfig
from shortzip.train.settings.reduced import reductions_of

Loaded = tuple[Any, Any]
"""A model and its processor, as `load_release` gives them."""


class CalibrationPrompt(NamedTuple):
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
) -> list[CalibrationPrompt]:
    """The first `count` conversations, in an order drawn with `seed`, that answer something after an image.

    `source`: what messages call the conversations. Raises ValueError if there is none, BadSample for a bad row where
    bad samples raise.
    """
    prompts: list[CalibrationPrompt] = []
    image_token = supervision.processor.image_token_id
    for index in permutation(len(conversations), seed, 0).tolist():
        if len(prompts) == count:
            break
        conversation = conversations[index]
        if not conversation.images or conversation.videos:
            continue
        try:
            encoded = encode_unread(conversation, supervision, image_root, KnownImages())
        except BadSample as error:
            drops.add(error)
            continue
        first_image = encoded.input_ids.index(image_token) if image_token in encoded.input_ids else len(encoded.labels)
        starts = [start for start, _ in encoded.answers if start > first_image]
        if starts:
            prompts.append(CalibrationPrompt(conversation, encoded.input_ids[: starts[0]]))
    if not prompts:
        raise UserError(
            f"{source}: none of the {len(conversations)} conversations answers something after an image (those with "
            "videos are left out), so LC cannot be measured on them. Give others, or shortv.layers"
        )
    return prompts


def dataset_of(
    prompts: Sequence[CalibrationPrompt], supervision: Supervision, image_root: str | None
) -> ConversationDataset:
    """What `load_sample` takes the conversations' images from."""
    conversations = [item.conversation for item in prompts]
    return ConversationDataset(conversations, supervision, image_root, drops=DropLog("skip", 1))


def load_sample(prompt: CalibrationPrompt, dataset: ConversationDataset) -> CalibrationSample:
    """Its prompt with the pixels of the images in it. Raises BadSample for an image that cannot be read."""
    sample = with_prompt(dataset.load(prompt.conversation), dataset.supervision, prompt.prompt)
    inputs = Collator.of(dataset.supervision)([sample]).inputs
    return CalibrationSample(torch.tensor(prompt.prompt), inputs["pixel_values"], inputs.get("image_sizes"))


def with_prompt(sample: Sample, supervision: Supervision, prompt: list[int]) -> Sample:
    """The sample with only the images and videos that stand in `prompt`, a beginning of its tokens."""
    placeholders, images, videos = prompt.count(supervision.processor.image_token_id), 0, 0
    while placeholders > 0:
        budget = sample.budgets[images] if sample.budgets else None
        placeholders -= supervision.placeholders(sample.image_sizes[images], budget)
        images += 1
    of_videos = prompt.count(supervision.processor.video_token_id) if sample.frames else 0
    while of_videos > 0:
        of_videos -= supervision.video_placeholders(len(sample.frames[videos]))
        videos += 1
    of_images = sample.pixels[:images], sample.image_sizes[:images]
    budgets, frames = sample.budgets[:images], sample.frames[:videos]
    return Sample(sample.id, sample.encoded, *of_images, budgets=budgets, frames=frames)


def choose_layers(
    config: TuneConfig,
    release: Release,
    accelerator: Accelerator,
    write: Callable[[Path, str], None] = write_atomically,
    rows: TrainingRows | None = None,
) -> tuple[list[int] | None, Loaded | None]:
    """The layers to freeze: those listed, or the first of a ranking of all; None for none. And what they were measured
    with, on the device that it was loaded to: model and processor of the run's budget with no layer frozen.

    LC (for ranking cosine, 1 - cosine in its place) is measured on the visual tokens that the budget leaves, for those
    are what will be frozen. Each process measures its share of the conversations; the values go to the run's folder,
    by `write`. `rows`: those of `training_rows`, where they have been read already.
    """
    if config.shortv is None or config.shortv.freeze is None:
        return (config.shortv.layers if config.shortv else None), None
    if config.shortv.ranking == "random":
        count = int(release.config["text_config"]["num_hidden_layers"])
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed)).tolist()
        return sorted(pick_layers(drawn, config.shortv.freeze)) or None, None
    one_budget = reductions_of(config.visionzip, None, None, config.positions).one_budget
    model, processor = load_release(release, one_budget)
    loaded_to = model.device
    model.to(accelerator.device)
    samples = _calibration_samples(config, processor, rows or training_rows(config.data, config.seed))
    share = samples[accelerator.process_index :: accelerator.num_processes]
    if config.shortv.ranking == "cosine":
        measured = cosine_changes(model, share)
    else:
        measured = measure_layer_contributions(model, share).visual[:, 0].tolist() if share else []
    places = range(accelerator.process_index, len(samples), accelerator.num_processes)
    in_order = [values for _, values in sorted(gather_object(list(zip(places, measured, strict=True))))]
    mean = torch.tensor(in_order, dtype=torch.float64).mean(dim=0).tolist()
    ranking = rank_layers(mean)
    layers = sorted(pick_layers(ranking, config.shortv.freeze))
    if accelerator.is_main_process:
        record = {"layers": layers, "ranking": ranking, "layer_contributions": mean, "samples": len(samples)}
        write(Path(config.output_dir) / LAYERS, json.dumps(record, indent=1) + "\n")
    return layers or None, (model.to(loaded_to), processor)


def freeze_layers(loaded: Loaded, reductions: Reductions, *, with_tower: bool) -> Loaded:
    """What `load_release` would give for the same release: the weights that `choose_layers` measured with, under the
    run's `reductions`, and its processor. `with_tower` False: with nothing in the tower's place."""
    model, processor = share_weights(loaded[0], reductions), loaded[1]
    if not with_tower:
        leave_out_towers(model)
    return model, processor


def calibration_prompts(
    config: TuneConfig, supervision: Supervision, count: int, drops: DropLog
) -> tuple[list[CalibrationPrompt], str]:
    """What `choose_layers` measures on, and where image paths start from. Raises as `choose_prompts` does."""
    conversations, root = training_conversations(config.data, config.seed, drops)
    return _prompts(config, conversations, supervision, root, count, drops), root


def _prompts(
    config: TuneConfig,
    conversations: Sequence[Conversation],
    supervision: Supervision,
    root: str,
    count: int,
    drops: DropLog,
) -> list[CalibrationPrompt]:
    source, seed = config.data.instructions, config.seed
    return choose_prompts(conversations, supervision, root, drops, count=count, seed=seed, source=source)


def _calibration_samples(config: TuneConfig, processor: Any, rows: TrainingRows) -> list[CalibrationSample]:
    assert config.shortv is not None
    drops = deepcopy(rows.drops)  # what cannot be measured on is no loss of the run's yet
    supervision, count = Supervision(processor, max_length=None), config.shortv.calibration_samples
    prompts = _prompts(config, rows.conversations, supervision, rows.image_root, count, drops)
    dataset = dataset_of(prompts, supervision, rows.image_root)
    samples: list[CalibrationSample] = []
    for item in prompts:
        try:
            samples.append(load_sample(item, dataset))
        except BadSample as error:
            drops.add(error)
    if not samples:
        raise UserError(f"{config.data.instructions}: no image could be read to measure LC on: {drops.summary()}")
    return samples
