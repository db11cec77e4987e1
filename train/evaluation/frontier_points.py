"""The frontier's points: budgets x frozen layers, and the baselines at equal tokens, untuned and tuned."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from shortzip.reduction.parsing import parse_budget
from shortzip.reduction.reductions import ALL, Reductions
from shortzip.train.evaluation.frontier_report import GRID_OF_POINTS
from shortzip.train.settings.checks import ConfigError, repeated
from shortzip.train.settings.config import FastVConfig

DOMINANT_ONLY = "dominant only"
DRAWN = ("random", "random layers")


@dataclass(frozen=True)
class FrontierConfig:
    """Settings of scripts/frontier.py."""

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
    """Baselines with as many tokens as the first budget: random, grid, pool, downsample, and "dominant only"."""
    fastv: list[FastVConfig] = field(default_factory=list)
    """FastV baselines, on all tokens."""
    rankings: list[str] = field(default_factory=list)
    """Other rankings of the layers to freeze, on all tokens, beside lc: cosine, random."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of what is drawn at random, and of tuning."""
    tune: bool = False
    """Also tune each point by the recipe, once per seed."""
    prefill_rounds: int = 3
    """How often prefill is timed: a round times every untuned point once, so that a slower moment is so for all."""
    samples: int | None = None
    """Only the first so many held-out conversations; null: as the recipe says."""

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ConfigError("seeds is empty: at least one is needed")
        if self.prefill_rounds < 1:
            raise ConfigError(f"prefill_rounds is {self.prefill_rounds}: at least 1 is needed")
        for name, values in (
            ("seeds", self.seeds), ("budgets", self.budgets), ("freeze", self.freeze), ("methods", self.methods),
            ("fastv", self.fastv), ("rankings", self.rankings),
        ):  # fmt: skip
            again = repeated(values)
            if again:
                raise ConfigError(f"{name}: {again[0]!r} stands there twice")
        if not self.freeze:
            raise ConfigError("freeze is empty: give at least one number of layers, 0 to freeze none")
        for freeze in self.freeze:
            if not re.fullmatch(r"\d+|\d+(\.\d+)?%", freeze):
                raise ConfigError(f"freeze {freeze!r}: a number of layers (19) or a share (60%) is needed")
        known = ("random", "grid", "pool", "downsample", DOMINANT_ONLY)
        for value, allowed in ((self.methods, known), (self.rankings, ("cosine", "random"))):
            bad = [entry for entry in value if entry not in allowed]
            if bad:
                raise ConfigError(f"{bad[0]!r} is none of {', '.join(allowed)}")
        if self.methods and not self.budgets:
            raise ConfigError("methods are held to the first budget, and budgets is empty")


@dataclass(frozen=True)
class Point:
    """A point of the frontier: a reduction, and the seed of what it draws or was tuned with."""

    series: str
    """What it is called in table and picture; points that differ in their seed alone share it."""
    reductions: Reductions
    seed: int | None = None
    tuned: bool = False

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def budget(self) -> str:
        """all, or dominant+contextual."""
        return self.reductions.budget_words

    @property
    def frozen(self) -> int:
        """How many layers are frozen."""
        return len(self.reductions.layers)

    @property
    def name(self) -> str:
        """A folder's name, unlike every other point's."""
        pruned = self.reductions.fastv
        fastv = f"-{pruned['layer']}-{pruned['keep']:g}" if pruned else ""
        parts = [self.series + fastv, self.budget, f"{self.frozen} frozen"]
        parts += [] if self.seed is None else [f"seed {self.seed}"]
        text = ", ".join([*parts, "tuned"] if self.tuned else parts)
        return "".join(letter if letter.isalnum() or letter in "+-." else "-" for letter in text)


Ranked = tuple[str, str, str, int]  # ranking, `freeze`, the budget whose visual tokens it is measured on, seed


def points_of(config: FrontierConfig, layers: Mapping[Ranked, Sequence[int]]) -> list[Point]:
    """All points, untuned, each once however often the config describes it ("0" and "0%", "4" and "50%" of 8)."""
    points = [Point("all tokens", Reductions())]
    for freeze in config.freeze:
        for budget in [ALL, *config.budgets]:
            reductions = _frozen(Reductions.parse(budget), layers["lc", freeze, budget, config.seeds[0]])
            if not reductions.is_empty:
                points.append(Point(GRID_OF_POINTS, reductions))
    for method in config.methods:
        count = sum(parse_budget(config.budgets[0]).values())
        for seed in config.seeds if method in DRAWN else [None]:
            kind = {} if method == DOMINANT_ONLY else {"method": method}
            points.append(Point(method, Reductions.parse(f"{count}+0", seed=seed or 0, **kind), seed))
    points += [Point("FastV", Reductions(fastv=asdict(fastv))) for fastv in config.fastv]
    for ranking in config.rankings:
        freeze = config.freeze[-1]
        for seed in config.seeds if ranking == "random" else [None]:
            chosen = layers[ranking, freeze, ALL, config.seeds[0] if seed is None else seed]
            points.append(Point(f"{ranking} layers", _frozen(Reductions(), chosen), seed))
    return list({point.name: point for point in points}.values())


def _frozen(reductions: Reductions, layers: Sequence[int]) -> Reductions:
    return replace(reductions, shortv={"layers": list(layers)}) if layers else reductions


def tuned_points(config: FrontierConfig, points: Sequence[Point]) -> Iterator[Point]:
    """Each point tuned, once per seed; what a point draws, it draws with that seed."""
    done = set()
    for point in points:
        for seed in config.seeds:
            if point.seed in (None, seed):
                tuned = replace(point, seed=seed, tuned=True)
                if tuned not in done:
                    done.add(tuned)
                    yield tuned
