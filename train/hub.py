"""Fetching a release's files from the Hub, or finding them in a folder."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.py", "*.txt", "projector.safetensors", "mm_projector.bin")


def fetch(name: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder `name` itself, or the files of the Hub repository `name` that a release needs, and the commit.

    Weights come as safetensors where the repository has them. Raises FileNotFoundError when `name` is neither a folder
    nor a repository that can be reached, and ValueError for a `revision` given with a folder.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision {revision!r} is for Hub ids, but {name} is a folder: leave revision out")
        return folder, None
    cure = (
        f"needed is a folder, or a Hub id such as llava-hf/llava-1.5-7b-hf that this machine can reach; got {name!r}"
    )
    if folder.is_absolute() or name.count("/") != 1 or name.startswith("."):
        raise FileNotFoundError(f"{name} does not exist: {cure}")
    try:
        if constants.is_offline_mode():
            found = Path(snapshot_download(name, revision=revision, local_files_only=True))
            return found, found.name
        info = HfApi().model_info(name, revision=revision)
        names = [sibling.rfilename for sibling in info.siblings or []]
        safe = any(file.startswith("model") and file.endswith(".safetensors") for file in names)
        weights = "model*.safetensors" if safe else "pytorch_model*.bin"
        found = Path(snapshot_download(name, revision=info.sha, allow_patterns=[*_SMALL_FILES, weights]))
        return found, info.sha
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name} has no revision {revision!r}: give a branch, tag or commit it has") from error
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{name} is gated: accept its terms on the Hub, then `hf auth login` with a token that may read it"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{name} is neither a folder nor a repository that this machine's token can see: {cure}"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise FileNotFoundError(f"{name} is not in the cache, and the Hub cannot be reached: {cure}") from error
