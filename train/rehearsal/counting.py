"""Bytes of tensors, counted as they are made and freed: on real tensors, or on fake ones that hold nothing."""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shortzip.train.settings.recipes import HOME

CUDA_BLOCK = 512  # bytes: what CUDA's caching allocator rounds a tensor up to (c10/cuda/CUDACachingAllocator.h)
GATHERED = "gathered weights"
_GATHERING = ("fsdp", "c10d")  # namespaces of the operators that come before and after a storage changes its size
_OWN = str(Path(__file__).parent)
# What a kernel makes for itself while it runs, and no dispatch mode sees: the exponentials of what is summed.
_AS_LARGE_AS_THEIR_INPUT = (torch.ops.aten.logsumexp.default,)


@dataclass
class Peak:
    """Where most was held at once.

    Attributes:
        total: bytes.
        parts: bytes by part.
        phase: what the step was doing.
        operator: what asked for memory last, as torch names it.
        node: the step of the backward pass that it belongs to; empty in a forward pass.
        line: the nearest line of ShortZip's, as `folder/file.py:number`.
    """

    total: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    phase: str = ""
    operator: str = ""
    node: str = ""
    line: str = ""


@dataclass
class _Followed:
    """A storage that was seen: `part` None where it came from outside, and `size` 0 with it."""

    storage: weakref.ref[torch.UntypedStorage]
    part: str | None
    size: int


class StorageCounter(TorchDispatchMode):
    """Sums the storages that operations make, from their making to their end.

    Args:
        block: bytes that a storage's size is rounded up to.
        gathers: weights are gathered as FSDP2 does it, in storages that are emptied and filled again.

    Attributes:
        phase: name of what is going on; whoever counts sets it.
        part: what new storages are counted as; likewise.
        held: bytes at the moment, by part.
        total: their sum.
        peaks: by phase, where the sum was largest.
    """

    def __init__(self, block: int = 1, *, gathers: bool = False) -> None:
        super().__init__()
        self.block, self.gathers, self.phase, self.part, self.total = block, gathers, "", "", 0
        self.held: defaultdict[str, int] = defaultdict(int)
        self.peaks = defaultdict[str, Peak](Peak)
        self._followed: dict[int, _Followed] = {}  # by the storage's address
        self._elastic: dict[int, _Followed] = {}  # those of them that may change their size

    @property
    def peak(self) -> Peak:
        """Where the sum was largest of all."""
        return max(self.peaks.values(), key=lambda peak: peak.total, default=Peak())

    @contextmanager
    def during(self, phase: str, part: str) -> Iterator[None]:
        """Names what goes on inside."""
        before = self.phase, self.part
        self._measure_again("")
        self.phase, self.part = phase, part
        try:
            yield
        finally:
            self.phase, self.part = before

    def add(self, tensors: Iterable[Tensor], part: str) -> None:
        """Counts tensors that were there before as `part`, or moves those that are counted already to it."""
        for tensor in tensors:
            followed = self._followed.get(tensor.untyped_storage()._cdata)
            if followed is None:
                self._count(tensor.untyped_storage(), part, "")
            elif followed.part is not None:
                self.held[followed.part] -= followed.size
                self.held[part] += followed.size
                followed.part = part

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        for tensor in tree_leaves((arguments, keywords)):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._followed:
                self._follow(tensor.untyped_storage(), None, 0)  # from outside: it was there before
        results = function(*arguments, **(keywords or {}))
        if self._elastic and function.namespace in _GATHERING:
            self._measure_again(str(function))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._followed:
                part = GATHERED if self.gathers and _is_gathering() else self.part
                self._count(tensor.untyped_storage(), part, str(function))
        if function in _AS_LARGE_AS_THEIR_INPUT:
            self._note(self.total + self._rounded(arguments[0].nbytes), str(function))
        return results

    def _rounded(self, size: int) -> int:
        return -(-size // self.block) * self.block

    def _count(self, storage: torch.UntypedStorage, part: str, operator: str) -> None:
        size = self._rounded(storage.nbytes())
        self.held[part] += size
        self.total += size
        followed = self._follow(storage, part, size)
        if part == GATHERED:
            self._elastic[storage._cdata] = followed
        self._note(self.total, operator)

    def _follow(self, storage: torch.UntypedStorage, part: str | None, size: int) -> _Followed:
        followed = self._followed[storage._cdata] = _Followed(weakref.ref(storage), part, size)
        weakref.finalize(storage, self._freed, storage._cdata).atexit = False
        return followed

    def _freed(self, identity: int) -> None:
        followed = self._followed.pop(identity)  # for the address is used again
        self._elastic.pop(identity, None)
        if followed.part is not None:
            self.held[followed.part] -= followed.size
            self.total -= followed.size

    def _measure_again(self, operator: str) -> None:
        """No operation says that a storage was emptied or filled."""
        for followed in self._elastic.values():
            storage = followed.storage()
            if storage is not None and (change := self._rounded(storage.nbytes()) - followed.size):
                followed.size += change
                self.held[GATHERED] += change
                self.total += change
        self._note(self.total, operator)

    def _note(self, total: int, operator: str) -> None:
        if total > self.peaks[self.phase].total:
            parts = {part: size for part, size in self.held.items() if size}
            if total > self.total:
                parts["kernels"] = total - self.total
            node = torch._C._current_autograd_node()
            self.peaks[self.phase] = Peak(total, parts, self.phase, operator, node.name() if node else "", _line())


def _frames() -> Iterator[tuple[str, int]]:
    """File and line of everything that is being run, the innermost first."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back


def _is_gathering() -> bool:
    for name, _ in _frames():
        if "/distributed/fsdp/" in name:
            return True
        if name.startswith(str(HOME)) and not name.startswith(_OWN) and "/site-packages/" not in name:
            return False
    return False


def _line() -> str:
    """The innermost line of ShortZip's that is being run, this folder's left out."""
    for name, number in _frames():
        if name.startswith(str(HOME)) and not name.startswith(_OWN) and "/site-packages/" not in name:
            return f"{Path(name).relative_to(HOME)}:{number}"
    return ""
