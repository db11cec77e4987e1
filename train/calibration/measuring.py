"""Measuring layer contribution (LC) on an instruction file, so that an interruption costs one batch at most."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from shortzip.data.dataset import ConversationDataset
from shortzip.data.drops import BadSample, DropLog
from shortzip.data.errors import UserError
from shortzip.data.files import read_json, write_atomically, writing
from shortzip.data.instructions import Conversation, read_instructions
from shortzip.data.kept import conversations_digest, identity_of
from shortzip.data.supervision import Supervision
from shortzip.reduction.calibration_prompts import embed_prompt, plan_batches
from shortzip.reduction.layer_choice import rank_layers
from shortzip.reduction.layer_contribution import DIRECTIONS, LayerContributionMeter
from shortzip.reduction.parsing import format_budget, format_method
from shortzip.reduction.reductions import Reductions
from shortzip.reduction.selectors import VISIONZIP
from shortzip.train.calibration.choosing import CalibrationPrompt, choose_prompts, dataset_of, load_sample
from shortzip.train.inputs.samples import demo_folder, draw_demo_scenes, folder_of
from shortzip.train.release.loading import load_processor, load_release
from shortzip.train.release.opening import Release, open_release, release_content
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.run.checkpoint import differing_settings
from shortzip.train.settings.calibrating import CalibrateBudgetConfig
from shortzip.train.settings.commands import CalibrateConfig
from shortzip.train.settings.config import DEMO, DataConfig, DemoScenesConfig

ANEW_OR_ELSEWHERE = "give --overwrite true to measure anew, or another --output"


def budget_name(visionzip: Mapping[str, Any] | None) -> str:
    """How a budget is written: dominant+contextual, and the method where it is another than VisionZip's."""
    if not visionzip:
        return "all visual tokens"
    words = format_method(visionzip)
    return f"budget {format_budget(visionzip)}" + ("" if words == VISIONZIP else f", {words}")


@dataclass
class Measurement:
    """LC under one budget."""

    budget: dict[str, Any] | None
    visual_tokens: float  # mean of the prompts
    visual: torch.Tensor  # [N, 2, L] float64
    text: torch.Tensor | None
    seconds: float
    dropped: dict[str, int] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """What layers.json holds of it."""
        kinds = {"visual": self.visual, "text": self.text}
        return {
            "budget": self.budget,
            "visual_tokens_per_prompt": self.visual_tokens,
            "samples": len(self.visual),
            "seconds": round(self.seconds, 3),
            "dropped": self.dropped,
            **{
                kind: {name: _spread(lc[:, number]) for number, name in enumerate(DIRECTIONS)}
                for kind, lc in kinds.items()
                if lc is not None
            },
        }


def _spread(lc: torch.Tensor) -> dict[str, list[Any]]:
    mean = lc.mean(dim=0).tolist()
    deviation = lc.std(dim=0).tolist() if len(lc) > 1 else [0.0] * len(mean)
    return {"mean": mean, "std": deviation, "ranking": rank_layers(mean)}


# ------------------------------------------------------------------------------------------------ what is measured


class CalibrationSet(NamedTuple):
    """What LC is to be measured on, before weights are read."""

    release: Release
    prompts: list[CalibrationPrompt]
    dataset: ConversationDataset
    drops: DropLog
    visionzip: dict[str, Any] | None
    content: dict[str, Any]
    """All that the measurement depends on beside the settings: the release's files, the prompts and their images."""


def calibration_set(settings: CalibrateConfig, budget: Reductions | None) -> CalibrationSet:
    """The prompts under one budget (None: as the model was saved).

    Raises what opening the release and reading the conversations raises.
    """
    release = open_release(
        ReleaseSpec(
            settings.model,
            settings.revision,
            chat_template=settings.chat_template,
            dtype=getattr(torch, settings.dtype),
            load_in_4bit=settings.load_in_4bit,
        )
    )
    processor = load_processor(release, budget)
    supervision = Supervision(processor, max_length=None)
    drops = DropLog(settings.on_bad_sample)
    conversations, root = calibration_conversations(settings, drops)
    prompts = choose_prompts(
        conversations,
        supervision,
        root,
        drops,
        count=settings.samples,
        seed=settings.seed,
        source=settings.instructions,
    )
    content = {
        **release_content(release),
        "conversations": {
            "texts and images": conversations_digest([item.conversation for item in prompts], root),
            "prompts": identity_of([item.prompt for item in prompts]),
        },
    }
    dataset = dataset_of(prompts, supervision, root)
    return CalibrationSet(release, prompts, dataset, drops, processor.visionzip, content)


