"""Several budgets in one step (`sandwich`): rows are read under the largest, which learns as ever, and under smaller
ones, which learn what the largest says.

After Yu and Huang's universally slimmable networks (arXiv 1903.05134, §3: the sandwich rule and inplace distillation),
where networks are wider or narrower and here images have more or fewer tokens. The loss of a supervised token is
L(largest) + Σ τ² KL(largest ‖ smaller), summed over a global batch and divided by its supervised tokens, so that no
cut into micro-batches or processes changes it; L is cross-entropy, or what `distill` makes of it. The largest is
detached: it does not learn to say what smaller ones can follow. One reading after the other is computed and gives its
gradient, so that the memory is the largest's, and its hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from shortzip.data.dataset import MicroBatch

_TAUGHT = ("taught_log_probs", "taught_ids")  # what the release said is for the largest alone


@dataclass
class Widest:
    """What the reading of most tokens says of a micro-batch."""

    states: Tensor | None = None
    """[S, H], hidden states at its supervised positions, of rows that answer an image (in `plain` steps: of all)."""

    def keep(self, states: Tensor) -> None:
        self.states = states.detach()

    def said(self) -> Tensor:
        assert self.states is not None, "the widest reading comes first"
        return self.states


@dataclass(frozen=True)
class Turn:
    """Which of a micro-batch's readings one is."""

    widest: Widest = field(default_factory=Widest)
    """Filled by the first reading."""
    follows: bool = False
    """Whether it learns what the widest says."""


def readings_of(batch: MicroBatch) -> list[MicroBatch]:
    """The readings of a micro-batch, the widest first: itself, where it has no narrower ones."""
    if not batch.narrower:
        return [batch]
    widest = Widest()
    shared = {name: tensor for name, tensor in batch.inputs.items() if name not in _TAUGHT}
    first = replace(batch, narrower=[], turn=Turn(widest))
    others = [
        replace(narrow, inputs={**shared, **narrow.inputs}, turn=Turn(widest, follows=True))
        for narrow in batch.narrower
    ]
    return [first, *others]
