"""The benchmarks of generation, run as short as they can be."""

import json
from pathlib import Path

import pytest

from shortzip.scripts.benchmarks import generation, turns


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_held_against_what_is_allowed(
    cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    options = ["--batch_sizes", "[2]", "--new_tokens", "3", "--rounds", "1", "--cache", cache]
    generation.main([*options, "--output", str(figures)])
    result = json.loads(figures.read_text())["2"]
    assert {side: len(parts["step"]) for side, parts in result["seconds"].items()} == dict.fromkeys(
        generation.SIDES, 1
    )
    assert all(0 < parts["step"][0] < parts["prefill"][0] for parts in result["seconds"].values())
    allowed = {side: round(limits["prefill"], 2) for side, limits in result["limits"].items()}
    assert allowed == {"visionzip": 2.2, "both": 2.33}  # as the docstring says
    assert "FLOPs" in capsys.readouterr().out


def test_a_second_question_computes_its_own_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    turns.main(["--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    tokens = {line.split(":")[0]: int(line.split(" for ")[1].split()[0]) for line in lines}
    assert tokens["all tokens, going on"] == tokens["reduced, going on"] < 20
    assert tokens["all tokens, anew"] - tokens["reduced, anew"] == 144 - 16