def measure(
    settings: CalibrateConfig, budget: Reductions | None, done: Partial, calibration: CalibrationSet | None = None
) -> Measurement:
    """LC under one budget (None: as the model was saved), going on from the batches that `done` holds, and adding to
    them. `calibration`: what `calibration_set` gave, where it was called already."""
    release, prompts, dataset, drops, _, content = calibration or calibration_set(settings, budget)
    model, _ = load_release(release, (release.saved_reductions if budget is None else budget).before_the_llm)
    if not settings.load_in_4bit:
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(automatic if settings.device == "auto" else settings.device)
    ids = [torch.tensor(item.prompt) for item in prompts]
    plan = plan_batches(ids, model.config.image_token_id, settings.samples_per_batch)
    name = budget_name(model.config.visionzip)
    batches = done.begin(name, identity_of([content, plan]), len(plan))
    meter = LayerContributionMeter(
        model.model.language_model,
        model.lm_head,
        text_tokens=settings.text_tokens,
        tokens_per_pass=settings.tokens_per_pass,
    )
    for number, batch in enumerate(plan):
        if number in batches:
            continue
        batches[number] = _measure_batch(model, meter, [prompts[index] for index in batch], dataset, drops)
        done.add(name, number, batches[number])
        _progress(f"LC with {name}", len(batches), len(plan))
    entries = [batches[number] for number in range(len(plan))]
    visual = [row for entry in entries for row in entry["visual"]]
    if not visual:
        raise UserError(f"no image could be read: {drops.summary()}.")
    text = [row for entry in entries for row in entry["text"] or []]
    image_token = model.config.image_token_id
    return Measurement(
        budget=model.config.visionzip,
        visual_tokens=sum(int((row == image_token).sum()) for row in ids) / len(ids),
        visual=torch.tensor(visual, dtype=torch.float64),
        text=torch.tensor(text, dtype=torch.float64) if text else None,
        seconds=sum(entry["seconds"] for entry in entries),
        dropped=drops.counts,
    )


@torch.no_grad()
def _measure_batch(
    model: Any,
    meter: LayerContributionMeter,
    prompts: Sequence[CalibrationPrompt],
    dataset: ConversationDataset,
    drops: DropLog,
) -> dict[str, Any]:
    """LC of the prompts whose images can be read, as a line of a `Partial` holds it."""
    started = time.perf_counter()
    embedded = []
    for prompt in prompts:
        try:
            embedded.append(embed_prompt(model, load_sample(prompt, dataset)))
        except BadSample as error:
            drops.add(error)
    lc = meter.measure(embedded) if embedded else None
    return {
        "visual": lc.visual.tolist() if lc else [],
        "text": lc.text.tolist() if lc and lc.text is not None else None,
        "seconds": time.perf_counter() - started,
    }


def calibration_conversations(
    settings: CalibrateConfig | CalibrateBudgetConfig, drops: DropLog
) -> tuple[list[Conversation], str | None]:
    """The conversations that are calibrated on, and the folder that image paths start from."""
    if settings.instructions != DEMO:
        root = settings.image_root or folder_of(settings.instructions)
        return read_instructions(settings.instructions, drops=drops), root
    # Scenes of their own: neither trained on nor held out.
    scenes = DemoScenesConfig(train_scenes=settings.samples, train_seed=1000 + settings.seed)
    draw_demo_scenes(DataConfig(instructions=DEMO, demo_scenes=scenes))
    folder = demo_folder(scenes, held_out=False)
    return read_instructions(folder / "instructions.json", drops=drops), str(folder / "images")


