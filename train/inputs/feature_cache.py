"""An image's or a video's visual tokens, computed once (train/inputs/shards.py): the tower is untrained and no cached
selection reads the text. Another image has another key, and a video under another sampling; another tower, processor
or budget, another folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shortzip.data.dataset import FeatureSource
from shortzip.data.errors import UserError
from shortzip.data.images import (
    BadImage,
    ImageSource,
    image_bytes,
    image_name,
)
from shortzip.data.known_images import KnownImages
from shortzip.data.supervision import takes_videos
from shortzip.data.video_frames import video_key
from shortzip.data.videos import Sampling, VideoSource
from shortzip.reduction.families import family_of
from shortzip.reduction.positions import keeps_positions
from shortzip.reduction.selectors import refuse_to_keep, settled
from shortzip.train.inputs.shards import Shards
from shortzip.train.release.towers import tensors_digest, tower_digest, whole_tower

FORMAT = 2  # of shards, and of what data/images.py makes of a file: to be raised when either changes
_KEPT = ("tokens", "kept", "targets")
_WIDTHS = "widths"  # of an image that has its own budget: what of each is no filling, [tiles, parts] int64
_NOT_OF_FEATURES = ("transformers_version", "_name_or_path", "dtype")  # the tower's digest holds its dtype


def image_key(source: ImageSource, image_root: str | os.PathLike[str] | None) -> str:
    """SHA-256 of an image's bytes. Raises `BadImage` if it cannot be read."""
    try:
        return hashlib.sha256(image_bytes(source, image_root)).hexdigest()
    except OSError as error:  # a table's cell that holds no bytes
        raise BadImage("missing_image", image_name(source), str(error)) from error


def known_key(known: KnownImages, source: ImageSource, image_root: str | os.PathLike[str] | None) -> str:
    """As `image_key`; of a file that has not changed since it was read, without opening it."""
    key: str = known.get("key", source, image_root, image_key)
    return key


def features_identity(
    model: Any, processor: Any, tower: str | None = None, budgets: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Everything but the image that its visual tokens depend on. `tower`: its digest, where that is known. `budgets`:
    the `visionzip` keys under which they are kept, where they are several.

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
        "tower": tower or tower_digest(whole_tower(model)),
        "tower's config": {key: value for key, value in of_tower.items() if key not in _NOT_OF_FEATURES},
        **_of_family(model),
        "layer": config.vision_feature_layer,
        "visionzip": [settled(budget) for budget in budgets] if budgets else settled(config.visionzip),
        # What is kept for compact positions is found as it was before there were others.
        **({"positions": config.positions} if keeps_positions(config) else {}),
        "processor": {"class": type(images).__name__, **json.loads(images.to_json_string())},
        **({"processor of frames": processor.frames_read_by()} if takes_videos(processor) else {}),
    }


def _of_family(model: Any) -> dict[str, Any]:
    """What a family's visual tokens depend on beside its tower: keys of the config, untrained parts of the
    projector."""
    config, projector = model.config, model.model.multi_modal_projector
    family, values = family_of(config.model_type), config.to_dict()
    keys = {key: values[key] for key in family.tower_keys}
    parts = {
        name: tensors_digest(projector.get_submodule(name).state_dict()) for name in family.untuned_parts("projector")
    }
    return {**({"family's keys": keys} if keys else {}), **({"parts of the projector": parts} if parts else {})}


class FeatureCache(Shards):
    """Visual tokens by image. Raises ValueError as `features_identity` does."""

    WHAT = "images"

    def __init__(self, root: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        super().__init__(root, identity)
        self.known_images = KnownImages()

    def key_of(self, source: ImageSource, image_root: str | os.PathLike[str] | None) -> str:
        """As `known_key`, of the images known here."""
        return known_key(self.known_images, source, image_root)

    def find(self, source: ImageSource, image_root: str | os.PathLike[str] | None) -> dict[str, Tensor] | None:
        """`visual_tokens` [tiles, budget, H of the tower] and `visual_kept` [tiles, D] int64 of an image, or None.

        Where tokens keep their positions, `visual_targets` [tiles, C] int64 too. Where they are kept under several
        budgets, all of these under each, as `visual_tokens.16` and so on.

        Raises `BadImage` if it cannot be read, and `DamagedShard`.
        """
        key = self.key_of(source, image_root)
        return self.get(key) if key in self else None

    def find_video(
        self, source: VideoSource, image_root: str | os.PathLike[str] | None, sampling: Sampling
    ) -> dict[str, Tensor] | None:
        """`video_tokens` [frames, budget, H of the tower] of a video of which these frames are seen, or None.

        Where tokens keep their positions, `video_kept` and `video_targets` too, as of `find`.

        Raises `BadImage` if it cannot be read, and `DamagedShard`.
        """
        key = video_key(source, image_root, sampling, self.known_images)
        if key not in self:
            return None
        held = self.tensors(key)
        names = _KEPT if "targets" in held else _KEPT[:1]
        return {f"video_{name}": held[name] for name in names}

    def get(self, key: str) -> dict[str, Tensor]:
        """As `find`, by key."""
        held = self.tensors(key)
        names = [name for name in held if name.partition(".")[0] in _KEPT]
        if _WIDTHS in held:
            names = [name for name in _KEPT if name in held]
            widths = dict(zip(names, held[_WIDTHS][0].tolist(), strict=True))
            held = {name: held[name][:, : widths[name]] for name in names}
        return {f"visual_{name}": held[name] for name in names}

    def write(self, images: dict[str, tuple[Tensor, ...]]) -> None:
        """Stores (tokens, kept) or (tokens, kept, targets), as `find` gives them, by key, as one shard.

        Raises `CannotWrite`.
        """
        self.write_tensors({key: by_name(parts) for key, parts in images.items()})


@dataclass(frozen=True)
class UnderOneBudget:
    """Of features that are kept under several budgets, those of one: as if no other were."""

    features: FeatureSource
    tokens: int

    def find(self, source: ImageSource, image_root: str | os.PathLike[str] | None) -> dict[str, Tensor] | None:
        """As FeatureCache's."""
        stored = self.features.find(source, image_root)
        return None if stored is None else features_of(stored, self.tokens)

    def find_video(
        self, source: VideoSource, image_root: str | os.PathLike[str] | None, sampling: Sampling
    ) -> dict[str, Tensor] | None:
        """None: videos are not kept under several budgets."""
        return None


def name_of(part: str, tokens: int) -> str:
    """What a part of an image's features is called under the budget of so many tokens, one of several."""
    return f"{part}.{tokens}"


def features_of(stored: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """Of an image's features under several budgets, those of the one with so many tokens."""
    return {name.partition(".")[0]: part for name, part in stored.items() if name.partition(".")[2] == str(tokens)}


def by_name(parts: tuple[Tensor, ...], own_budget: bool = False) -> dict[str, Tensor]:
    """An image's (tokens, kept) or (tokens, kept, targets) under the names that shards have for them. `own_budget`:
    other images have another one."""
    named = dict(zip(_KEPT, parts, strict=False))
    if own_budget:
        named[_WIDTHS] = torch.tensor([[part.shape[1] for part in parts]] * len(parts[0]))
    return named
