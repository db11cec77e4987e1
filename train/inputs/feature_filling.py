"""Filling the cache of features: each image and video once, by all processes together, and the tower not loaded where
it is full."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
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
from shortzip.data.instructions import Conversation
from shortzip.data.kept import Kept, identity_of
from shortzip.data.known_images import KnownImages
from shortzip.data.pixels import cuts_lone_images_only, frames_pixels, pixel_values
from shortzip.data.video_frames import read_frames, video_key
from shortzip.data.videos import Sampling, VideoSource, frame_paths
from shortzip.reduction.configuration_budgets import tokens_of
from shortzip.reduction.families import family_of
from shortzip.reduction.image_budgets import budget_of, chosen_tokens, with_budget
from shortzip.reduction.positions import keeps_positions
from shortzip.reduction.selectors import has_own_budgets
from shortzip.reduction.visual_tokens import VisualTokens
from shortzip.train.inputs.feature_cache import FeatureCache, by_name, features_identity, name_of
from shortzip.train.inputs.shards import OpenShard, leave_out_damaged
from shortzip.train.release.opening import Release
from shortzip.train.release.towers import leave_out_towers, load_tower, tower_digest, tower_parts, whole_tower
from shortzip.train.run.session import Session
from shortzip.train.settings.config import TuneConfig


class _ReadImage(NamedTuple):
    """An image that was read: its key, its pixels if it is not in the cache, and what is known of its file."""

    key: str
    pixels: Tensor | None
    files: dict[str, dict[str, Any]]


class _Videos(Dataset[_ReadImage | None]):
    """As `_Images`, of videos: pixels are those of the frames that are seen."""

    def __init__(self, sources: Sequence[tuple[VideoSource, Any, Sampling]], cache: FeatureCache, processor: Any):
        self.sources, self.cache, self.processor = sources, copy.copy(cache), processor

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> _ReadImage | None:
        video = self.sources[index]
        known = self.cache.known_images = KnownImages()
        try:
            key = video_key(*video, known)
            if key in self.cache:
                return _ReadImage(key, None, known.files)
            return _ReadImage(key, frames_pixels(read_frames(*video), self.processor), known.files)
        except BadImage:
            return None


class _Images(Dataset[_ReadImage | None]):
    """What a worker sees of each image; None for those that cannot be read."""

    def __init__(self, sources: Sequence[tuple[ImageSource, Any]], cache: FeatureCache, image_processor: Any) -> None:
        self.sources, self.cache, self.image_processor = sources, copy.copy(cache), image_processor

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> _ReadImage | None:
        source, root = self.sources[index]
        self.cache.known_images = KnownImages()
        files = self.cache.known_images.files
        try:
            key = self.cache.key_of(source, root)
            if key in self.cache:
                return _ReadImage(key, None, files)
            pixels = pixel_values(open_image(source, root), self.image_processor)
        except BadImage:
            return None  # it is dropped, or refused, with its row when that is read
        return _ReadImage(key, pixels if pixels.dim() == 4 else pixels[None], files)


def _sources(
    datasets: Sequence[ConversationDataset | ImageRows], image_processor: Any
) -> list[tuple[ImageSource, Any]]:
    """Every image of the datasets once, in order."""
    sources: dict[Any, tuple[ImageSource, Any]] = {}
    lone_only = cuts_lone_images_only(image_processor)
    for dataset in datasets:
        for conversation in dataset.conversations:
            if lone_only and len(conversation.images) > 1:
                raise UserError(
                    f"data.cache_features: row {conversation.id!r} has {len(conversation.images)} images, and "
                    "LLaVA-OneVision reads an image otherwise where it is one of several: set data.cache_features to "
                    "null, or leave such rows out"
                )
            for source in conversation.images:
                sources.setdefault((str(dataset.image_root), source), (source, dataset.image_root))
    return list(sources.values())


def _videos(datasets: Sequence[ConversationDataset | ImageRows]) -> list[tuple[VideoSource, Any, Sampling]]:
    """Every video of the datasets once, in order, with the sampling of its frames."""
    videos: dict[Any, tuple[VideoSource, Any, Sampling]] = {}
    for dataset in datasets:
        sampling = dataset.supervision.sampling if isinstance(dataset, ConversationDataset) else None
        for conversation in dataset.conversations if sampling else []:
            for source in conversation.videos:
                assert sampling is not None
                videos.setdefault((str(dataset.image_root), source, sampling), (source, dataset.image_root, sampling))
    return list(videos.values())


def _is_kept(cache: FeatureCache, video: tuple[VideoSource, Any, Sampling]) -> bool:
    """Whether a video is known to be in the cache, without opening it."""
    source, root, _ = video
    try:
        paths = frame_paths(source, root) or (str(source),)
        known = all(cache.known_images.has("video key", path, root) for path in paths)
        return known and video_key(*video, cache.known_images) in cache
    except BadImage:
        return False


@torch.no_grad()
def fill_cache(
    cache: FeatureCache,
    model: Any,
    processor: Any,
    datasets: Sequence[ConversationDataset | ImageRows],
    session: Session,
    *,
    batch_size: int = 16,
    num_workers: int = 0,
    prepare: Callable[[], None] = lambda: None,
    budgets: Sequence[dict[str, Any]] = (),
) -> int:
    """Stores the visual tokens of every image and video of the datasets that has none yet; gives how many it computed.

    Each process takes its share of them, and goes on when all are done or one was asked to stop. `prepare` is
    called before each batch that is computed: the model's tower must be there then, on the accelerator's device.
    `budgets`: as of `features_identity`.
    """
    accelerator, known_images = session.accelerator, cache.known_images
    own_budgets = has_own_budgets(model.config.visionzip)
    sweep(cache.folder)
    leave_out_damaged(cache, accelerator)
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    images = _sources(datasets, processor.image_processor)[share]
    images = [image for image in images if not (known_images.has("key", *image) and cache.key_of(*image) in cache)]
    videos = [video for video in _videos(datasets)[share] if not _is_kept(cache, video)]
    of_images = DataLoader(
        _Images(images, cache, processor.image_processor), batch_size, collate_fn=list, num_workers=num_workers
    )
    # One video at a time: its frames are as many pixels as a batch of images.
    of_videos = DataLoader(_Videos(videos, cache, processor), 1, collate_fn=list, num_workers=num_workers)
    passes: list[tuple[Any, int, int]] = [(of_images, batch_size, 0), (of_videos, 1, len(images))]
    batches = ((batch, done + number * size) for loader, size, done in passes for number, batch in enumerate(loader))
    computed, shard, files = 0, OpenShard(cache), {}
    for batch, done in batches:
        session.report.progress("features", done, len(images) + len(videos))
        is_video = done >= len(images)
        read = [image for image in batch if image is not None]
        for image in read:
            files.update(image.files)
        pixels = {image.key: image.pixels for image in read if image.pixels is not None and image.key not in shard}
        if pixels:
            prepare()
            computed += len(pixels)
            if budgets:
                tokens = _under_each(model, list(pixels.values()), budgets)
            else:
                chosen = (_frame_tokens if is_video else _visual_tokens)(model, list(pixels.values()))
                tokens = (by_name(parts, own_budgets) for parts in chosen)
            shard.add(dict(zip(pixels, tokens, strict=True)))
        if shard.is_due():
            shard.write()
        if session.stop.signal is not None:
            break
    session.report.end_progress()
    shard.write()
    accelerator.wait_for_everyone()
    for learned in gather_object([files]):
        known_images.learn(learned)
    cache.refresh()
    cache.drop([])  # what was written since it was looked at is whole
    return int(session.total(computed)[0])


def _visual_tokens(model: Any, images: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """(tokens, kept), with original positions (tokens, kept, targets), of each image, given as [tiles, 3, S, S]."""
    tower = model.model.vision_tower
    weight = next(tower.parameters())
    pixels, counts = torch.cat(images).to(weight.device), [len(image) for image in images]
    if not has_own_budgets(model.config.visionzip):
        visual = model.model.get_visual_tokens(pixels)
        yield from zip(*(part.split(counts) for part in _parts(model, visual)), strict=True)
        return
    budgets, of_rows = chosen_tokens(model.model, pixels, tiles=counts)
    rows = torch.arange(len(pixels)).split(counts)
    for budget, of_image in zip(budgets, rows, strict=True):
        view = with_budget(model.model, budget_of(model.config.visionzip, budget))
        yield _parts(model, of_rows(of_image, view))


def _frame_tokens(model: Any, videos: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """(tokens, kept) of the frames of each video, given as [F, 3, S, S]."""
    for frames in videos:
        there = frames.to(next(whole_tower(model).parameters()).device)
        yield _parts(model, model.model.get_frame_tokens(there[None]))


def _under_each(model: Any, images: list[Tensor], budgets: Sequence[dict[str, Any]]) -> Iterator[Mapping[str, Tensor]]:
    """What is kept of each image, given as [tiles, 3, S, S], under each of several budgets, by name."""
    weight, counts = next(model.model.vision_tower.parameters()), [len(image) for image in images]
    family, pixels = family_of(model.config.model_type), torch.cat(images).to(weight.device)
    under = [
        list(zip(*(part.split(counts) for part in _parts(model, visual)), strict=True))
        for visual in family.tokens_of_budgets(model.model, pixels, budgets)
    ]
    for of_image in zip(*under, strict=True):
        named: dict[str, Tensor] = {}
        for budget, parts in zip(budgets, of_image, strict=True):
            named |= {name_of(name, tokens_of(budget)): part for name, part in by_name(parts).items()}
        yield named


def _parts(model: Any, visual: VisualTokens) -> tuple[Tensor, ...]:
    assert visual.tokens is not None
    assert visual.kept is not None
    assert visual.targets is not None
    placed = [visual.targets] if keeps_positions(model.config) else []
    return (visual.tokens, visual.kept, *placed)


@dataclass
class ImageRows:
    """Conversations that `store_features` takes as it does a dataset, before they are tokenized.

    `features`: where those of their images are then taken from.
    """

    conversations: Sequence[Conversation]
    image_root: str
    known_images: KnownImages = field(default_factory=KnownImages)
    features: FeatureCache | None = None


class _TowerRecord(NamedTuple):
    """Where the digest of a release's tower is kept, for the runs that then need not load it."""

    kept: Kept
    name: str
    parts: dict[str, Any]

    @classmethod
    def of(cls, config: TuneConfig, release: Release, dtype: torch.dtype) -> _TowerRecord | None:
        """None where no features are kept, or the tower's files cannot be told from others."""
        root, parts = config.data.cache_features, tower_parts(release.folder, dtype)
        return None if root is None or parts is None else cls(Kept(root), f"tower-{identity_of(parts)[:16]}", parts)

    def digest(self) -> str | None:
        return self.kept.find(self.name, self.parts)

    def keep(self, digest: str) -> None:
        self.kept.keep(self.name, self.parts, digest)

    def forget(self) -> None:
        self.kept.path(self.name).unlink(missing_ok=True)


