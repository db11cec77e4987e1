"""Every selector, and tower states to choose from."""

from __future__ import annotations

import torch
from torch import Tensor

from shortzip.reduction.selectors import SELECTORS, Selection, TowerStates, selector_of

METHODS: dict[str, dict[str, object]] = {
    **{method: {"method": method} for method in SELECTORS},
    "divprune, projected": {"method": "divprune", "space": "projected"},
    "vispruner, 0.3": {"method": "vispruner", "important": 0.3},
    "scope, 0.5": {"method": "scope", "alpha": 0.5},
    "duet, 2": {"method": "duet", "window": 2},
}


def tower_states(images: int, patches: int, width: int = 48, seed: int = 0, dtype: torch.dtype = torch.float32):
    """States as a tower's are: features with directions in common, a few patches that CLS attends to."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(images, *shape, generator=generator, dtype=torch.float64)

    topics = draw(patches, 6).softmax(dim=-1)
    features = topics @ draw(6, width) * 3 + draw(patches, width)
    attention = (draw(4, patches) + draw(1, patches) * 1.5).softmax(dim=-1).sum(dim=1) * 0.9
    return TowerStates(
        patches=features.to(dtype),
        cls=draw(1, width).to(dtype),
        attention=attention.to(torch.promote_types(dtype, torch.float32)),
        keys=(features[..., : width // 2] + draw(patches, width // 2)).to(torch.promote_types(dtype, torch.float32)),
        projected=(features @ draw(width, width) / width**0.5).tanh().to(dtype),
        pixels=None,
    )


def mapped(states: TowerStates, function) -> TowerStates:
    """`states` with every tensor put through `function`."""
    return TowerStates(*(None if part is None else function(part) for part in states))


def choose(name: str, states: TowerStates, dominant: int, contextual: int = 0) -> Selection:
    """What a method makes of states, given no more of them than it says that it reads."""
    selector = selector_of({**METHODS[name], "dominant": dominant, "contextual": contextual})
    optional = ("attention", "keys", "projected", "pixels")
    unread = {part: None for part in optional if part not in selector.reads}
    return selector.select(states._replace(**unread), dominant, contextual if selector.merges else 0)


def merges(name: str) -> bool:
    return selector_of({**METHODS[name], "dominant": 1, "contextual": 0}).merges


def tokens(states: TowerStates, selection: Selection) -> Tensor:
    """What the language model is given of a selection, without CLS: kept patches in spatial order, then merged."""
    ascending, rank = selection.order.sort(dim=-1)
    source, index = (states.patches, ascending) if selection.kept is None else (selection.kept, rank)
    kept = source.gather(1, index.unsqueeze(-1).expand(-1, -1, source.shape[-1]))
    return kept if selection.contextual is None else torch.cat([kept, selection.contextual], dim=1)
