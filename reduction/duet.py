"""DUET-VLM's first stage, vision to vision (CVPR 2026, arXiv 2602.18846): VisionZip that merges locally.

CLS and the dominant patches by attention are kept, as in VisionZip. Of the other M, the `window` * C that CLS attends
to most are the pool, in falling attention; every (pool // C)-th of it is an anchor, and every other one goes to the
anchor whose key is most like its own (cosine). A contextual token is the anchor **plus** the mean of what went to it.
The other patches are dropped. O(w C² d) after the sort.

As the authors' code; the paper, by its readers, averages the `window` neighbours of each anchor. In the code window
is the mean size of a group, and a group may be of any. window 1 keeps the anchors alone; from M / C on
nothing is dropped. (Their second stage, inside the language model, is not here.)
"""

from dataclasses import dataclass
from typing import ClassVar

from .errors import ReductionError
from .selectors import Selection, TowerStates
from .tensors import by_score, check_count
from .visionzip import merge_into


def pool_of(rest: int, count: int, window: int) -> tuple[int, int]:
    """(size of the pool, step between its anchors) for `count` contextual tokens of `rest` patches.

    Raises:
        ReductionError: `count` outside 0 to `rest`.
    """
    if not 0 <= count <= rest:
        raise ReductionError(
            f"cannot merge {rest} remaining patches into {count} contextual tokens: choose 0 to {rest}"
        )
    size = min(max(1, window * count), rest)
    return size, max(1, size // max(1, count))


@dataclass(frozen=True)
class Duet:
    """DUET-VLM: VisionZip with anchors by attention; `window` is the mean number of patches in a contextual token."""

    title: ClassVar[str] = "DUET-VLM"
    paper: ClassVar[str] = "2602.18846"
    reads: ClassVar[frozenset[str]] = frozenset({"attention", "keys"})
    keeps_cls: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    window: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or isinstance(self.window, bool) or self.window < 1:
            raise ReductionError(
                f"visionzip: method duet: window is {self.window!r}; it must be a whole number from 1"
            )

    def select(self, states: TowerStates, dominant: int, contextual: int) -> Selection:
        """See `Selector.select`; contextual tokens in falling attention of their anchors.

        Raises ReductionError for a budget that the grid cannot fill.
        """
        assert states.attention is not None
        assert states.keys is not None
        patches = states.attention.shape[-1]
        check_count(dominant, patches)
        size, step = pool_of(patches - dominant, contextual, self.window)
        ranked = by_score(states.attention)
        order, pool = ranked[:, :dominant], ranked[:, dominant : dominant + size]
        merged, targets, groups = merge_into(states.content, states.keys, pool, step, contextual)
        return Selection(order, contextual=merged, targets=targets, groups=groups)
