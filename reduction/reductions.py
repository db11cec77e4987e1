"""What is reduced, as one object: the budget and its method, the frozen layers, and pruning inside the LLM.

    Reductions({"dominant": 54, "contextual": 10}, {"layers": [31, 29, 30]})
    Reductions.from_config(config)                       # a checkpoint's config.json
    Reductions.parse(budget="54+10", layers="31+29+30")  # a command line's words

`Reductions()` is a model with all its visual tokens in every layer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from transformers import PreTrainedConfig

from shortzip.reduction.configuration_pruning import PRUNING_METHODS, pruning_method
from shortzip.reduction.configuration_reduced_llava import (
    TOWER_HAS_CLS,
    validate_fastv,
    validate_shortv,
    validate_visionzip,
)
from shortzip.reduction.errors import ReductionError
from shortzip.reduction.flops import llm_prefill_flops_grouped, llm_prefill_flops_pruned, visual_tokens_per_image
from shortzip.reduction.image_budgets import budget_of
from shortzip.reduction.parsing import (
    format_budget,
    format_fastv,
    format_method,
    parse_budget,
    parse_fastv,
    parse_layers,
    parse_method,
)
from shortzip.reduction.positions import COMPACT, validate_positions
from shortzip.reduction.selectors import BASELINES, VISIONZIP, has_own_budgets, selector_of, settled

ALL, NONE = "all", "none"


@dataclass(frozen=True)
class Reductions:
    """The keys of a reduced model's config, each None where nothing is reduced.

    Raises ReductionError for what no model can take; what one model can take, `validate` says.
    """

    visionzip: Mapping[str, Any] | None = None
    """{"dominant": 54, "contextual": 10}; with "method" and its parameters, chosen in another way than VisionZip's."""
    shortv: Mapping[str, Any] | None = None
    """{"layers": [0, 3]}: the frozen layers, counted from 0."""
    fastv: Mapping[str, Any] | None = None
    """Pruning inside the language model. {"layer": 2, "keep": 0.5} is FastV: layers before the pruning, and the share
    of visual tokens that later ones see; other methods: configuration_pruning.py."""
    positions: str = COMPACT
    """compact or original: where tokens stand once others are left out. Compact where none is."""

    def __post_init__(self) -> None:
        validate_visionzip(self.visionzip)
        validate_shortv(self.shortv)
        validate_fastv(self.fastv)
        validate_positions(self.positions)
        if self.visionzip is not None:
            object.__setattr__(self, "visionzip", settled(self.visionzip))
        if self.shortv is not None and self.fastv is not None:
            raise ReductionError("fastv and shortv are both given: one of them must be null")
        if self.visionzip is None and self.fastv is None:
            object.__setattr__(self, "positions", COMPACT)
        for key, value in self.as_config().items():
            object.__setattr__(self, key, value)  # what the caller does to its dictionaries changes nothing here

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Those that a config.json names: none for a release that knows no reductions."""
        positions = config.get("positions", COMPACT)
        return cls(config.get("visionzip"), config.get("shortv"), config.get("fastv"), positions)

    @classmethod
    def parse(
        cls,
        budget: str = ALL,
        layers: str = NONE,
        fastv: str = NONE,
        *,
        method: str = VISIONZIP,
        seed: int = 0,
        positions: str = COMPACT,
    ) -> Self:
        """Those of "54+10" (or all), "31+29+30" (or none) and "2+0.5" (or none; see `parse_fastv`).

        `method`, of a budget: its word, like "vispruner:important=0.25". `seed`: of random, where its word has none.
        Raises ReductionError.
        """
        visionzip: dict[str, Any] | None = None
        if budget not in (ALL, NONE):
            named = parse_method(method)
            drawn = {"seed": seed} if named["method"] == "random" else {}
            visionzip = {**parse_budget(budget), **drawn, **named}
        frozen = parse_layers(layers)
        return cls(visionzip, {"layers": frozen} if frozen else None, parse_fastv(fastv), positions)

    def as_config(self) -> dict[str, Any]:
        """The keys of a reduced model's config, as values that may be changed."""
        return {
            "visionzip": copy.deepcopy(self.visionzip),
            "shortv": None if self.shortv is None else {"layers": list(self.shortv["layers"])},
            "fastv": copy.deepcopy(self.fastv),
            "positions": self.positions,
        }

    @property
    def is_empty(self) -> bool:
        """Whether nothing is reduced: all visual tokens, in every layer."""
        return self.visionzip is None and self.shortv is None and self.fastv is None

    @property
    def before_the_llm(self) -> Self:
        """The same visual tokens, with nothing frozen or pruned inside the language model."""
        return replace(self, shortv=None, fastv=None)

    @property
    def before_an_engine(self) -> Self:
        """The same visual tokens, where an engine runs the whole language model and numbers tokens as they come."""
        return replace(self.before_the_llm, positions=COMPACT)

    @property
    def lost_in_an_engine(self) -> list[str]:
        """What `before_an_engine` leaves out, each with the reason in words."""
        frozen = f"{len(self.layers)} frozen layers (an engine runs every layer for every token)"
        pruned = f"{self.pruning_described} (an engine prunes nothing)"
        placed = f"{self.positions} positions (an engine numbers tokens as they come)"
        parts = ((self.layers, frozen), (self.fastv, pruned), (self.positions != COMPACT, placed))
        return [words for is_lost, words in parts if is_lost]

    @property
    def layers(self) -> list[int]:
        """The frozen layers, in the order given."""
        return [] if self.shortv is None else list(self.shortv["layers"])

    @property
    def method(self) -> str:
        """How the visual tokens are chosen, by name: visionzip, another published selection or a baseline."""
        return VISIONZIP if self.visionzip is None else str(self.visionzip.get("method", VISIONZIP))

    @property
    def method_words(self) -> str:
        """The method as commands take it, with the parameters that are not at their defaults: random:seed=3."""
        return VISIONZIP if self.visionzip is None else format_method(self.visionzip)

    @property
    def budget_words(self) -> str:
        """The budget as commands take it: 54+10, or all."""
        return ALL if self.visionzip is None else format_budget(self.visionzip)

    @property
    def layers_words(self) -> str:
        """The frozen layers as commands take them, in ascending order: 0+3, or none."""
        return "+".join(map(str, sorted(self.layers))) or NONE

    @property
    def fastv_words(self) -> str:
        """The pruning as commands take it: 2+0.5, or none."""
        return format_fastv(self.fastv)

    @property
    def pruning_name(self) -> str:
        """What the method of pruning is called: FastV; none."""
        return NONE if self.fastv is None else PRUNING_METHODS[pruning_method(self.fastv)].name

    @property
    def pruning_described(self) -> str:
        """The pruning in words, as in: "FastV: 0.5 of them kept after layer 2"; none."""
        if self.fastv is None:
            return NONE
        if pruning_method(self.fastv) == "fastv":
            kept = f"{float(self.fastv['keep']):.3g} of them kept after layer {self.fastv['layer']}"
        else:
            when = "before" if pruning_method(self.fastv) == "pyramiddrop" else "after"
            shares, layers = (", ".join(f"{value:.3g}" for value in self.fastv[key]) for key in ("keep", "layers"))
            kept = f"{shares} of them kept {when} layers {layers}"
        own = self.fastv.get("positions", self.positions)
        differs = "" if own == self.positions else ", renumbered" if own == COMPACT else ", positions kept"
        return f"{self.pruning_name}: {kept}{differs}"

    def describe(self) -> str:
        """Everything that is reduced, in a line of a table or a card."""
        if self.visionzip is None:
            parts = ["all visual tokens"]
        else:
            baseline = "baseline " if self.method in BASELINES else ""
            how = "" if self.method_words == VISIONZIP else f" ({baseline}{self.method_words})"
            parts = [f"{self.budget_words} visual tokens{how}{self._per_image_described}"]
        if self.layers:
            parts.append(f"{len(self.layers)} frozen layers")
        if self.fastv is not None:
            parts.append(self.pruning_described)
        if self.positions != COMPACT:
            parts.append(f"{self.positions} positions")
        return ", ".join(parts)

    @property
    def one_budget(self) -> Self:
        """The same with one budget for all images, where they have one each."""
        if self.visionzip is None or "per_image" not in self.visionzip:
            return self
        return replace(self, visionzip={key: value for key, value in self.visionzip.items() if key != "per_image"})

    def with_budget(self, budget: Mapping[str, int]) -> Self:
        """The same with as many dominant and contextual tokens as `budget` says, by the same method."""
        assert self.visionzip is not None
        named = {key: budget[key] for key in ("dominant", "contextual")}
        return replace(self, visionzip={**self.visionzip, **named})

    @property
    def largest_budget(self) -> Self:
        """The same with the largest budget that an image can have for all of them."""
        if self.visionzip is None or not has_own_budgets(self.visionzip):
            return self.one_budget
        return replace(self, visionzip=budget_of(self.visionzip, self.visionzip["per_image"]["max"]))

    @property
    def _per_image_described(self) -> str:
        per_image = None if self.visionzip is None else self.visionzip.get("per_image")
        if per_image is None or per_image["chooser"] == "fixed":
            return ""
        chooser, parameter = per_image["chooser"], next(key for key in per_image if key in ("coverage", "scale"))
        named = chooser if chooser == parameter else f"{chooser}, {parameter}"
        return f"' shares, {per_image['min']} to {per_image['max']} by {named} {per_image[parameter]:g}"

    def in_place_of_cls(self, config: Mapping[str, Any]) -> str | None:
        """What takes the place of the attention from CLS where a model's config.json names a tower without one, in
        words; None where it has one, or the method looks at no attention."""
        if self.visionzip is None or self.method in BASELINES or "attention" not in selector_of(self.visionzip).reads:
            return None
        tower = config["vision_config"].get("model_type", "clip_vision_model")
        if TOWER_HAS_CLS.get(tower, True):
            return None
        return f"{tower} has no CLS: patches are scored by the attention that they receive"

    def tokens_per_image(self, config: PreTrainedConfig, tiles: int = 1) -> int:
        """Visual tokens that the language model is given of one image (in LLaVA-NeXT of `tiles`), before pruning."""
        zipped = self.visionzip
        budget = None if zipped is None else (zipped["dominant"], zipped["contextual"])
        return visual_tokens_per_image(config, budget, tiles)

    def prefill_flops(self, text_config: PreTrainedConfig, text_tokens: int, visual_tokens: int) -> int:
        """FLOPs of the language model for a prompt, of whose tokens `visual_tokens` are visual ones."""
        if self.fastv is not None:
            return llm_prefill_flops_pruned(text_config, text_tokens, visual_tokens, self.fastv)
        return llm_prefill_flops_grouped(text_config, text_tokens, visual_tokens, self.layers)
