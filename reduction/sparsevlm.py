"""SparseVLM (arXiv 2410.04417, ICML 2025), version 1.5, and SparseVLM+: pruning by the words that look at the image.

**Raters**, once, from the input embeddings: the text behind the image, up to the prompt's end, whose share of
softmax(visual . text), mean over visual tokens, is above the mean. **After** each of the layers listed (from 0), the
attention that they pay there (mean over heads and raters) ranks the visual tokens still there; the best of them go on,
as many as listed, at least one fewer than there were.

1.5: the int(0.3 m) + 1 best of m pruned tokens are merged into int(q / 10) + 1 clusters of them (density peaks), which
stand behind the row's other visual tokens; positions are renumbered.
+: attention is divided by what the rotary positions alone would give, R(m, n) = sum over the head of the products of
ones under the positions m and n, over sqrt(d); only the 14 heads that pay most count; nothing is merged, and positions
are kept.

The authors' code takes one prompt with one image. A batch is its rows here; of several images the text behind the
first rates, and their tokens are ranked together. Their clusters hang on a random number where densities are equal,
as those of mutual neighbours are; here the lowest index wins. A prompt none of whose words stands out is rated by all
of them, one without words behind the image by its last token.

Cost: the rows of a layer's attention that belong to raters, per stage; of 1.5, the distances of q tokens.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half

from .pruning import Pruning, PruningMethod, Ranking, top
from .shortv import active_rows

HEADS = 14


class SparseVLMPlus(PruningMethod):
    """After each of `layers`, all but `keep` of a row's visual tokens are pruned."""

    opens = True

    def __init__(self, settings: Any) -> None:
        self.layers, self.keep = settings["layers"], settings["keep"]

    def counts(self, there: int) -> list[int]:
        found = []
        for keep in self.keep:
            there = max(min(keep, there - 1), 0)
            found.append(there)
        return found

    @torch.no_grad()
    def open(self, pruning: Pruning, embeds: Tensor) -> None:
        visual, length = pruning.visual, embeds.shape[1]
        assert visual is not None
        places = torch.arange(length, device=embeds.device)
        end = torch.full((len(embeds),), length - 1, device=embeds.device) if pruning.query is None else pruning.query
        text = (visual.cumsum(dim=1) > 0) & ~visual & (places <= end[:, None])
        pruning.raters = active_rows(~_raters(embeds.float(), visual, text, places == end[:, None]))

    def queries(self, pruning: Pruning) -> Tensor | None:
        assert pruning.raters is not None
        return pruning.raters.positions.where(pruning.raters.is_active, -1)

    def choose(self, stage: int, pruning: Pruning, ranking: Ranking, states: Tensor) -> tuple[Tensor, Tensor]:
        visual = pruning.visual
        assert visual is not None
        present = visual if stage == 0 else visual & pruning.stages[stage].left
        scores = self.scores(ranking, present)
        counts = [self.counts(there)[stage] for there in pruning.there]
        return ~visual | top(scores, present, counts), states

    def scores(self, ranking: Ranking, present: Tensor) -> Tensor:
        """[B, L] float32."""
        paid = ranking.paid / _rotary_alone(ranking)[:, None]
        rated = _mean_over_raters(paid, ranking)
        total = rated.masked_fill(~present[:, None], 0).sum(dim=2)
        best = total.sort(dim=1, descending=True, stable=True).indices[:, :HEADS, None]
        return rated.gather(1, best.expand(-1, -1, rated.shape[2])).mean(dim=1)


class SparseVLM(SparseVLMPlus):
    """Version 1.5, which merges part of what it prunes."""

    compact = True

    def counts(self, there: int) -> list[int]:
        found = []
        for keep in self.keep:
            kept = max(min(keep, there - 1), 0)
            there = kept + _clusters(there - kept)[1]
            found.append(there)
        return found

    def scores(self, ranking: Ranking, present: Tensor) -> Tensor:
        return _mean_over_raters(ranking.paid, ranking).mean(dim=1)

    def choose(self, stage: int, pruning: Pruning, ranking: Ranking, states: Tensor) -> tuple[Tensor, Tensor]:
        visual = pruning.visual
        assert visual is not None
        present = visual if stage == 0 else visual & pruning.stages[stage].left
        scores = self.scores(ranking, present)
        before = [there if stage == 0 else self.counts(there)[stage - 1] for there in pruning.there]
        kept = [max(min(self.keep[stage], there - 1), 0) for there in before]
        is_kept = top(scores, present, kept)
        merging = [_clusters(there - count)[0] for there, count in zip(before, kept, strict=True)]
        is_merged = top(scores, present & ~is_kept, merging)
        rows = [
            _laid_out(states[row], visual[row], is_kept[row], is_merged[row], pruning.there[row], kept[row], count)
            for row, count in enumerate(merging)
        ]
        left, laid = (torch.stack(parts) for parts in zip(*rows, strict=True))
        return left, laid


