"""The most bytes of tensors that a piece of work holds at once, beside those that were there before.

On CUDA the device's allocator counts them. On the CPU the process's resident size also holds Python, libraries,
weights and what the allocator has not given back, so every tensor that an operation makes is counted, until it is
freed; what a kernel takes for itself while it runs is not seen. Counting slows the work: it has a run of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Counted(TorchDispatchMode):
    """Sums the storages that operations make, from their making to their end."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        for tensor in tree_leaves((arguments, keywords)):
            if isinstance(tensor, torch.Tensor):
                self._known.add(tensor.untyped_storage()._cdata)  # what comes from outside was there before
        results = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.held += storage.nbytes()
        self.most = max(self.most, self.held)
        weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes()).atexit = False

    def _freed(self, identity: int, size: int) -> None:
        self.held -= size
        self._known.discard(identity)


def peak_tensor_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Peak of the bytes of tensors on `device` while `run` works, less what was there when it began."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Counted() as counted:
        run()
    return counted.most
