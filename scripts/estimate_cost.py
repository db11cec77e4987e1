"""Prints what a LLaVA costs with and without its reductions, from its config alone (no weights are read).

    python scripts/estimate_cost.py --model llava-1.5-7b --budget 54+10 --freeze 19 --memory 24GiB
    python scripts/estimate_cost.py --model FOLDER_OF_A_LLAVA_ONEVISION --budget 70+10 --frames 32

Four rows: none / VisionZip / ShortV / both. Columns: visual tokens of a sample, prefill FLOPs (by ShortV's formula,
and with the key heads that the config really has), KV cache of the prefill, FLOPs and memory of a training step that
tunes the projector, and whether that fits on the card. With --budgets there is a row for each of them, and one for a
projector that is tuned for all. FLOPs count a multiply-add as two. The memory is an estimate
for one device that holds the whole model: `train/step/memory.py` says what is counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from transformers import CLIPVisionConfig, PreTrainedConfig

from shortzip.data.errors import MissingFile, UserError
from shortzip.data.files import read_json, refuse_to_replace, write_atomically, writing
from shortzip.reduction import flops
from shortzip.reduction.errors import ReductionError
from shortzip.reduction.families import all_families, family_of
from shortzip.reduction.parsing import budget_by, format_budget, parse_budget, parse_bytes, parse_freeze
from shortzip.reduction.reductions import Reductions
from shortzip.reduction.selectors import VISIONZIP
from shortzip.train.settings.budget import VisionZipConfig
from shortzip.train.settings.budget_list import listed_budgets
from shortzip.train.settings.command_line import parse_config, run_command, say
from shortzip.train.settings.commands import EstimateConfig
from shortzip.train.step import memory as training_cost
from shortzip.train.step.flops import RowShape, teacher_flops
from shortzip.train.step.teaching_cost import sandwich_bytes, teacher_bytes

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_BUDGET = "54+10"
DEFAULT_FREEZE = "60%"
TEXT_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
VISION_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "patch_size")


@dataclass(frozen=True)
class CostRow:
    """Figures of one reduction; ``memory`` holds the parts that add up to ``training_bytes``."""

    name: str
    visual_tokens: int  # of one sample
    frozen_layers: int
    prefill_flops: int  # the LLM, ShortV's formula
    prefill_flops_grouped: int  # the LLM, with the key heads that are there
    tower_flops: int  # vision tower, what the method reads beside its output, and projector
    kv_cache_bytes: int
    training_flops: int
    training_bytes: int
    memory: dict[str, int]
    largest_micro_batch: int  # 0: not even one sample fits


def known_release(name: str) -> PreTrainedConfig | None:
    """The config of a release known by name, or None."""
    for family in all_families():
        if name in family.releases:
            tower = CLIPVisionConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                image_size=family.releases_side,
                patch_size=14,
            )
            llm, sizes = family.releases[name]
            text = getattr(transformers, llm)(vocab_size=32064, **sizes)
            return family.plain_config_class(text_config=text, vision_config=tower, tie_word_embeddings=False)
    return None


def read_config(model: str) -> PreTrainedConfig:
    """The LLaVA config that ``model`` names. Raises FileNotFoundError or ValueError when there is none."""
    by_name = known_release(model)
    if by_name is not None:
        return by_name
    source = ROOT / "checkpoints" / "demo-llava" if model == "demo" else Path(model)
    if (source.exists() or model == "demo") and not (source / "config.json").is_file():
        raise MissingFile(f"{source}: no config.json there. Name the folder of a LLaVA checkpoint")
    try:
        if source.is_dir():
            values = read_json(source / "config.json")
        else:
            values, _ = PreTrainedConfig.get_config_dict(str(source))
    except UserError:
        raise
    except OSError as error:
        raise MissingFile(
            f"model {model!r} is neither a known release, nor a folder with a config.json, nor a Hub id that can be "
            f"read here: {error}"
        ) from error
    try:
        kind = family_of(values.get("model_type"), model)
    except ReductionError as error:
        raise UserError(f"{error}. An original LLaVA release must be converted first") from error
    try:
        config = kind.plain_config_class.from_dict(values)
        sizes = [
            *(getattr(config.text_config, name) for name in TEXT_SIZES),
            *(getattr(config.vision_config, name) for name in VISION_SIZES),
        ]
    except Exception as error:  # of many kinds, all of a config that is not one
        raise UserError(f"{source / 'config.json'} does not describe a LLaVA: {error}") from error
    for name, size in zip((*TEXT_SIZES, *VISION_SIZES), sizes, strict=True):
        if not isinstance(size, int) or size < 1:
            raise UserError(f"{source / 'config.json'}: {name} is {size!r}, and a number from 1 on is needed")
    return config


def estimate(settings: EstimateConfig) -> tuple[PreTrainedConfig, list[CostRow]]:
    """The config and the four rows: none, VisionZip, ShortV, both. Raises ValueError for settings out of range."""
    config = read_config(settings.model)
    num_layers = config.text_config.num_hidden_layers
    own_budget, own_shortv = config.to_dict().get("visionzip"), config.to_dict().get("shortv")
    if settings.budget is None:
        by = settings.method or VISIONZIP
        budget = own_budget if own_budget and settings.method is None else budget_by(parse_budget(DEFAULT_BUDGET), by)
    else:
        budget = Reductions.parse(settings.budget, method=settings.method or VISIONZIP).visionzip
    frozen: int | list[int]
    if own_shortv and settings.freeze is None:
        frozen = list(own_shortv["layers"])
    else:
        frozen = parse_freeze(settings.freeze or DEFAULT_FREEZE, num_layers)
    frozen = frozen if isinstance(frozen, int) else len(frozen)
    both = Reductions(budget)
    if settings.budgets and settings.frames is not None:
        raise UserError(
            "budgets and frames are both given: one projector for several budgets is tuned on images alone"
        )
    if settings.budgets:
        return config, _of_budgets(config, settings, both.visionzip, frozen)
    if settings.sandwich:
        raise UserError("sandwich is true, and there are no budgets: give two or more (--budgets 64,128,192)")
    reduced = f"{'VisionZip' if both.method == VISIONZIP else both.method_words} {both.budget_words}"
    return config, [
        _row(config, settings, "none", None, 0),
        _row(config, settings, reduced, both.visionzip, 0),
        _row(config, settings, f"ShortV {frozen} of {num_layers}", None, frozen),
        _row(config, settings, "both", both.visionzip, frozen),
    ]


def _of_budgets(config: PreTrainedConfig, settings: EstimateConfig, visionzip: Any, frozen: int) -> list[CostRow]:
    """None, each of the budgets, and one projector for all of them: a step's mean FLOPs, in the memory of the largest.
    Raises ConfigError for a list that no projector is tuned for."""
    listed = [budget.as_key() for budget in listed_budgets(settings.budgets, VisionZipConfig.of(visionzip))]
    rows = [_row(config, settings, f"{format_budget(key)}, {frozen} frozen", key, frozen) for key in listed]
    asked = _teacher_flops(config, settings)
    flops_of = [row.training_flops - asked for row in rows]
    if settings.sandwich:
        between = flops_of[1:-1]
        mean = flops_of[0] + flops_of[-1] + (sum(between) // len(between) if between else 0)
    else:
        mean = sum(flops_of) // len(flops_of)
    name = "one for all" + (", sandwich" if settings.sandwich else "")
    together = _row(config, settings, name, listed[-1], frozen, narrower=listed[-2] if settings.sandwich else None)
    return [_row(config, settings, "none", None, 0), *rows, replace(together, training_flops=mean + asked)]


def _teacher_flops(config: PreTrainedConfig, settings: EstimateConfig) -> int:
    """Of a teacher that is asked in a step, if one is."""
    if not settings.distill:
        return 0
    tiles, whole = _tiles(config, settings), _visual_tokens(config, settings, None)
    row = RowShape(settings.training_text_tokens, whole, settings.training_text_tokens, tiles)
    return settings.global_batch_size * teacher_flops(config, row)


def _row(
    config: PreTrainedConfig,
    settings: EstimateConfig,
    name: str,
    visionzip: Mapping[str, Any] | None,
    frozen: int,
    *,
    narrower: Mapping[str, Any] | None = None,
) -> CostRow:
    tiles = _tiles(config, settings)
    text, prompt = config.text_config, settings.text_tokens
    visual = _visual_tokens(config, settings, visionzip)
    selection = 0 if visionzip is None else flops.selection_flops(config, visionzip, tiles)
    pooled = settings.frames is not None and visionzip is None  # behind the projector, which sees every patch
    side = config.vision_config.image_size // config.vision_config.patch_size
    projected = tiles * side * side if pooled else visual
    step = training_cost.TrainingStep(
        text_tokens=settings.training_text_tokens,
        visual_tokens=visual,
        tiles=tiles,
        frozen_layers=frozen,
        global_batch_size=settings.global_batch_size,
        micro_batch_size=settings.per_device_train_batch_size,
        gradient_checkpointing=settings.gradient_checkpointing,
        weights=settings.weights,
    )
    second = None if narrower is None else (narrower["dominant"], narrower["contextual"])
    read = None if second is None else flops.visual_tokens_per_image(config, second, tiles)
    parts = _memory_parts(config, settings, step, read)
    training_flops = training_cost.training_step_flops(config, step) + _teacher_flops(config, settings)
    return CostRow(
        name=name,
        visual_tokens=visual,
        frozen_layers=frozen,
        prefill_flops=flops.llm_prefill_flops(text, prompt, visual, frozen),
        prefill_flops_grouped=flops.llm_prefill_flops_grouped(text, prompt, visual, frozen),
        tower_flops=flops.vision_tower_flops(config, tiles) + selection + flops.projector_flops(config, projected),
        kv_cache_bytes=flops.kv_cache_bytes(text, prompt + visual, step.bytes_per_value),
        training_flops=training_flops,
        training_bytes=sum(parts.values()),
        memory=parts,
        largest_micro_batch=_largest_micro_batch(config, settings, step, read),
    )


def _tiles(config: PreTrainedConfig, settings: EstimateConfig) -> int:
    """Images, tiles or frames of a sample. Raises UserError where both are given, ReductionError for a family that
    takes no videos."""
    if settings.frames is not None:
        if settings.tiles is not None:
            raise UserError(f"tiles {settings.tiles} and frames {settings.frames} are both given: give one")
        return family_of(config.model_type).check_frames(settings.frames, config)
    return flops.usual_tiles(config) if settings.tiles is None else settings.tiles


def _visual_tokens(config: PreTrainedConfig, settings: EstimateConfig, visionzip: Mapping[str, Any] | None) -> int:
    """Visual tokens of a sample. Raises ReductionError for a budget that the grid cannot fill."""
    budget = None if visionzip is None else (visionzip["dominant"], visionzip["contextual"])
    of_images = flops.visual_tokens_per_image(config, budget, _tiles(config, settings))
    if settings.frames is None:
        return of_images
    return flops.visual_tokens_of_video(config, visionzip, settings.frames)


def _memory_parts(
    config: PreTrainedConfig, settings: EstimateConfig, step: training_cost.TrainingStep, narrower: int | None
) -> dict[str, int]:
    """The parts of the memory at a step's peak; with `distill` the teacher's too, and where settings say `sandwich`
    what narrower readings add: nothing in a row that has none (`narrower`: visual tokens of the widest of them)."""
    memory = training_cost.training_step_memory(config, step)
    parts = asdict(memory)
    if settings.sandwich:
        parts["sandwich"] = 0 if narrower is None else sandwich_bytes(config, step, narrower)
    if settings.distill:
        whole = _visual_tokens(config, settings, None)
        student = memory.activations + memory.working
        parts["teacher"] = teacher_bytes(config, step, whole, student)
    return parts


def _largest_micro_batch(
    config: PreTrainedConfig, settings: EstimateConfig, step: training_cost.TrainingStep, narrower: int | None
) -> int:
    """The most samples, up to the global batch, whose training step fits into ``memory``; 0: none."""
    card_bytes = parse_bytes(settings.memory)
    low, high = 0, step.global_batch_size
    while low < high:
        middle = (low + high + 1) // 2
        parts = _memory_parts(config, settings, replace(step, micro_batch_size=middle), narrower)
        fits = sum(parts.values()) <= card_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns aligned with spaces, the first to the left; header cells may hold line breaks."""
    cells = [cell.split("\n") for cell in header]
    depth = max(len(lines) for lines in cells)
    head = [[lines[i] if i < len(lines) else "" for lines in cells] for i in range(depth)]
    widths = [max(len(line[column]) for line in head + rows) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(pairs)
        )
        for pairs in (list(zip(line, widths, strict=True)) for line in head + rows)
    ]
    lines.insert(depth, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def report(config: PreTrainedConfig, rows: list[CostRow], settings: EstimateConfig) -> str:
    """The whole text that the command prints."""
    text, counts = config.text_config, flops.parameter_counts(config)
    recomputed = "with" if settings.gradient_checkpointing else "without"
    return "\n".join(
        [
            f"{settings.model}: {counts.total / 1e9:.3g} B parameters, {counts.projector / 1e6:.3g} M of them in the "
            f"projector; {text.num_hidden_layers} LLM layers of width {text.hidden_size}",
            "",
            f"Prefill of one sample with {settings.text_tokens} text tokens{_of_video(settings)}",
            _prefill_table(rows),
            "",
            f"Training step of the projector: {settings.global_batch_size} samples of {settings.training_text_tokens} "
            f"text tokens{_of_video(settings)}, {settings.per_device_train_batch_size} in memory at once,",
            f"{settings.weights}, {recomputed} gradient checkpointing",
            _training_table(rows, settings.memory),
            "",
            "A frozen layer keeps keys and values: ShortV leaves the KV cache as it is. Memory is an estimate for one",
            "device that holds the whole model.",
        ]
    )


def _of_video(settings: EstimateConfig) -> str:
    return "" if settings.frames is None else f" and a video of {settings.frames} frames"


def _prefill_table(rows: list[CostRow]) -> str:
    unit, size = _flop_unit([row.prefill_flops for row in rows])
    header = ["", "visual\ntokens", f"LLM\n{unit}", "", "with its own\nkey heads", "tower and\nprojector"]
    cells = [
        [
            row.name,
            str(row.visual_tokens),
            f"{row.prefill_flops / size:.3f}",
            _share(row.prefill_flops, rows[0].prefill_flops),
            f"{row.prefill_flops_grouped / size:.3f}",
            f"{row.tower_flops / size:.3f}",
            f"{row.kv_cache_bytes / 2**20:.1f}",
        ]
        for row in rows
    ]
    return format_table([*header, "KV cache\nMiB"], cells)


def _training_table(rows: list[CostRow], card: str) -> str:
    """`card`: its memory, like 24GiB."""
    unit, size = _flop_unit([row.training_flops for row in rows])
    parts = [f"{part}\nGiB" for part in rows[0].memory]
    cells = [
        [
            row.name,
            f"{row.training_flops / size:.2f}",
            _share(row.training_flops, rows[0].training_flops),
            *(f"{part / 2**30:.2f}" for part in row.memory.values()),
            f"{row.training_bytes / 2**30:.2f}",
            "yes" if row.training_bytes <= parse_bytes(card) else "NO",
            str(row.largest_micro_batch) if row.largest_micro_batch else "none",
        ]
        for row in rows
    ]
    return format_table(["", unit, "", *parts, "total\nGiB", f"fits in\n{card}", "largest\nmicro-batch"], cells)


def _share(value: int, of: int) -> str:
    return f"{100 * value / of:.0f} %"


def _flop_unit(values: list[int]) -> tuple[str, float]:
    """The largest unit that the largest of the values fills, and its FLOPs."""
    units = [("PFLOPs", 1e15), ("TFLOPs", 1e12), ("GFLOPs", 1e9)]
    return next(((name, size) for name, size in units if max(values) >= size), ("MFLOPs", 1e6))


def main(argv: Sequence[str]) -> None:
    run(parse_config(EstimateConfig, argv, program="estimate_cost.py"))


def run(settings: EstimateConfig) -> None:
    """Writes the estimate to ``output`` when given, and prints it."""
    if settings.output is not None:
        refuse_to_replace(settings.output, overwrite=settings.overwrite, inputs=[settings.model])
    config, rows = estimate(settings)
    text = report(config, rows, settings)
    if settings.output is not None:
        values = {
            "model": settings.model,
            "memory": parse_bytes(settings.memory),
            "rows": [asdict(r) for r in rows],
        }
        with writing(settings.output):
            settings.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(settings.output, json.dumps(values, indent=1) + "\n")
    say(text)


if __name__ == "__main__":
    run_command(main)
