"""A device that is none: its tensors lie in the CPU's memory, behave as a GPU's do, and say what would wait or break.

torch's own hook for devices written in Python (PrivateUse1) gives them a device of their own and an autograd; here
every operation on them is computed by the CPU. An operation that mixes them with the CPU's tensors is refused, as CUDA
refuses it; what makes the host wait for the device is counted by the line that asks for it.

Registering it is for the whole process: tests run it in one of their own.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

HOME = Path(__file__).resolve().parents[2]
aten = torch.ops.aten
# What has to know values before it can go on: a number for Python, or the shape of a result.
WAITING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default,
    aten.unique_consecutive.default, aten.equal.default, aten.is_nonzero.default, aten.repeat_interleave.Tensor,
}  # fmt: skip
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default}


WATCHES: list[Watch] = []  # the one that is told of what comes past every mode


class OnDevice(Tensor):
    """A tensor of the device; `held` is what it is made of."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE, requires_grad=False,
        )  # fmt: skip
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"a tensor of {DEVICE} has no numpy array: copy it to the CPU first")

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        return compute(function, arguments, keywords or {})


class Watch(TorchDispatchMode):
    """Sends operations to the device, and notes what it must be asked.

    Attributes:
        waits: by `file:line operator`, how often the host waited.
        wide: the same of what is in float64.
        products: the same of matrix products in float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.wide: Counter[str] = Counter()
        self.products: Counter[str] = Counter()
        WATCHES[:] = [self]

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        return compute(function, arguments, keywords or {}, self)


def line() -> str:
    """The innermost line of ShortZip's (tests left out) that is being run."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(HOME) and path.relative_to(HOME).parts[0] in ("train", "reduction", "data", "scripts"):
            return f"{path.relative_to(HOME)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "a backward pass"


def compute(function: Any, arguments: Any, keywords: Any, watch: Watch | None = None) -> Any:
    """Runs an operation on the device if it is one of the device's. Raises RuntimeError for tensors of two devices."""
    given = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor)]
    target = keywords.get("device")
    to_device = target is not None and torch.device(target).type == DEVICE.type
    ours = [tensor for tensor in given if isinstance(tensor, OnDevice)]
    if not ours and not to_device:
        return function(*arguments, **keywords)
    copies = function in (aten._to_copy.default, aten.copy_.default)
    others = [tensor for tensor in given if not isinstance(tensor, OnDevice) and tensor.dim() > 0]
    indexed = function in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
    if ours and others and not copies:
        if not indexed:
            places = ", ".join(f"{tuple(tensor.shape)} {tensor.device}" for tensor in given)
            raise RuntimeError(f"{function}: tensors of two devices ({places}), at {line()}")
        note(watch, "waits", f"{line()} {function} with an index of the CPU's")
    if ours and watch is not None:
        leaves = target is not None and not to_device
        back = function is aten.copy_.default and not isinstance(arguments[0], OnDevice)
        truths = indexed and any(
            isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(arguments[1])
        )
        if function in WAITING or leaves or back or truths:
            note(watch, "waits", f"{line()} {function}")
        if function in PRODUCTS and any(tensor.dtype == torch.float32 for tensor in ours):
            note(watch, "products", f"{line()} {function}")

    def bare(leaf: Any) -> Any:
        return leaf.held if isinstance(leaf, OnDevice) else leaf

    called = tree_map(bare, keywords)
    if to_device:
        called["device"] = torch.device("cpu")
    results = function(*tree_map(bare, arguments), **called)
    if target is not None and not to_device:
        return results
    if function is aten.copy_.default:
        return arguments[0]

    def wrapped(leaf: Any) -> Any:
        return OnDevice(leaf) if isinstance(leaf, Tensor) else leaf

    results = tree_map(wrapped, results)
    made = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
    if any(tensor.dtype == torch.float64 for tensor in made):
        note(watch, "wide", f"{line()} {function}")
    return return_and_correct_aliasing(function, arguments, keywords, results) if ours else results


def note(watch: Watch | None, what: str, said: str) -> None:
    if watch is not None:
        getattr(watch, what)[said] += 1


class Backend(_DummyBackendModule):
    """What torch asks a device's module for."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device: Any = None) -> None:
        pass


_setup_privateuseone_for_python_backend("standin", backend_module=Backend())
DEVICE = torch.device("standin", 0)

# torch.tensor(…, device=…) asks the device itself, past every mode.
_KERNELS = torch.library.Library("aten", "IMPL")


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> Tensor:
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _empty(size: Any, dtype: Any = None, **_: Any) -> Tensor:
    return OnDevice(torch.empty(size, dtype=dtype, device="cpu"))


def _copy_from(source: Tensor, target: Any, non_blocking: bool = False) -> Tensor:
    target.held.copy_(source.held if isinstance(source, OnDevice) else source)
    return target


def _local_scalar_dense(tensor: Any) -> Any:
    note(WATCHES[0], "waits", f"{line()} aten._local_scalar_dense.default")
    return tensor.held.item()


_KERNELS.impl("_local_scalar_dense", _local_scalar_dense, "PrivateUse1")
_KERNELS.impl("empty_strided", _empty_strided, "PrivateUse1")
_KERNELS.impl("empty.memory_format", _empty, "PrivateUse1")
_KERNELS.impl("_copy_from", _copy_from, "PrivateUse1")
