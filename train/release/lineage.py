"""Whether a checkpoint was tuned from a release, and with which settings: what showing, comparing, publishing need."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from shortzip.data.files import read_json, write_atomically
from shortzip.reduction.base_release import fetch_base
from shortzip.reduction.reductions import Reductions
from shortzip.train.release.loading import reduced_config
from shortzip.train.release.opening import Release, open_release, release_projector
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.release.tensor_files import open_tensors, weight_files
from shortzip.train.release.writing import lineage, weights_folder
from shortzip.train.settings.checks import ConfigError

RECORD = "tuned_with.json"
# Keys of config.json that say how it was written or tuned, and nothing of the model.
_OF_THE_FILE = (
    "_name_or_path", "architectures", "auto_map", "base_release", "budgets", "transformers_version", "dtype",
)  # fmt: skip


def write_record(final: Path, release: Release, settings: Mapping[str, Any]) -> None:
    """Writes beside a run's checkpoint what it was tuned with: the run's own config.yaml can be replaced later.

    `settings`: those that decide what comes out (`TuneConfig.shaping_settings`).
    """
    record = {"settings": dict(settings), "projector": _projector_digest(release)}
    write_atomically(final / RECORD, json.dumps(record, indent=1) + "\n")


def check_settings(final: Path, config: Mapping[str, Any], file: Path) -> None:
    """Raises ConfigError when `config`, read from `file`, is not what `final` was tuned with.

    A checkpoint of before the record was kept has none: it passes.
    """
    if not (final / RECORD).is_file():
        return
    for key, needed in read_json(final / RECORD)["settings"].items():
        section, _, name = key.rpartition(".")
        values = config.get(section, {}) if section else config
        value = json.loads(json.dumps(values.get(name, needed)))  # a setting that is newer than the file
        if value != needed:
            raise ConfigError(
                f"{file}: {key} is {value!r}, and {final} was tuned with {needed!r}: the file is of another run, or "
                "was changed afterwards. Put the run's own config.yaml back"
            )


def base_revision(final: Release, config: Mapping[str, Any]) -> str | None:
    """The commit that the run of `final` started from; its config may name a branch, which moves on."""
    older = lineage(final)[:-1]
    pinned = older[-1]["revision"] if older and not Path(str(config["model"])).expanduser().is_dir() else None
    return pinned or config.get("revision")


def release_of(final: Release, config: Mapping[str, Any]) -> Release:
    """The release that a run's config names, as it was when the run started. Raises what `open_release` raises."""
    revision = base_revision(final, config)
    return open_release(
        ReleaseSpec(str(config["model"]), revision, config.get("mm_projector"), config.get("vision_tower"))
    )


def check_run(final: Release, release: Release, file: Path) -> None:
    """Raises ConfigError when `release`, which a run's `file` names, is not the one that `final` was tuned over."""
    older = lineage(final)[:-1]
    named = f", which names {older[-1]['name']}" if older else ""
    cure = f"put the run's own config.yaml back{named}"
    if not _same_base(final, release):
        raise ConfigError(f"{file} names {release.name}, and {final.source} was tuned over other weights: {cure}")
    record = final.source / RECORD
    if record.is_file() and read_json(record)["projector"] != _projector_digest(release):
        raise ConfigError(f"{file} names {release.name}, and {final.source} began with another projector: {cure}")


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
        own, needed = (shape.get(name, "missing") for shape in shapes)
        if own != needed:
            differs = f"its projector's {name} is {own}, needed by model {release.name} is {needed}"
            raise ConfigError(f"tuned {tuned.name}: {differs}: {cure}")
    if not _same_base(tuned, release):
        raise ConfigError(f"tuned {tuned.name} was tuned from other weights than model {release.name}: {cure}")


def shares_weights(one: Release, other: Release) -> bool:
    """Whether both are loaded alike but for reductions and projector: the same tower, language model and config."""
    loaded, plain = [], []
    for release in (one, other):
        spec = release.spec
        loaded.append((spec.dtype, spec.load_in_4bit, spec.attn_implementation))
        config = reduced_config(release, Reductions()).to_dict()
        plain.append({key: value for key, value in config.items() if key not in _OF_THE_FILE})
    return loaded[0] == loaded[1] and plain[0] == plain[1] and _same_base(one, other)


def _same_base(tuned: Release, release: Release) -> bool:
    """Whether `tuned` holds or names the vision tower and language model of `release`."""
    named = tuned.config.get("base_release")
    if named is None:
        folders = weights_folder(tuned), weights_folder(release)
        return folders[0] == folders[1] or _beginnings(folders[0]) == _beginnings(folders[1])
    try:
        fetch_base({**named, "name": str(weights_folder(release)), "revision": None}, tuned.name)
    except (OSError, ValueError):
        return False
    return True


def _projector_digest(release: Release) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(release_projector(release).items()):
        digest.update(name.encode() + tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _beginnings(folder: Path) -> dict[str, tuple[torch.Size, list[float]]]:
    """Shape and first values of every tensor outside the projector: training changes a tensor nearly everywhere."""
    beginnings = {}
    for path in weight_files(folder):
        with open_tensors(path) as tensors:
            for name in tensors:
                if "multi_modal_projector." not in name:
                    tensor = tensors[name]
                    beginnings[name] = (tensor.shape, tensor.flatten()[:64].tolist())
    return beginnings
