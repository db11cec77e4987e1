"""What a setting may be: checks that name the key, the value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shortzip.data.errors import UserError


class ConfigError(UserError):
    """A key that does not exist, a value of the wrong type, or settings that do not go together."""


def repeated(values: Sequence[Any]) -> list[Any]:
    """The values of a setting that stand there more than once."""
    return [value for value in values if values.count(value) > 1]


def check_seed(key: str, seed: int) -> None:
    """Raises `ConfigError` for a seed that a random generator does not take: they have 32 bits."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"{key} is {seed}: 0 to {2**32 - 1} are allowed")


def refuse_idle_positions(positions: str, *reductions: object) -> None:
    """Raises `ConfigError` for original positions where no reduction (None each) leaves tokens out."""
    if positions != "compact" and not any(reductions):
        raise ConfigError(
            f"positions is {positions!r}, and no visual token is left out, so all stand where they do: set visionzip, "
            "or positions to compact"
        )


def _at_least(section: Any, prefix: str, **minima: float) -> None:
    for key, minimum in minima.items():
        value = getattr(section, key)
        if value is not None and not minimum <= value < float("inf"):  # NaN too
            raise ConfigError(f"{prefix}{key} is {value}: at least {minimum} is needed, and finite")


def _within(section: Any, prefix: str, **ranges: tuple[int, int]) -> None:
    """Bounds of what costs memory or time by its size alone: a slip of the keyboard is no machine that was bought."""
    for key, (least, most) in ranges.items():
        value = getattr(section, key)
        if value is not None and not least <= value <= most:
            raise ConfigError(f"{prefix}{key} is {value}: at least {least}, and at most {most}, is needed")
