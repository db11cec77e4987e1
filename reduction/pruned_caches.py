"""What caches hold where visual tokens are pruned inside the language model: zeros for those that are gone.

So a cache must give keys back as it got them (SUPPORTED_CACHE_LAYERS).
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .errors import ReductionError

SUPPORTED_CACHE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


def refuse_cache(cache: Any) -> None:
    """Refuses a cache whose keys may come back changed, or that holds more than keys and values of attention.

    Raises:
        ReductionError: naming the cache's or its layer's class.
    """
    if cache is None:
        return
    # Exactly these: what a subclass gives back is its own business.
    whole = type(cache) in (DynamicCache, StaticCache)
    for kind in {type(layer) for layer in cache.layers} - set(SUPPORTED_CACHE_LAYERS) if whole else {type(cache)}:
        raise ReductionError(
            f"fastv: a {kind.__name__} may change the zeros by which pruned tokens are known: generate with the "
            "dynamic or static cache (cache_implementation 'dynamic' or 'static'), or load the model with fastv=None"
        )


def first_key(cache: Cache | None, layer: int, length: int) -> int | Tensor:
    """The column of attention at which a pass's keys will begin, asked before they are put into a layer's cache.

    A static cache gives it as a tensor, which is not waited for here.
    """
    if cache is None:
        return 0
    _, offset = cache.get_mask_sizes(length, layer)
    return cache.get_seq_length(layer) - offset


def gone_before(cache: Cache | None, layer: int, start: int | Tensor, mask: Tensor | None) -> Tensor | None:
    """[B, 1] int64, how many positions were pruned in the layer's cache, before column `start`; None: it is empty.

    `mask`: the decoder's. Padding is no pruned token, whatever key it has.
    """
    if cache is None or (isinstance(start, int) and start == 0):
        return None
    held: Any = cache.layers[layer]
    if not held.is_initialized:
        return None
    gone = (held.keys == 0).all(dim=-1).all(dim=1)
    gone = gone & (torch.arange(gone.shape[1], device=gone.device) < start)
    if mask is not None:
        last = mask[:, 0, -1, : gone.shape[1]]
        gone = gone & (last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2)
    return gone.sum(dim=1, keepdim=True)
