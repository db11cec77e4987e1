"""Reaching the Hub: fetching a release's files, and repeating what a busy server or a cut connection made fail."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

from shortzip.data.errors import MissingFile, UserError
from shortzip.train.settings.recipes import DEMO_MODEL, DEMO_NAMES

_SMALL_FILES = (
    "README.md",
    "*.json",
    "*.jinja",
    "*.model",
    "*.py",
    "*.txt",
    "projector.safetensors",
    "mm_projector.bin",
)
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
_PASSING = (408, 429, 500, 502, 503, 504)
_WAITS = (1, 2, 4, 8, 16)

Result = TypeVar("Result")


def fetch(name: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder `name` itself, or the files of the Hub repository `name` that a release needs, and the commit.

    Weights come as safetensors where the repository has them. What was fetched before is used where the Hub cannot be
    reached. Raises FileNotFoundError when `name` is neither a folder nor a repository that can be had, and ValueError
    for a `revision` given with a folder.
    """
    folder = Path(name).expanduser()
    here = f"there is no folder {name} in {Path.cwd()}"
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"revision {revision!r} is for Hub ids, but {name} is a folder: leave revision out")
        return folder, None
    if name in DEMO_NAMES and revision is None:
        return DEMO_MODEL, None  # it travels with the package
    cure = f"needed is a folder, or a Hub id (such as llava-hf/llava-1.5-7b-hf) within reach; got {name!r}"
    if folder.is_absolute() or name.count("/") != 1 or name.startswith("."):
        raise MissingFile(f"{name} does not exist: {cure}")
    try:
        if constants.is_offline_mode():
            return _cached(name, revision, here)
        info = HfApi().model_info(name, revision=revision)
        names = [sibling.rfilename for sibling in info.siblings or []]
        safe = any(file.startswith("model") and file.endswith(".safetensors") for file in names)
        patterns = [*_SMALL_FILES, _WEIGHTS[0] if safe else _WEIGHTS[1]]
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        return snapshot, snapshot.name
    except RevisionNotFoundError as error:
        raise MissingFile(f"{name} has no revision {revision!r}: give a branch, tag or commit it has") from error
    except GatedRepoError as error:
        raise MissingFile(
            f"{name} is gated: accept its terms on the Hub, then `hf auth login` with a token that may read it"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise MissingFile(
            f"{name} is neither a folder nor a repository that this machine's token can see: {cure}"
        ) from error
    except (httpx.TransportError, OfflineModeIsEnabled):
        pass
    return _cached(name, revision, here)  # no longer within the handler, whose error would tell of sockets


def _cached(name: str, revision: str | None, here: str) -> tuple[Path, str]:
    for weights in _WEIGHTS:
        patterns = [*_SMALL_FILES, weights]
        try:
            snapshot = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=patterns))
        except LocalEntryNotFoundError:
            continue
        if any(snapshot.glob(weights)) or any(snapshot.glob("*projector*")):
            return snapshot, snapshot.name
    raise MissingFile(
        f"{here}, {name}{f' at {revision}' if revision else ''} is not in the Hub's cache, and the Hub cannot be "
        "reached: connect this machine, or give a folder"
    )


def retrying(action: Callable[[], Result], say: Callable[[str], None], what: str) -> Result:
    """`action()`, repeated after 1, 2, 4, 8 and 16 seconds while the Hub is busy (429), fails (5xx) or is cut off.

    A Retry-After that the Hub sends is kept to, up to a minute. `what` is said in the message of each repetition. The
    last error is raised as it is. (huggingface_hub repeats uploads alone, and silently; it reads no Retry-After.)
    """
    for wait in (*_WAITS, None):
        try:
            return action()
        except (HfHubHTTPError, httpx.TransportError, RuntimeError) as error:
            reason = _passing_reason(error)
            if reason is None or wait is None:
                raise
            pause = min(60.0, max(float(wait), _retry_after(error)))
            say(f"{what}: {reason}; again in {pause:g} s")
            time.sleep(pause)
    raise AssertionError("unreachable")


def _passing_reason(error: BaseException) -> str | None:
    """Why an error may pass, in words; None if repeating is no use. Uploads wrap theirs in a RuntimeError."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return f"the Hub answered {status}" if status in _PASSING else None
    if isinstance(error, httpx.TransportError):
        return f"the connection failed ({type(error).__name__})"
    return _passing_reason(error.__cause__) if error.__cause__ is not None else None


def _retry_after(error: BaseException) -> float:
    if isinstance(error, HfHubHTTPError):
        header = error.response.headers.get("Retry-After", "")
        return float(header) if header.isdigit() else 0.0
    return _retry_after(error.__cause__) if error.__cause__ is not None else 0.0
