"""The frontier's points: budgets x frozen layers, and the baselines at equal tokens, untuned and tuned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from shortzip.reduction.parsing import parse_budget
from shortzip.reduction.reductions import ALL, Reductions
from shortzip.train.evaluation.frontier_report import GRID_OF_POINTS
from shortzip.train.settings.comparing import DOMINANT_ONLY, FrontierConfig

DRAWN = ("random", "random layers")


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
        words = self.reductions.fastv_words
        if pruned and "layer" in pruned:
            words = f"{pruned['layer']}-{pruned['keep']:g}"
        parts = [f"{self.series}-{words}" if pruned else self.series, self.budget, f"{self.frozen} frozen"]
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
    for pruned in (Reductions(fastv=fastv.as_key()) for fastv in config.fastv):
        points.append(Point(pruned.pruning_name, pruned))
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
