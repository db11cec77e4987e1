"""An image's visual tokens, computed once: the tower is untrained and no cached selection reads the text.

A folder holds shards, safetensors files of a few hundred images each. Their names and contents depend on what is in
them alone; they are written beside and renamed, so that processes never see half of one and a kill loses at most the
images since the last shard. Nothing is ever changed: another image, tower, processor or budget has another key. A
shard holds a digest of what it holds: a damaged one counts as not there, and its images are computed anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shortzip.data.errors import UserError
from shortzip.data.files import replace_file, write_atomically, writing
from shortzip.data.images import (
    BadImage,
    ImageSource,
    image_bytes,
    image_name,
)
from shortzip.data.kept import identity_of
from shortzip.data.known_images import KnownImages
from shortzip.reduction.positions import keeps_positions
from shortzip.reduction.selectors import refuse_to_keep, settled
from shortzip.train.release.tensor_files import read_safetensors_specs
from shortzip.train.release.towers import tensors_digest, tower_digest

FORMAT = 2  # of shards, and of what data/images.py makes of a file: to be raised when either changes
_KEPT = ("tokens", "kept", "targets")
_NOT_OF_FEATURES = ("transformers_version", "_name_or_path", "dtype")  # the tower's digest holds its dtype


class DamagedShard(UserError):
    """A shard that does not hold what was written; the message says what to do."""


def image_key(source: ImageSource, image_root: str | os.PathLike[str] | None) -> str:
    """SHA-256 of an image's bytes. Raises `BadImage` if it cannot be read."""
    try:
        return hashlib.sha256(image_bytes(source, image_root)).hexdigest()
    except OSError as error:  # a table's cell that holds no bytes
        raise BadImage("missing_image", image_name(source), str(error)) from error


def features_identity(model: Any, processor: Any, tower: str | None = None) -> dict[str, Any]:
    """Everything but the image that its visual tokens depend on. `tower`: its digest, where that is known.

    Raises ValueError if the model keeps every visual token, or chooses by more than the image.
    """
    config = model.config
    if config.visionzip is None:
        raise UserError(
            "features can be cached for a reduced budget only: all visual tokens of an image take nine times its "
            "file's size. Set visionzip, or data.cache_features to null"
        )
    refuse_to_keep(config.visionzip)
    images, of_tower = processor.image_processor, config.vision_config.to_dict()
    return {
        "format": FORMAT,
        "tower": tower or tower_digest(model.model.vision_tower),
        "tower's config": {key: value for key, value in of_tower.items() if key not in _NOT_OF_FEATURES},
        "layer": config.vision_feature_layer,
        "visionzip": settled(config.visionzip),
        # What is kept for compact positions is found as it was before there were others.
        **({"positions": config.positions} if keeps_positions(config) else {}),
        "processor": {"class": type(images).__name__, **json.loads(images.to_json_string())},
    }


class FeatureCache:
    """Visual tokens by image, read from the shards of one identity beneath `root`.

    Raises ValueError as `features_identity` does. Instances can be sent to other processes.
    """

    def __init__(self, root: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        self.folder = Path(root) / identity_of(identity)[:16]
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        # To be read by people: the folder's name is the identity, and shards hold digests of their own.
        write_atomically(self.folder / "identity.json", json.dumps(identity, sort_keys=True, indent=1) + "\n")
        self._places: dict[str, tuple[str, int]] = {}
        self._shards: dict[str, bool] = {}  # those taken in, and whether their digest was compared
        self._open: dict[str, Any] = {}
        self.known_images = KnownImages()
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def refresh(self) -> None:
        """Takes in the shards that were written since. One whose header is damaged counts as not there."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self._shards and (header := _header(path)) is not None:
                keys, _ = header
                self._places.update({key: (path.name, number) for number, key in enumerate(keys)})
                self._shards[path.name] = False

    def damaged(self, share: slice = slice(None)) -> list[str]:
        """Those of a share of the shards whose content is not what was written: reads each whole."""
        return [name for name in sorted(self._shards)[share] if not _is_whole(self.folder / name)]

    def drop(self, damaged: Sequence[str]) -> None:
        """Counts shards as not there, and all others as whole."""
        self._shards = {name: True for name in self._shards if name not in damaged}
        self._places = {key: place for key, place in self._places.items() if place[0] in self._shards}

    def key_of(self, source: ImageSource, image_root: str | os.PathLike[str] | None) -> str:
        """As `image_key`; of a file that has not changed since it was read, without opening it."""
        key: str = self.known_images.get("key", source, image_root, image_key)
        return key

    def find(self, source: ImageSource, image_root: str | os.PathLike[str] | None) -> dict[str, Tensor] | None:
        """`visual_tokens` [tiles, budget, H of the tower] and `visual_kept` [tiles, D] int64 of an image, or None.

        Where tokens keep their positions, `visual_targets` [tiles, C] int64 too.

        Raises `BadImage` if it cannot be read, and `DamagedShard`.
        """
        key = self.key_of(source, image_root)
        return self.get(key) if key in self else None

    def get(self, key: str) -> dict[str, Tensor]:
        """As `find`, by key."""
        name, number = self._places[key]
        if name not in self._open:
            path = self.folder / name
            if not self._shards[name] and not _is_whole(path):
                raise DamagedShard(f"{path} is damaged: start the run again, its images are then computed anew")
            self._shards[name] = True
            self._open[name] = safe_open(path, "pt").__enter__()
        shard = self._open[name]
        start, stop = shard.get_slice("offsets")[number : number + 2].tolist()
        held = set(shard.keys())
        return {f"visual_{name}": shard.get_slice(name)[start:stop] for name in _KEPT if name in held}

    def write(self, images: dict[str, tuple[Tensor, ...]]) -> None:
        """Stores (tokens, kept) or (tokens, kept, targets), as `find` gives them, by key, as one shard.

        Raises `CannotWrite`.
        """
        keys = sorted(images)
        counts = [len(images[key][0]) for key in keys]
        parts = zip(_KEPT, zip(*(images[key] for key in keys), strict=True), strict=False)
        tensors = {name: torch.cat(part).cpu().contiguous() for name, part in parts}
        tensors["offsets"] = torch.tensor([0, *counts]).cumsum(0)
        # One entry: safetensors writes several in any order, and equal shards shall have equal bytes.
        metadata = {"shard": json.dumps({"images": keys, "digest": tensors_digest(tensors)})}
        replace_file(self.folder / _name(keys), lambda path: save_file(tensors, path, metadata))


def _name(keys: Sequence[str]) -> str:
    return hashlib.sha256(",".join(keys).encode()).hexdigest()[:24] + ".safetensors"


def _header(path: Path) -> tuple[list[str], str] | None:
    """The images of a shard and the digest of its tensors; None for what is no shard, or was damaged there."""
    try:
        if not path.is_file():
            return None
        read_safetensors_specs(path)
        with safe_open(path, "pt") as shard:
            metadata = shard.metadata() or {}
        entry = json.loads(metadata["shard"])
        return (entry["images"], entry["digest"]) if _name(entry["images"]) == path.name else None
    except (ValueError, KeyError, TypeError, OSError, SafetensorError):
        return None


def _is_whole(path: Path) -> bool:
    header = _header(path)
    if header is None:
        return False
    try:
        with safe_open(path, "pt") as shard:
            return tensors_digest({name: shard.get_tensor(name) for name in shard.keys()}) == header[1]  # noqa: SIM118
    except (OSError, SafetensorError):
        return False
