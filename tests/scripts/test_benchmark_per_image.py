"""What fullness has to decide: the best budget for each number of objects, at no more than the mean."""

import numpy as np
import pytest

from shortzip.data.generated.scenes import sample_scene
from shortzip.scripts.benchmarks.per_image import best_by_objects, by_objects, objects_in


def test_scenes_are_told_apart_by_their_objects() -> None:
    assert objects_in("scene-102-7") == len(sample_scene(102, 7).objects)
    found = by_objects([True, False, True, True], np.array([1, 1, 3, 5]))
    assert found == [0.5, 0.0, 1.0, 0.0, 1.0]


def test_the_best_budgets_spend_no_more_than_the_mean() -> None:
    """Two numbers of objects, of which only the second gains by more tokens."""
    alone, counts = {8: [0.9, 0.4], 16: [0.9, 0.6], 24: [0.9, 0.8]}, np.array([10, 10])
    assert best_by_objects(alone, counts, 16) == (pytest.approx(0.85), [8, 24])
    assert best_by_objects(alone, counts, 8) == (pytest.approx(0.65), [8, 8])
    flat = {8: [0.5, 0.4], 16: [0.7, 0.6], 24: [0.8, 0.7]}
    assert best_by_objects(flat, counts, 16)[0] == pytest.approx(0.65), "fullness decides nothing"
