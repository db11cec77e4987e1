"""An image's visual tokens, computed once: the tower is untrained and VisionZip does not read the text.

A folder holds shards, safetensors files of a few hundred images each. Their names and contents depend on what is in
them alone; they are written beside and renamed, so that processes never see half of one and a kill loses at most the
images since the last shard. Nothing is ever changed: another image, tower, processor or budget has another key. A
shard holds a digest of what it holds: a damaged one counts as not there, and its images are computed anew.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from shortzip.data.dataset import ConversationDataset
from shortzip.data.errors import UserError
from shortzip.data.files import replace_file, sweep, write_atomically, writing
from shortzip.data.images import (
    BadImage,
    ImageSource,
    image_bytes,
    image_name,
    open_image,
    pixel_values,
    resolve_image_path,
)
from shortzip.data.kept import Kept, identity_of
from shortzip.train.release.opening import Release
from shortzip.train.release.tensor_files import read_safetensors_specs
from shortzip.train.release.towers import load_tower, tensors_digest, tower_digest, tower_parts
from shortzip.train.run.processes import StopRequest, StopRequested
from shortzip.train.run.report import Reporter
from shortzip.train.settings.config import TuneConfig

logger = logging.getLogger(__name__)

FORMAT = 2  # of shards, and of what data/images.py makes of a file: to be raised when either changes
SHARD_IMAGES = 256
SHARD_SECONDS = 60.0
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

    Raises ValueError if the model keeps every visual token.
    """
    config = model.config
    if config.visionzip is None:
        raise UserError(
            "features can be cached for a reduced budget only: all visual tokens of an image take nine times its "
            "file's size. Set visionzip, or data.cache_features to null"
        )
    images, of_tower = processor.image_processor, config.vision_config.to_dict()
    return {
        "format": FORMAT,
        "tower": tower or tower_digest(model.model.vision_tower),
        "tower's config": {key: value for key, value in of_tower.items() if key not in _NOT_OF_FEATURES},
        "layer": config.vision_feature_layer,
        "visionzip": dict(config.visionzip),
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
        write_atomically(self.folder / "identity.json", json.dumps(identity, sort_keys=True, indent=1) + "\n")
        self._places: dict[str, tuple[str, int]] = {}
        self._shards: dict[str, bool] = {}  # those taken in, and whether their digest was compared
        self._open: dict[str, Any] = {}
        self.known_files: dict[str, tuple[int, str]] = {}  # by path: what tells that a file has changed, and its key
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
        """As `image_key`; of a file that has not changed since it was asked for last, without reading it."""
        if not isinstance(source, str):
            return image_key(source, image_root)
        path = resolve_image_path(source, image_root)
        try:
            status = path.stat()
        except (OSError, ValueError):
            return image_key(source, image_root)  # says what is wrong with it
        stamp = hash((status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))
        known = self.known_files.get(str(path))
        if known is None or known[0] != stamp:
            known = self.known_files[str(path)] = (stamp, image_key(source, image_root))
        return known[1]

    def find(self, source: ImageSource, image_root: str | os.PathLike[str] | None) -> dict[str, Tensor] | None:
        """`visual_tokens` [tiles, budget, H of the tower] and `visual_kept` [tiles, D] int64 of an image, or None.

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
        return {
            "visual_tokens": shard.get_slice("tokens")[start:stop],
            "visual_kept": shard.get_slice("kept")[start:stop],
        }

    def write(self, images: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Stores (tokens, kept), as `find` gives them, by key, as one shard. Raises `CannotWrite`."""
        keys = sorted(images)
        counts = [len(images[key][0]) for key in keys]
        tensors = {
            "tokens": torch.cat([images[key][0] for key in keys]).cpu().contiguous(),
            "kept": torch.cat([images[key][1] for key in keys]).cpu().contiguous(),
            "offsets": torch.tensor([0, *counts]).cumsum(0),
        }
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


class _Seen(NamedTuple):
    """An image that was read: its key, its pixels if it is not in the cache, and what is new in `known_files`."""

    key: str
    pixels: Tensor | None
    known_files: dict[str, tuple[int, str]]


class _Images(Dataset[_Seen | None]):
    """What a worker sees of each image; None for those that cannot be read."""

    def __init__(self, sources: Sequence[tuple[ImageSource, Any]], cache: FeatureCache, image_processor: Any) -> None:
        self.sources, self.cache, self.image_processor = sources, copy.copy(cache), image_processor

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> _Seen | None:
        source, root = self.sources[index]
        known: dict[str, tuple[int, str]] = {}
        self.cache.known_files = known
        try:
            key = self.cache.key_of(source, root)
            if key in self.cache:
                return _Seen(key, None, known)
            pixels = pixel_values(open_image(source, root), self.image_processor)
        except BadImage:
            return None  # it is dropped, or refused, with its row when that is read
        return _Seen(key, pixels if pixels.dim() == 4 else pixels[None], known)


def _sources(datasets: Sequence[ConversationDataset]) -> list[tuple[ImageSource, Any]]:
    """Every image of the datasets once, in order."""
    found: dict[Any, tuple[ImageSource, Any]] = {}
    for dataset in datasets:
        for conversation in dataset.conversations:
            for source in conversation.images:
                found.setdefault((str(dataset.image_root), source), (source, dataset.image_root))
    return list(found.values())


@torch.no_grad()
def fill_cache(
    cache: FeatureCache,
    model: Any,
    image_processor: Any,
    datasets: Sequence[ConversationDataset],
    accelerator: Accelerator,
    *,
    batch_size: int = 16,
    num_workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    stopped: Callable[[], bool] = lambda: False,
    prepare: Callable[[], None] = lambda: None,
) -> int:
    """Stores the visual tokens of every image of the datasets that has none yet; gives how many were computed.

    Each process takes its share of the images, and goes on when all are done or one was asked to stop. `prepare` is
    called before each batch that is computed: the model's tower must be there then, on the accelerator's device.
    """
    sweep(cache.folder)
    _leave_out_damaged(cache, accelerator)
    sources = _sources(datasets)
    share = sources[accelerator.process_index :: accelerator.num_processes]
    loader: Any = DataLoader(
        _Images(share, cache, image_processor), batch_size, collate_fn=list, num_workers=num_workers
    )
    computed, waiting, written = 0, {}, time.monotonic()
    for number, batch in enumerate(loader):
        progress(number * batch_size, len(share))
        seen = [image for image in batch if image is not None]
        for image in seen:
            cache.known_files.update(image.known_files)
        found = {image.key: image.pixels for image in seen if image.pixels is not None and image.key not in waiting}
        if found:
            prepare()
            computed += len(found)
            waiting.update(dict(zip(found, _visual_tokens(model, list(found.values())), strict=True)))
        if len(waiting) >= SHARD_IMAGES or (waiting and time.monotonic() - written > SHARD_SECONDS):
            cache.write(waiting)
            waiting, written = {}, time.monotonic()
        if stopped():
            break
    if waiting:
        cache.write(waiting)
    accelerator.wait_for_everyone()
    cache.refresh()
    cache.drop([])  # what was written since it was looked at is whole
    counted = torch.tensor(computed, device=accelerator.device)
    return int(accelerator.reduce(counted))


def _leave_out_damaged(cache: FeatureCache, accelerator: Accelerator) -> None:
    """Has every process count as not there what one of them, each reading its share, found damaged; says so."""
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    damaged = sorted(gather_object(cache.damaged(share)))
    cache.drop(damaged)
    if damaged and accelerator.is_main_process:
        logger.warning(
            "%d of the shards in %s are damaged (%s): their images are computed anew",
            len(damaged),
            cache.folder,
            ", ".join(damaged[:3]),
        )
        for name in damaged:
            (cache.folder / name).unlink(missing_ok=True)


def _visual_tokens(model: Any, images: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, kept) of each image, given as [tiles, 3, S, S]."""
    tower = model.model.vision_tower
    weight = next(tower.parameters())
    visual = model.model.get_visual_tokens(torch.cat(images).to(weight.device))
    counts = [len(image) for image in images]
    return zip(visual.tokens.split(counts), visual.kept.split(counts), strict=True)


def _kept_tower(config: TuneConfig, release: Release, dtype: torch.dtype) -> tuple[Kept, str, dict[str, Any]] | None:
    """Where the digest of the release's tower is kept, under which name and parts; None where none can be."""
    root, parts = config.data.cache_features, tower_parts(release.folder, dtype)
    return None if root is None or parts is None else (Kept(root), f"tower-{identity_of(parts)[:16]}", parts)


def known_tower(config: TuneConfig, release: Release, dtype: torch.dtype) -> str | None:
    """The digest of the release's tower, if features are cached and an earlier run left it."""
    if config.data.cache_features is None or (where := _kept_tower(config, release, dtype)) is None:
        return None
    kept, name, parts = where
    return kept.find(name, parts)


def store_features(
    config: TuneConfig,
    release: Release,
    tower: str | None,
    model: Any,
    processor: Any,
    training: ConversationDataset,
    held_out: ConversationDataset | None,
    accelerator: Accelerator,
    report: Reporter,
    stop: StopRequest,
) -> None:
    """Computes what `config.data.cache_features` lacks for a run, whose datasets then give features instead of pixels.

    `tower`: what `known_tower` gave; then the model has come without its tower, which is loaded only if an image has
    no features yet. The model is left without it. Raises `StopRequested` on every process if one was asked to stop,
    and ValueError if the tower is not the one that was known.
    """
    assert config.data.cache_features is not None
    datasets = [dataset for dataset in (training, held_out) if dataset is not None]
    identity = features_identity(model, processor, tower)
    cache = FeatureCache(config.data.cache_features, identity)
    dtype = model.get_input_embeddings().weight.dtype
    if tower is None and (where := _kept_tower(config, release, dtype)) is not None:
        kept, name, parts = where
        kept.keep(name, parts, identity["tower"])

    def tower_on_device() -> None:
        if isinstance(model.model.vision_tower, nn.Identity):
            model.model.vision_tower = load_tower(release.folder, model.config, dtype)
            if tower_digest(model.model.vision_tower) != tower:
                if (where := _kept_tower(config, release, dtype)) is not None:
                    where[0].path(where[1]).unlink(missing_ok=True)
                raise UserError(
                    f"{release.folder}: the tower has changed where its samples do not show it. The features of the "
                    "one before are left alone: start the run again"
                )
        model.model.vision_tower.to(accelerator.device)

    computed = fill_cache(
        cache,
        model,
        processor.image_processor,
        datasets,
        accelerator,
        num_workers=config.data.num_workers,
        progress=lambda done, total: report.progress("features", done, total),
        stopped=lambda: stop.signal is not None,
        prepare=tower_on_device,
    )
    report.end_progress()
    stops = torch.tensor(int(stop.signal is not None), device=accelerator.device)
    if int(accelerator.reduce(stops)):
        raise StopRequested(stop.signal or "a signal to another process")
    model.model.vision_tower = nn.Identity()
    for dataset in datasets:
        dataset.features = cache
    report.say(f"features: {computed} images computed, {len(cache)} in {cache.folder}; the tower is not needed")
