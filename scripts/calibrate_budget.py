"""Finds the parameter with which each image gets its own budget, for a mean of so many visual tokens.

    python scripts/calibrate_budget.py --budget 12+4 --chooser coverage --mean 16 --min 4 --max 64

Prints the `visionzip` key for a run's YAML, and how the sample's budgets are spread. Works with any release, reduced
checkpoint or run's folder, and any instruction file; each image is read once.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

import yaml

from shortzip.data.files import refuse_to_replace, write_atomically
from shortzip.reduction.reductions import Reductions
from shortzip.train.calibration.budget_choice import FoundBudgets, calibrate
from shortzip.train.settings.calibrating import CalibrateBudgetConfig
from shortzip.train.settings.command_line import parse_config, run_command, say


def report(found: FoundBudgets, settings: CalibrateBudgetConfig) -> str:
    """What the command prints."""
    budgets = sorted(found.budgets)
    at_least, at_most = budgets.count(settings.min), budgets.count(settings.max)
    key = yaml.safe_dump(found.visionzip, default_flow_style=True, sort_keys=False, width=1000).strip()
    described = Reductions(found.visionzip).describe()
    lines = [
        f"{len(budgets)} images of {settings.instructions} (seed {settings.seed}): {described}",
        f"mean {found.mean:.2f} (asked: {settings.mean:g}), median {statistics.median(budgets):g}, "
        f"{budgets[0]} to {budgets[-1]}; {at_least} images at min, {at_most} at max",
    ]
    if found.dropped:
        lines.append(f"left out: {', '.join(f'{count} {reason}' for reason, count in found.dropped.items())}")
    return "\n".join([*lines, "", f"visionzip: {key}"])


def as_json(found: FoundBudgets, settings: CalibrateBudgetConfig) -> dict[str, Any]:
    """What the output holds."""
    names = ("model", "revision", "instructions", "samples", "seed", "mean")
    return {
        **{name: getattr(settings, name) for name in names},
        "visionzip": found.visionzip,
        "mean found": found.mean,
        "budgets": found.budgets,
        "dropped": found.dropped,
    }


def main(argv: Sequence[str]) -> None:
    run(parse_config(CalibrateBudgetConfig, argv, program="calibrate_budget.py"))


def run(settings: CalibrateBudgetConfig) -> None:
    """Calibrates, and prints what was found. Raises what `calibrate` raises."""
    if settings.output is not None:
        refuse_to_replace(
            settings.output, overwrite=settings.overwrite, inputs=[settings.model, settings.instructions]
        )
    found = calibrate(settings)
    say(report(found, settings))
    if settings.output is not None:
        write_atomically(settings.output, json.dumps(as_json(found, settings), indent=1) + "\n")
        say(f"written: {settings.output}")


if __name__ == "__main__":
    run_command(main)
