"""Vision towers apart from their models: left out where cached features take their place, recognised, loaded alone.

Which features belong to a tower is told by its weights, whose hash takes loading them. So the hash is kept beside the
features under the content of the weight files (train/release/content.py): a later run on the same ones loads no tower.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shortzip.data.errors import UserError
from shortzip.reduction.families import family_of
from shortzip.train.release.content import content_of
from shortzip.train.release.tensor_files import open_tensors, read_specs, weight_files


class _TowerlessMixin:
    _towers: tuple[str, ...]

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        _leave_out(self, self._towers)


def _leave_out(model: Any, towers: tuple[str, ...]) -> None:
    for name in towers:
        setattr(model.model, name, nn.Identity())


@cache
def towerless(model_class: Any) -> Any:
    """A reduced model's class with nothing in the place of its towers, whose weights are not read."""
    towers = family_of(model_class.config_class.model_type).towers
    ignored = tuple(rf"{name}\." for name in towers)
    own = {"_towers": towers, "_keys_to_ignore_on_load_unexpected": ignored}
    return type(f"Towerless{model_class.__name__}", (_TowerlessMixin, model_class), own)


def leave_out_towers(model: Any) -> None:
    """Puts nothing in the place of a loaded model's towers, all of them."""
    _leave_out(model, family_of(model.config.model_type).towers)


def tower_digest(tower: nn.Module) -> str:
    """SHA-256 of a tower's weights, their names and dtypes."""
    return tensors_digest(tower.state_dict())


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 (hex) of tensors, their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tower_parts(release: Path, dtype: torch.dtype) -> dict[str, Any] | None:
    """All that the digest of the tower in `release`, a folder, depends on when it is loaded in this dtype; None for a
    release whose tower lies elsewhere."""
    weights = weight_files(release)
    return {"files": content_of([*weights, release / "config.json"]), "dtype": str(dtype)} if weights else None


def whole_tower(model: Any) -> nn.Module:
    """All that pixels pass through before a loaded model's projector: its tower, or its towers by their names."""
    names = family_of(model.config.model_type).towers
    towers = {name: getattr(model.model, name) for name in names}
    return towers[names[0]] if len(towers) == 1 else nn.ModuleDict(towers)


def load_tower(release: Path, config: Any, dtype: torch.dtype, name: str | None = None) -> nn.Module:
    """A tower of a release's folder in transformers' layout, alone; nothing else of the weights is read.

    `config`: of the LLaVA. `name`: of its towers, as its family has them; the one for images by default. Raises
    ValueError if the files hold other weights than the tower has.
    """
    family = family_of(config.model_type)
    name = family.towers[0] if name is None else name
    tower: nn.Module = family.build_tower(config, name)
    prefix = f"{name}."
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(release):
        found = [key for key in read_specs(path) if prefix in key]
        if found:
            with open_tensors(path) as stored:
                for key in found:  # older releases have one more level, which transformers leaves out by now
                    tensors[_newest_name(key.split(prefix, 1)[1])] = stored[key].to(dtype)
    expected = {_newest_name(key): key for key in tower.state_dict()}
    if expected.keys() != tensors.keys():
        different = sorted(expected.keys() ^ tensors.keys())
        raise UserError(f"{release}: {len(different)} weights of the tower, such as {different[0]}, are not as needed")
    tower.to(dtype).load_state_dict({expected[key]: tensor for key, tensor in tensors.items()})
    return tower.eval().requires_grad_(False)


def _newest_name(name: str) -> str:
    """A tower's weight without the level that transformers has left out of its names by now."""
    return ".".join(part for part in name.split(".") if part != "vision_model")
