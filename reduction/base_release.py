"""The release that a projector-only checkpoint lays its projector over: named, pinned and recognised by its own bytes.

A checkpoint of this shape holds the projector and, in its config, `base_release`:

    {"name": a Hub id or a folder, "revision": a commit or None, "files": [{"file", "size", "digest"}, ...]}

A digest must tell one release from another without reading 14 GB, and releases of one architecture differ in nothing
but the values of their tensors. So it is the SHA-256 of a safetensors file's size, of its header (every tensor's name,
dtype, shape and place) and of the first 4 KiB of every tensor: some 3 MB of a 7B model. Training changes every tensor
it touches nearly everywhere, the first bytes included; a file altered on purpose further inside is not what this finds
(the pinned revision is for that). Small files (config.json, the index) are hashed whole.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file

from .errors import ReductionError
from .weight_files import INDEX_FILE, SINGLE_FILE, is_inside, read_header, weight_names

PROJECTOR_FILE = "projector.safetensors"
_SAMPLE = 4096
_HUB = ("cache_dir", "token", "local_files_only", "force_download")
_PLACE = ("revision", "subfolder")


def digest(path: Path) -> str:
    """SHA-256 (hex) of a file, by parts as the module says. Raises ValueError for a damaged safetensors file."""
    summary = hashlib.sha256(str(path.stat().st_size).encode())
    if path.suffix != ".safetensors":
        summary.update(path.read_bytes())
        return summary.hexdigest()
    header, places = read_header(path)
    summary.update(header)
    with path.open("rb") as file:
        for first, end in places:
            file.seek(8 + len(header) + first)
            summary.update(file.read(min(_SAMPLE, end - first)))
    return summary.hexdigest()


def describe_files(folder: Path, names: Iterable[str]) -> list[dict[str, Any]]:
    """`files` of a `base_release`: size in bytes and digest of each of the named files, smallest first."""
    sizes = {name: (folder / name).stat().st_size for name in names}
    order = sorted(sizes, key=lambda name: (sizes[name], name))
    return [{"file": name, "size": sizes[name], "digest": digest(folder / name)} for name in order]


def fetch_base(base_release: Any, checkpoint: str, **hub: Any) -> Path:
    """The folder of the release that a checkpoint names, with its weights, checked file by file.

    Files are fetched smallest first and checked as they come, so that another release is refused early.

    Args:
        base_release: the config's key.
        checkpoint: the checkpoint's own name, for messages.
        hub: `cache_dir`, `token`, `local_files_only`, `force_download`, as in `from_pretrained`.

    Raises:
        ValueError: the key is malformed, or a file is not the one that the projector was tuned over.
        OSError: a file that cannot be found or fetched.
    """
    files = _files_of(base_release, checkpoint)
    name, revision = base_release["name"], base_release["revision"]
    folder: Path | None = None
    for expected in files:
        file = expected["file"]
        try:
            path = Path(str(cached_file(name, file, revision=revision, **hub)))
        except OSError as error:
            raise OSError(
                f"{checkpoint} is a projector for {name}{f' at revision {revision}' if revision else ''}, whose "
                f"{file} could not be had: {error}. Put that release there, or load a full checkpoint"
            ) from error
        size = path.stat().st_size
        if size != expected["size"] or digest(path) != expected["digest"]:
            raise ReductionError(
                f"{checkpoint} is a projector for another release than the {name} found here: {file} has {size} bytes "
                f"(needed {expected['size']}) or other content. Give it the release it was tuned over"
                f"{f', revision {revision}' if revision else ''}, or load a full checkpoint"
            )
        folder = path.parent
    assert folder is not None
    _refuse_unlisted(folder, {expected["file"] for expected in files}, checkpoint)
    return folder


def _files_of(base_release: Any, checkpoint: str) -> list[dict[str, Any]]:
    """`files` of a config's `base_release`, each entry looked at: the key comes from whoever published it."""
    if not isinstance(base_release, dict) or not {"name", "revision", "files"} <= base_release.keys():
        raise ReductionError(f"{checkpoint}: base_release must hold name, revision and files; got {base_release!r}")
    name, revision, files = base_release["name"], base_release["revision"], base_release["files"]
    if not isinstance(name, str) or not name or not isinstance(revision, str | None):
        raise ReductionError(
            f"{checkpoint}: base_release must name a Hub id or a folder, and a revision or null; got name {name!r}, "
            f"revision {revision!r}"
        )
    for entry in files if isinstance(files, list) else [files]:
        if not isinstance(entry, dict) or [type(entry.get(key)) for key in ("file", "size", "digest")] != [
            str,
            int,
            str,
        ]:
            raise ReductionError(
                f"{checkpoint}: base_release must list files as {{file, size, digest}}: a name, bytes and SHA-256; "
                f"got {entry!r}"
            )
        if not is_inside(entry["file"]) or "/" in entry["file"]:
            raise ReductionError(
                f"{checkpoint}: base_release lists the file {entry['file']!r}, needed is the name of a file in the "
                "release's own folder"
            )
    if not {SINGLE_FILE, INDEX_FILE} & {entry["file"] for entry in files}:
        raise ReductionError(
            f"{checkpoint}: base_release lists no weights ({SINGLE_FILE}, or {INDEX_FILE} and the files it names), so "
            "that any release would pass for it: publish the checkpoint again, or load a full one"
        )
    return list(files)


def _refuse_unlisted(folder: Path, listed: set[str], checkpoint: str) -> None:
    """Refuses a folder from which weights would be loaded that were not compared."""
    unlisted = sorted(set(weight_names(folder)) - listed)
    if unlisted:
        raise ReductionError(
            f"{checkpoint}: base_release does not list {', '.join(unlisted[:3])}, of which {folder} would be loaded: "
            "publish the checkpoint again, or load a full one"
        )


def find_base(config_class: Any, checkpoint: Any, kwargs: dict[str, Any]) -> Any:
    """`base_release` of what `from_pretrained(checkpoint, **kwargs)` is about to load, or None."""
    config = kwargs.get("config")
    if isinstance(config, PreTrainedConfig):
        return config.base_release
    if checkpoint is None:
        return None
    where = {key: kwargs[key] for key in (*_HUB, *_PLACE) if key in kwargs}
    return config_class.get_config_dict(config or checkpoint, **where)[0].get("base_release")


def open_base(
    config_class: Any, base_release: Any, checkpoint: Any, kwargs: dict[str, Any]
) -> tuple[Path, Path, dict[str, Any]]:
    """For a projector-only checkpoint: the folder to load instead, the projector's file, and the arguments to use.

    Raises as `fetch_base` does, and OSError when the projector's file is missing.
    """
    hub = {key: kwargs[key] for key in _HUB if key in kwargs}
    place = {key: kwargs[key] for key in _PLACE if key in kwargs}
    if not isinstance(kwargs.get("config"), PreTrainedConfig):
        named = kwargs.pop("config", None) or checkpoint
        config, kwargs = config_class.from_pretrained(named, return_unused_kwargs=True, **kwargs)
        kwargs = {**kwargs, "config": config}
    projector = Path(str(cached_file(checkpoint, PROJECTOR_FILE, **place, **hub)))
    folder = fetch_base(base_release, str(checkpoint), **hub)
    return folder, projector, {key: value for key, value in kwargs.items() if key not in (*_HUB, *_PLACE)}
