"""The benchmark of serving, with its two servers in processes of their own."""

import pytest

from shortzip.scripts.benchmarks.serving import PLAIN, REDUCED, ServingConfig, benchmark
from shortzip.train.settings.recipes import DEMO_MODEL


@pytest.mark.slow
def test_both_sides_are_measured() -> None:
    config = ServingConfig(str(DEMO_MODEL), concurrent=[2], requests=2, rounds=1, max_tokens=2)
    (row,) = benchmark(config)
    assert row["concurrent"] == 2
    assert set(row["requests_per_second"]) == {PLAIN, REDUCED}
    assert all(value > 0 for value in row["median_seconds"].values())
