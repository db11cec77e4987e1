"""The benchmark of selection measures every method beside the whole tower."""

import json

import pytest

from shortzip.reduction.errors import ReductionError
from shortzip.scripts.benchmarks.selection import BLOCKS, EMBEDDINGS, BenchmarkConfig, benchmark, main

SMALL = {"images": 1, "tokens": 4, "image_size": 56, "hidden_size": 32, "heads": 2, "projector_width": 32, "rounds": 1}


@pytest.fixture(autouse=True)
def _no_collections_between_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shortzip.scripts.benchmarks.timing._reset_peak_memory", lambda _: None)


def test_a_method_s_share_is_of_all_the_tower_s_blocks() -> None:
    methods = ["scope", "duet", "divprune, projected"]
    result = benchmark(BenchmarkConfig(**SMALL, methods=methods, blocks=10, measured_blocks=2))
    assert list(result["shares"]) == methods
    seconds = {name: timing["seconds"] for name, timing in result["timings"].items()}
    tower = seconds[EMBEDDINGS] + 5 * seconds[BLOCKS]
    assert result["tower_seconds"] == pytest.approx(tower)
    assert result["shares"]["scope"] == pytest.approx(seconds["scope"] / tower)


def test_figures_are_printed_and_written(tmp_path, capsys) -> None:
    flags = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
    main([*flags, "--methods", "[dpp]", "--output", str(tmp_path / "figures.json")])
    assert "dpp" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "figures.json").read_text())["shares"]) == {"dpp"}


def test_a_method_that_is_not_there_is_refused() -> None:
    with pytest.raises(ReductionError, match="method is 'nothing'; it must be one of"):
        benchmark(BenchmarkConfig(**SMALL, methods=["nothing"]))
