"""From the config to what a run starts from: training and held-out conversations, and the layers LC chooses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from data.batching import permutation
from data.dataset import Collator, ConversationDataset, Sample
from data.drops import Drop, DropLog
from data.errors import UserError
from data.files import write_atomically, written_whole
from data.instructions import read_instructions
from data.scene_questions import write_scenes
from data.strata import draw
from data.subset import subset_report
from data.supervision import Supervision
from data.tables import check_source
from reduction.layer_contribution import CalibrationSample, measure_layer_contributions, pick_layers, rank_layers
from reduction.layer_cosine import cosine_changes
from train.config import DEMO, DataConfig, DemoScenesConfig, TuneConfig, reductions_of
from train.release import Release, load_release
from train.run_folder import LAYERS


def training_set(config: DataConfig, processor: Any, seed: int) -> ConversationDataset:
    """The conversations to train on, `config.fraction` of them, as `processor` renders and tokenizes them.

    Raises `FileNotFoundError`, `data.drops.BadSample` and `ValueError` for instructions that cannot be used.
    """
    drops = DropLog(config.on_bad_sample, config.max_bad_fraction)
    if config.instructions == DEMO:
        folder = demo_folder(config.demo_scenes, held_out=False, fraction=config.fraction)
        conversations, root = read_instructions(folder / "instructions.json", drops=drops), str(folder / "images")
    else:
        root = config.image_root or folder_of(config.instructions)
        conversations = read_instructions(config.instructions, drops=drops)
        if config.fraction < 1:
            _refuse_a_part_of_a_subset(config)
            conversations = draw(conversations, config.fraction, seed)
    supervision = Supervision(processor, max_length=config.max_length)
    return ConversationDataset(conversations, supervision, root, drops=drops, cache_dir=config.cache_dir)


def _refuse_a_part_of_a_subset(config: DataConfig) -> None:
    report = subset_report(config.instructions)
    if report is not None and report["fraction"] < 1:
        raise UserError(
            f"{config.instructions} is a subset already, {report['fraction']:g} of {report['instructions']}, and "
            f"data.fraction {config.fraction:g} would train on a part of that: set data.fraction to 1.0"
        )


def held_out_set(config: DataConfig, processor: Any) -> ConversationDataset:
    """The held-out conversations, whole: `max_length` would cut them at other places for another budget.

    Raises as `training_set` does.
    """
    assert config.eval_instructions is not None
    drops = DropLog(config.on_bad_sample, config.max_bad_fraction)
    if config.eval_instructions == DEMO:
        folder = demo_folder(config.demo_scenes, held_out=True)
        conversations, root = read_instructions(folder / "instructions.json", drops=drops), str(folder / "images")
    else:
        root = config.eval_image_root or config.image_root or folder_of(config.eval_instructions)
        conversations = read_instructions(config.eval_instructions, drops=drops)
    supervision = Supervision(processor, max_length=None)
    return ConversationDataset(conversations[: config.eval_samples], supervision, root, drops=drops)


def check_instructions(config: DataConfig) -> None:
    """Raises FileNotFoundError for conversations that are not there: before a release is fetched, which takes long."""
    for source in (config.instructions, config.eval_instructions):
        if source not in (DEMO, None):
            check_source(source)


def draw_demo_scenes(config: DataConfig) -> None:
    """Draws the scenes that `demo` stands for, where the config names it and they are not there yet.

    For one process; afterwards every process can read them.
    """
    scenes = config.demo_scenes
    wanted = []
    if config.instructions == DEMO:
        wanted.append((demo_folder(scenes, False, config.fraction), scenes.train_seed, scenes.train_scenes))
    if config.eval_instructions == DEMO:
        wanted.append((demo_folder(scenes, True), scenes.eval_seed, scenes.eval_scenes))
    for folder, seed, count in wanted:
        if not folder.exists():
            fraction = config.fraction if seed == scenes.train_seed else 1.0
            with written_whole(folder) as partial:
                write_scenes(partial, seed, count, fraction)


def with_prompt(sample: Sample, supervision: Supervision, prompt: list[int]) -> Sample:
    """The sample with only the images that stand in `prompt`, a beginning of its tokens."""
    left, images = prompt.count(supervision.processor.image_token_id), 0
    while left > 0:
        left -= supervision.placeholders(sample.image_sizes[images])
        images += 1
    return Sample(sample.id, sample.encoded, sample.pixels[:images], sample.image_sizes[:images])


def calibration_samples(dataset: ConversationDataset, count: int, seed: int) -> list[CalibrationSample]:
    """Prompts up to the first answer, of `count` conversations that begin with an image, drawn with `seed`.

    Raises `ValueError` if there is none.
    """
    found: list[CalibrationSample] = []
    for index in permutation(len(dataset), seed, 0).tolist():
        if len(found) == count:
            break
        sample = dataset[index] if dataset.conversations[index].images else None
        if sample is None or isinstance(sample, Drop):
            continue
        prompt = sample.encoded.input_ids[: sample.encoded.answers[0][0]]
        shown = with_prompt(sample, dataset.supervision, prompt)
        if shown.pixels:
            inputs = Collator.of(dataset.supervision)([shown]).inputs
            found.append(CalibrationSample(torch.tensor(prompt), inputs["pixel_values"], inputs.get("image_sizes")))
    if not found:
        raise UserError("no conversation begins with an image: LC cannot be measured. Give shortv.layers instead")
    return found


def choose_layers(
    config: TuneConfig, release: Release, dtype: torch.dtype, accelerator: Accelerator
) -> list[int] | None:
    """The layers to freeze: those listed, or the first of a ranking of all; None for none.

    LC (for ranking cosine, 1 - cosine in its place) is measured on the visual tokens that the budget leaves, for those
    are what will be frozen. Each process measures its share of the conversations; the values are written to the run's
    folder.
    """
    if config.shortv is None or config.shortv.freeze is None:
        return config.shortv.layers if config.shortv else None
    if config.shortv.ranking == "random":
        count = int(release.config["text_config"]["num_hidden_layers"])
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed)).tolist()
        return sorted(pick_layers(drawn, config.shortv.freeze))
    model, processor = load_release(
        release,
        reductions_of(config.visionzip, None, None),
        dtype=dtype,
        chat_template=config.data.chat_template,
        load_in_4bit=config.load_in_4bit,
    )
    model.to(accelerator.device)
    dataset = training_set(config.data, processor, config.seed)
    samples = calibration_samples(dataset, config.shortv.calibration_samples, config.seed)
    share = samples[accelerator.process_index :: accelerator.num_processes]
    if config.shortv.ranking == "cosine":
        measured = cosine_changes(model, share)
    else:
        measured = measure_layer_contributions(model, share).visual[:, 0].tolist() if share else []
    places = range(accelerator.process_index, len(samples), accelerator.num_processes)
    rows = [values for _, values in sorted(gather_object(list(zip(places, measured, strict=True))))]
    mean = torch.tensor(rows, dtype=torch.float64).mean(dim=0).tolist()
    ranking = rank_layers(mean)
    chosen = sorted(pick_layers(ranking, config.shortv.freeze))
    if accelerator.is_main_process:
        found = {"layers": chosen, "ranking": ranking, "layer_contributions": mean, "samples": len(samples)}
        write_atomically(Path(config.output_dir) / LAYERS, json.dumps(found, indent=1) + "\n")
    return chosen


def fingerprint(dataset: ConversationDataset, projector: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """What a run starts from, by its content: folders and files may move between a run and its continuation."""
    samples = hashlib.sha256(dataset.lengths.tobytes() + dataset.supervised.tobytes())
    for conversation in dataset.conversations:
        samples.update(conversation.id.encode() + b"\0")
    weights = hashlib.sha256()
    for name in sorted(projector):
        weights.update(projector[name].detach().cpu().contiguous().numpy().tobytes())
    return {"content of the samples": samples.hexdigest()[:16], "release's projector": weights.hexdigest()[:16]}


def demo_folder(scenes: DemoScenesConfig, held_out: bool, fraction: float = 1.0) -> Path:
    """Where the scenes that `demo` stands for are drawn: instructions.json and images/."""
    if held_out:
        return Path(scenes.folder) / f"held-out-{scenes.eval_seed}-{scenes.eval_scenes}"
    return Path(scenes.folder) / f"train-{scenes.train_seed}-{scenes.train_scenes}-{fraction:g}"


def folder_of(instructions: str) -> str:
    """Where image paths start from when nothing else is said: beside the instructions."""
    path = Path(instructions)
    return str(path if path.is_dir() else path.parent)
