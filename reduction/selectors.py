"""How visual tokens are chosen: the interface of a selector, and the list of methods (`visionzip: {method: ...}`).

A selector is a frozen dataclass of its parameters, in a file of its own. To add one: write the file, and name it in
SELECTORS and in extras.py. N is the number of images (tiles in LLaVA-NeXT), P of patches, H the tower's width, D the
dominant patches that are kept, C the contextual tokens that others are merged into.

Imports no torch: commands name the methods in their --help.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, get_args, get_origin, get_type_hints

from .errors import ReductionError
from .extras import extra

if TYPE_CHECKING:
    from torch import Tensor

VISIONZIP = "visionzip"
# Method: its file in this folder, and its class there.
SELECTORS = {
    VISIONZIP: ("visionzip", "VisionZip"),
    "divprune": ("divprune", "DivPrune"),
    "vispruner": ("vispruner", "VisPruner"),
    "scope": ("scope", "Scope"),
    "dpp": ("dpp", "DeterminantalPoints"),
    "duet": ("duet", "Duet"),
    "fastervlm": ("vispruner", "FasterVLM"),
    "prumerge+": ("prumerge", "PruMergePlus"),
}
# Ways to as few tokens that are there to compare with (baselines.py): their parameters, with the defaults.
BASELINES: dict[str, dict[str, Any]] = {"random": {"seed": 0}, "grid": {}, "pool": {}, "downsample": {}}
METHODS = (*SELECTORS, *BASELINES)
BY_QUESTION = "cdpruner"  # what question_tokens.py adds, and no config holds
BUDGET_KEYS = ("dominant", "contextual", "per_image", "method")
# What a selector may read and still choose the same of an image whenever it is asked; and what all else depends on.
OF_THE_IMAGE = frozenset({"attention", "keys", "pixels"})
MOVING = {"projected": "the projector, which is tuned"}


class TowerStates(NamedTuple):
    """What a selector may look at, of N images. What it does not list in `reads` is None, and is not computed.

    Attributes:
        patches: [N, P, H], the tower's output in its dtype, CLS off.
        cls: [N, 1, H], or None for a tower without CLS.
        attention: [N, P] float32 or finer, the score of each patch: attention from CLS, summed over heads; without CLS
            the attention received (visionzip.score_patches).
        keys: [N, P, d] float32 or finer, the selected block's keys, unscaled, mean over heads, CLS off.
        projected: [N, P, W], every patch through the projector as it is now.
        pixels: [N, 3, S, S], what the tower was given.
        refined: [N, P, H], what is kept and merged of the patches, where that is not what is looked at (Mini-Gemini
            adds what each patch mines); None: the patches themselves.
    """

    patches: Tensor
    cls: Tensor | None = None
    attention: Tensor | None = None
    keys: Tensor | None = None
    projected: Tensor | None = None
    pixels: Tensor | None = None
    refined: Tensor | None = None

    @property
    def content(self) -> Tensor:
        """[N, P, H], what is kept and merged: a method that merges takes it, one that compares takes `patches`."""
        return self.patches if self.refined is None else self.refined


class Selection(NamedTuple):
    """What a selector chooses of N images.

    Attributes:
        order: [N, D] int64, the patches that are kept, each once, in the order of choice. The model gives them to the
            language model in spatial order.
        kept: [N, D, H] in the order of `order`, where a method changes the patches that it keeps (it merges others
            into them); None: as they are.
        contextual: [N, C, H], tokens merged of others; None: there are none (C is 0).
        targets: [N, C] int64, for each contextual token the patch that it grew from.
        groups: [N, P] int64, for each patch the contextual token that it was merged into; -1: kept, or dropped.
    """

    order: Tensor
    kept: Tensor | None = None
    contextual: Tensor | None = None
    targets: Tensor | None = None
    groups: Tensor | None = None


class Selector(Protocol):
    """A method of choosing. Its fields are its parameters: the keys that `visionzip` takes beside the budget.

    Attributes:
        title: what its paper calls it.
        paper: its arXiv id.
        reads: which of attention, keys, projected and pixels `select` looks at.
        keeps_cls: whether CLS goes to the language model and is counted in `dominant`, where the tower has one.
        merges: whether `contextual` may be above 0.
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    keeps_cls: ClassVar[bool]
    merges: ClassVar[bool]

    @property
    def reads(self) -> frozenset[str]: ...

    def select(self, states: TowerStates, dominant: int, contextual: int) -> Selection:
        """Chooses `dominant` patches (CLS not counted) and merges others into `contextual` tokens.

        Batched over images, without waiting for the device, the same whatever else is in the batch; similarities in
        float32 or finer; of equals the lowest index wins. Called without autocast.
        """


