"""Runs a training step at full size on tensors that hold nothing, and prints what it would take of a device.

    python scripts/rehearse_memory.py llava-1.5-7b-3090
    python scripts/rehearse_memory.py --model llava-1.5-13b --budget 54+10 --freeze 24 --rows 4 --text_tokens 200

The code is the run's own: tower, selection, projector, the walk through the language model, loss, backward pass, the
optimizer's first step and the step after it (train/rehearsal/). No weights are read and no GPU is needed. What a CUDA
process holds beside its tensors is not in it: `train/step/memory.py` says what that is.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from shortzip.data.batching import BatchPlan
from shortzip.data.dataset import ConversationDataset
from shortzip.data.errors import UserError
from shortzip.data.files import refuse_to_replace, write_atomically, writing
from shortzip.reduction import flops
from shortzip.reduction.families import family_of
from shortzip.reduction.parsing import parse_budget, parse_bytes, parse_freeze
from shortzip.reduction.reductions import Reductions
from shortzip.reduction.selectors import VISIONZIP
from shortzip.scripts.estimate_cost import read_config
from shortzip.train.rehearsal.fake_models import reduced
from shortzip.train.rehearsal.real_rows import integers_of_conversations, largest_micro_batch, recipe_conversations
from shortzip.train.rehearsal.rows import Integers, RowLengths, integers_of
from shortzip.train.rehearsal.step import Rehearsal, StepToRehearse, rehearse
from shortzip.train.settings.budget_list import listed_budgets
from shortzip.train.settings.command_line import load_config, parse_config, run_command
from shortzip.train.settings.commands import RehearseConfig
from shortzip.train.settings.config import TuneConfig
from shortzip.train.settings.recipes import find_recipe
from shortzip.train.step.memory import CUDA_OVERHEAD_BYTES, TrainingStep, training_step_memory
from shortzip.train.step.micro_batch import MicroBatchLimits, StepEstimate, choose_limits
from shortzip.train.step.teaching_cost import sandwich_bytes

KNOWN_AS = {  # so that no recipe needs the network to be rehearsed
    "llava-hf/llava-1.5-7b-hf": "llava-1.5-7b",
    "llava-hf/llava-1.5-13b-hf": "llava-1.5-13b",
    "llava-hf/llava-v1.6-vicuna-7b-hf": "llava-next-7b",
    "llava-hf/LLaVA-NeXT-Video-7B-hf": "llava-next-video-7b",
    "llava-hf/llava-v1.6-vicuna-13b-hf": "llava-next-13b",
    "llava-hf/llava-v1.6-mistral-7b-hf": "llava-next-mistral-7b",
    "YanweiLi/MGM-7B": "mgm-7b",
    "YanweiLi/MGM-13B": "mgm-13b",
    "LanguageBind/Video-LLaVA-7B": "video-llava-7b",
    "checkpoints/demo-llava": "demo",
}
TILED_SIDE = 672  # pixels of an image that LLaVA-NeXT cuts into four tiles beside the whole
CARDS = ("24GiB", "22GiB")  # what is sold as 24 GB, and what its driver and desktop leave
DEFAULT_BUDGET, DEFAULT_FREEZE = "54+10", "60%"


@dataclass(frozen=True)
class Row:
    """One rehearsal, with what it is compared with; bytes."""

    name: str
    rows: int
    tokens: int
    """Of each row, padding included."""
    rehearsed: Rehearsal
    estimated: int
    """Without the overhead."""
    fits: dict[str, bool]
    """By the card's memory, the overhead included."""
    seconds: float


def main(argv: Sequence[str]) -> None:
    run(parse_config(RehearseConfig, argv, program="rehearse_memory.py"))


