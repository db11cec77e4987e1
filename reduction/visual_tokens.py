"""From pixels to the visual tokens that are chosen of them: the tower up to the selected block, then a selector."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .selectors import Selection, Selector, TowerStates
from .tensors import at_least_float32
from .tower import embed_patches, queries_and_keys
from .visionzip import score_patches


@dataclass
class VisualTokens(ModelOutput):
    """What the tower and the selection make of N images (tiles in LLaVA-NeXT), before the projector.

    Attributes:
        tokens: [N, budget, H] in the tower's dtype: CLS (if kept), dominant patches in spatial order, contextual.
        kept: [N, D] int64, patch indices (row-major in the grid) of the dominant tokens, ascending.
        targets: [N, C] int64, patch indices of the tokens that the contextual ones grew from.
        groups: [N, P] int64, the contextual token that each patch was merged into; -1 for a dominant or dropped patch.
        attention: [N, P] float32, the score of each patch; None where the method looks at none.
    """

    tokens: Tensor | None = None
    kept: Tensor | None = None
    targets: Tensor | None = None
    groups: Tensor | None = None
    attention: Tensor | None = None


class BlockStates(NamedTuple):
    """What the tower's selected block gives of N images (tiles).

    Attributes:
        hidden: [N, T, H], its output.
        queries: [N, heads, Q, d] (see `score_patches`); None where the selector reads nothing of it.
        keys: [N, heads, T, d], unscaled, with bias; likewise.
        scale: see `score_patches`.
    """

    hidden: Tensor
    queries: Tensor | None
    keys: Tensor | None
    scale: float


def run_to_block(tower: Any, pixel_values: Tensor, selected: int, has_cls: bool, reads_attention: bool) -> BlockStates:
    """Runs CLIP or SigLIP on images [N, 3, S, S] up to its block `selected`, and no further.

    `reads_attention` False: queries and keys are None.
    """
    blocks = tower.encoder.layers
    hidden = embed_patches(tower, pixel_values)
    for block in blocks[:selected]:
        hidden = block(hidden, None)
    queries = keys = None
    if reads_attention:
        queries, keys = queries_and_keys(blocks[selected], hidden, has_cls)
    return BlockStates(blocks[selected](hidden, None), queries, keys, blocks[selected].self_attn.scale)


def choose_tokens(
    tower: Any,
    projector: Any,
    pixel_values: Tensor,
    selected: int,
    selector: Selector,
    visionzip: Mapping[str, Any],
    has_cls: bool,
) -> VisualTokens:
    """The visual tokens of images [N, 3, S, S] by the output of the tower's block `selected`.

    Args:
        tower: CLIP's or SigLIP's; run only up to that block.
        projector: asked only by a selector that reads projected patches.
        visionzip: the config's key, for its `dominant` and `contextual`.
        has_cls: whether the tower's token 0 is CLS.
    """
    states = run_to_block(tower, pixel_values, selected, has_cls, bool(selector.reads & {"attention", "keys"}))
    return tokens_of_block(*states, selector, visionzip, has_cls, projector, pixel_values)


def tokens_of_block(
    hidden: Tensor,
    queries: Tensor | None,
    keys: Tensor | None,
    scale: float,
    selector: Selector,
    visionzip: Mapping[str, Any],
    has_cls: bool,
    projector: Any = None,
    pixels: Tensor | None = None,
    refined: Tensor | None = None,
) -> VisualTokens:
    """As `choose_tokens`, of what the selected block gives.

    Args:
        hidden, queries, keys, scale: see BlockStates.
        refined: see TowerStates.
    """
    cls, counts_cls, reads = int(has_cls), has_cls and selector.keeps_cls, selector.reads
    patches = hidden[:, cls:]
    # Autocast would bring back the rounding that float32 is here to avoid.
    with torch.autocast(hidden.device.type, enabled=False):
        with torch.no_grad():
            attention = metric = None
            if queries is not None and keys is not None:
                attention = score_patches(queries, keys, scale, has_cls) if "attention" in reads else None
                metric = at_least_float32(keys).mean(dim=1)[:, cls:] if "keys" in reads else None
            projected = projector(patches if refined is None else refined) if "projected" in reads else None
        states = TowerStates(
            patches=patches,
            cls=hidden[:, :1] if has_cls else None,
            attention=attention,
            keys=metric,
            projected=projected,
            pixels=pixels if "pixels" in reads else None,
            refined=refined,
        )
        selection = selector.select(states, visionzip["dominant"] - counts_cls, visionzip["contextual"])
    return _arranged(states, selection, counts_cls)


def _arranged(states: TowerStates, selection: Selection, counts_cls: bool) -> VisualTokens:
    """CLS, what is kept in spatial order, then what is merged."""
    patches, order = states.content, selection.order
    ascending, rank = order.sort(dim=-1)
    source, index = (patches, ascending) if selection.kept is None else (selection.kept, rank)
    dominant = source.gather(1, index.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
    parts = [dominant] if selection.contextual is None else [dominant, selection.contextual.to(dominant.dtype)]
    if counts_cls and states.cls is not None:
        parts.insert(0, states.cls)
    groups = selection.groups
    return VisualTokens(
        tokens=torch.cat(parts, dim=1),
        kept=ascending,
        targets=order[:, :0] if selection.targets is None else selection.targets,
        groups=order.new_full(patches.shape[:2], -1) if groups is None else groups,
        attention=states.attention,
    )
