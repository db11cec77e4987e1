"""Measuring layer contribution (LC) on an instruction file, so that an interruption costs one batch at most."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from data.batching import permutation
from data.dataset import Collator, ConversationDataset, encode_unread
from data.drops import BadSample, DropLog
from data.errors import UserError
from data.files import write_atomically
from data.instructions import Conversation, read_instructions
from data.supervision import Supervision
from reduction.layer_contribution import (
    DIRECTIONS,
    CalibrationSample,
    Direction,
    LayerContributionMeter,
    embed_prompt,
    plan_batches,
    rank_layers,
)
from reduction.parsing import format_budget, parse_budget, parse_freeze
from train.checkpoint import differing_settings
from train.config import DEMO, DataConfig, DemoScenesConfig, check_seed
from train.release import Reduction, load_release
from train.samples import demo_folder, draw_demo_scenes, folder_of, with_prompt


def budget_name(visionzip: Mapping[str, Any] | None) -> str:
    """How a budget is written: dominant+contextual."""
    return f"budget {format_budget(visionzip)}" if visionzip else "all visual tokens"


@dataclass
class CalibrateConfig:
    """What `scripts/calibrate_shortv.py` takes."""

    model: str = "checkpoints/demo-llava"
    """A release, a reduced checkpoint or a run's folder; or a Hub id. Layers that it freezes count as plain ones."""
    revision: str | None = None
    """With a Hub id: the revision."""
    instructions: str = DEMO
    """Conversations to calibrate on (LLaVA's JSON or JSON Lines, messages, a datasets table); demo draws scenes."""
    image_root: str | None = None
    """Folder that image paths start from; null means the folder of the instructions."""
    samples: int = 200
    """Conversations with an image to measure on (the paper: 2000)."""
    seed: int = 0
    """Which conversations are drawn."""
    budget: str | None = None
    """Visual tokens per image (LLaVA-NeXT: per tile), dominant+contextual, or none. Default: the model's own."""
    compare_full: bool = False
    """With a budget: also measure with all visual tokens, and show both."""
    freeze: str | None = None
    """Picks the layers to freeze: a number (19) or a share (60%)."""
    direction: Direction = "full_to_frozen"
    """Which KL divergence ranks the layers: the paper's, or frozen_to_full as in their code. Both are written."""
    text_tokens: bool = True
    """Whether LC of the text tokens is measured too, which doubles the work."""
    output: Path = Path("layers.json")
    """The JSON file; the chart gets the same name with .png."""
    overwrite: bool = False
    """Whether a file of other settings may be replaced."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the model computes in; the LM head and the softmax are float32 in any case."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto: cuda where there is one."""
    load_in_4bit: bool = False
    """Whether the language model is loaded in 4 bits (needs shortzip[4bit] and a GPU)."""
    samples_per_batch: int = 8
    """Conversations measured together, each with all its variants."""
    tokens_per_pass: int | None = None
    """Tokens that go through a layer at once. Default: 1024 on a CPU, else 8192, halved when memory runs out."""
    chat_template: str = "auto"
    """The prompt: auto (the release's own, or the one it was trained with where that differs: data/supervision.py),
    release, vicuna_v1, chatml, mistral_instruct, plain, or a file."""
    on_bad_sample: Literal["raise", "skip"] = "raise"
    """What a bad row or image gets: an error, or being left out and counted."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"samples={self.samples}: at least 1.")
        check_seed("seed", self.seed)
        if self.budget not in (None, "none"):
            parse_budget(str(self.budget))
        if self.compare_full and self.budget == "none":
            raise UserError("compare_full compares a budget with all visual tokens: give a budget.")
        if self.freeze is not None and isinstance(parse_freeze(self.freeze, 10**6), list):
            raise UserError(f"freeze {self.freeze!r}: LC picks the layers; write how many (19) or a share (60%).")


class Chosen(NamedTuple):
    """A conversation and its prompt: token ids up to the first answer after an image."""

    conversation: Conversation
    prompt: list[int]


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
            **{kind: {name: _spread(lc[:, number]) for number, name in enumerate(DIRECTIONS)}
               for kind, lc in kinds.items() if lc is not None},
        }  # fmt: skip


def _spread(lc: torch.Tensor) -> dict[str, list[Any]]:
    mean = lc.mean(dim=0).tolist()
    deviation = lc.std(dim=0).tolist() if len(lc) > 1 else [0.0] * len(mean)
    return {"mean": mean, "std": deviation, "ranking": rank_layers(mean)}


# ------------------------------------------------------------------------------------------------ what is measured


def choose_prompts(
    conversations: list[Conversation], supervision: Supervision, image_root: str | None, settings: CalibrateConfig,
    drops: DropLog,
) -> list[Chosen]:  # fmt: skip
    """The first `samples` conversations, in an order drawn with `seed`, that answer something after an image.

    Raises ValueError if there is none, BadSample for a bad row where bad samples raise.
    """
    found: list[Chosen] = []
    image_token = supervision.processor.image_token_id
    for index in permutation(len(conversations), settings.seed, 0).tolist():
        if len(found) == settings.samples:
            break
        conversation = conversations[index]
        if not conversation.images:
            continue
        try:
            encoded = encode_unread(conversation, supervision, image_root)
        except BadSample as error:
            drops.add(error)
            continue
        first_image = encoded.input_ids.index(image_token) if image_token in encoded.input_ids else len(encoded.labels)
        starts = [start for start, _ in encoded.answers if start > first_image]
        if starts:
            found.append(Chosen(conversation, encoded.input_ids[: starts[0]]))
    if not found:
        raise UserError(
            f"{settings.instructions}: none of the {len(conversations)} conversations answers something after an "
            "image, so LC cannot be measured on them."
        )
    return found


def load_sample(chosen: Chosen, dataset: ConversationDataset) -> CalibrationSample:
    """Its prompt with the pixels of the images in it. Raises BadSample for an image that cannot be read."""
    sample = with_prompt(dataset.load(chosen.conversation), dataset.supervision, chosen.prompt)
    inputs = Collator.of(dataset.supervision)([sample]).inputs
    return CalibrationSample(torch.tensor(chosen.prompt), inputs["pixel_values"], inputs.get("image_sizes"))


def measure(settings: CalibrateConfig, budget: Reduction, done: Partial) -> Measurement:
    """LC under one budget, going on from the batches that `done` holds, and adding to them."""
    model, processor = load_release(
        settings.model,
        revision=settings.revision,
        visionzip=budget,
        shortv=None,
        fastv=None,
        dtype=getattr(torch, settings.dtype),
        chat_template=settings.chat_template,
        load_in_4bit=settings.load_in_4bit,
    )
    if not settings.load_in_4bit:
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(automatic if settings.device == "auto" else settings.device)
    drops = DropLog(settings.on_bad_sample)
    conversations, root = _conversations(settings, drops)
    supervision = Supervision(processor)
    chosen = choose_prompts(conversations, supervision, root, settings, drops)
    dataset = ConversationDataset([item.conversation for item in chosen], supervision, root, drops=DropLog("skip", 1))
    prompts = [torch.tensor(item.prompt) for item in chosen]
    plan = plan_batches(prompts, model.config.image_token_id, settings.samples_per_batch)
    name = budget_name(model.config.visionzip)
    batches = done.begin(name, _identity(model, chosen, plan), len(plan))
    meter = LayerContributionMeter(
        model.model.language_model,
        model.lm_head,
        text_tokens=settings.text_tokens,
        tokens_per_pass=settings.tokens_per_pass,
    )
    for number, batch in enumerate(plan):
        if number in batches:
            continue
        started = time.perf_counter()
        with torch.no_grad():
            embedded = []
            for index in batch:
                try:
                    embedded.append(embed_prompt(model, load_sample(chosen[index], dataset)))
                except BadSample as error:
                    drops.add(error)
            found = meter.measure(embedded) if embedded else None
        entry = {
            "visual": found.visual.tolist() if found else [],
            "text": found.text.tolist() if found and found.text is not None else None,
            "seconds": time.perf_counter() - started,
        }
        done.add(name, number, entry)
        batches[number] = entry
        _progress(f"LC with {name}", len(batches), len(plan))
    entries = [batches[number] for number in range(len(plan))]
    visual = [row for entry in entries for row in entry["visual"]]
    if not visual:
        raise UserError(f"no image could be read: {drops.summary()}.")
    text = [row for entry in entries for row in entry["text"] or []]
    image_token = model.config.image_token_id
    return Measurement(
        budget=model.config.visionzip,
        visual_tokens=sum(int((ids == image_token).sum()) for ids in prompts) / len(prompts),
        visual=torch.tensor(visual, dtype=torch.float64),
        text=torch.tensor(text, dtype=torch.float64) if text else None,
        seconds=sum(entry["seconds"] for entry in entries),
        dropped=drops.counts,
    )


def _conversations(settings: CalibrateConfig, drops: DropLog) -> tuple[list[Conversation], str | None]:
    if settings.instructions != DEMO:
        root = settings.image_root or folder_of(settings.instructions)
        return read_instructions(settings.instructions, drops=drops), root
    # Scenes of their own: neither trained on nor held out.
    scenes = DemoScenesConfig(train_scenes=settings.samples, train_seed=1000 + settings.seed)
    draw_demo_scenes(DataConfig(instructions=DEMO, demo_scenes=scenes))
    folder = demo_folder(scenes, held_out=False)
    return read_instructions(folder / "instructions.json", drops=drops), str(folder / "images")


def _identity(model: Any, chosen: list[Chosen], plan: list[list[int]]) -> str:
    """Equal for equal work: the prompts, in their batches, and the weights (the projector's and the last norm's)."""
    digest = hashlib.sha256(json.dumps([plan, [[item.conversation.id, item.prompt] for item in chosen]]).encode())
    parts = [*model.model.multi_modal_projector.parameters(), model.model.language_model.norm.weight]
    for tensor in parts:
        if not tensor.is_meta:
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _progress(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{what}: {done}/{total} batches", end="\n" if done == total else "", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------ going on


class Partial:
    """What an interrupted run has measured: JSON lines, the settings first, then one line per finished batch."""

    def __init__(self, path: Path, settings: dict[str, Any], overwrite: bool) -> None:
        """Raises ValueError when the file is of other settings and may not be replaced."""
        self.path = path
        self._entries: list[dict[str, Any]] = []
        lines = path.read_bytes().split(b"\n") if path.is_file() and not overwrite else []
        # Every line ends with a line break: what stands behind the last one was being written.
        whole = [json.loads(line) for line in lines[:-1]]
        if whole:
            refuse_other_settings(whole[0]["settings"], settings, path)
            self._entries = whole[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [{"settings": settings}, *self._entries]
        write_atomically(path, "".join(json.dumps(entry) + "\n" for entry in kept))

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
                f"{self.path} was begun with other conversations or weights than are found now: "
                "give --overwrite true to begin anew, or another --output."
            )
        finished = {entry["batch"]: entry for entry in own if "batch" in entry}
        if finished:
            print(f"LC with {name}: going on after {len(finished)} of {batches} batches")
        return finished

    def add(self, name: str, batch: int, entry: dict[str, Any]) -> None:
        """Keeps a finished batch, on the disk when this returns."""
        self._write({"budget": name, "batch": batch, **entry})

    def _write(self, entry: dict[str, Any]) -> None:
        self._entries.append(entry)
        with self.path.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def refuse_other_settings(found: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """Raises ValueError that names each setting that differs."""
    differing = differing_settings(found, wanted)
    if differing:
        raise UserError(
            f"{path} is of other settings: {differing}. Give --overwrite true to replace it, or another --output."
        )
