"""Trains `checkpoints/demo-llava`, the small genuine LLaVA that ShortZip runs on by default.

    python scripts/make_demo_model.py --output checkpoints/demo-llava

Two stages, as LLaVA itself has a vision tower that was trained before it:

1. **Vision tower.** A CLIP tower learns, at the layer that LLaVA reads (`hidden_states[-2]`), to say for every patch
   which object it belongs to (colour, shape, size, place) and whether it is that object's middle. Its CLS token
   learns, from the same layer, which kinds of objects the scene holds and how many, and is rewarded for attending to
   them: that attention is what VisionZip reads.
2. **Projector and language model**, from scratch and with all visual tokens, on questions about scenes. Several short
   conversations share one picture: they stand one after another behind it, and a block mask with restarted positions
   keeps them from seeing each other, so each is supervised exactly as if it stood alone.

Tried after the shipped weights (93.6 % of 4 214 held-out questions exact), continuing from them for 1 100 steps
each, and left: practice on counts as well (95.5 %, but the demo's reduction then costs 26 points, and tuning wins
back 13 % of them instead of 30 %); the same with half of the scenes' visual tokens in random order (96.4 %; the
reduction costs 20, and tuning wins back next to nothing). A model that finds places by where in the prompt a token
stands loses more to the reduction, and a projector can repair that; counts are lost with the patches that are not
kept.

The model is never trained on reduced visual tokens. `log.jsonl` beside the weights keeps command, seed, time and
accuracy. Same seed, same machine, same number of threads: same weights.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from shortzip.data.errors import FileInTheWay, UserError
from shortzip.data.files import writing
from shortzip.train.demo.language_model import Writer, measure, train_language_model
from shortzip.train.demo.model import DemoModelConfig, build_model, build_tokenizer, save_demo_model
from shortzip.train.demo.tower import draw_scenes, tower_features, train_tower
from shortzip.train.settings.checks import check_seed
from shortzip.train.settings.command_line import parse_config, run_command

HELD_OUT_SEED = 1  # scenes are a function of (seed, index): held-out ones share no seed with the training scenes


class Log:
    """`log.jsonl` beside the weights: an entry a line, with the seconds since the start, on the screen as well."""

    def __init__(self, folder: Path) -> None:
        self.started = time.time()
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.file = (folder / "log.jsonl").open("w")

    @property
    def seconds(self) -> float:
        return round(time.time() - self.started, 1)

    def note(self, entry: dict[str, object]) -> None:
        line = json.dumps({**entry, "seconds": self.seconds})
        print(line, flush=True)
        print(line, file=self.file, flush=True)


def make(config: DemoModelConfig) -> None:
    """Trains the demo model, measures it on held-out scenes and saves it with its log.

    Raises:
        UserError: the seed is the held-out scenes' own, or a model is there already.
    """
    check_output(config)
    log = Log(config.output_dir)
    torch.manual_seed(config.seed)
    log.note(describe_command(config))
    pictures, labels = training_scenes(config)
    held_out, _ = draw_scenes(HELD_OUT_SEED, config.held_out, config.processes)
    log.note({"stage": "scenes", "drawn": len(pictures)})

    tokenizer = build_tokenizer()
    model, writer = build_model(tokenizer), Writer(tokenizer)
    log.note({"parameters": sum(p.numel() for p in model.parameters()), "vocabulary": len(tokenizer)})
    make_tower(model.model.vision_tower, pictures, labels, config, log)
    del labels
    if config.continue_from:
        go_on_from(config.continue_from, model, log)
    make_language_model(model, writer, pictures, held_out, config, log)
    log.note({"stage": "held-out, all visual tokens", **measure(model, writer, held_out, HELD_OUT_SEED)})
    blind = measure(model, writer, held_out, HELD_OUT_SEED, blind=True)
    log.note({"stage": "held-out, another scene's picture", **blind})
    save_demo_model(model, tokenizer, config.output_dir)
    log.note({"stage": "saved"})


def check_output(config: DemoModelConfig) -> None:
    """Refuses, before anything is written, a seed that cannot be used and a model that is there already."""
    check_seed("seed", config.seed)
    if config.seed == HELD_OUT_SEED:
        raise UserError(f"seed {config.seed} draws the held-out scenes: choose any other")
    for name in ("log.jsonl", "config.json"):
        file = config.output_dir / name
        if file.exists() and not config.overwrite:
            raise FileInTheWay(f"{file} exists already: give --overwrite, or another --output_dir")


def describe_command(config: DemoModelConfig) -> dict[str, object]:
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items() if k != "work_dir"}
    return {
        "command": ["python", *sys.argv],
        "settings": settings,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def training_scenes(config: DemoModelConfig) -> tuple[Tensor, Tensor]:
    """Pictures and patch labels, as `draw_scenes` gives them; from `work_dir` where an earlier run left them."""
    file = config.work_dir / f"scenes-{config.seed}-{config.scenes}.pt" if config.work_dir else None
    if file and file.exists():
        pictures, labels = torch.load(file, weights_only=True)
        return pictures, labels
    pictures, labels = draw_scenes(config.seed, config.scenes, config.processes)
    if file:
        torch.save((pictures, labels), file)
    return pictures, labels


def make_tower(tower: Any, pictures: Tensor, labels: Tensor, config: DemoModelConfig, log: Log) -> None:
    """Stage 1, or its result from `work_dir` where an earlier run left it."""
    file = config.work_dir / "tower.pt" if config.work_dir else None
    if file and file.exists():
        state, entries = torch.load(file, weights_only=True)
        tower.load_state_dict(state)
        for entry in entries:
            log.note({**entry, "reused": True})
        return
    entries = []
    for entry in train_tower(tower, pictures, labels, config):
        entries.append({**entry, "seconds_then": log.seconds})
        log.note(entry)
    if file:
        torch.save((tower.state_dict(), entries), file)


def go_on_from(folder: Path, model: LlavaForConditionalGeneration, log: Log) -> None:
    """Puts the weights of an earlier run's stage 2 into the model, and its log before this one's."""
    model.load_state_dict(torch.load(folder / "partial.pt", weights_only=True))
    for line in (folder / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        log.note({"earlier": entry.get("earlier", entry)})


def make_language_model(
    model: LlavaForConditionalGeneration,
    writer: Writer,
    pictures: Tensor,
    held_out: Tensor,
    config: DemoModelConfig,
    log: Log,
) -> None:
    """Stage 2; meanwhile the weights are kept in `partial.pt`, and measured on a hundred held-out scenes."""
    partial = config.output_dir / "partial.pt"
    features = tower_features(model.model.vision_tower, pictures[: config.lm_steps * config.lm_batch])
    log.note({"stage": "features", "shape": list(features.shape)})
    for entry in train_language_model(model, writer, features, config):
        log.note(entry)
        if entry["step"] and int(str(entry["step"])) % 150 == 0:
            log.note({"stage": "held-out", **measure(model, writer, held_out[:100], HELD_OUT_SEED)})
            torch.save(model.state_dict(), partial)
    partial.unlink(missing_ok=True)


def main(argv: Sequence[str]) -> None:
    make(parse_config(DemoModelConfig, argv, program="make_demo_model.py"))


if __name__ == "__main__":
    run_command(main)
