"""FastV (arXiv 2403.06764), to compare with: visual tokens are pruned inside the language model, after layer K.

The attention that the prompt's last token pays in layer K (mean over heads) ranks the visual tokens; the layers after
it see the highest-ranked share of them, and all text. That is the authors' code; their paper averages over the
attention of all later tokens. Kept tokens keep their positions.
"""

from typing import Any

from torch import Tensor

from .pruning import Pruning, PruningMethod, Ranking, top


class FastV(PruningMethod):
    """One pruning, after `layer` layers, of all but the share `keep`, rounded to whole tokens, at least one."""

    def __init__(self, settings: Any) -> None:
        self.layers, self.keep = [settings["layer"] - 1], settings["keep"]

    def counts(self, there: int) -> list[int]:
        return [max(round(there * self.keep), min(1, there))]

    def choose(self, stage: int, pruning: Pruning, ranking: Ranking, states: Tensor) -> tuple[Tensor, Tensor]:
        assert pruning.visual is not None
        counts = [self.counts(there)[stage] for there in pruning.there]
        kept = top(ranking.paid.mean(dim=1)[:, 0], pruning.visual, counts)
        return ~pruning.visual | kept, states


METHODS = {"fastv": FastV}
