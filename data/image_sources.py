"""Where images are served, and how one is asked for: file by file, or as a single member of a remote archive."""

from __future__ import annotations

import io
import json
import struct
import threading
import zlib
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote
from zipfile import BadZipFile, ZipExtFile, ZipInfo

import requests
import yaml
from remotezip import RemoteIOError, RemoteZip
from remotezip import RemoteZipError as RangeError
from urllib3.exceptions import HTTPError

from shortzip.data.errors import MissingFile, UserError, printable
from shortzip.data.files import read_json, read_text
from shortzip.data.images import BadImage

LARGEST = 200 << 20  # bytes of one image: no photograph is near it
GIVEN_UP = 20  # images in a row that one source fails to serve: the rest of it is not asked for
NETWORK_ERRORS = (requests.RequestException, HTTPError, RemoteIOError, ConnectionError, TimeoutError)
DAMAGED = (BadZipFile, EOFError, zlib.error)  # a member that does not unpack to what its archive says of it
PASSING = (408, 425, 429)  # refusals of a server that is asked too early, or too often


class SourceDown(Exception):
    """A source that serves none of its images, with the reason."""


@dataclass(frozen=True)
class Source:
    """Where the images of one folder are served: by one of `files`, `archive` and `index`."""

    files: str | None = None
    """Address of an image, with {name} or {stem}."""
    archive: str | None = None
    """Address of a ZIP archive; its server must answer range requests."""
    member: str = "{name}"
    """An image's name in the archive."""
    index: str | None = None
    """A JSON file, or its address: an object whose values, by {stem}, hold each image's address."""
    key: str = "url"
    """What an entry of the index calls the address."""

    def __post_init__(self) -> None:
        places = [name for name in ("files", "archive", "index") if getattr(self, name) is not None]
        if len(places) != 1:
            raise UserError(f"a source needs one of files, archive and index; given are {', '.join(places) or 'none'}")
        for key in ("files", "archive"):
            address = getattr(self, key)
            if address is not None and not address.startswith(("http://", "https://")):
                raise UserError(f"{key}: {address!r} is no address: it begins with http:// or https://")
        for key in ("files", "member"):
            pattern = getattr(self, key)
            if pattern is None:
                continue
            try:
                is_own = pattern.format(name="a", stem="a") != pattern.format(name="b", stem="b")
            except (LookupError, ValueError) as error:
                raise UserError(f"{key}: {pattern!r} may hold {{name}} and {{stem}}, no other braces") from error
            if not is_own:
                raise UserError(
                    f"{key}: {pattern!r} holds neither {{name}} nor {{stem}}: every image would be the same"
                )


def read_sources(path: Path, replaced_by: Path | None = None) -> dict[str, Source]:
    """The sources of a YAML file, single folders replaced by those of another. Raises `UserError`."""
    sources: dict[str, Source] = {}
    for file in (path, *([replaced_by] if replaced_by else [])):
        try:
            content = yaml.safe_load(read_text(file)) or {}
        except (yaml.YAMLError, RecursionError) as error:
            raise UserError(f"{file} is not YAML: {error}") from error
        if not isinstance(content, dict):
            raise UserError(f"{file} holds a {type(content).__name__}; needed are folders, each with a source")
        keys = {item.name for item in fields(Source)}
        for folder, values in content.items():
            if not isinstance(values, dict) or not values.keys() <= keys or not all(map(_is_text, values.values())):
                raise UserError(f"{file}: {folder}: {values!r} is no source; its keys are {', '.join(sorted(keys))}")
            try:
                sources[str(folder).strip("/")] = Source(**values)
            except UserError as error:
                raise UserError(f"{file}: {folder}: {error}") from error
    return sources


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


