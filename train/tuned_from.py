"""Whether a checkpoint was tuned from a release: what showing and comparing the two needs."""

from __future__ import annotations

from pathlib import Path

import torch

from reduction.base_release import fetch_base
from train.config import ConfigError
from train.reduced_checkpoint import lineage
from train.release import Release, release_projector
from train.tensor_files import open_tensors, weight_files


def check_untuned(release: Release) -> None:
    """Raises ConfigError for a release that is itself reduced or tuned: "all tokens" would not be what it shows."""
    older = lineage(release)[:-1]
    if older or not release.saved_reductions.is_empty:
        base = f" ({older[-1]['name']})" if older else ""
        raise ConfigError(
            f"model {release.name} is a reduced or tuned checkpoint: needed is the release it was tuned from{base}; "
            f"give the checkpoint itself as --tuned {release.name}"
        )


def check_tuned(tuned: Release, release: Release) -> None:
    """Raises ConfigError for what is not `release` with a tuned projector."""
    older = lineage(tuned)[:-1]
    if not older:
        raise ConfigError(f"tuned {tuned.name} is a release, and was not tuned from one")
    shapes = [{name: tuple(t.shape) for name, t in release_projector(x).items()} for x in (tuned, release)]
    cure = f"give the release it was tuned from as --model ({older[-1]['name']})"
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        found, needed = (shape.get(name, "missing") for shape in shapes)
        if found != needed:
            differs = f"its projector's {name} is {found}, needed by model {release.name} is {needed}"
            raise ConfigError(f"tuned {tuned.name}: {differs}: {cure}")
    if not _same_base(tuned, release):
        raise ConfigError(f"tuned {tuned.name} was tuned from other weights than model {release.name}: {cure}")


def _same_base(tuned: Release, release: Release) -> bool:
    """Whether `tuned` holds or names the vision tower and language model of `release`."""
    named = tuned.config.get("base_release")
    if named is None:
        return tuned.folder == release.folder or _beginnings(tuned.folder) == _beginnings(release.folder)
    try:
        fetch_base({**named, "name": str(release.folder), "revision": None}, tuned.name)
    except (OSError, ValueError):
        return False
    return True


def _beginnings(folder: Path) -> dict[str, tuple[torch.Size, list[float]]]:
    """Shape and first values of every tensor outside the projector: training changes a tensor nearly everywhere."""
    found = {}
    for path in weight_files(folder):
        with open_tensors(path) as tensors:
            for name in tensors:
                if "multi_modal_projector." not in name:
                    tensor = tensors[name]
                    found[name] = (tensor.shape, tensor.flatten()[:64].tolist())
    return found
