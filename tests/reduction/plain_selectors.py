"""The selectors read plainly, one image at a time, in float64 and without what makes them fast."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def unit(rows: Array) -> Array:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def first_best(scores: Array, among: list[int]) -> int:
    """The lowest of `among` whose score is the highest, but for rounding."""
    best = max(scores[i] for i in among)
    return min(i for i in among if scores[i] >= best - 1e-14)


def by_falling(scores: Array) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def divprune(states: Array, count: int) -> list[int]:
    patches = range(len(states))
    distance = 1 - unit(states) @ unit(states).T
    order: list[int] = []
    while len(order) < count:
        others = [i for i in patches if i not in order]
        against = [[j for j in (order or patches) if j != i] for i in patches]
        scores = np.array([distance[i][against[i]].min() if against[i] else math.inf for i in patches])
        order.append(first_best(scores, others))
    return order


def scope(features: Array, attention: Array, count: int, alpha: float) -> list[int]:
    alike = unit(features) @ unit(features).T
    covered, order = np.zeros(len(features)), list[int]()
    while len(order) < count:
        scores = np.maximum(alike - covered[:, None], 0).sum(axis=0) * attention**alpha
        order.append(first_best(scores, [j for j in range(len(features)) if j not in order]))
        covered = np.maximum(covered, alike[:, order[-1]])
    return order


def vispruner(features: Array, attention: Array, count: int, important: float) -> list[int]:
    alike = unit(features) @ unit(features).T
    ranked, first = by_falling(attention), int(count * important)
    rest = ranked[first:]
    while len(rest) > count - first > 0:
        evens, odds = rest[::2], rest[1::2]
        nearest = [alike[i, odds].max() for i in evens]
        dropped = min(8, len(rest) - count + first, len(evens))
        rest = [evens[place] for place in by_falling(np.array(nearest))[dropped:]] + odds
    return ranked[:first] + (rest if count > first else [])


def dpp(states: Array, attention: Array, count: int) -> list[int]:
    quality = (attention - attention.min() + 1e-6) / (np.ptp(attention) or 1.0)
    kernel = quality[:, None] * (unit(states) @ unit(states).T) * quality
    order: list[int] = []
    while len(order) < count:
        gains = np.diag(kernel).copy()  # what a patch adds to the determinant: its variance, given the chosen ones
        if order:
            across = kernel[order]
            gains -= (across * np.linalg.solve(kernel[np.ix_(order, order)], across)).sum(axis=0)
        others = [j for j in range(len(states)) if j not in order]
        order.append(max(others, key=lambda j: gains[j]))
    return order


def duet(
    features: Array, attention: Array, keys: Array, dominant: int, contextual: int, window: int
) -> tuple[list[int], list[int], Array]:
    """Kept patches, anchors and contextual tokens."""
    ranked = by_falling(attention)
    rest = ranked[dominant:]
    pool = rest[: min(max(1, window * contextual), len(rest))]
    anchors = pool[:: max(1, len(pool) // contextual)][:contextual] if contextual else []
    members: dict[int, list[int]] = {anchor: [] for anchor in anchors}
    for patch in pool:
        if anchors and patch not in anchors:
            members[max(anchors, key=lambda a, p=patch: unit(keys[a]) @ unit(keys[p]))].append(patch)  # type: ignore[misc]
    merged = [features[a] + (features[members[a]].mean(axis=0) if members[a] else 0) for a in anchors]
    return ranked[:dominant], anchors, np.array(merged).reshape(contextual, features.shape[-1])


def prumerge(features: Array, attention: Array, keys: Array, count: int) -> tuple[list[int], Array]:
    """Kept patches, and what they become."""
    patches = len(features)
    spaced = count // 2
    ranked = by_falling(attention)
    others = sorted(ranked[count - spaced :])
    order = ranked[: count - spaced] + [others[(2 * k + 1) * len(others) // (2 * spaced)] for k in range(spaced)]
    share, alike = attention / attention.sum(), unit(keys) @ unit(keys).T
    near = min(max(1, round(patches / 18)), patches - 1)
    kept = []
    for patch in order:
        nearest = [j for j in by_falling(alike[patch]) if j != patch][:near]
        kept.append(features[patch] + sum((share[j] * features[j] for j in nearest), np.zeros(features.shape[-1])))
    return order, np.array(kept).reshape(count, features.shape[-1])
