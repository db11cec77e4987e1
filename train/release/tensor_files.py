"""Tensor files of a release, one tensor at a time: reading .bin and .safetensors, writing .safetensors as a stream.

Reading never runs code from a file (`torch.load(weights_only=True)`) and writing never holds more than one tensor,
so that converting a release needs about one of its shards in memory.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from shortzip.data.errors import MissingFile, UserError
from shortzip.reduction.weight_files import refuse_compressed, weight_names

_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_TORCH_DTYPES = {name: dtype for dtype, name in _SAFETENSORS_NAMES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float16` → `float16`, as configs spell it."""
    return str(dtype).removeprefix("torch.")


def read_safetensors_specs(path: Path) -> dict[str, TensorSpec]:
    """Names, shapes and dtypes of a .safetensors file, from its header alone.

    Raises ValueError when the file is shorter or longer than its header announces: a copy or a conversion that was
    cut short is found without reading the tensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            entries = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            shapes = {name: (tuple(entry.get_shape()), entry.get_dtype()) for name, entry in entries.items()}
    except SafetensorError as error:
        raise UserError(
            f"{path} was cut short or damaged ({path.stat().st_size} bytes; {error}): download or convert it again"
        ) from error
    unknown = sorted({dtype for _, dtype in shapes.values()} - _TORCH_DTYPES.keys())
    if unknown:
        raise UserError(f"{path} holds tensors of dtype {', '.join(unknown)}, known are {', '.join(_TORCH_DTYPES)}")
    return {name: TensorSpec(shape, _TORCH_DTYPES[dtype]) for name, (shape, dtype) in shapes.items()}


def _load_bin(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a .bin file, memory-mapped where the format allows it (everything since torch 1.6)."""
    zipped = zipfile.is_zipfile(path)
    if zipped:
        refuse_compressed(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: it holds something other than tensors, and loading that could run code "
            f"({str(error).splitlines()[0]}). Only files that `torch.load(weights_only=True)` reads are accepted: "
            "ask its author for a safetensors file"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read, it was probably cut short ({path.stat().st_size} bytes): download it again "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} is refused: it holds a {type(loaded).__name__}, needed is a dict of tensors by name")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UserError(
                f"{path} is refused: entry {name!r} is a {type(value).__name__}, needed are tensors by name only. "
                "A training checkpoint? Save its state dict alone"
            )
    return loaded


@contextmanager
def open_tensors(path: Path) -> Iterator[Mapping[str, torch.Tensor]]:
    """The tensors of a .bin or .safetensors file by name, read (or mapped) only when asked for.

    Raises FileNotFoundError, or ValueError for a file that is cut short or holds anything but tensors.
    """
    if not path.is_file():
        raise MissingFile(f"{path} is missing: download the release again")
    if path.suffix == ".safetensors":
        read_safetensors_specs(path)
        try:
            with safe_open(path, framework="pt") as file:
                yield _LazySafetensors(file)
        except SafetensorError as error:
            raise UserError(f"{path} cannot be read ({error}): download or convert it again") from error
    else:
        tensors = _load_bin(path)
        try:
            yield tensors
        finally:
            tensors.clear()


class _LazySafetensors(Mapping[str, torch.Tensor]):
    def __init__(self, file: safe_open) -> None:
        self._file = file
        self._names = list(file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_specs(path: Path) -> dict[str, TensorSpec]:
    """Names, shapes and dtypes of a .bin or .safetensors file. Raises as `open_tensors` does."""
    if not path.is_file():
        raise MissingFile(f"{path} is missing: download the release again")
    if path.suffix == ".safetensors":
        return read_safetensors_specs(path)
    with open_tensors(path) as tensors:
        return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, as transformers chooses them: one file, or those of an index; safetensors first.

    An empty list when the folder holds none. Raises FileNotFoundError for a shard that the index names and the
    folder lacks, ValueError for an index that is damaged or leads out of the folder.
    """
    names = weight_names(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        index = "model.safetensors" if missing[0].endswith(".safetensors") else "pytorch_model.bin"
        raise MissingFile(
            f"{folder} lacks {', '.join(missing)}, which {index}.index.json names: download the release again"
        )
    return [folder / name for name in names]


def folder_specs(folder: Path) -> dict[str, TensorSpec]:
    """Specs of all tensors in `weight_files(folder)`, with the size of every safetensors file checked."""
    specs: dict[str, TensorSpec] = {}
    for path in weight_files(folder):
        specs.update(read_specs(path))
    return specs


def write_safetensors(
    path: Path, specs: Mapping[str, TensorSpec], produce: Callable[[str], torch.Tensor | list[torch.Tensor]]
) -> None:
    """Writes `path` tensor by tensor. `produce(name)` gives the tensor, or a list of pieces joined along dimension 0.

    The file is flushed to the disk before the function returns. Raises ValueError when a tensor does not have the
    shape and dtype that `specs` promises.
    """
    # The format's own order: wide dtypes first, so that every tensor is aligned; then by name.
    names = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        spec = specs[name]
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name in names:
            pieces = produce(name)
            pieces = pieces if isinstance(pieces, list) else [pieces]
            written = 0
            for piece in pieces:
                if piece.dtype != specs[name].dtype:
                    raise UserError(f"{name}: {piece.dtype} where {specs[name].dtype} was announced")
                written += piece.numel() * piece.dtype.itemsize
                if piece.numel():
                    file.write(piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if written != specs[name].nbytes:
                raise UserError(f"{name}: {written} bytes where {specs[name].nbytes} were announced")
        file.flush()
        os.fsync(file.fileno())


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """`model.safetensors.index.json` as transformers reads it. `total_size` in bytes."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