class Parameter(NamedTuple):
    """What a method can be told beside the budget."""

    kind: Any
    """bool, int, float, str, or a Literal of what is allowed."""
    default: Any


def parameters_of(method: str) -> dict[str, Parameter]:
    """The parameters of a method, by name. Raises ReductionError for an unknown method."""
    methods = [*SELECTORS, *BASELINES]  # a list: what is asked for may be anything
    if method == BY_QUESTION:
        raise ReductionError(
            f"visionzip: method {method} chooses by each question, which no config and no cache can hold: evaluate it "
            "with text_tower (shortzip evaluate, lmms-eval), which takes a budget and no method"
        )
    if method not in methods:
        raise ReductionError(f"visionzip: method is {method!r}; it must be one of {methods}")
    if method in BASELINES:
        return {name: Parameter(type(default), default) for name, default in BASELINES[method].items()}
    kind = _class_of(method)
    hints = get_type_hints(kind)
    return {field.name: Parameter(hints[field.name], field.default) for field in dataclasses.fields(kind)}


def settled(visionzip: Mapping[str, Any]) -> dict[str, Any]:
    """A config's `visionzip` key with all parameters of its method, those that it does not name at their defaults:
    two that mean the same are equal. VisionZip's own method is left unsaid.

    Raises:
        ReductionError: an unknown method, a parameter that it does not take, or a value of another type.
    """
    method = visionzip.get("method", VISIONZIP)
    known = parameters_of(method)
    given = {key: value for key, value in visionzip.items() if key not in BUDGET_KEYS}
    if unknown := sorted(set(given) - set(known)):
        takes = f"it takes {', '.join(known)}" if known else "it takes no parameters"
        raise ReductionError(f"visionzip: method {method} has no parameter {unknown[0]!r}: {takes}")
    values = {
        name: _checked(method, name, kind, given[name]) if name in given else default
        for name, (kind, default) in known.items()
    }
    named = {} if method == VISIONZIP else {"method": method}
    per_image = {} if visionzip.get("per_image") is None else {"per_image": dict(visionzip["per_image"])}
    budget = {"dominant": visionzip["dominant"], "contextual": visionzip["contextual"], **per_image}
    return {**budget, **named, **values}


def selector_of(visionzip: Mapping[str, Any]) -> Selector:
    """The selector that a config's `visionzip` key asks for; its method is no baseline.

    Raises:
        ReductionError: as `settled`, and a value out of range.
    """
    budget = {"dominant": 1, "contextual": 0}  # what is chosen by asks for none
    parameters = {key: value for key, value in settled({**budget, **visionzip}).items() if key not in BUDGET_KEYS}
    selector: Selector = _class_of(visionzip.get("method", VISIONZIP))(**parameters)
    return selector


def merges(visionzip: Mapping[str, Any]) -> bool:
    """Whether the method of a config's `visionzip` key takes `contextual` tokens. Raises as `selector_of`."""
    method = visionzip.get("method", VISIONZIP)
    return method not in BASELINES and selector_of(visionzip).merges


def has_own_budgets(visionzip: Mapping[str, Any] | None) -> bool:
    """Whether images of a config's `visionzip` key choose a budget each (image_budgets.py)."""
    per_image = None if visionzip is None else visionzip.get("per_image")
    return per_image is not None and per_image["chooser"] != "fixed"


def refuse_to_keep(visionzip: Mapping[str, Any]) -> None:
    """Raises ReductionError for a method whose visual tokens cannot be computed once and kept: it chooses by more than
    the image."""
    method = visionzip.get("method", VISIONZIP)
    reads = frozenset() if method in BASELINES else selector_of(visionzip).reads
    for moving in sorted(reads - OF_THE_IMAGE):
        named = "".join(f", {key} {value}," for key, value in visionzip.items() if key not in BUDGET_KEYS)
        raise ReductionError(
            f"visionzip: method {method}{named} chooses by {MOVING.get(moving, 'the question')}, "
            "not by the image alone: its visual tokens cannot be cached (data.cache_features: null)"
        )


def _class_of(method: str) -> Any:
    file, name = SELECTORS[method]
    return getattr(extra(file, f"visionzip: method {method}"), name)


def _checked(method: str, name: str, kind: Any, value: Any) -> Any:
    """`value` as a parameter's `kind` has it: a whole number is a number too."""
    if get_origin(kind) is Literal:
        needed, fits = f"one of {', '.join(map(repr, get_args(kind)))}", value in get_args(kind)
    elif kind is float:
        needed, fits = "a finite number", type(value) in (int, float) and math.isfinite(value)
    else:
        needed, fits = {int: "a whole number", bool: "true or false", str: "a word"}[kind], type(value) is kind
    if not fits:
        raise ReductionError(f"visionzip: method {method}: {name} is {value!r}; {needed} is needed")
    return float(value) if kind is float else value
