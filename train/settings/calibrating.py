"""Settings of scripts/calibrate_budget.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shortzip.reduction.parsing import parse_budget
from shortzip.reduction.selectors import VISIONZIP
from shortzip.train.settings.checks import ConfigError, _at_least, check_seed
from shortzip.train.settings.config import DEMO


@dataclass(frozen=True)
class CalibrateBudgetConfig:
    """What `scripts/calibrate_budget.py` takes.

    shortzip calibrate_budget --budget 12+4 --chooser coverage --mean 16 --min 4 --max 64
    """

    mean: float
    """Visual tokens per image (LLaVA-NeXT: per tile) that are wanted on the average."""
    min: int
    """The smallest budget of an image."""
    max: int
    """The largest."""
    chooser: Literal["coverage", "image"] = "coverage"
    """What chooses: the tower's attention (coverage), or the picture alone (image)."""
    model: str = "checkpoints/demo-llava"
    """A release, a reduced checkpoint or a run's folder; or a Hub id. Of its weights, only the tower's are read."""
    revision: str | None = None
    """With a Hub id: the revision."""
    instructions: str = DEMO
    """Conversations whose images are calibrated on; demo draws scenes that are neither trained on nor held out."""
    image_root: str | None = None
    """Folder that image paths start from; null means the folder of the instructions."""
    samples: int = 500
    """Images to calibrate on."""
    seed: int = 0
    """Which ones are drawn."""
    budget: str | None = None
    """dominant+contextual, whose shares every budget has. Default: the model's own."""
    method: str = VISIONZIP
    """With budget: how tokens are chosen, with parameters as in vispruner:important=0.25."""
    on_bad_sample: Literal["raise", "skip"] = "raise"
    """What a bad row or image gets: an error, or being left out and counted."""
    output: Path | None = None
    """A JSON file for what was found, with each image's budget; null writes none."""
    overwrite: bool = False
    """Replace that file."""

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        _at_least(self, "", samples=1, min=1)
        if self.max <= self.min:
            raise ConfigError(f"max is {self.max}: more than min, {self.min}, is needed")
        if not self.min < self.mean < self.max:
            raise ConfigError(
                f"mean is {self.mean:g}: a number between min, {self.min}, and max, {self.max}, is needed"
            )
        if self.budget is not None:
            parse_budget(self.budget)
        elif self.method != VISIONZIP:
            raise ConfigError(f"method {self.method!r}: give the budget that is met by it")