METHODS = {"sparsevlm": SparseVLM, "sparsevlm+": SparseVLMPlus}


def _raters(embeds: Tensor, visual: Tensor, text: Tensor, end: Tensor) -> Tensor:
    """[B, L] bool: the text tokens [B, L] of embeddings [B, L, H] that rate; all of them, or the `end` [B, L], where
    none stands out."""
    logits = (embeds @ embeds.transpose(1, 2)).masked_fill(~text[:, None], torch.finfo(embeds.dtype).min)
    of_image = visual.to(embeds) / visual.sum(dim=1, keepdim=True).clamp(min=1)
    share = (of_image[:, None] @ logits.softmax(dim=-1))[:, 0].masked_fill(~text, 0)
    mean = share.sum(dim=1, keepdim=True) / text.sum(dim=1, keepdim=True).clamp(min=1)
    found = text & (share > mean)
    found = found | (text & ~found.any(dim=1, keepdim=True))
    return found | (end & ~found.any(dim=1, keepdim=True))


def _mean_over_raters(paid: Tensor, ranking: Ranking) -> Tensor:
    """[B, heads, S, L] to [B, heads, L]."""
    rates = (ranking.queries >= 0).float()
    paid = paid.masked_fill((ranking.queries < 0)[:, None, :, None], 0)
    return paid.sum(dim=2) / rates.sum(dim=1)[:, None, None]


def _rotary_alone(ranking: Ranking) -> Tensor:
    """[B, S, L] float32, R of the queries and all positions."""
    cos, sin = ranking.rotation
    ones = torch.ones_like(cos, dtype=torch.float32)
    turned = ones * cos.float() + rotate_half(ones) * sin.float()
    at = ranking.queries.clamp(min=0)[:, :, None].expand(-1, -1, turned.shape[2])
    return turned.gather(1, at) @ turned.transpose(1, 2) / turned.shape[2] ** 0.5


def _clusters(pruned: int) -> tuple[int, int]:
    """Of so many pruned tokens, how many are merged, and into how many."""
    merged = int(0.3 * pruned) + 1 if pruned else 0
    return merged, _clusters_of(merged)


def _clusters_of(merged: int) -> int:
    return int(merged / 10) + 1 if merged else 0


def merge(tokens: Tensor, clusters: int) -> Tensor:
    """Tokens [q, H] merged into the means of `clusters` of them, [clusters, H], by density peaks."""
    with torch.no_grad():
        points = tokens.float()
        distances = torch.cdist(points[None], points[None])[0] / points.shape[1] ** 0.5
        nearest = distances.topk(clusters, dim=1, largest=False).values
        density = (-nearest.square().mean(dim=1)).exp()
        index = torch.arange(len(points), device=points.device)
        # Of equally dense tokens the earlier counts as denser.
        denser = (density > density[:, None]) | ((density == density[:, None]) & (index < index[:, None]))
        to_denser = torch.where(denser, distances, distances.max()).min(dim=1).values
        centres = (to_denser * density).sort(descending=True, stable=True).indices[:clusters]
        member = distances[:, centres].argmin(dim=1).index_copy(0, centres, index[:clusters])
        belongs = torch.nn.functional.one_hot(member, clusters).to(tokens)
    return belongs.T @ tokens / (belongs.sum(dim=0)[:, None] + 1e-6)


def _laid_out(
    states: Tensor, visual: Tensor, is_kept: Tensor, is_merged: Tensor, there: int, kept: int, merging: int
) -> tuple[Tensor, Tensor]:
    """What is left of a row, [L] bool, and its states [L, H]: merged tokens take its last visual places, and what is
    kept makes room for them.

    Args:
        visual, is_kept, is_merged: [L] bool, of which `there`, `kept` and `merging` are set.
    """
    if merging == 0:
        return ~visual | is_kept, states
    places, keeping = _set(visual, there), _set(is_kept, kept)
    merged = merge(states[_set(is_merged, merging)], _clusters_of(merging))
    rank, room = (visual.cumsum(dim=0) - 1)[keeping], there - len(merged)
    moved = places[torch.minimum(rank, torch.arange(room - kept, room, device=rank.device))]
    left = (~visual).index_fill(0, moved, True).index_fill(0, places[room:], True)
    return left, states.index_copy(0, moved, states[keeping]).index_copy(0, places[room:], merged)


def _set(mask: Tensor, count: int) -> Tensor:
    """[count] int64, where a mask [L] is set, ascending; `count` is known, so that nothing is waited for."""
    return mask.to(torch.uint8).sort(descending=True, stable=True).indices[:count]
