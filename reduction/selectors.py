"""How visual tokens are chosen: the interface of a selector, and the list of methods (`visionzip: {method: ...}`).

A selector is a frozen dataclass of its parameters, in a file of its own. To add one: write the file, and name it in
SELECTORS. N is the number of images (tiles in LLaVA-NeXT), P of patches, H the tower's width, D the dominant patches
that are kept, C the contextual tokens that others are merged into.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from .errors import ReductionError
from .extras import extra

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
BUDGET_KEYS = ("dominant", "contextual", "method")


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
    """

    patches: Tensor
    cls: Tensor | None = None
    attention: Tensor | None = None
    keys: Tensor | None = None
    projected: Tensor | None = None
    pixels: Tensor | None = None


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
        reads: which of attention, keys, projected and pixels `select` looks at.
        keeps_cls: whether CLS goes to the language model and is counted in `dominant`, where the tower has one.
        merges: whether `contextual` may be above 0.
    """

    keeps_cls: ClassVar[bool]
    merges: ClassVar[bool]

    @property
    def reads(self) -> frozenset[str]: ...

    def select(self, states: TowerStates, dominant: int, contextual: int) -> Selection:
        """Chooses `dominant` patches (CLS not counted) and merges others into `contextual` tokens.

        Batched over images, without waiting for the device, the same whatever else is in the batch; similarities in
        float32 or finer; of equals the lowest index wins. Called without autocast.
        """


def selector_of(visionzip: Mapping[str, Any]) -> Selector:
    """The selector that a config's `visionzip` key asks for.

    Raises:
        ReductionError: an unknown method, or a parameter that it does not take.
    """
    method = visionzip.get("method", VISIONZIP)
    if method not in SELECTORS:
        raise ReductionError(f"visionzip: method is {method!r}; it must be one of {list(SELECTORS)}")
    file, name = SELECTORS[method]
    kind = getattr(extra(file, f"visionzip: method {method}"), name)
    parameters = {key: value for key, value in visionzip.items() if key not in BUDGET_KEYS}
    names = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(set(parameters) - set(names))
    if unknown:
        takes = f"it takes {', '.join(names)}" if names else "it takes no parameters"
        raise ReductionError(f"visionzip: method {method} has no parameter {unknown[0]!r}: {takes}")
    selector: Selector = kind(**parameters)
    return selector
