"""PyramidDrop (arXiv 2410.17247, CVPR 2025): visual tokens are pruned in stages, ever fewer in deeper layers.

Before layer l of a stage, the attention that the prompt's last token would pay in it (its own norm, queries, keys and
positions; softmax over the whole row, mean over heads) ranks the visual tokens that are still there. int(P * ratio) of
the original P go on, with all text. In training, where answers follow, the queries are the positions just before each
supervised span, averaged; a row without such stays whole. In decoding nothing is pruned.

With the authors, who look at a row's first image only, P are the visual tokens of one image; here they are all of a
row, ranked together. What is left is renumbered, as in their code; `positions: original` keeps positions (SparseVLM+
and GAP, arXiv 2506.21873, find that better for grounding).

Cost: a layer's projections and one query's attention per stage.
"""

from typing import Any

from torch import Tensor

from .configuration_pruning import POSITIONS
from .pruning import Pruning, PruningMethod, Ranking, top


class PyramidDrop(PruningMethod):
    """Before each of `layers`, all but the share `keep` of a row's visual tokens are pruned."""

    before = True

    def __init__(self, settings: Any) -> None:
        self.layers, self.keep = settings["layers"], settings["keep"]
        self.compact = settings.get("positions", POSITIONS[0]) == "compact"

    def counts(self, there: int) -> list[int]:
        return [int(there * keep) for keep in self.keep]

    def choose(self, stage: int, pruning: Pruning, ranking: Ranking, states: Tensor) -> tuple[Tensor, Tensor]:
        assert pruning.visual is not None
        counts = [self.counts(there)[stage] for there in pruning.there]
        asks = (ranking.queries >= 0).float()
        shares = asks / asks.sum(dim=1, keepdim=True).clamp(min=1)
        scores = (ranking.paid.mean(dim=1) * shares[:, :, None]).sum(dim=1)
        present = pruning.visual if stage == 0 else pruning.visual & pruning.stages[stage].left
        whole = asks.sum(dim=1, keepdim=True) == 0
        return ~pruning.visual | top(scores, present, counts) | whole, states


METHODS = {"pyramiddrop": PyramidDrop}
