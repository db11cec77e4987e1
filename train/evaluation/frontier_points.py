"""The frontier's points: budgets x frozen layers, and methods at equal tokens, untuned and tuned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shortzip.reduction.errors import ReductionError
from shortzip.reduction.parsing import parse_budget, parse_method
from shortzip.reduction.positions import COMPACT
from shortzip.reduction.reductions import ALL, Reductions
from shortzip.reduction.selectors import has_own_budgets, merges, refuse_to_keep
from shortzip.train.evaluation.frontier_report import GRID_OF_POINTS
from shortzip.train.settings.checks import ConfigError, repeated
from shortzip.train.settings.frontier import DOMINANT_ONLY, FrontierConfig, Training, plain_name

DRAWN = ("random", "random layers")
ELASTIC = "one projector for all budgets"


@dataclass(frozen=True)
class Point:
    """A point of the frontier: a reduction, and the seed of what it draws or was tuned with."""

    series: str
    """What it is called in table and picture; points that differ in their seed alone share it."""
    reductions: Reductions
    seed: int | None = None
    tuned: bool = False
    training: str = ""
    """How it was tuned, by name; empty: as the recipe says."""

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def budget(self) -> str:
        """all, or dominant+contextual."""
        return self.reductions.budget_words

    @property
    def tokens(self) -> float:
        """Visual tokens per image; infinite where all are kept."""
        zipped = self.reductions.visionzip
        return math.inf if zipped is None else zipped["dominant"] + zipped["contextual"]

    @property
    def frozen(self) -> int:
        """How many layers are frozen."""
        return len(self.reductions.layers)

    @property
    def positions(self) -> str:
        """compact, or original."""
        return self.reductions.positions

    @property
    def name(self) -> str:
        """A folder's name, unlike every other point's."""
        pruned = self.reductions.fastv
        words = self.reductions.fastv_words
        if pruned and "layer" in pruned:
            words = f"{pruned['layer']}-{pruned['keep']:g}"
        parts = [f"{self.series}-{words}" if pruned else self.series, self.budget, f"{self.frozen} frozen"]
        parts += [] if self.positions == COMPACT else [f"{self.positions} positions"]
        parts += [] if self.seed is None else [f"seed {self.seed}"]
        text = ", ".join([*parts, "tuned"] if self.tuned else parts)
        text = f"{text}, {self.training}" if self.training else text
        return plain_name(text)


def point_of(values: Mapping[str, Any]) -> Point:
    """The point that `asdict` was made of."""
    return Point(**{**values, "reductions": Reductions(**values["reductions"])})


Ranked = tuple[str, str, str, int]  # ranking, `freeze`, the budget whose visual tokens it is measured on, seed


def points_of(config: FrontierConfig, layers: Mapping[Ranked, Sequence[int]]) -> list[Point]:
    """All points, untuned, each once however often the config describes it ("0" and "0%", "4" and "50%" of 8)."""
    points = [Point("all tokens", Reductions())]
    for freeze in config.freeze:
        for budget in [ALL, *config.budgets]:
            reductions = _frozen(Reductions.parse(budget), layers["lc", freeze, budget, config.seeds[0]])
            if not reductions.is_empty:
                points.append(Point(GRID_OF_POINTS, reductions))
    choosing = [Reductions(visionzip.as_key()) for visionzip in config.per_image]
    if again := repeated([own.describe() for own in choosing]):
        raise ConfigError(f"per_image: {again[0]} stands there twice")
    points += [Point(own.describe(), own) for own in choosing]
    points += _under_all_budgets(config, layers)
    for tokens in config.tokens or [sum(parse_budget(budget).values()) for budget in config.budgets[:1]]:
        points += _methods_at(config, tokens)
    for pruned in (Reductions(fastv=fastv.as_key()) for fastv in config.fastv):
        points.append(Point(pruned.pruning_name, pruned))
    for ranking in config.rankings:
        freeze = config.freeze[-1]
        for seed in config.seeds if ranking == "random" else [None]:
            chosen = layers[ranking, freeze, ALL, config.seeds[0] if seed is None else seed]
            points.append(Point(f"{ranking} layers", _frozen(Reductions(), chosen), seed))
    return list({point.name: point for point in points}.values())


def _under_all_budgets(config: FrontierConfig, layers: Mapping[Ranked, Sequence[int]]) -> list[Point]:
    """Each budget as one projector for all of them meets it: with the frozen layers of the first."""
    if not config.elastic:
        return []
    frozen = [layers["lc", freeze, config.budgets[0], config.seeds[0]] for freeze in config.freeze]
    return [
        Point(ELASTIC, _frozen(Reductions.parse(budget), chosen)) for chosen in frozen for budget in config.budgets
    ]


def tuned_as(point: Point, config: FrontierConfig) -> Point:
    """The point whose run tunes this one: itself, or the first budget's where one projector is tuned for all."""
    if point.series != ELASTIC:
        return point
    return replace(point, reductions=replace(Reductions.parse(config.budgets[0]), shortv=point.reductions.shortv))


