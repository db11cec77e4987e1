"""The budget and the method by which it is met (`visionzip`), and pruning inside the language model (`fastv`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

from shortzip.reduction.configuration_pruning import validate_fastv
from shortzip.reduction.errors import ReductionError
from shortzip.reduction.selectors import VISIONZIP, refuse_to_keep, settled
from shortzip.train.settings.checks import ConfigError, check_seed
from shortzip.train.settings.flags import PARAMETERS


@dataclass(frozen=True)
class BudgetScheduleConfig:
    """From a loose budget to the run's own, linear in tokens (train/inputs/budgets.py)."""

    start: int
    """Visual tokens per image (per tile in LLaVA-NeXT) in the first step: more than the budget."""
    share: float = 0.5
    """Share of the steps after which the budget is the run's own."""
    stages: int | None = None
    """In how many equal parts it falls; null: with every step."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"budget_schedule.share is {self.share}: a share between 0 and 1 is needed")
        if self.stages is not None and self.stages < 1:
            raise ConfigError(f"budget_schedule.stages is {self.stages}: at least 1 is needed (with every step: null)")

    def as_setting(self) -> dict[str, Any]:
        """What shapes a run, as checkpoints name it: without stages, as before there were any."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def falling(self, last: int, parts: int) -> list[int]:
        """Tokens of each of so many equal parts of the way from `start` down to `last`, which comes after them."""
        return [round(self.start + (last - self.start) * part / parts) for part in range(parts)]

    def check(self, visionzip: VisionZipConfig | None, cache_features: str | None) -> None:
        """Raises `ConfigError` where there is no budget to come to, or one budget's features would be kept."""
        if visionzip is None:
            raise ConfigError("budget_schedule ends with the budget, and visionzip is null: set visionzip")
        tokens = visionzip.dominant + visionzip.contextual
        if self.start <= tokens:
            raise ConfigError(f"budget_schedule.start is {self.start}: more than the budget's {tokens} is needed")
        if self.stages is not None and self.stages > self.start - tokens:
            raise ConfigError(
                f"budget_schedule.stages is {self.stages}: from {self.start} to {tokens} tokens there are at most "
                f"{self.start - tokens}"
            )
        if cache_features is not None and self.stages is None:
            raise ConfigError(
                f"budget_schedule and data.cache_features ({cache_features!r}) do not go together where the budget "
                "falls with every step: features are kept under each budget. Set budget_schedule.stages to a few (8), "
                "or data.cache_features to null"
            )


@dataclass(frozen=True)
class PerImageConfig:
    """A budget for each image (reduction/image_budgets.py); the keys that a chooser does not take are null."""

    chooser: Literal["fixed", "coverage", "image"]
    """fixed: the budget for all; coverage: as many as hold a share of the image's attention; image: by the detail of
    the picture alone."""
    coverage: float | None = None
    """Of chooser coverage: the share of the image's total score that its dominant patches reach, above 0 to 1."""
    scale: float | None = None
    """Of chooser image: the budget of an image is this many times its detail. scripts/calibrate_budget.py finds it."""
    min: int | None = None
    """The smallest budget of an image (of a tile in LLaVA-NeXT)."""
    max: int | None = None
    """The largest."""

    def as_key(self) -> dict[str, Any]:
        """`visionzip.per_image` of a model's config; what is not given is left out."""
        return {name: value for name, value in vars(self).items() if value is not None}


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
    per_image: PerImageConfig | None = None
    """A budget for each image; null: this one for all. visionzip.per_image.chooser: fixed, coverage or image;
    visionzip.per_image.coverage or .scale: its parameter; .min and .max: between which it chooses."""
    parameters: dict[str, Any] = field(default_factory=dict, metadata=PARAMETERS)
    """The method's own, each a key beside it (visionzip.alpha); those that are not given get their defaults."""

    def __post_init__(self) -> None:
        check_seed("visionzip.seed", self.seed)
        if self.seed and self.method != "random":
            raise ConfigError(f"visionzip.seed is {self.seed}: only method random draws anything")
        if self.method == VISIONZIP and not self.parameters and self.per_image is None:
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

    def check_per_image(self, cache_features: str | None, other: Mapping[str, object]) -> None:
        """Raises `ConfigError` where a run cannot know its images' budgets before rows are tokenized, or something
        else of it tells them. `other`: what does not go with budgets per image, by key; None where it is not asked."""
        if self.per_image is None or self.per_image.chooser == "fixed":
            return
        for key in [key for key, value in other.items() if value is not None]:
            raise ConfigError(f"visionzip.per_image and {key} do not go together: set one of them to null")
        if self.per_image.chooser == "coverage" and cache_features is None:
            raise ConfigError(
                "visionzip.per_image.chooser is coverage, which the tower finds before rows are tokenized, and "
                "data.cache_features is null, where what it gives is kept for the steps: set data.cache_features to a "
                "folder, or choose chooser image"
            )

    @classmethod
    def of(cls, key: Mapping[str, Any]) -> Self:
        """The settings of a model config's `visionzip` key."""
        own = [item.name for item in fields(cls)]
        parameters = {name: value for name, value in key.items() if name not in own}
        named = {name: value for name, value in key.items() if name in own}
        if named.get("per_image") is not None:
            named["per_image"] = PerImageConfig(**named["per_image"])
        return cls(**named, parameters=parameters)

    def as_key(self) -> dict[str, Any]:
        """The `visionzip` key of a model's config; VisionZip's own method is left out."""
        key: dict[str, Any] = {"dominant": self.dominant, "contextual": self.contextual}
        if self.method != VISIONZIP:
            key["method"] = self.method
        if self.method == "random":
            key["seed"] = self.seed
        if self.per_image is not None:
            key["per_image"] = self.per_image.as_key()
        return {**key, **self.parameters}


@dataclass(frozen=True)
class FastVConfig:
    """Visual tokens pruned inside the language model: FastV, or another method (reduction/README.md)."""

    layer: int | None = None
    """Of FastV, layers that all visual tokens pass before the pruning, counted from 1: the paper's K."""
    keep: float | list[float] | None = None
    """Of FastV, the share of the visual tokens that later layers see; of pyramiddrop such a share at each of `layers`;
    of sparsevlm and sparsevlm+ the number that are kept at each."""
    method: Literal["fastv", "pyramiddrop", "sparsevlm", "sparsevlm+"] = "fastv"
    """How visual tokens are ranked."""
    layers: list[int] | None = None
    """Of the other methods, the layers that prune, counted from 0: pyramiddrop before them, sparsevlm after."""
    positions: Literal["compact", "original"] | None = None
    """Of pyramiddrop: whether what is left is renumbered (compact); null: as the model's `positions` say."""

    def __post_init__(self) -> None:
        try:
            validate_fastv(self.as_key())
        except ReductionError as error:
            raise ConfigError(str(error)) from error

    def as_key(self) -> dict[str, Any]:
        """The `fastv` key of a model's config; what is not given is left out."""
        key: dict[str, Any] = {name: value for name, value in vars(self).items() if value is not None}
        if self.method == "fastv":
            del key["method"]
        if self.method.startswith("sparsevlm") and isinstance(self.keep, list):
            key["keep"] = [int(kept) if kept == int(kept) else kept for kept in self.keep]
        return key
