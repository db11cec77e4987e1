"""What a folder holds, and whether it can be opened without harm: JSON files, an index of weights, their headers.

They come from strangers, so everything in them is looked at before it is used, and every refusal names the file.
"""

import json
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .errors import ReductionError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MOST_HEADER = 100_000_000  # bytes; the format's own limit


def parse_object(text: str | bytes, path: Any) -> dict[str, Any]:
    """A JSON object from `text`, the content of `path`. Raises ReductionError, naming the file."""
    try:
        loaded = json.loads(text)
    except RecursionError as error:
        raise ReductionError(f"{path} is nested too deeply to be read as JSON: download it again") from error
    except ValueError as error:
        raise ReductionError(f"{path} is not readable as JSON ({error}): download it again") from error
    if not isinstance(loaded, dict):
        raise ReductionError(f"{path} holds a {type(loaded).__name__}, needed is a JSON object: download it again")
    return loaded


def check_json(source: Any, names: tuple[str, ...], subfolder: str | None = None) -> None:
    """Refuses JSON files that transformers would stumble over without a file's name. What is no folder (a Hub id), and
    a file that is not there, is left to it."""
    folder = Path(str(source), subfolder or "")
    for path in (folder / name for name in names):
        if path.is_file():
            parse_object(path.read_bytes(), path)


def is_inside(name: Any) -> bool:
    """Whether a name in an index or a list of files stays within its folder, on every system."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor
    return not absolute and ".." not in PureWindowsPath(name).parts


def shard_names(index: Path) -> list[str]:
    """The weight files that an index names, sorted. Raises ReductionError for a damaged index, and for names that lead
    out of its folder."""
    weight_map = parse_object(index.read_bytes(), index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ReductionError(f"{index} has no weight_map, which says where each tensor is: download it again")
    for tensor, name in weight_map.items():
        if not is_inside(name):
            raise ReductionError(
                f"{index}: weight_map says that {tensor} is in {name!r}, needed is the name of a file beside the index"
            )
    return sorted(set(weight_map.values()))


def weight_names(folder: Path) -> list[str]:
    """The weight files of a folder as transformers chooses them: safetensors first, and one file before an index."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        if (folder / f"{stem}{suffix}").is_file():
            return [f"{stem}{suffix}"]
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            return shard_names(index)
    return []


def check_weights(folder: Path) -> None:
    """Refuses weights that transformers would stumble over without a file's name. Raises ReductionError."""
    for path in (folder / name for name in weight_names(folder)):
        if path.suffix == ".safetensors" and path.is_file():
            read_header(path)
        elif path.is_file() and zipfile.is_zipfile(path):
            refuse_compressed(path)


def refuse_compressed(path: Path) -> None:
    """Refuses a .bin that is larger unpacked than packed: torch compresses nothing, and a few kilobytes could fill the
    memory before anything of them is looked at."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ReductionError(
            f"{path} cannot be read, it was probably cut short: download it again ({error})"
        ) from error
    if unpacked > size:
        raise ReductionError(
            f"{path} is refused: its {size} bytes unpack to {unpacked}, and torch.save compresses nothing: ask its "
            "author for a safetensors file"
        )


def read_header(path: Path) -> tuple[bytes, list[tuple[int, int]]]:
    """The header of a safetensors file as it is, and first and last byte + 1 of each tensor's data, ascending.

    Read by hand because a digest is of these bytes, and because what travels imports torch and transformers alone.
    Raises ReductionError for anything that is no such header. Whether the file is as long as it says is not looked at.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        header = file.read(length) if len(start) == 8 and length <= min(size, _MOST_HEADER) else b""
    damaged = f"{path} is no safetensors file, or was cut short within its header ({size} bytes)"
    places = []
    try:
        for name, entry in json.loads(header).items():
            if name != "__metadata__":
                first, end = entry["data_offsets"]
                shape = tuple(entry["shape"])
                if not all(type(number) is int and number >= 0 for number in (*shape, first, end - first)):
                    raise ReductionError(f"{path}: the header gives {name} a shape or a place that cannot be")
                places.append((first, end))
    except ReductionError:
        raise
    except RecursionError as error:
        raise ReductionError(f"{damaged}: the header is nested too deeply. Download or convert it again") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReductionError(f"{damaged}: download or convert it again") from error
    return header, sorted(places)
