"""Measures a budget for each image against one budget for all, at the same mean of visual tokens, untuned.

    python scripts/benchmarks/per_image.py --output per_image.json

For every mean and chooser: calibrated on drawn scenes that are neither trained on nor held out, then the held-out
scenes are answered. What is calibrated on one sample has another mean on the next: both are shown. By the number of
objects in a scene, too: with the best budget for each number, of those measured, found on the very questions, no more
than the mean is spent; what that is above one budget for all is what fullness has to decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from shortzip.data.files import refuse_to_replace
from shortzip.data.generated.scenes import MAX_OBJECTS, sample_scene
from shortzip.reduction.image_budgets import budget_of
from shortzip.reduction.parsing import format_budget
from shortzip.reduction.reductions import Reductions
from shortzip.reduction.selectors import VISIONZIP
from shortzip.scripts.benchmarks.timing import write_figures
from shortzip.train.calibration.budget_choice import calibrate
from shortzip.train.evaluation.comparison import Candidate, compare
from shortzip.train.inputs.samples import draw_demo_scenes
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.settings.calibrating import CalibrateBudgetConfig
from shortzip.train.settings.command_line import parse_config, run_command
from shortzip.train.settings.config import DEMO, DataConfig, DemoScenesConfig

ONE = "one budget"


@dataclass
class BenchmarkConfig:
    """What `scripts/benchmarks/per_image.py` takes."""

    model: str = "checkpoints/demo-llava"
    """A release that reads drawn scenes."""
    means: list[int] = field(default_factory=lambda: [16, 32, 64])
    """Visual tokens per image on the average."""
    choosers: list[str] = field(default_factory=lambda: ["coverage", "image"])
    """Which to hold against one budget for all."""
    budget: str = "12+4"
    """dominant+contextual, whose shares every budget has."""
    method: str = VISIONZIP
    """How tokens are chosen."""
    positions: str = "compact"
    """compact or original."""
    min: int = 4
    """The smallest budget of an image."""
    max: int = 144
    """The largest; no more than four times the mean is taken."""
    samples: int = 500
    """Scenes to calibrate on."""
    seed: int = 0
    """Which ones."""
    scenes: int = 256
    """Held-out scenes to answer about."""
    batch_size: int = 64
    """Conversations and questions at once."""
    output: Path | None = None
    """A JSON file to write the figures to."""
    overwrite: bool = False
    """Replace the file that is there already."""


def rows(settings: BenchmarkConfig) -> Iterator[Candidate]:
    """One budget for all and each chooser at every mean."""
    spec = ReleaseSpec(settings.model)
    shares = Reductions.parse(settings.budget, method=settings.method).visionzip
    assert shares is not None
    for mean in settings.means:
        one = Reductions(budget_of(shares, mean), positions=settings.positions)
        yield Candidate(f"{mean}: {ONE}", spec, one)
        for chooser in settings.choosers:
            found = calibrate(
                CalibrateBudgetConfig(
                    mean=mean,
                    min=settings.min,
                    max=min(settings.max, 4 * mean),
                    chooser=chooser,  # type: ignore[arg-type]  # as the command line gave it
                    model=settings.model,
                    samples=settings.samples,
                    seed=settings.seed,
                    budget=format_budget(shares),
                    method=settings.method,
                )
            )
            yield Candidate(f"{mean}: {chooser}", spec, Reductions(found.visionzip, positions=settings.positions))


def benchmark(settings: BenchmarkConfig) -> list[dict[str, Any]]:
    """The evaluation of every row, with its `visionzip` key."""
    data = DataConfig(
        instructions=settings.model,  # not read
        eval_instructions=DEMO,
        demo_scenes=DemoScenesConfig(eval_scenes=settings.scenes),
    )
    draw_demo_scenes(data)
    candidates = list(rows(settings))
    results, answers = compare(
        candidates, data, Accelerator(), batch_size=settings.batch_size, max_new_tokens=48, timed=False
    )
    keys = [row.reductions and row.reductions.as_config()["visionzip"] for row in candidates]
    numbers = np.array([objects_in(answer.id) for answer in answers[0]])
    found = [
        {"visionzip": key, **asdict(result), "by objects": by_objects([one.correct for one in own], numbers)}
        for key, result, own in zip(keys, results, answers, strict=True)
    ]
    counts = np.bincount(numbers, minlength=MAX_OBJECTS + 1)[1:]
    alone = {mean: row["by objects"] for mean in settings.means for row in found if row["name"] == f"{mean}: {ONE}"}
    for mean in settings.means:
        share, budgets = best_by_objects(alone, counts, mean)
        spent = float((np.array(budgets) * counts).sum() / counts.sum())
        best = {"exact_match": share, "visual_tokens": spent, "budgets": budgets}
        found.append({"name": f"{mean}: best by objects", **best})
    return found


def objects_in(scene: str) -> int:
    """Objects of a drawn scene by its id, scene-SEED-INDEX."""
    _, seed, index = scene.split("-")
    return len(sample_scene(int(seed), int(index)).objects)


def by_objects(correct: Sequence[bool], numbers: NDArray[np.int64]) -> list[float]:
    """Exact match of the questions about scenes with 1, 2, … objects; 0 where there is none."""
    right = np.array(correct, dtype=bool)
    return [
        float(right[numbers == number].mean()) if (numbers == number).any() else 0.0
        for number in range(1, MAX_OBJECTS + 1)
    ]


def best_by_objects(
    alone: Mapping[int, Sequence[float]], counts: NDArray[np.int64], mean: int
) -> tuple[float, list[int]]:
    """The best exact match, and the budget for each number of objects, of those that spend no more than the mean.

    Args:
        alone: by budget, exact match for each number of objects.
        counts: questions for each number of objects.
    """
    share = counts / counts.sum()
    return max(
        (float(sum(alone[budget][place] * share[place] for place, budget in enumerate(budgets))), list(budgets))
        for budgets in product(alone, repeat=len(share))
        if float(np.dot(budgets, share)) <= mean + 1e-9
    )


def main(argv: Sequence[str]) -> None:
    """Prints the table, and writes it to `output` when given."""
    settings = parse_config(BenchmarkConfig, argv, program="per_image.py")
    if settings.output is not None:
        refuse_to_replace(settings.output, overwrite=settings.overwrite)
    found = benchmark(settings)
    table = Table(title=f"untuned, {found[0]['questions']} questions, {settings.method}, seed {settings.seed}")
    numbers = [f"{number} objects" for number in range(1, MAX_OBJECTS + 1)]
    for heading in ("mean asked", "exact match", "loss", "mean visual tokens", *numbers):
        table.add_column(heading, justify="left" if heading == "mean asked" else "right")
    for row in found:
        loss = f"{row['loss']:.4f}" if "loss" in row else ""
        own = row.get("budgets")  # of the best ones, which are shown in place of what they win
        shares = [f"({budget})" for budget in own] if own else [f"{share:.1%}" for share in row["by objects"]]
        table.add_row(row["name"], f"{row['exact_match']:.1%}", loss, f"{row['visual_tokens']:.2f}", *shares)
    Console().print(table)
    if settings.output is not None:
        write_figures(settings.output, {"settings": asdict(settings), "rows": found})


if __name__ == "__main__":
    run_command(main)
