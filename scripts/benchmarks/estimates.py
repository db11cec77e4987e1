"""Holds the memory estimate against the rehearsal, for models, micro-batches and ways of training.

    python scripts/benchmarks/estimates.py [--models [llava-1.5-7b]] [--output estimates.json]

Full width, `--layers` layers: in a few, what is not the layers' weighs more. The table says, for each way, how much
the estimate is above what the step's own code holds at its peak on fake tensors (train/rehearsal/), least and most
over the micro-batches. tests/train/test_rehearsal.py holds it to 0 to 3 %.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from shortzip.data.errors import UserError
from shortzip.data.files import refuse_to_replace
from shortzip.reduction.image_budgets import divided
from shortzip.reduction.reductions import Reductions
from shortzip.scripts.benchmarks.shapes import BEFORE, SHAPES
from shortzip.scripts.benchmarks.timing import write_figures
from shortzip.scripts.estimate_cost import known_release
from shortzip.train.rehearsal.fake_models import reduced
from shortzip.train.rehearsal.rows import RowLengths, integers_of
from shortzip.train.rehearsal.step import StepToRehearse, rehearse
from shortzip.train.settings.command_line import parse_config, run_command
from shortzip.train.step.memory import CUDA_OVERHEAD_BYTES, TrainingStep, training_step_memory
from shortzip.train.step.teaching_cost import sandwich_bytes

MODELS = ("llava-1.5-7b", "llava-1.5-13b", "llava-next-7b", "llava-next-mistral-7b")
MICRO_BATCHES = ((1, 1965), (4, 165), (16, 165), (48, 40))  # rows, and text tokens of each behind its image


@dataclass(frozen=True)
class Way:
    """How a step is computed, beside what `StepToRehearse` does by default; `frozen` None: some of the layers."""

    frozen: tuple[int, ...] | None = None
    supervised: int | None = None
    weights: str = "bfloat16"
    recomputed: bool = False
    cached_features: bool = False
    every_token: bool = False
    processes: int = 1
    sandwich: bool = False
    """Rows are read under half and a quarter of the tokens too."""

    def __str__(self) -> str:
        changed = [f"{name}={value}" for name, value in vars(self).items() if value != getattr(Way(), name)]
        return ", ".join(changed) or "as a run is by default"


WAYS = (
    Way(), Way(recomputed=True), Way(cached_features=True), Way(weights="4bit"), Way(weights="float32"),
    Way(every_token=True), Way(every_token=True, recomputed=True), Way(frozen=()), Way(supervised=4),
    Way(frozen=(), recomputed=True), Way(weights="4bit", recomputed=True), Way(every_token=True, processes=8),
    Way(every_token=True, processes=8, recomputed=True),
)  # fmt: skip
# Held less tightly: what several readings add is estimated by the peak of the widest and that of the others.
SANDWICHES = (
    Way(sandwich=True), Way(sandwich=True, recomputed=True), Way(sandwich=True, cached_features=True),
    Way(sandwich=True, every_token=True), Way(sandwich=True, every_token=True, processes=8),
)  # fmt: skip


@dataclass(frozen=True)
class Held:
    """One step: bytes at its peak, as rehearsed and as estimated without what CUDA takes for itself."""

    model: str
    rows: int
    after: int
    way: str
    rehearsed: int
    estimated: int

    @property
    def ratio(self) -> float:
        return self.estimated / self.rehearsed


def compare(name: str, rows: int, after: int, layers: int | None, way: Way) -> Held:
    """`rows` conversations with an image and `after` text tokens behind it; `layers` None: as the model has them."""
    shape, plain = SHAPES.get(name, SHAPES["llava-next-7b"]), known_release(name)
    if plain is None:
        raise UserError(f"model {name}: choose of {', '.join(MODELS)}")
    frozen = shape.frozen
    if layers is not None:
        plain.text_config.num_hidden_layers, frozen = layers, [0, *range(max(1, layers // 2), layers)]
    if way.frozen is not None:
        frozen = list(way.frozen)
    budget = {"dominant": shape.dominant, "contextual": shape.contextual}
    config = reduced(plain, Reductions(budget, {"layers": frozen} if frozen else None))
    visual = shape.tiles * sum(budget.values())
    supervised = after if way.supervised is None else way.supervised
    sizes = [(672, 672)] * rows if shape.tiles > 1 else []
    same: dict[str, Any] = {
        "weights": way.weights, "cached_features": way.cached_features, "every_token": way.every_token
    }  # fmt: skip
    integers = integers_of([RowLengths(BEFORE, visual, after, supervised)] * rows, config.image_token_id)
    step = StepToRehearse(
        config, integers, sizes, rows * shape.tiles, recomputed=way.recomputed, processes=way.processes, **same
    )
    if way.sandwich:
        smaller = [{**budget, **divided(budget, sum(budget.values()) // part)} for part in (2, 4)]
        lengths = [RowLengths(BEFORE, shape.tiles * sum(key.values()), after, supervised) for key in smaller]
        readings = (integers_of([each] * rows, config.image_token_id) for each in lengths)
        step = replace(step, narrower=tuple(zip(smaller, readings, strict=True)))
    estimate = TrainingStep(
        text_tokens=BEFORE + after,
        visual_tokens=visual,
        tiles=shape.tiles,
        frozen_layers=tuple(frozen),
        micro_batch_size=rows,
        gradient_checkpointing=way.recomputed,
        weights_share=1 / way.processes,
        shared_tokens=BEFORE,
        supervised_tokens=supervised,
        **same,
    )
    estimated = training_step_memory(config, estimate).total - CUDA_OVERHEAD_BYTES
    estimated += sandwich_bytes(config, estimate, visual // 2) if way.sandwich else 0
    return Held(name, rows, after, str(way), rehearse(step).peak.total, estimated)


@dataclass
class EstimatesConfig:
    """What `scripts/benchmarks/estimates.py` takes."""

    models: list[str] = field(default_factory=lambda: list(MODELS))
    """Of which a config is known."""
    layers: int = 6
    """Of the language model."""
    output: Path | None = None
    """A JSON file to write every comparison to."""
    overwrite: bool = False
    """Replace the file that is there already."""


def matrix(settings: EstimatesConfig) -> Iterator[Held]:
    for name in settings.models:
        for way in WAYS:
            for rows, after in MICRO_BATCHES:
                yield compare(name, rows, after, settings.layers, way)


def table_of(held: Sequence[Held]) -> str:
    """Markdown: ways down, models across, how far the estimate is above the rehearsal."""
    models = list(dict.fromkeys(one.model for one in held))
    lines = [f"| | {' | '.join(models)} |", "|---" * (1 + len(models)) + "|"]
    for way in dict.fromkeys(one.way for one in held):
        cells = []
        for model in models:
            ratios = [100 * (one.ratio - 1) for one in held if (one.way, one.model) == (way, model)]
            cells.append(f"{min(ratios):.1f} to {max(ratios):.1f} %" if ratios else "")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Prints each comparison as it is made and the table, and writes `output` when given."""
    settings = parse_config(EstimatesConfig, argv, program="estimates.py")
    if settings.output is not None:
        refuse_to_replace(settings.output, overwrite=settings.overwrite)
    console, held = Console(soft_wrap=True), []
    for one in matrix(settings):
        held.append(one)
        sizes = f"{one.estimated / 2**30:.2f} of {one.rehearsed / 2**30:.2f} GiB"
        console.print(f"{one.model}, {one.rows} x {one.after}, {one.way}: {one.ratio:.4f}, {sizes}", highlight=False)
    print(table_of(held))
    if settings.output is not None:
        write_figures(settings.output, {"held": [asdict(one) for one in held]})


if __name__ == "__main__":
    run_command(main)