def _progress(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{what}: {done}/{total} batches", end="\n" if done == total else "", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------ going on


class Partial:
    """What an interrupted run has measured: JSON lines, the settings first, then one line per finished batch.

    No `Kept`, which writes a result whole: this one grows by a line at a time for hours.
    """

    def __init__(self, path: Path, settings: dict[str, Any], overwrite: bool) -> None:
        """Raises ValueError when the file is of other settings, or none of these, and may not be replaced."""
        self.path = path
        self._entries: list[dict[str, Any]] = []
        whole = _lines_of(path) if path.is_file() and not overwrite else []
        if whole:
            refuse_other_settings(whole[0]["settings"], settings, path)
            self._entries = whole[1:]
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        lines = [{"settings": settings}, *self._entries]
        write_atomically(path, "".join(json.dumps(entry) + "\n" for entry in lines))

    def begin(self, name: str, identity: str, batches: int) -> dict[int, dict[str, Any]]:
        """The finished batches under one budget, by number. Raises ValueError when they are of other prompts or
        weights."""
        own = [entry for entry in self._entries if entry["budget"] == name]
        started = [entry for entry in own if "identity" in entry]
        if not started:
            self._write({"budget": name, "identity": identity})
            return {}
        if started[0]["identity"] != identity:
            raise UserError(
                f"{self.path} was begun with other conversations or weights than are found now: {ANEW_OR_ELSEWHERE}"
            )
        finished = {entry["batch"]: entry for entry in own if "batch" in entry}
        if finished:
            print(f"LC with {name}: going on after {len(finished)} of {batches} batches")
        return finished

    def add(self, name: str, batch: int, entry: dict[str, Any]) -> None:
        """Keeps a finished batch, on the disk when this returns. Raises `CannotWrite`."""
        self._write({"budget": name, "batch": batch, **entry})

    def _write(self, entry: dict[str, Any]) -> None:
        self._entries.append(entry)
        with writing(self.path), self.path.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _lines_of(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a `Partial`. Raises ValueError for what is none."""
    # Every line ends with a line break: what stands behind the last one was being written.
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        whole = [json.loads(line) for line in lines]
        if whole and isinstance(whole[0]["settings"], dict) and all(_is_entry(entry) for entry in whole[1:]):
            return whole
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"{path} is not what an interrupted calibration leaves: remove it, or {ANEW_OR_ELSEWHERE}")


def _is_entry(entry: dict[str, Any]) -> bool:
    is_batch = isinstance(entry.get("batch"), int) and isinstance(entry.get("visual"), list)
    return isinstance(entry["budget"], str) and (is_batch or isinstance(entry.get("identity"), str))


def measured_digest(measurements: list[dict[str, Any]]) -> str:
    """SHA-256 (hex) of what layers.json holds under `measurements`, but for the time that it took."""
    return identity_of([{**item, "seconds": None} for item in measurements])


def read_measured(path: Path) -> dict[str, Any]:
    """A layers.json. Raises ValueError for a file that is none, or was changed."""
    try:
        result = read_json(path)
        visual = [item["visual"] for item in result["measurements"]]
        rankings = [kind[direction]["ranking"] for kind in visual for direction in DIRECTIONS]
        if not rankings or not isinstance(result["settings"], dict):
            raise KeyError("measurements")
        if "digest" in result and result["digest"] != measured_digest(result["measurements"]):
            raise UserError(f"{path} holds other measurements than were written into it")
    except UserError as error:
        raise UserError(f"{error}. To replace it: {ANEW_OR_ELSEWHERE}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no LC measurements: {ANEW_OR_ELSEWHERE}") from error
    return result


def refuse_other_content(measured: Mapping[str, Any], content: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError that names what is not as it was when it was measured on."""
    changed = [
        f"{file} of the {part}" if part != "conversations" else f"the conversations' {file}"
        for part in content
        for file in {**measured.get(part, {}), **content[part]}
        if measured.get(part, {}).get(file) != content[part].get(file)
    ]
    if changed:
        raise UserError(f"{path} was measured before these changed: {', '.join(changed)}. {ANEW_OR_ELSEWHERE}")


def refuse_other_settings(measured: dict[str, Any], settings: dict[str, Any], path: Path) -> None:
    """Raises ValueError that names each setting that differs."""
    differing = differing_settings(measured, settings)
    if differing:
        raise UserError(f"{path} is of other settings: {differing}. {ANEW_OR_ELSEWHERE}")
