"""Fetches the images that a subset needs, and no others: files from where files are served, members out of archives.

An image is on the disk whole and decodable, or not at all; what is there is not fetched again, so that the same
command continues after a kill. What cannot be had is listed with its reason, and the others go on.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import quote
from zipfile import BadZipFile

import requests
import yaml
from remotezip import RemoteIOError, RemoteZip
from remotezip import RemoteZipError as RangeError
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from shortzip.data.errors import MissingFile, UserError, printable
from shortzip.data.files import read_json, read_text, replace_file, sweep
from shortzip.data.images import BadImage, open_image

LARGEST = 200 << 20  # bytes of one image: no photograph is near it
LONGEST_WAIT = 60.0  # seconds between two attempts
GIVEN_UP = 20  # images in a row that one source fails to serve: the rest of it is not asked for
NETWORK_ERRORS = (requests.RequestException, HTTPError, RemoteIOError, ConnectionError, TimeoutError)

Fate = Literal["fetched", "there", "absent", "failed"]


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
        given = [name for name in ("files", "archive", "index") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(f"a source needs one of files, archive and index; given are {', '.join(given) or 'none'}")
        if self.files is not None and "{name}" not in self.files and "{stem}" not in self.files:
            raise UserError(
                f"files: {self.files!r} holds neither {{name}} nor {{stem}}: every image would be the same"
            )


@dataclass(frozen=True)
class FetchOptions:
    """What to fetch, and how hard to try."""

    images: list[str]
    """Paths below the image root, as images.txt lists them."""
    to: Path
    """The image root."""
    sources: dict[str, Source]
    """By folder of the image root."""
    workers: int = 16
    """Images at a time."""
    retries: int = 5
    """Attempts after the first one, each after a longer wait (or what the server's Retry-After says)."""
    timeout: float = 30.0
    """Seconds without a byte after which a connection is given up."""
    backoff: float = 0.5
    """Seconds before the first repetition; doubled with each."""


@dataclass
class Outcome:
    """What became of the images."""

    fates: dict[Fate, int] = field(default_factory=lambda: dict.fromkeys(("fetched", "there", "absent", "failed"), 0))
    bytes: int = 0
    """Of what was fetched now."""
    missing: dict[str, str] = field(default_factory=dict)
    """Path → why it could not be had."""


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
        known = {item.name for item in fields(Source)}
        for folder, values in content.items():
            if not isinstance(values, dict) or not values.keys() <= known or not all(map(_is_text, values.values())):
                raise UserError(f"{file}: {folder}: {values!r} is no source; its keys are {', '.join(sorted(known))}")
            try:
                sources[str(folder).strip("/")] = Source(**values)
            except UserError as error:
                raise UserError(f"{file}: {folder}: {error}") from error
    return sources


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def read_list(path: Path) -> list[str]:
    """The paths that images.txt lists, each once. Raises `UserError` for one that leads out of the image root."""
    paths = dict.fromkeys(line for line in read_text(path).split("\n") if line.strip())
    for number, name in enumerate(paths, start=1):
        parts = PurePosixPath(name).parts
        if PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name:
            raise UserError(f"{path}: line {number}: {printable(name)[:200]!r} leads out of the image root")
    if not paths:
        raise UserError(f"{path} lists no images")
    return list(paths)


def by_source(images: Iterable[str], sources: Mapping[str, Source]) -> dict[str, list[str]]:
    """The images of each source's folder. Raises `UserError` naming folders that no source serves."""
    groups: dict[str, list[str]] = {}
    unknown: dict[str, str] = {}
    for name in images:
        folder = next((str(p) for p in PurePosixPath(name).parents if str(p) in sources), None)
        if folder is None:
            unknown.setdefault(str(PurePosixPath(name).parent), name)
        else:
            groups.setdefault(folder, []).append(name)
    if unknown:
        raise UserError(
            f"no source serves {', '.join(f'{folder}/ ({name})' for folder, name in list(unknown.items())[:3])}: name "
            f"it in a YAML of your own (--sources); known are {', '.join(sources)}"
        )
    return groups


class _Server:
    """One source: asks for its images, from several threads."""

    def __init__(self, folder: str, source: Source, options: FetchOptions) -> None:
        self.folder, self.source, self.options = folder, source, options
        self._of_thread = threading.local()
        self._index: dict[str, Any] | None = None
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

    def _get(self, address: str) -> bytes | None:
        if not address.startswith(("http://", "https://")):
            raise SourceDown(f"{address[:200]!r} is no http(s) address")
        with self._session().get(address, timeout=self.options.timeout, stream=True) as response:
            if response.status_code in (404, 410):
                return None
            response.raise_for_status()
            parts, size = [], 0
            for part in response.iter_content(1 << 16):
                size += len(part)
                if size > LARGEST:
                    raise BadImage("unreadable_image", address, f"is over {LARGEST >> 20} MiB")
                parts.append(part)
            return b"".join(parts)

    def _member(self, name: str) -> bytes | None:
        archive = self._archive()
        try:
            info = archive.getinfo(name)
        except KeyError:
            return None
        if info.file_size > LARGEST:
            raise BadImage("unreadable_image", name, f"is over {LARGEST >> 20} MiB")
        try:
            return archive.read(info)  # and compares its CRC
        except Exception:
            self._of_thread.archive = None  # the connection may be in the middle of something
            raise

    def _archive(self) -> RemoteZip:
        archive = getattr(self._of_thread, "archive", None)
        if archive is None:
            try:
                archive = RemoteZip(self.source.archive, session=self._session(), timeout=self.options.timeout)
            except RemoteIOError:
                raise
            except RangeError as error:
                raise SourceDown(
                    f"{self.source.archive}: {error}; name a mirror that serves ranges (--sources), or fetch all of "
                    f"the archive and unpack it into {self.options.to / self.folder}"
                ) from error
            except BadZipFile as error:
                raise SourceDown(f"{self.source.archive} is no ZIP archive: {error}") from error
            self._of_thread.archive = archive
        return archive

    def _addresses(self) -> dict[str, Any]:
        with self._lock:
            if self._index is None:
                given = self.source.index
                assert given is not None
                if given.startswith(("http://", "https://")):
                    content = self._get(given)
                    try:
                        self._index = json.loads(content or b"")
                    except (ValueError, RecursionError) as error:
                        raise SourceDown(f"index {given} is not JSON") from error
                else:
                    file = Path(given) if Path(given).is_file() else self.options.to / given
                    try:
                        self._index = read_json(file)
                    except MissingFile as error:
                        raise SourceDown(
                            f"{file} is missing: the index of the addresses of {self.folder}; put it there, or name "
                            "it in a YAML of your own (--sources)"
                        ) from error
                if not isinstance(self._index, dict):
                    raise SourceDown(f"index {given} holds no JSON object")
            return self._index


def in_words(error: BaseException | None) -> str:
    """A network's error in one line."""
    while isinstance(error, requests.RequestException) and error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    reason = getattr(error, "reason", None)
    return printable(f"{type(error).__name__}: {reason or error}")[:300]


def fetch(options: FetchOptions, progress: Callable[[Outcome, int], None] = lambda outcome, total: None) -> Outcome:
    """Fetches what is not there yet; `progress` hears of every image, with how many there are.

    Raises `UserError` for folders that no source serves, before anything is fetched; `CannotWrite` for a full disk.
    """
    groups = by_source(options.images, options.sources)
    outcome, total = Outcome(), len(options.images)
    for place in {options.to / PurePosixPath(name).parent for name in options.images}:
        place.mkdir(parents=True, exist_ok=True)
        sweep(place)
    wanted: list[tuple[_Server, str]] = []
    for folder, names in groups.items():
        server = _Server(folder, options.sources[folder], options)
        for name in names:
            if (options.to / name).is_file() and (options.to / name).stat().st_size > 0:
                outcome.fates["there"] += 1
            else:
                wanted.append((server, name))
    progress(outcome, total)
    stop = threading.Event()
    with ThreadPoolExecutor(options.workers) as pool:
        waiting: set[Future[tuple[str, Fate, int, str]]] = set()
        queue = iter(_mixed(wanted))
        try:
            while True:
                for server, name in queue:
                    waiting.add(pool.submit(_fetch, server, name, options, stop))
                    if len(waiting) >= 4 * options.workers:
                        break
                if not waiting:
                    return outcome
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    name, fate, size, reason = future.result()
                    outcome.fates[fate] += 1
                    outcome.bytes += size
                    if reason:
                        outcome.missing[name] = reason
                progress(outcome, total)
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _mixed(wanted: Sequence[tuple[_Server, str]]) -> Iterator[tuple[_Server, str]]:
    """The sources in turn, so that one that is slow holds up no other."""
    groups: dict[str, list[tuple[_Server, str]]] = {}
    for server, name in wanted:
        groups.setdefault(server.folder, []).append((server, name))
    queues = [iter(group) for group in groups.values()]
    while queues:
        for queue in list(queues):
            item = next(queue, None)
            if item is None:
                queues.remove(queue)
            else:
                yield item


def _fetch(server: _Server, name: str, options: FetchOptions, stop: threading.Event) -> tuple[str, Fate, int, str]:
    """Name, fate, bytes and (where it could not be had) the reason."""
    reason, pause = "", 0.0
    for attempt in range(options.retries + 1):
        if stop.wait(pause) or server.down is not None:
            return name, "failed", 0, server.down or "stopped"
        pause = min(LONGEST_WAIT, options.backoff * 2**attempt)
        try:
            content = server.content(name)
            if content is None:
                server.count(None)
                return name, "absent", 0, "the source has no such image"
            open_image(content)
        except SourceDown as error:
            server.down = str(error)
            return name, "failed", 0, server.down
        except BadImage as error:  # cut off on the way, perhaps
            reason = f"what was sent is no whole picture: {error.detail}"
            continue
        except (*NETWORK_ERRORS, BadZipFile, EOFError) as error:
            reason = in_words(error)
            response = getattr(error, "response", None)
            if response is not None and 400 <= response.status_code < 500 and response.status_code != 429:
                server.count(error)
                return name, "absent", 0, f"the source refuses it ({response.status_code})"
            if response is not None:
                pause = min(LONGEST_WAIT, Retry().get_retry_after(response.raw) or pause)
            if attempt == options.retries:
                server.count(error)
            continue
        server.count(None)
        replace_file(options.to / name, lambda partial, content=content: partial.write_bytes(content))  # type: ignore[misc]
        return name, "fetched", len(content), ""
    return name, "failed", 0, reason