class Server:
    """One source: asks for its images, from several threads."""

    def __init__(self, folder: str, source: Source, root: Path, timeout: float) -> None:
        self.folder, self.source, self.root, self.timeout = folder, source, root, timeout
        self._of_thread = threading.local()
        self._index: dict[str, Any] | None = None
        self._members: dict[str, tuple[ZipInfo, int]] | None = None
        self._lock = threading.Lock()
        self._failures = 0
        self.down: str | None = None
        """Why the rest of this source is not asked for."""

    def content(self, name: str) -> bytes | None:
        """The bytes of an image; None where the source says that it has none. Raises `NETWORK_ERRORS`,
        `SourceDown`."""
        below = name[len(self.folder) + 1 :]
        stem = str(PurePosixPath(below).with_suffix(""))
        if self.source.archive is not None:
            return self._member(self.source.member.format(name=below, stem=stem))
        if self.source.files is not None:
            return self._get(self.source.files.format(name=quote(below), stem=quote(stem)))
        entry = self._addresses().get(stem)
        address = entry.get(self.source.key) if isinstance(entry, dict) else entry
        return self._get(address) if isinstance(address, str) else None

    def count(self, error: Exception | None) -> None:
        """Notes whether the source answered: after `GIVEN_UP` failures in a row the rest of it is left."""
        with self._lock:
            self._failures = self._failures + 1 if error is not None else 0
            if self._failures >= GIVEN_UP:
                self.down = f"{self.folder}: {GIVEN_UP} images in a row failed, the last with: {in_words(error)}"

    def _session(self) -> requests.Session:
        if not hasattr(self._of_thread, "session"):
            self._of_thread.session = requests.Session()
        return self._of_thread.session

    def _get(self, address: str, part: tuple[int, int] | None = None) -> bytes | None:
        """What an address serves, or bytes `part` (first, last) of it."""
        if not address.startswith(("http://", "https://")):
            raise SourceDown(f"{address[:200]!r} is no http(s) address")
        headers = {} if part is None else {"Range": f"bytes={part[0]}-{part[1]}"}
        with self._session().get(address, headers=headers, timeout=self.timeout, stream=True) as response:
            if response.status_code in (404, 410):
                return None
            response.raise_for_status()
            if part is not None and response.status_code != 206:
                raise self._without_ranges("its server ignores range requests")
            parts, size = [], 0
            for content in response.iter_content(1 << 16):
                size += len(content)
                if size > LARGEST:
                    raise BadImage("unreadable_image", address, f"is over {LARGEST >> 20} MiB")
                parts.append(content)
            return b"".join(parts)

    def _member(self, name: str) -> bytes | None:
        info, size = self._directory().get(name, (None, 0))
        if info is None:
            return None
        if max(info.file_size, size) > LARGEST:
            raise BadImage("unreadable_image", name, f"is over {LARGEST >> 20} MiB")
        assert self.source.archive is not None
        part = self._get(self.source.archive, (info.header_offset, info.header_offset + size - 1))
        if part is None or len(part) < 30:
            raise EOFError(f"{len(part or b'')} of {size} bytes came")
        names = sum(struct.unpack("<HH", part[26:30]))  # of the local header: file name, extra fields
        with ZipExtFile(io.BytesIO(part[30 + names :]), "r", info) as member:
            return member.read()  # and compares its CRC

    def _directory(self) -> dict[str, tuple[ZipInfo, int]]:
        """The archive's members with the bytes that each takes, read once for all threads: of 150,000 members these
        are tens of megabytes."""
        with self._lock:
            if self._members is None:
                address = self.source.archive
                try:
                    archive = RemoteZip(address, session=self._session(), timeout=self.timeout)
                except RemoteIOError as error:  # which has the words alone of the answer
                    cause = error.__context__
                    if not isinstance(cause, requests.HTTPError) or cause.response is None:
                        raise
                    status = cause.response.status_code
                    if status < 500 and status not in PASSING:
                        raise SourceDown(f"{address}: the source refuses it ({status})") from error
                    raise cause from None
                except RangeError as error:
                    raise self._without_ranges(str(error)) from error
                except BadZipFile as error:
                    raise SourceDown(f"{address} is no ZIP archive: {error}") from error
                with archive:
                    members = sorted(archive.infolist(), key=lambda info: info.header_offset)
                    ends = [*(info.header_offset for info in members[1:]), archive.start_dir]
                self._members = {
                    info.filename: (info, end - info.header_offset) for info, end in zip(members, ends, strict=True)
                }
            return self._members

    def _without_ranges(self, words: str) -> SourceDown:
        return SourceDown(
            f"{self.source.archive}: {words}; name a mirror that serves ranges (--sources), or fetch all of "
            f"the archive and unpack it into {self.root / self.folder}"
        )

    def _addresses(self) -> dict[str, Any]:
        with self._lock:
            if self._index is None:
                index = self.source.index
                assert index is not None
                if index.startswith(("http://", "https://")):
                    content = self._get(index)
                    if content is None:
                        raise SourceDown(f"there is no index at {index}")
                    try:
                        self._index = json.loads(content)
                    except (ValueError, RecursionError) as error:
                        raise SourceDown(f"index {index} is not JSON") from error
                else:
                    file = Path(index) if Path(index).is_file() else self.root / index
                    try:
                        self._index = read_json(file)
                    except MissingFile as error:
                        raise SourceDown(
                            f"{file} is missing: the index of the addresses of {self.folder}; put it there, or name "
                            "it in a YAML of your own (--sources)"
                        ) from error
                    except UserError as error:
                        raise SourceDown(str(error)) from error
                if not isinstance(self._index, dict):
                    raise SourceDown(f"index {index} holds no JSON object")
            return self._index


def in_words(error: BaseException | None) -> str:
    """A network's error in one line."""
    while isinstance(error, requests.RequestException) and error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    reason = getattr(error, "reason", None)
    return printable(f"{type(error).__name__}: {reason or error}")[:300]
