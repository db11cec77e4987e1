"""Selectors against a plain reading of their formulas: any small grid and budget, and a release's 576 patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import plain_selectors as plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selector_cases import METHODS, choose, mapped, merges, tower_states

from shortzip.reduction.selectors import SELECTORS, TowerStates, selector_of
from shortzip.reduction.vispruner import prune_alike

ORDERS: dict[str, Callable[[Any, Any, int], list[int]]] = {
    "divprune": lambda one, how, count: plain.divprune(one.projected if how.reads else one.patches, count),
    "scope": lambda one, how, count: plain.scope(one.patches, one.attention, count, how.alpha),
    "vispruner": lambda one, how, count: plain.vispruner(one.patches, one.attention, count, how.important),
    "fastervlm": lambda one, how, count: plain.by_falling(one.attention)[:count],
    "dpp": lambda one, how, count: plain.dpp(one.patches, one.attention, count),
}
MERGING = ("duet", "prumerge+")


def check(name: str, states: TowerStates, dominant: int, contextual: int, tolerance: float) -> None:
    """Compares what a method makes of float64 or float32 states with its plain reading in float64."""
    case = METHODS[name]
    selector: Any = selector_of(case)
    selection = choose(name, states, dominant, contextual)
    for image, order in enumerate(selection.order.tolist()):
        one = mapped(states, lambda part, image=image: part[image].double().numpy())
        if case["method"] == "duet":
            expected, anchors, merged = plain.duet(
                one.patches, one.attention, one.keys, dominant, contextual, selector.window
            )
            assert selection.targets[image].tolist() == anchors
            close(selection.contextual[image], merged, tolerance)
        elif case["method"] == "prumerge+":
            expected, changed = plain.prumerge(one.patches, one.attention, one.keys, dominant)
            close(selection.kept[image], changed, tolerance)
        else:
            expected = ORDERS[str(case["method"])](one, selector, dominant)
        assert order == expected


def close(ours: torch.Tensor, expected: Any, tolerance: float) -> None:
    torch.testing.assert_close(ours.double(), torch.from_numpy(expected), rtol=0, atol=tolerance)


READ_PLAINLY = pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name]["method"] != "visionzip"])


@READ_PLAINLY
@settings(max_examples=10, deadline=None)
@given(data=st.data(), side=st.integers(1, 6), seed=st.integers(0, 999))
def test_any_grid_and_budget_equals_a_plain_reading(name: str, data: st.DataObject, side: int, seed: int) -> None:
    patches = side * side
    dominant = data.draw(st.integers(0, patches))
    contextual = data.draw(st.integers(0, patches - dominant)) if merges(name) else 0
    check(name, tower_states(2, patches, seed=seed, dtype=torch.float64), dominant, contextual, 1e-12)


@READ_PLAINLY
def test_the_patches_of_a_release_equal_a_plain_reading(name: str) -> None:
    states = tower_states(1, 576, width=96, seed=6)
    check(name, states, 64 if name != "duet" else 53, 10 if merges(name) else 0, 1e-5)


@pytest.mark.parametrize(("count", "important"), [(128, 0.75), (32, 0.25), (63, 0.5)])
def test_vispruner_s_rounds_do_not_drift_at_576_patches(count: int, important: float) -> None:
    """A swap of 1e-7 at the beginning changes half of the choice: float32 states, and as fine as the plain reading."""
    states = tower_states(1, 576, seed=7)
    features, attention = states.patches, states.attention
    expected = plain.vispruner(features[0].double().numpy(), attention[0].double().numpy(), count, important)
    assert prune_alike(features, attention, count, important)[0].tolist() == expected


def test_every_method_is_read_plainly() -> None:
    assert {*ORDERS, *MERGING, "visionzip"} == set(SELECTORS)
