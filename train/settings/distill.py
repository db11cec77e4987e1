"""The untrained model as a teacher: the group `distill` of a run's settings, and what it goes with."""

from __future__ import annotations

from dataclasses import dataclass

from shortzip.train.settings.checks import ConfigError


@dataclass(frozen=True)
class DistillConfig:
    """The untrained model, reading all visual tokens, teaches (train/step/teacher.py)."""

    weight: float = 0.5
    """w, above 0 and up to 1: the loss of a token is (1 - w) cross-entropy + w temperature² KL(teacher ‖ student)."""
    temperature: float = 1.0
    """By which both models' logits are divided in the divergence."""

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ConfigError(
                f"distill.weight is {self.weight}: a share above 0 and up to 1 is needed (no teacher: distill: null)"
            )
        if not 0 < self.temperature <= 100:
            raise ConfigError(f"distill.temperature is {self.temperature}: more than 0, up to 100, is needed")


def check_teacher(distill: DistillConfig | None, cache_teacher: str | None, cache_features: str | None) -> None:
    """Raises `ConfigError` for a teacher without a tower, and for a kept one that nobody listens to."""
    if distill is None and cache_teacher is not None:
        raise ConfigError(
            f"data.cache_teacher is {cache_teacher!r}, but distill is null, so there is no teacher: set distill, or "
            "data.cache_teacher to null"
        )
    if distill is not None and cache_features is not None and cache_teacher is None:
        raise ConfigError(
            f"distill with data.cache_features ({cache_features!r}) leaves the teacher without a tower: set "
            "data.cache_teacher to a folder too, or data.cache_features to null"
        )
