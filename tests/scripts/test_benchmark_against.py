"""The benchmark against what a user would run instead: equal losses, and what is left out is refused."""

import importlib.util
from pathlib import Path

import pytest
import torch

from shortzip.data.errors import UserError
from shortzip.scripts.benchmarks import against
from shortzip.scripts.benchmarks.against import AgainstConfig, losses_apart, measure, table_of
from shortzip.scripts.benchmarks.shapes import ModelShape

SHAPE = ModelShape(
    {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2},
    {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
     "image_size": 24, "patch_size": 4},
    4, 2, [1, 2],
)  # fmt: skip
SIDES = [
    "shortzip", "shortzip, frozen", "shortzip, cached", "shortzip, all tokens", "authors' VisionZip", "Trainer",
    "Trainer, recomputed",
]  # fmt: skip


@pytest.mark.slow
def test_sides_that_compute_the_same_loss_have_the_same_after_some_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shortzip.scripts.benchmarks.timing._reset_peak_memory", lambda _: None)
    settings = AgainstConfig(sides=SIDES, global_batch_size=3, micro_batch_size=2, steps=2, rounds=1)
    sides = measure(settings, SHAPE, torch.device("cpu"))["sides"]
    assert list(sides) == SIDES
    apart = losses_apart(sides)
    assert apart.keys() == {"reduced", "all"}
    assert max(apart.values()) < 1e-6
    assert len({round(sides[name]["loss"], 6) for name in ("shortzip", "shortzip, frozen", "Trainer")}) == 3
    assert sides["shortzip"]["tensor_memory"] < sides["Trainer"]["tensor_memory"]
    # What a side leaves on the model that others train too: it would have them recompute.
    assert sides["shortzip, all tokens"]["tensor_memory"] < sides["Trainer"]["tensor_memory"]
    assert table_of(sides).row_count == len(SIDES)


def test_what_cannot_be_measured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"Axolotl.*choose of shortzip,"):
        measure(AgainstConfig(sides=["Axolotl"]), SHAPE, torch.device("cpu"))
    with pytest.raises(UserError, match="steps 0: must be at least 1"):
        AgainstConfig(steps=0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install trl"):
        measure(AgainstConfig(sides=["SFTTrainer"], global_batch_size=2), SHAPE, torch.device("cpu"))


def test_an_output_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "figures.json").write_text("mine")
    with pytest.raises(UserError, match="overwrite"):
        against.main(["--output", str(tmp_path / "figures.json")])
    assert (tmp_path / "figures.json").read_text() == "mine"
