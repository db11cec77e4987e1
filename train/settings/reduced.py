"""What the settings reduce: apart from them, since it imports torch, which --help does not wait for."""

from __future__ import annotations

from collections.abc import Sequence

from shortzip.reduction.positions import COMPACT
from shortzip.reduction.reductions import Reductions
from shortzip.train.settings.budget import VisionZipConfig
from shortzip.train.settings.config import FastVConfig


def reductions_of(
    visionzip: VisionZipConfig | None,
    layers: Sequence[int] | None,
    fastv: FastVConfig | None,
    positions: str = COMPACT,
) -> Reductions:
    """What these settings reduce. `layers`: the frozen ones, as listed or chosen; None freezes nothing."""
    return Reductions(
        visionzip.as_key() if visionzip else None,
        None if layers is None else {"layers": list(layers)},
        fastv.as_key() if fastv else None,
        positions,
    )
