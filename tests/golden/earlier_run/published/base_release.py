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
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.modeling_utils import load_state_dict
from transformers.utils.hub import cached_file

PROJECTOR_FILE = "projector.safetensors"
_SAMPLE = 4096
_HUB = ("cache_dir", "token", "local_files_only", "force_download")
_PLACE = ("revision", "subfolder")


def digest(path: Path) -> str:
    """SHA-256 (hex) of a file, by parts as the module says. Raises ValueError for a damaged safetensors file."""
    size = path.stat().st_size
    summary = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if path.suffix != ".safetensors":
            summary.update(file.read())
            return summary.hexdigest()
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= size else b""
        try:
            entries = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        except ValueError as error:
            raise ValueError(f"{path} is no safetensors file, or was cut short: download it again") from error
        summary.update(header)
        for start, end in sorted(tuple(entry["data_offsets"]) for entry in entries):
            file.seek(8 + length + start)
            summary.update(file.read(min(_SAMPLE, end - start)))
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
    if not isinstance(base_release, dict) or not {"name", "revision", "files"} <= base_release.keys():
        raise ValueError(f"base_release must hold name, revision and files; got {base_release!r}")
    name, revision = base_release["name"], base_release["revision"]
    folder: Path | None = None
    for expected in base_release["files"]:
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
            raise ValueError(
                f"{checkpoint} is a projector for another release than the {name} found here: {file} has {size} bytes "
                f"(needed {expected['size']}) or other content. Give it the release it was tuned over"
                f"{f', revision {revision}' if revision else ''}, or load a full checkpoint"
            )
        folder = path.parent
    if folder is None:
        raise ValueError(f"base_release of {checkpoint} lists no files")
    return folder


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


def lay_projector(model: Any, path: Path) -> None:
    """Puts a projector's file into a loaded model, whose config then names no base any more: it is whole.

    Raises:
        ValueError: tensors that do not fit, or a projector that is quantised or offloaded.
    """
    projector = model.model.multi_modal_projector
    for name, parameter in projector.named_parameters():
        if parameter.is_meta or not parameter.dtype.is_floating_point:
            raise ValueError(
                f"the projector's {name} is {'offloaded' if parameter.is_meta else parameter.dtype}: the tuned one "
                "cannot be laid over it; leave it out (llm_int8_skip_modules=['model.multi_modal_projector'], or a "
                "device_map that keeps model.multi_modal_projector on a device), or load a full checkpoint"
            )
    tensors = load_state_dict(str(path))
    try:
        projector.load_state_dict({name.rsplit("multi_modal_projector.", 1)[-1]: t for name, t in tensors.items()})
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the release's projector: {error}") from error
    model.config.base_release = None
