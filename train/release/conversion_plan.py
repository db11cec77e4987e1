"""Which tensor of a converted release comes from which file, and that every one is there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from shortzip.data.errors import UserError
from shortzip.train.release.tensor_files import TensorSpec, dtype_name, read_specs


def check_dtypes(specs: Mapping[str, TensorSpec], part: str, where: str) -> torch.dtype:
    """The one floating dtype of a part (language model, projector or vision tower).

    Raises ValueError naming the dtypes and an example of each when there are several.
    """
    names: dict[torch.dtype, list[str]] = {}
    for name, spec in specs.items():
        if spec.dtype.is_floating_point:
            names.setdefault(spec.dtype, []).append(name)
    if len(names) != 1:
        mix = "; ".join(f"{len(few)} in {dtype_name(dtype)} (such as {few[0]})" for dtype, few in names.items())
        raise UserError(
            f"{where}: the {part}'s tensors have mixed dtypes: {mix or 'none is floating point'}; needed is one. "
            "Choose it: scripts/convert_release.py --dtype float16"
        )
    return next(iter(names))


class Tensors(NamedTuple):
    """The tensors of a folder: what each is, and the file that it is in."""

    specs: dict[str, TensorSpec]
    origin: dict[str, Path]

    @classmethod
    def of(cls, paths: list[Path]) -> Tensors:
        tensors = cls({}, {})
        for path in paths:
            specs = read_specs(path)
            tensors.specs.update(specs)
            tensors.origin.update(dict.fromkeys(specs, path))
        return tensors


class Plan:
    """Which tensor of the converted release comes from which file, and how. `dtype`: of all; None: each its own."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.files: dict[Path, dict[str, str]] = {}
        self.specs: dict[str, TensorSpec] = {}

    def take(self, path: Path, source: str, target: str, spec: TensorSpec) -> None:
        self.files.setdefault(path, {})[target] = source
        self.specs[target] = TensorSpec(spec.shape, self.dtype or spec.dtype)

    def check_dtypes(self, specs: Mapping[str, TensorSpec], part: str, where: str) -> None:
        if self.dtype is None:
            check_dtypes(specs, part, where)


def compare(specs: Mapping[str, TensorSpec], needed: Mapping[str, torch.Tensor], part: str, where: str) -> None:
    """Refuses a part whose tensors are not those that its config needs, by name."""
    missing = sorted(set(needed) - set(specs))
    if missing:
        raise UserError(
            f"{where}: the {part} lacks {len(missing)} tensors, such as {missing[0]}: download the release again"
        )
    for name, tensor in needed.items():
        if specs[name].shape != tuple(tensor.shape):
            raise UserError(
                f"{where}: {name} is {specs[name].shape}, needed by its config.json is {tuple(tensor.shape)}"
            )
