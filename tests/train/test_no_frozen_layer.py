"""`freeze: 0` is no frozen layer, which a config says with null."""

from types import SimpleNamespace
from typing import Any

import pytest

from shortzip.train.calibration.choosing import choose_layers


@pytest.mark.parametrize(("freeze", "count"), [("0", None), ("0%", None), ("10%", None), ("2", 2)])
def test_a_run_that_freezes_none(freeze: str, count: int | None) -> None:
    config: Any = SimpleNamespace(shortv=SimpleNamespace(freeze=freeze, ranking="random"), seed=0)
    release: Any = SimpleNamespace(config={"text_config": {"num_hidden_layers": 4}})
    nobody: Any = None
    chosen, _ = choose_layers(config, release, nobody)
    assert chosen is None if count is None else len(chosen or ()) == count
