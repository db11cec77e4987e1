"""The budget, and the method by which it is met: the group `visionzip` of a run's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from shortzip.reduction.errors import ReductionError
from shortzip.reduction.selectors import VISIONZIP, refuse_to_keep, settled
from shortzip.train.settings.checks import ConfigError, check_seed
from shortzip.train.settings.flags import PARAMETERS


@dataclass(frozen=True)
class VisionZipConfig:
    """The budget: visual tokens per image (per tile in LLaVA-NeXT)."""

    dominant: int
    """Patches kept as they are, CLS counted among them."""
    contextual: int
    """Tokens that the other patches are merged into."""
    method: str = VISIONZIP
    """How tokens are chosen: visionzip, another published selection or a baseline (reduction/README.md lists them and
    what each takes). visionzip with contextual 0 is the baseline that keeps dominant patches only."""
    seed: int = 0
    """Seed of method random."""
    parameters: dict[str, Any] = field(default_factory=dict, metadata=PARAMETERS)
    """The method's own, each a key beside it (visionzip.alpha); those that are not given get their defaults."""

    def __post_init__(self) -> None:
        check_seed("visionzip.seed", self.seed)
        if self.seed and self.method != "random":
            raise ConfigError(f"visionzip.seed is {self.seed}: only method random draws anything")
        if self.method == VISIONZIP and not self.parameters:
            return
        from shortzip.reduction.configuration_reduced_llava import validate_visionzip  # torch: --help does not wait

        try:
            validate_visionzip(self.as_key())
        except ReductionError as error:
            raise ConfigError(str(error)) from error
        own = [item.name for item in fields(self)]
        found = {name: value for name, value in settled(self.as_key()).items() if name not in own}
        object.__setattr__(self, "parameters", found)

    def check_cacheable(self) -> None:
        """Raises `ConfigError` for a method that chooses by more than the image, so that no choice can be kept."""
        try:
            refuse_to_keep(self.as_key())
        except ReductionError as error:
            raise ConfigError(str(error)) from error

    @classmethod
    def of(cls, key: Mapping[str, Any]) -> Self:
        """The settings of a model config's `visionzip` key."""
        own = [item.name for item in fields(cls)]
        parameters = {name: value for name, value in key.items() if name not in own}
        return cls(**{name: value for name, value in key.items() if name in own}, parameters=parameters)

    def as_key(self) -> dict[str, Any]:
        """The `visionzip` key of a model's config; VisionZip's own method is left out."""
        key: dict[str, Any] = {"dominant": self.dominant, "contextual": self.contextual}
        if self.method != VISIONZIP:
            key["method"] = self.method
        if self.method == "random":
            key["seed"] = self.seed
        return {**key, **self.parameters}
