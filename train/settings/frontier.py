"""The settings of `frontier`.

Nothing here imports what a command works with: its --help needs no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from shortzip.reduction.parsing import parse_budget
from shortzip.reduction.selectors import VISIONZIP
from shortzip.train.settings.budget import FastVConfig, VisionZipConfig
from shortzip.train.settings.checks import ConfigError, repeated
from shortzip.train.settings.comparing import alike, refuse_repeated

DOMINANT_ONLY = "dominant only"
HOW_TO_TUNE = (
    "distill", "budget_schedule", "tune", "tuning", "lora_r", "lora_alpha", "learning_rate", "weight_decay",
    "lr_scheduler_type", "warmup_ratio", "num_train_epochs", "max_steps", "global_batch_size", "max_grad_norm",
    "data.instructions", "data.image_root", "data.fraction", "data.max_length",
)  # fmt: skip


def plain_name(text: str) -> str:
    """What a point, and so its folder, is called by: letters, digits, + - and . alone."""
    return "".join(letter if letter.isalnum() or letter in "+-." else "-" for letter in text)


@dataclass(frozen=True)
class Kind:
    """A kind of questions."""

    name: str
    """The column's heading."""
    pattern: str
    """The regular expression that is found in its questions."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"kinds: {self.name}: {self.pattern!r} is no regular expression: {error}") from error


@dataclass(frozen=True)
class Training:
    """A way to tune."""

    name: str
    """What its rows are called."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Keys of the recipe with other values: {max_steps: 640, distill: {weight: 0.5}}. Those that say how to tune, not
    what, or how it is measured."""
    against: str | None = None
    """The training that it is compared with, by name; null: the first."""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ConfigError("trainings: one of them has no name")
        other = [key for key in self.settings if key not in HOW_TO_TUNE and key.partition(".")[0] not in HOW_TO_TUNE]
        if other:
            known = ", ".join(HOW_TO_TUNE)
            raise ConfigError(f"trainings: {self.name}: {other[0]} does not say how to tune: one of {known} is needed")

    @property
    def starts_at(self) -> int | None:
        """The loosest budget of its own schedule, in tokens; None where it says none."""
        schedule = self.settings.get("budget_schedule")
        start = self.settings.get("budget_schedule.start", schedule.get("start") if schedule else None)
        return None if start is None else int(start)


@dataclass(frozen=True)
class FrontierConfig:
    """Settings of scripts/frontier.py.

    shortzip frontier --recipe llava-1.5-7b --budget 162+30,108+20,54+10 --freeze 0,60%
    """

    recipe: str
    """The YAML of a run: release, data and how to tune."""
    output: str
    """Folder of everything that is written."""
    budgets: list[str] = field(default_factory=list)
    """Budgets (dominant+contextual), each with each of `freeze`. The first is the one the baselines are held to."""
    freeze: list[str] = field(default_factory=lambda: ["0"])
    """How many layers to freeze, as numbers or shares; those with the lowest LC on the visual tokens that a budget
    leaves. The last is the one that rankings are compared at."""
    methods: list[str] = field(default_factory=list)
    """Ways to choose, with as many tokens as `tokens` says: visionzip and the others with their parameters, the
    baselines (random, grid, pool, downsample), and "dominant only"."""
    tokens: list[int] = field(default_factory=list)
    """Visual tokens per image that each of `methods` is held to; empty: as many as the first budget has."""
    contextual_share: float = 0.25
    """Share of these tokens that a merging method makes of others; one that merges nothing keeps all as dominant."""
    positions: list[Literal["compact", "original"]] = field(default_factory=lambda: ["compact"])
    """Which positions visual tokens have in the language model, for each of `methods`, untuned."""
    tune_original: list[str] = field(default_factory=list)
    """Those of `methods` that are also tuned with original positions; the others are with compact ones."""
    reference: str = VISIONZIP
    """The one of `methods` that the others are compared with, at equal tokens, positions and tuning."""
    kinds: list[Kind] = field(default_factory=list)
    """Kinds of questions that are told apart; a question is of the first whose pattern it fits."""
    resamples: int = 10_000
    """How often questions and seeds are drawn for an interval (bootstrap)."""
    fastv: list[FastVConfig] = field(default_factory=list)
    """Pruning inside the language model, on all tokens."""
    rankings: list[str] = field(default_factory=list)
    """Other rankings of the layers to freeze, on all tokens, beside lc: cosine, random."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of what is drawn at random, and of tuning."""
    tune: bool = False
    """Also tune each point by the recipe, once per seed."""
    elastic: bool = False
    """With tune: beside the projectors that are tuned for one of `budgets` each, one that is tuned for all of them,
    once per seed and number of frozen layers (those of the first budget), and is measured under each."""
    sandwich: bool = False
    """With elastic: that one is tuned with sandwich (each step has the largest budget, the smallest, one between)."""
    per_image: list[VisionZipConfig] = field(default_factory=list)
    """`visionzip` keys with a budget for each image (scripts/calibrate_budget.py prints them), each compared with the
    one of `budgets` that has its dominant and contextual. A method's own parameters stand in `parameters`."""
    trainings: list[Training] = field(default_factory=list)
    """With tune: ways to tune every point, beside one another; empty: as the recipe says. The first is that of the
    frontier's own table and picture."""
    prefill_rounds: int = 3
    """How often prefill is timed: a round times every untuned point once, so that a slower moment is so for all."""
    samples: int | None = None
    """Only the first so many held-out conversations; null: as the recipe says."""
    processes: int = 1
    """Processes that tune and evaluate the tuned points side by side; on a CPU one per core, each with one thread."""
    report_only: bool = False
    """Measure nothing: write the report of what is measured so far."""

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ConfigError("seeds is empty: at least one is needed")
        if self.prefill_rounds < 1:
            raise ConfigError(f"prefill_rounds is {self.prefill_rounds}: at least 1 is needed")
        for name, values in (
            ("seeds", self.seeds), ("budgets", self.budgets), ("freeze", self.freeze), ("methods", self.methods),
            ("fastv", self.fastv), ("rankings", self.rankings), ("tokens", self.tokens),
            ("positions", self.positions), ("tune_original", self.tune_original),
        ):  # fmt: skip
            again = repeated(values)
            if again:
                raise ConfigError(f"{name}: {again[0]!r} stands there twice")
        if not self.freeze:
            raise ConfigError("freeze is empty: give at least one number of layers, 0 to freeze none")
        for freeze in self.freeze:
            if not re.fullmatch(r"\d+|\d+(\.\d+)?%", freeze):
                raise ConfigError(f"freeze {freeze!r}: a number of layers (19) or a share (60%) is needed")
        bad = [ranking for ranking in self.rankings if ranking not in ("cosine", "random")]
        if bad:
            raise ConfigError(f"{bad[0]!r} is none of cosine, random")
        if self.methods and not (self.budgets or self.tokens):
            raise ConfigError("methods are held to `tokens` or to the first budget: both are empty")
        self._check_methods()
        self._check_elastic()
        self._check_trainings()

    def _check_trainings(self) -> None:
        """Raises ConfigError for trainings that no table can tell apart, and budgets per image that are none."""
        names = [training.name for training in self.trainings]
        refuse_repeated("trainings", [plain_name(name) for name in names])
        for training in self.trainings:
            if training.against is not None and (training.against == training.name or training.against not in names):
                raise ConfigError(
                    f"trainings: {training.name}: against is {training.against!r}: another one is needed"
                )
        for visionzip in self.per_image:
            if visionzip.per_image is None or visionzip.per_image.chooser == "fixed":
                key = visionzip.as_key()
                raise ConfigError(f"per_image: {key} gives all images one budget: it belongs in budgets")

    def _check_elastic(self) -> None:
        """Raises ConfigError for budgets that no projector can be tuned for together."""
        if self.sandwich and not self.elastic:
            raise ConfigError("sandwich is true, and elastic is false: it says how one projector for all is tuned")
        if not self.elastic:
            return
        if len(self.budgets) < 2:
            raise ConfigError(f"elastic is true, and budgets is {self.budgets}: two or more are needed")
        tokens = [sum(parse_budget(alike("budget", budget)).values()) for budget in self.budgets]
        if again := repeated(tokens):
            raise ConfigError(f"elastic: two of budgets have {again[0]} tokens: each must have another number")

    def _check_methods(self) -> None:
        """Raises ConfigError for what the table of `methods` cannot be made of."""
        for key in ("methods", "tune_original"):
            words = [each if each == DOMINANT_ONLY else alike("method", each) for each in getattr(self, key)]
            object.__setattr__(self, key, words)
        if min([*self.tokens, self.processes, self.resamples]) < 1:
            raise ConfigError(
                f"tokens {self.tokens}, processes {self.processes}, resamples {self.resamples}: at least 1 is needed"
            )
        if not 0 <= self.contextual_share < 1:
            raise ConfigError(f"contextual_share is {self.contextual_share}: 0 up to, but not including, 1 is needed")
        if self.methods and not self.positions:
            raise ConfigError("positions is empty: compact, original or both are needed")
        foreign = [method for method in self.tune_original if method not in self.methods]
        if foreign:
            raise ConfigError(f"tune_original: {foreign[0]!r} is none of methods: {', '.join(self.methods)}")
        refuse_repeated("kinds", [kind.name for kind in self.kinds])
