"""What a release's files hold, without reading 14 GB: the part that a release has in an identity (data/kept.py)."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable
from pathlib import Path

from shortzip.data.files import sha256
from shortzip.reduction.base_release import PROJECTOR_FILE, digest
from shortzip.train.release.tensor_files import weight_files

READ_WHOLE = 64 << 20  # bytes: smaller files are hashed whole
_SAMPLE, _STRIDE = 1 << 12, 1 << 20
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)  # all that transformers reads of a folder, beside weights


def content_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's content; of a large one, of samples that reach into every tensor.

    Of a large safetensors file as `shortzip.reduction.base_release.digest` says. Of a large .bin: a zip's own
    checksum of each tensor and its first 4 KiB, or, in the format without zip, 4 KiB of every MiB.
    """
    size = path.stat().st_size
    if size <= READ_WHOLE:
        return sha256(path)
    if path.suffix == ".safetensors":
        return digest(path)
    summary = hashlib.sha256(str(size).encode())
    starts: Iterable[int] = range(0, size, _STRIDE)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        summary.update(repr([(entry.filename, entry.CRC, entry.file_size) for entry in entries]).encode())
        starts = [entry.header_offset for entry in entries]
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            summary.update(file.read(_SAMPLE))
    return summary.hexdigest()


def content_of(files: Iterable[Path]) -> dict[str, str]:
    """The content of files, which lie in one folder, by name."""
    return {file.name: content_digest(file) for file in files}


def folder_content(folder: Path) -> dict[str, str]:
    """The content of what loading a release reads of its folder: weights, configs, tokenizer, templates."""
    small = [folder / name for name in (*SMALL_FILES, PROJECTOR_FILE) if (folder / name).is_file()]
    templates = sorted(folder.glob("additional_chat_templates/*.jinja"))
    return content_of([*small, *templates, *weight_files(folder)])