def share_of(points: Sequence[Point], config: FrontierConfig, number: int, processes: int) -> list[Point]:
    """What the process of this number, from 1, tunes and evaluates: points of one run are in one share."""
    runs = list(dict.fromkeys(tuned_as(point, config).name if point.tuned else point.name for point in points))
    own = set(runs[number - 1 :: processes])
    return [point for point in points if (tuned_as(point, config).name if point.tuned else point.name) in own]


def can_have(point: Point, training: Training, first: Training) -> bool:
    """Whether a point can be tuned so, and differs by it: a control with all tokens is one of the first alone, images
    that choose their budget have no teacher, and nothing comes down to more tokens than a schedule starts with."""
    if point.reductions.is_empty:
        return training == first
    parts = {key.partition(".")[0] for key in training.settings}
    zipped = point.reductions.visionzip
    if zipped is not None and has_own_budgets(zipped) and parts & {"distill", "budget_schedule"}:
        return False
    if "budget_schedule" in parts and (point.series == ELASTIC or zipped is None):
        return False
    return training.starts_at is None or point.tokens < training.starts_at


def _methods_at(config: FrontierConfig, tokens: int) -> Iterator[Point]:
    """Each of the methods at so many visual tokens, in each kind of positions."""
    for positions in config.positions:
        for method in config.methods:
            for seed in config.seeds if method in DRAWN else [None]:
                reductions = reductions_at(method, tokens, config.contextual_share, seed or 0)
                yield Point(method, replace(reductions, positions=positions), seed)


def reductions_at(method: str, tokens: int, contextual_share: float, seed: int = 0) -> Reductions:
    """A method at so many visual tokens; of one that merges, `contextual_share` of them are contextual.

    Raises ReductionError for an unknown method or parameter.
    """
    if method == DOMINANT_ONLY:
        return Reductions.parse(f"{tokens}+0")
    merging = merges({**parse_budget(f"{tokens}+0"), **parse_method(method)})
    contextual = round(tokens * contextual_share) if merging else 0
    return Reductions.parse(f"{tokens - contextual}+{contextual}", method=method, seed=seed)


def is_cacheable(reductions: Reductions) -> bool:
    """Whether the visual tokens are a function of the image, which can be computed once for all runs."""
    if reductions.visionzip is None:
        return False
    try:
        refuse_to_keep(reductions.visionzip)
    except ReductionError:
        return False
    return True


def _frozen(reductions: Reductions, layers: Sequence[int]) -> Reductions:
    return replace(reductions, shortv={"layers": list(layers)}) if layers else reductions


def tuned_points(config: FrontierConfig, points: Sequence[Point]) -> list[Point]:
    """Each point tuned, once per seed, in order of what they tell; what a point draws, it draws with that seed.

    Of several trainings one after the other, those that a point can have. Fewest visual tokens first, of these one
    seed after the other; original positions, of the methods that are to be tuned with them, come last.
    """
    trainings = [training.name for training in config.trainings] or [""]
    tuned = [
        replace(point, seed=seed, tuned=True, training=training.name if config.trainings else "")
        for training in config.trainings or [Training("the recipe's")]
        for point in points
        if not config.trainings or can_have(point, training, config.trainings[0])
        for seed in config.seeds
        if point.seed in (None, seed) and (point.positions == COMPACT or point.series in config.tune_original)
    ]
    if config.tokens:
        turns: dict[int | None, int] = {seed: turn for turn, seed in enumerate(config.seeds)}
        tuned.sort(
            key=lambda point: (
                trainings.index(point.training),
                point.positions != COMPACT,
                point.tokens,
                turns[point.seed],
            )
        )
    return list(dict.fromkeys(tuned))
