"""An image's visual tokens, computed once: the tower is untrained and VisionZip does not read the text.

A folder holds shards, safetensors files of a few hundred images each. Their names and contents depend on what is in
them alone; they are written beside and renamed, so that processes never see half of one and a kill loses at most the
images since the last shard. Nothing is ever changed: another image, tower, processor or budget has another key.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from data.dataset import ConversationDataset
from data.errors import UserError
from data.files import replace_file, write_atomically
from data.images import BadImage, ImageSource, image_bytes, open_image, pixel_values
from train.config import TuneConfig
from train.processes import StopRequest, StopRequested
from train.release import Release
from train.report import Reporter
from train.tensor_files import read_safetensors_specs
from train.towers import load_tower, read_digest, tower_digest, tower_record

FORMAT = 1  # of shards, and of what data/images.py makes of a file: to be raised when either changes
SHARD_IMAGES = 256
SHARD_SECONDS = 60.0
STALE_SECONDS = 3600.0  # a partial file this old has no writer any more


def image_key(source: ImageSource, image_root: str | os.PathLike[str] | None) -> str:
    """SHA-256 of an image's bytes. Raises `BadImage` if it cannot be read."""
    return hashlib.sha256(image_bytes(source, image_root)).hexdigest()


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
    images = processor.image_processor
    return {
        "format": FORMAT,
        "tower": tower or tower_digest(model.model.vision_tower),
        "layer": config.vision_feature_layer,
        "visionzip": dict(config.visionzip),
        "processor": {"class": type(images).__name__, **json.loads(images.to_json_string())},
    }


class FeatureCache:
    """Visual tokens by image, read from the shards of one identity beneath `root`.

    Raises ValueError as `features_identity` does. Instances can be sent to other processes.
    """

    def __init__(self, root: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        text = json.dumps(identity, sort_keys=True, indent=1)
        self.folder = Path(root) / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "identity.json", text + "\n")
        self._places: dict[str, tuple[str, int]] = {}
        self._read: set[str] = set()
        self._open: dict[str, Any] = {}
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def refresh(self) -> None:
        """Takes in the shards that were written since. A damaged one counts as not there."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._read:
                continue
            try:
                read_safetensors_specs(path)
            except ValueError:
                continue
            with safe_open(path, "pt") as shard:
                keys = shard.metadata()["images"].split(",")
            self._places.update({key: (path.name, number) for number, key in enumerate(keys)})
            self._read.add(path.name)

    def find(self, source: ImageSource, image_root: str | os.PathLike[str] | None) -> dict[str, Tensor] | None:
        """`visual_tokens` [tiles, budget, H of the tower] and `visual_kept` [tiles, D] int64 of an image, or None.

        Raises `BadImage` if it cannot be read.
        """
        key = image_key(source, image_root)
        return self.get(key) if key in self else None

    def get(self, key: str) -> dict[str, Tensor]:
        """As `find`, by key."""
        name, number = self._places[key]
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, "pt").__enter__()
        shard = self._open[name]
        start, stop = shard.get_slice("offsets")[number : number + 2].tolist()
        return {
            "visual_tokens": shard.get_slice("tokens")[start:stop],
            "visual_kept": shard.get_slice("kept")[start:stop],
        }

    def write(self, images: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Stores (tokens, kept), as `find` gives them, by key, as one shard."""
        keys = sorted(images)
        counts = [len(images[key][0]) for key in keys]
        tensors = {
            "tokens": torch.cat([images[key][0] for key in keys]).cpu().contiguous(),
            "kept": torch.cat([images[key][1] for key in keys]).cpu().contiguous(),
            "offsets": torch.tensor([0, *counts]).cumsum(0),
        }
        name = hashlib.sha256(",".join(keys).encode()).hexdigest()[:24]
        metadata = {"images": ",".join(keys)}
        replace_file(self.folder / f"{name}.safetensors", lambda path: save_file(tensors, path, metadata))

    def remove_stale(self) -> None:
        """Removes what killed writers left."""
        for path in self.folder.glob(".partial-*"):
            try:
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink(missing_ok=True)
            except FileNotFoundError:  # another process was faster
                continue


class _Missing(Dataset[tuple[str, Tensor] | None]):
    """Pixels of images that are not in the cache; None for those that are, and for those that cannot be read."""

    def __init__(self, sources: Sequence[tuple[ImageSource, Any]], cache: FeatureCache, image_processor: Any) -> None:
        self.sources, self.cache, self.image_processor = sources, cache, image_processor

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> tuple[str, Tensor] | None:
        source, root = self.sources[index]
        try:
            key = image_key(source, root)
            if key in self.cache:
                return None
            pixels = pixel_values(open_image(source, root), self.image_processor)
        except BadImage:
            return None  # it is dropped, or refused, with its row when that is read
        return key, pixels if pixels.dim() == 4 else pixels[None]


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
    cache.remove_stale()
    sources = _sources(datasets)
    share = sources[accelerator.process_index :: accelerator.num_processes]
    loader: Any = DataLoader(
        _Missing(share, cache, image_processor), batch_size, collate_fn=list, num_workers=num_workers
    )
    computed, waiting, written = 0, {}, time.monotonic()
    for number, batch in enumerate(loader):
        progress(number * batch_size, len(share))
        found = {key: pixels for key, pixels in filter(None, batch) if key not in waiting}
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
    counted = torch.tensor(computed, device=accelerator.device)
    return int(accelerator.reduce(counted))


def _visual_tokens(model: Any, images: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, kept) of each image, given as [tiles, 3, S, S]."""
    tower = model.model.vision_tower
    weight = next(tower.parameters())
    visual = model.model.get_visual_tokens(torch.cat(images).to(weight.device))
    counts = [len(image) for image in images]
    return zip(visual.tokens.split(counts), visual.kept.split(counts), strict=True)


def known_tower(config: TuneConfig, release: Release, dtype: torch.dtype) -> str | None:
    """The digest of the release's tower, if features are cached and an earlier run left it."""
    if config.data.cache_features is None:
        return None
    return read_digest(tower_record(config.data.cache_features, release.folder, dtype))


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
    record = tower_record(config.data.cache_features, release.folder, dtype)
    if tower is None and record is not None:
        text = json.dumps({"tower": identity["tower"], "release": str(release.folder)}, indent=1) + "\n"
        write_atomically(record, text)

    def tower_on_device() -> None:
        if isinstance(model.model.vision_tower, nn.Identity):
            model.model.vision_tower = load_tower(release.folder, model.config, dtype)
            if tower_digest(model.model.vision_tower) != tower:
                if record is not None:
                    record.unlink(missing_ok=True)
                raise UserError(
                    f"{release.folder}: the tower has changed, though its files have the same size and time. The "
                    "features of the one before are left alone: start the run again"
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
