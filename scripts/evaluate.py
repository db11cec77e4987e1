"""Compares models on held-out conversations: exact match, loss, visual tokens, LLM FLOPs and prefill time.

    python scripts/evaluate.py --model llava-hf/llava-1.5-7b-hf --model checkpoints/run --data.instructions FILE.json

A model is a release (evaluated with all its visual tokens; with --visionzip or --shortv also reduced, untuned), a
reduced checkpoint, or a run's folder (all tokens, reduced untuned, and tuned). Several GPUs: accelerate launch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator

from train.comparison import Candidate, compare, table_of, write_results
from train.config import ConfigError, DataConfig, FastVConfig, ShortVConfig, VisionZipConfig, load_config, parse_config
from train.finish import candidates_of
from train.release import open_release
from train.report import Reporter
from train.run_folder import CONFIG, FINAL


@dataclass(frozen=True)
class HeldOut:
    """The conversations to answer."""

    instructions: str | None = None
    """Held-out conversations in LLaVA's JSON; null: those of the run's own config."""
    image_root: str | None = None
    """Folder that image paths start from; null means the folder of the instructions."""
    samples: int | None = None
    """Only the first so many conversations; null means all."""
    on_bad_sample: Literal["raise", "skip"] = "raise"
    """What a bad row or image gets: an error, or being left out and counted."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of scripts/evaluate.py."""

    model: list[str]
    """A release, reduced checkpoint or run folder; repeat the option for several."""
    data: HeldOut
    """The conversations to answer."""
    revision: str | None = None
    """Branch, tag or commit, for a single Hub id."""
    visionzip: VisionZipConfig | None = None
    """Also evaluate each release with this budget. visionzip.dominant: patches kept as they are, CLS counted among
    them; visionzip.contextual: tokens that the other patches are merged into; visionzip.method: a baseline instead."""
    shortv: ShortVConfig | None = None
    """Also evaluate each release with these frozen layers. shortv.layers: their indices, from 0. (shortv.freeze and
    shortv.calibration_samples: only when tuning.)"""
    fastv: FastVConfig | None = None
    """Also evaluate each release with FastV, instead of shortv. fastv.layer: layers passed before the pruning;
    fastv.keep: share of the visual tokens kept."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Dtype of the computation: fp32 (no) or bf16."""
    batch_size: int = 16
    """Conversations (loss) and questions (answers) per batch."""
    max_new_tokens: int = 64
    """Longest answer, in tokens."""
    output: str = "checkpoints/evaluation"
    """Folder for the table as JSON and for each model's answers."""

    def __post_init__(self) -> None:
        if self.shortv is not None and self.shortv.layers is None:
            raise ConfigError("shortv.freeze is chosen when a run starts: give shortv.layers here")
        if self.fastv is not None and self.shortv is not None:
            raise ConfigError("fastv and shortv do not go together: give one of them")
        if self.revision is not None and len(self.model) != 1:
            raise ConfigError(f"revision {self.revision!r} fits one model, and there are {len(self.model)}")
        if not self.model:
            raise ConfigError("give at least one --model")
        for key in ("batch_size", "max_new_tokens"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}: at least 1 is needed")


def read_arguments(argv: Sequence[str]) -> EvaluateConfig:
    """The settings; `--model` may stand several times. Raises `ConfigError`."""
    models: list[str] = []
    others: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        if token == "--model":
            models.append(next(tokens, ""))
        elif token.startswith("--model="):
            models.append(token.removeprefix("--model="))
        else:
            others.append(token)
    given = ["--model", "[" + ", ".join(f'"{model}"' for model in models) + "]"] if models else []
    return parse_config(EvaluateConfig, [*given, *others], default=None, program="evaluate.py")


def candidates_for(config: EvaluateConfig) -> list[Candidate]:
    """The rows that the models give, in order. Raises what `open_release` raises."""
    rows: list[Candidate] = []
    for model in config.model:
        several = f"{model}: " if len(config.model) > 1 else ""
        if (Path(model) / CONFIG).is_file():
            run = load_config(["--config", str(Path(model) / CONFIG)])
            saved = open_release(str(Path(model) / FINAL)).saved_reductions
            rows += [replace(row, name=several + row.name) for row in candidates_of(run, Path(model), saved)]
            continue
        saved = open_release(model, config.revision).saved_reductions
        if any(saved.values()):
            rows.append(Candidate(model, model))
            continue
        release = Candidate(several + "all tokens", model, visionzip=None, shortv=None, revision=config.revision)
        rows.append(release)
        if config.visionzip or config.shortv or config.fastv:
            visionzip = config.visionzip.as_key() if config.visionzip else None
            fastv = asdict(config.fastv) if config.fastv else None
            shortv = {"layers": config.shortv.layers} if config.shortv else None
            name = several + "reduced, untuned"
            rows.append(replace(release, name=name, visionzip=visionzip, shortv=shortv, fastv=fastv))
    return rows


def data_for(config: EvaluateConfig) -> DataConfig:
    """The held-out conversations: those given, or those of the first run. Raises `ConfigError` without either."""
    if config.data.instructions is not None:
        return DataConfig(
            instructions=config.data.instructions,
            eval_instructions=config.data.instructions,
            eval_image_root=config.data.image_root,
            eval_samples=config.data.samples,
            on_bad_sample=config.data.on_bad_sample,
        )
    for model in config.model:
        if (Path(model) / CONFIG).is_file():
            data = load_config(["--config", str(Path(model) / CONFIG)]).data
            if data.eval_instructions is not None:
                return data
    raise ConfigError("data.instructions is needed: no run among the models names held-out conversations")


def main(argv: Sequence[str]) -> None:
    try:
        config = read_arguments(argv)
        data = data_for(config)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    accelerator = Accelerator(mixed_precision="no")
    report = Reporter(accelerator.is_main_process)
    output = Path(config.output)
    results = compare(
        candidates_for(config),
        data,
        accelerator,
        dtype=torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        answers=output / "answers",
        progress=lambda name, done, total: report.progress(f"evaluating {name}", done, total),
    )
    report.end_progress()
    report.table(table_of(results, f"held-out conversations of {data.eval_instructions}"))
    if accelerator.is_main_process:
        write_results(output / "evaluation.json", results)
    report.say(f"written: {output / 'evaluation.json'}, {output / 'answers'}/")
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])