def run(settings: RehearseConfig) -> None:
    """Prints the tables, and writes the figures to ``output`` when given."""
    if settings.output is not None:
        refuse_to_replace(settings.output, overwrite=settings.overwrite, inputs=[])
    console = Console()
    step, estimate, said = step_of(settings)
    console.print(said, soft_wrap=True, highlight=False)
    rows = []
    with console.status("rehearsing"):
        for name, variant in variants_of(settings, step):
            rows.append(row_of(name, variant, estimate, settings.memory))
    console.print(table_of(rows))
    for row in rows:
        console.print(where(row), soft_wrap=True, highlight=False)
    console.print(phases_of(rows[0]))
    overhead = f"{CUDA_OVERHEAD_BYTES / 2**30:.2f} GiB"
    console.print(f"fits: with {overhead} for CUDA itself, workspaces and fragments on top", highlight=False)
    if settings.output is not None:
        with writing(settings.output):
            settings.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(settings.output, json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def step_of(settings: RehearseConfig) -> tuple[StepToRehearse, TrainingStep, str]:
    """What is rehearsed first, how it is estimated, and words about it.

    Raises `UserError` and `ConfigError` for a model or a recipe that cannot be rehearsed, and where nothing fits.
    """
    recipe = load_config(["--config", find_recipe(settings.recipe)]) if settings.recipe else None
    smaller: list[dict[str, Any]] = []
    if recipe is not None and recipe.budgets:
        recipe, smaller = under_largest(recipe, settings)
    config, most = reduced_of(settings, recipe), recipe.global_batch_size if recipe else 128
    frozen = config.shortv["layers"] if config.shortv else []
    row = row_of_settings(settings, recipe, config, frozen)
    if recipe is not None and settings.conversations:
        dataset = recipe_conversations(recipe)
        row = replace(row, text_tokens=max(1, int(dataset.lengths.max()) - row.visual_tokens), shared_tokens=0)
        limits = limits_of(settings, recipe, StepEstimate(config, row, most))
        batch = real_micro_batch(dataset, recipe, limits)
    else:
        narrower = visual_tokens(config, smaller[0]) if smaller else None
        limits = limits_of(settings, recipe, StepEstimate(config, row, most, narrower=narrower))
        row = row_within(limits, row, most)
        batch = drawn_micro_batch(row, config)
    rows, length = batch.integers.input_ids.shape
    step = StepToRehearse(
        config,
        batch.integers,
        image_sizes=batch.image_sizes,
        tiles=batch.images * row.tiles,
        weights=row.weights,
        recomputed=limits.gradient_checkpointing,
        cached_features=bool(recipe and recipe.data.cache_features),
        accumulates=rows < most,
        narrower=tuple((key, drawn_micro_batch(under(row, config, key), config).integers) for key in smaller),
    )
    text, name = config.text_config, settings.recipe or settings.model or "llava-1.5-7b"
    said = (
        f"{name}: {text.num_hidden_layers} layers of width {text.hidden_size}, {len(frozen)} frozen; {rows} "
        f"conversations of {length} tokens at a time, {row.visual_tokens} of them visual"
    )
    row = replace(row, micro_batch_size=rows, text_tokens=max(1, length - row.visual_tokens))
    return step, row, said


def under_largest(recipe: TuneConfig, settings: RehearseConfig) -> tuple[TuneConfig, list[dict[str, Any]]]:
    """A recipe for several budgets as one for that which takes most, and the `visionzip` keys under which a step reads
    its rows again with `sandwich`: the largest of those between, and the smallest.

    Raises `UserError` for `settings` that say what the rows are under one budget alone.
    """
    assert recipe.visionzip is not None
    *others, largest = listed_budgets(recipe.budgets, recipe.visionzip)
    alone = replace(recipe, visionzip=largest, budgets=[], sandwich=False)
    if not recipe.sandwich:
        return alone, []
    for flag, is_set in (("--budget", settings.budget is not None), ("--conversations", settings.conversations)):
        if is_set:
            raise UserError(f"{flag}: the recipe's sandwich has rows under several budgets: leave it out")
    return alone, [key.as_key() for key in (others[-1:] + others[:-1][:1])]


def visual_tokens(config: Any, key: dict[str, Any]) -> int:
    """Of a conversation with one image, under a budget."""
    return flops.visual_tokens_per_image(config, (key["dominant"], key["contextual"]), flops.usual_tiles(config))


def under(row: TrainingStep, config: Any, key: dict[str, Any]) -> TrainingStep:
    """The same rows under another budget."""
    return replace(row, visual_tokens=visual_tokens(config, key))


@dataclass(frozen=True)
class Batch:
    """A micro-batch's integers, and its images."""

    integers: Integers
    images: int
    image_sizes: list[tuple[int, int]]


def row_of_settings(
    settings: RehearseConfig, recipe: TuneConfig | None, config: Any, frozen: Sequence[int]
) -> TrainingStep:
    """One conversation as long as they come."""
    tiles, zipped = flops.usual_tiles(config), config.visionzip
    budget = (zipped["dominant"], zipped["contextual"]) if zipped else None
    visual = flops.visual_tokens_per_image(config, budget, tiles)
    longest = recipe.data.max_length if recipe and recipe.data.max_length else 2048
    weights = "4bit" if recipe and recipe.load_in_4bit else "bfloat16"
    return TrainingStep(
        text_tokens=settings.text_tokens or max(settings.shared_tokens + 1, longest - visual),
        visual_tokens=visual,
        tiles=tiles,
        frozen_layers=tuple(frozen),
        micro_batch_size=1,
        weights="float32" if recipe and recipe.mixed_precision == "no" else weights,
        shared_tokens=settings.shared_tokens,
        supervised_tokens=settings.supervised_tokens,
    )


def row_within(limits: MicroBatchLimits, row: TrainingStep, most: int) -> TrainingStep:
    """Rows alike, about as long as `row`, that fill what the limits allow."""
    longest = row.text_tokens + row.visual_tokens
    tokens = longest * min(most, limits.rows or most)
    if limits.tokens is not None:
        tokens = max(longest, min(tokens, limits.tokens))
    rows = -(-tokens // longest)
    return replace(
        row, micro_batch_size=rows, text_tokens=max(row.shared_tokens + 1, tokens // rows - row.visual_tokens)
    )


def drawn_micro_batch(row: TrainingStep, config: Any) -> Batch:
    """Rows alike, each with one image."""
    after, rows = row.text_tokens - row.shared_tokens, row.micro_batch_size
    lengths = RowLengths(row.shared_tokens, row.visual_tokens, after, min(after, row.supervised_tokens or after))
    sizes = [(TILED_SIDE, TILED_SIDE)] * rows if family_of(config.model_type).counts_by_size else []
    return Batch(integers_of([lengths] * rows, config.image_token_id), rows, sizes)


def real_micro_batch(dataset: ConversationDataset, recipe: TuneConfig, limits: MicroBatchLimits) -> Batch:
    """The one of the recipe's first steps that holds most tokens."""
    plan = BatchPlan(
        dataset.lengths.tolist(),
        recipe.global_batch_size,
        seed=recipe.seed,
        micro_batch_size=limits.rows,
        max_tokens_per_micro_batch=limits.tokens,
    )
    numbers = largest_micro_batch(dataset, plan)
    integers, sizes = integers_of_conversations(dataset, numbers)
    return Batch(integers, sum(len(dataset.conversations[number].images) for number in numbers), sizes)


def reduced_of(settings: RehearseConfig, recipe: TuneConfig | None) -> Any:
    """The reduced config that settings and recipe name. Layers that LC is to choose are taken as the first ones: what
    is plain in the end takes most."""
    given = settings.model or (recipe.model if recipe else "llava-1.5-7b")
    plain = read_config(KNOWN_AS.get(given, given))
    values, depth = plain.to_dict(), plain.text_config.num_hidden_layers
    visionzip, shortv = values.get("visionzip"), values.get("shortv")
    freeze: Any = None
    if recipe is not None:
        visionzip = recipe.visionzip.as_key() if recipe.visionzip else None
        shortv = {"layers": recipe.shortv.layers} if recipe.shortv and recipe.shortv.layers else None
        freeze = str(recipe.shortv.freeze) if recipe.shortv and recipe.shortv.freeze else None
        if recipe.fastv is not None:
            raise UserError("fastv: pruning inside the language model cannot be rehearsed: set it to null")
        if recipe.distill is not None:
            raise UserError(
                "distill: what a teacher takes cannot be rehearsed: set it to null, and leave the room that "
                "shortzip estimate --distill true says"
            )
    elif settings.model is None or not (visionzip or shortv):
        visionzip, freeze = parse_budget(DEFAULT_BUDGET), DEFAULT_FREEZE
    if settings.budget is not None:
        visionzip = Reductions.parse(settings.budget, method=settings.method or VISIONZIP).visionzip
    if settings.freeze is not None:
        freeze, shortv = settings.freeze, None
    if freeze is not None and freeze != "none":
        layers = parse_freeze(freeze, depth)
        shortv = {"layers": list(range(layers)) if isinstance(layers, int) else layers}
    if visionzip and visionzip.get("method") == "random":
        raise UserError("visionzip: method random draws by each image, and there are none: rehearse method grid")
    return reduced(
        plain, Reductions(visionzip, shortv).largest_budget
    )  # positions are a few integers, whichever they are


def limits_of(settings: RehearseConfig, recipe: TuneConfig | None, estimate: StepEstimate) -> MicroBatchLimits:
    """The micro-batch that is given, or that a run would choose. Raises `ConfigError` where nothing fits."""
    again = recipe.gradient_checkpointing if recipe else None
    if settings.rows is not None:
        return MicroBatchLimits(settings.rows, None, bool(again))
    if recipe and (recipe.per_device_train_batch_size or recipe.max_tokens_per_micro_batch):
        given = recipe.per_device_train_batch_size, recipe.max_tokens_per_micro_batch
        return MicroBatchLimits(*given, bool(again))
    memory = parse_bytes(settings.memory)
    if recipe and recipe.max_memory:
        memory = min(memory, parse_bytes(recipe.max_memory))
    return choose_limits(estimate, memory, again)


def variants_of(settings: RehearseConfig, step: StepToRehearse) -> Iterator[tuple[str, StepToRehearse]]:
    """What is rehearsed, by name; another way of training, such as distillation, would be one more."""
    yield "recomputed" if step.recomputed else "kept", step
    if settings.variants:
        yield "kept" if step.recomputed else "recomputed", replace(step, recomputed=not step.recomputed)
        if not step.cached_features and step.config.visionzip:
            yield "cached features", replace(step, cached_features=True)
        if step.weights != "4bit" and importlib.util.find_spec("bitsandbytes") is not None:
            yield "4 bits", replace(step, weights="4bit")
    if settings.processes > 1:
        yield f"FSDP2 over {settings.processes}", replace(step, every_token=True, processes=settings.processes)


def row_of(name: str, step: StepToRehearse, estimate: TrainingStep, memory: str) -> Row:
    """Rehearses, and estimates the same."""
    started = time.perf_counter()
    found = rehearse(step)
    same = replace(
        estimate,
        gradient_checkpointing=step.recomputed,
        cached_features=step.cached_features,
        weights=step.weights,
        every_token=step.every_token,
        weights_share=1 / step.processes,
    )
    expected = training_step_memory(step.config, same).total - CUDA_OVERHEAD_BYTES
    if step.narrower:
        expected += sandwich_bytes(step.config, same, visual_tokens(step.config, step.narrower[0][0]))
    cards = dict.fromkeys((memory, *CARDS))
    fits = {card: found.peak.total + CUDA_OVERHEAD_BYTES <= parse_bytes(card) for card in cards}
    rows, tokens = step.integers.input_ids.shape
    return Row(name, rows, tokens, found, expected, fits, time.perf_counter() - started)


def table_of(rows: Sequence[Row]) -> Table:
    """What each way takes at its peak."""
    table = Table("", "peak GiB", "estimate", "at rest", *(f"fits {card}" for card in rows[0].fits), "peak in")
    for row in rows:
        sizes = (row.rehearsed.peak.total, row.estimated, sum(row.rehearsed.resting.values()))
        fits = ("yes" if fit else "NO" for fit in row.fits.values())
        table.add_row(row.name, *(f"{size / 2**30:.2f}" for size in sizes), *fits, row.rehearsed.peak.phase)
    return table


def phases_of(row: Row) -> Table:
    """The first way's peak by phase and by part, GiB."""
    shown = {"weights": ("weights", "gathered weights"), "trained": ("projector", "gradients", "moments")}
    shown |= {part: (part,) for part in ("inputs", "activations", "working", "kernels")}
    table = Table(row.name, "GiB", *shown)
    for name, peak in row.rehearsed.phases.items():
        sizes = (sum(peak.parts.get(part, 0) for part in parts) for parts in shown.values())
        table.add_row(name, f"{peak.total / 2**30:.2f}", *(f"{size / 2**30:.2f}" if size else "" for size in sizes))
    return table


def where(row: Row) -> str:
    """The operator and the line at the peak."""
    peak = row.rehearsed.peak
    return f"{row.name}: {peak.operator}{' of ' + peak.node if peak.node else ''}, {peak.line or 'a backward pass'}"


if __name__ == "__main__":
    run_command(main)