def known_tower(config: TuneConfig, release: Release, dtype: torch.dtype) -> str | None:
    """The digest of the release's tower, if features are cached and an earlier run left it."""
    if config.data.cache_features is None:
        return None
    record = _TowerRecord.of(config, release, dtype)
    return None if record is None else record.digest()


def store_features(
    config: TuneConfig,
    release: Release,
    tower: str | None,
    model: Any,
    processor: Any,
    datasets: Sequence[ConversationDataset | ImageRows],
    session: Session,
    budgets: Sequence[dict[str, Any]] = (),
) -> None:
    """Computes what `config.data.cache_features` lacks for a run, whose datasets then give features instead of pixels.

    `tower`: what `known_tower` gave; then the model has come without its tower, which is loaded only if an image has
    no features yet. The model is left without it. `budgets`: as of `features_identity`. Raises `StopRequested` on
    every process if one was asked to stop, and ValueError if the tower is not the one that was known.
    """
    assert config.data.cache_features is not None
    identity = features_identity(model, processor, tower, budgets)
    cache = FeatureCache(config.data.cache_features, identity)
    for dataset in datasets:
        cache.known_images.learn(dataset.known_images.files)
        dataset.known_images = cache.known_images
    record = _TowerRecord.of(config, release, model.get_input_embeddings().weight.dtype)
    if tower is None and record is not None:
        record.keep(identity["tower"])

    def tower_on_device() -> None:
        _put_tower(model, release, tower, record)
        whole_tower(model).to(session.accelerator.device)

    workers = config.data.num_workers
    computed = fill_cache(
        cache,
        model,
        processor,
        datasets,
        session,
        num_workers=workers,
        prepare=tower_on_device,
        budgets=budgets,
    )
    if session.accelerator.is_main_process:
        cache.known_images.keep(config.data.cache_features)
    if session.asked_to_stop():
        raise session.stopped()
    leave_out_towers(model)
    for dataset in datasets:
        dataset.features = cache
    what = "images and videos" if _videos(datasets) else "images"
    session.report.say(
        f"features: {computed} {what} computed, {len(cache)} in {cache.folder}; the tower is not needed"
    )


def _put_tower(model: Any, release: Release, digest: str | None, record: _TowerRecord | None) -> None:
    """Loads the tower where the model came without it. Raises UserError if it is not the one of `digest`."""
    if not isinstance(model.model.vision_tower, nn.Identity):
        return
    dtype = model.get_input_embeddings().weight.dtype
    for name in family_of(model.config.model_type).towers:
        setattr(model.model, name, load_tower(release.folder, model.config, dtype, name))
    if tower_digest(whole_tower(model)) != digest:
        if record is not None:
            record.forget()
        raise UserError(
            f"{release.folder}: the tower has changed where its samples do not show it. The features of the "
            "one before are left alone: start the run again"
        )
