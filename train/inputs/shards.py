"""What is computed once and kept in shards, whatever it is: tensors by key, written whole, recognised when damaged.

A folder holds shards, safetensors files of a few hundred entries each. Their names and contents depend on what is in
them alone; they are written beside and renamed, so that processes never see half of one and a kill loses at most what
came since the last shard. Nothing is ever changed: another content has another key. A shard holds a digest of what it
holds: a damaged one counts as not there, and its entries are computed anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shortzip.data.errors import UserError
from shortzip.data.files import replace_file, write_atomically, writing
from shortzip.data.kept import identity_of
from shortzip.data.pixels import joined
from shortzip.train.release.tensor_files import read_safetensors_specs
from shortzip.train.release.towers import tensors_digest

logger = logging.getLogger(__name__)

SHARD_ENTRIES = 256
SHARD_SECONDS = 60.0


class DamagedShard(UserError):
    """A shard that does not hold what was written; the message says what to do."""


class Shards:
    """Tensors by key and name, read from the shards of one identity beneath `root`; a key's have the same first size.

    `WHAT` names the entries, in messages and in the shards. Instances can be sent to other processes.
    """

    WHAT = "entries"

    def __init__(self, root: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        self.folder = Path(root) / identity_of(identity)[:16]
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        # To be read by people: the folder's name is the identity, and shards hold digests of their own.
        write_atomically(self.folder / "identity.json", json.dumps(identity, sort_keys=True, indent=1) + "\n")
        self._places: dict[str, tuple[str, int]] = {}
        self._shards: dict[str, bool] = {}  # those taken in, and whether their digest was compared
        self._open: dict[str, Any] = {}
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
            if path.name not in self._shards and (header := self._header(path)) is not None:
                keys, _ = header
                self._places.update({key: (path.name, number) for number, key in enumerate(keys)})
                self._shards[path.name] = False

    def damaged(self, share: slice = slice(None)) -> list[str]:
        """Those of a share of the shards whose content is not what was written: reads each whole."""
        return [name for name in sorted(self._shards)[share] if not self._is_whole(self.folder / name)]

    def drop(self, damaged: Sequence[str]) -> None:
        """Counts shards as not there, and all others as whole."""
        self._shards = {name: True for name in self._shards if name not in damaged}
        self._places = {key: place for key, place in self._places.items() if place[0] in self._shards}

    def tensors(self, key: str) -> dict[str, Tensor]:
        """What was written under a key. Raises `DamagedShard`."""
        name, number = self._places[key]
        if name not in self._open:
            path = self.folder / name
            if not self._shards[name] and not self._is_whole(path):
                raise DamagedShard(f"{path} is damaged: start the run again, its {self.WHAT} are then computed anew")
            self._shards[name] = True
            self._open[name] = safe_open(path, "pt").__enter__()
        shard = self._open[name]
        start, stop = shard.get_slice("offsets")[number : number + 2].tolist()
        return {name: shard.get_slice(name)[start:stop] for name in shard.keys() if name != "offsets"}  # noqa: SIM118

    def write_tensors(self, entries: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Stores entries of the same names, by key, as one shard; what they differ in behind their first dimension is
        filled up with zeros. Raises `CannotWrite`."""
        keys = sorted(entries)
        names = list(entries[keys[0]])
        tensors = {name: joined([entries[key][name] for key in keys]).cpu().contiguous() for name in names}
        tensors["offsets"] = torch.tensor([0, *(len(entries[key][names[0]]) for key in keys)]).cumsum(0)
        # One entry: safetensors writes several in any order, and equal shards shall have equal bytes.
        metadata = {"shard": json.dumps({self.WHAT: keys, "digest": tensors_digest(tensors)})}
        replace_file(self.folder / _name(keys), lambda path: save_file(tensors, path, metadata))

    def _header(self, path: Path) -> tuple[list[str], str] | None:
        """The keys of a shard and the digest of its tensors; None for what is no shard, or was damaged there."""
        try:
            if not path.is_file():
                return None
            read_safetensors_specs(path)
            with safe_open(path, "pt") as shard:
                metadata = shard.metadata() or {}
            entry = json.loads(metadata["shard"])
            return (entry[self.WHAT], entry["digest"]) if _name(entry[self.WHAT]) == path.name else None
        except (ValueError, KeyError, TypeError, OSError, SafetensorError):
            return None

    def _is_whole(self, path: Path) -> bool:
        header = self._header(path)
        if header is None:
            return False
        try:
            with safe_open(path, "pt") as shard:
                tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
                return tensors_digest(tensors) == header[1]
        except (OSError, SafetensorError):
            return False


class OpenShard:
    """Entries that wait to be written together."""

    def __init__(self, shards: Shards) -> None:
        self.shards, self.begun = shards, time.monotonic()
        self.entries: dict[str, Mapping[str, Tensor]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def add(self, entries: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.entries.update(entries)

    def is_due(self) -> bool:
        is_old = time.monotonic() - self.begun > SHARD_SECONDS
        return len(self.entries) >= SHARD_ENTRIES or (is_old and bool(self.entries))

    def write(self) -> None:
        if self.entries:
            self.shards.write_tensors(self.entries)
            self.entries, self.begun = {}, time.monotonic()


def leave_out_damaged(shards: Shards, accelerator: Accelerator) -> None:
    """Has every process count as not there what one of them, each reading its share, found damaged; says so."""
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    damaged = sorted(gather_object(shards.damaged(share)))
    shards.drop(damaged)
    if damaged and accelerator.is_main_process:
        logger.warning(
            "%d of the shards in %s are damaged (%s): their %s are computed anew",
            len(damaged),
            shards.folder,
            ", ".join(damaged[:3]),
            shards.WHAT,
        )
        for name in damaged:
            (shards.folder / name).unlink(missing_ok=True)


def _name(keys: Sequence[str]) -> str:
    return hashlib.sha256(",".join(keys).encode()).hexdigest()[:24] + ".safetensors"
