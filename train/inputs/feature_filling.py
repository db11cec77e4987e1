"""Filling the cache of features: each image once, by all processes together, and the tower not loaded where it is
full."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from shortzip.data.dataset import ConversationDataset
from shortzip.data.errors import UserError
from shortzip.data.files import sweep
from shortzip.data.images import (
    BadImage,
    ImageSource,
    open_image,
)
from shortzip.data.kept import Kept, identity_of
from shortzip.data.known_images import KnownImages
from shortzip.data.pixels import pixel_values
from shortzip.reduction.positions import keeps_positions
from shortzip.train.inputs.feature_cache import FeatureCache, features_identity
from shortzip.train.release.opening import Release
from shortzip.train.release.towers import load_tower, tower_digest, tower_parts
from shortzip.train.run.session import Session
from shortzip.train.settings.config import TuneConfig

logger = logging.getLogger(__name__)

SHARD_IMAGES = 256
SHARD_SECONDS = 60.0


class _Seen(NamedTuple):
    """An image that was read: its key, its pixels if it is not in the cache, and what is known of its file."""

    key: str
    pixels: Tensor | None
    known: dict[str, dict[str, Any]]


class _Images(Dataset[_Seen | None]):
    """What a worker sees of each image; None for those that cannot be read."""

    def __init__(self, sources: Sequence[tuple[ImageSource, Any]], cache: FeatureCache, image_processor: Any) -> None:
        self.sources, self.cache, self.image_processor = sources, copy.copy(cache), image_processor

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> _Seen | None:
        source, root = self.sources[index]
        self.cache.known_images = KnownImages()
        known = self.cache.known_images.files
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
    session: Session,
    *,
    batch_size: int = 16,
    num_workers: int = 0,
    prepare: Callable[[], None] = lambda: None,
) -> int:
    """Stores the visual tokens of every image of the datasets that has none yet; gives how many were computed.

    Each process takes its share of the images, and goes on when all are done or one was asked to stop. `prepare` is
    called before each batch that is computed: the model's tower must be there then, on the accelerator's device.
    """
    accelerator = session.accelerator
    sweep(cache.folder)
    _leave_out_damaged(cache, accelerator)
    sources = _sources(datasets)
    mine, known, read = sources[accelerator.process_index :: accelerator.num_processes], cache.known_images, {}
    share = [image for image in mine if not (known.has("key", *image) and cache.key_of(*image) in cache)]
    loader: Any = DataLoader(
        _Images(share, cache, image_processor), batch_size, collate_fn=list, num_workers=num_workers
    )
    computed, waiting, written = 0, {}, time.monotonic()
    for number, batch in enumerate(loader):
        session.report.progress("features", number * batch_size, len(share))
        seen = [image for image in batch if image is not None]
        for image in seen:
            read.update(image.known)
        found = {image.key: image.pixels for image in seen if image.pixels is not None and image.key not in waiting}
        if found:
            prepare()
            computed += len(found)
            waiting.update(dict(zip(found, _visual_tokens(model, list(found.values())), strict=True)))
        if len(waiting) >= SHARD_IMAGES or (waiting and time.monotonic() - written > SHARD_SECONDS):
            cache.write(waiting)
            waiting, written = {}, time.monotonic()
        if session.stop.signal is not None:
            break
    session.report.end_progress()
    if waiting:
        cache.write(waiting)
    accelerator.wait_for_everyone()
    for files in gather_object([read]):
        known.learn(files)
    cache.refresh()
    cache.drop([])  # what was written since it was looked at is whole
    return int(session.total(computed)[0])


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


def _visual_tokens(model: Any, images: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """(tokens, kept), with original positions (tokens, kept, targets), of each image, given as [tiles, 3, S, S]."""
    tower = model.model.vision_tower
    weight = next(tower.parameters())
    visual = model.model.get_visual_tokens(torch.cat(images).to(weight.device))
    counts = [len(image) for image in images]
    parts = [visual.tokens, visual.kept, *([visual.targets] if keeps_positions(model.config) else [])]
    return zip(*(part.split(counts) for part in parts), strict=True)


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
    datasets: Sequence[ConversationDataset],
    session: Session,
) -> None:
    """Computes what `config.data.cache_features` lacks for a run, whose datasets then give features instead of pixels.

    `tower`: what `known_tower` gave; then the model has come without its tower, which is loaded only if an image has
    no features yet. The model is left without it. Raises `StopRequested` on every process if one was asked to stop,
    and ValueError if the tower is not the one that was known.
    """
    assert config.data.cache_features is not None
    identity = features_identity(model, processor, tower)
    cache = FeatureCache(config.data.cache_features, identity)
    for dataset in datasets:
        cache.known_images.learn(dataset.known_images.files)
        dataset.known_images = cache.known_images
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
        model.model.vision_tower.to(session.accelerator.device)

    computed = fill_cache(
        cache,
        model,
        processor.image_processor,
        datasets,
        session,
        num_workers=config.data.num_workers,
        prepare=tower_on_device,
    )
    session.report.end_progress()
    if session.accelerator.is_main_process:
        cache.known_images.keep(config.data.cache_features)
    if session.asked_to_stop():
        raise session.stopped()
    model.model.vision_tower = nn.Identity()
    for dataset in datasets:
        dataset.features = cache
    session.report.say(
        f"features: {computed} images computed, {len(cache)} in {cache.folder}; the tower is not needed"
    )
