"""Fetches the images that a subset needs, and no others: files from where files are served, members out of archives.

An image is on the disk whole and decodable, or not at all; what is there is not fetched again, so that the same
command continues after a kill. What cannot be had is listed with its reason, and the others go on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal

import requests
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from shortzip.data.errors import UserError, printable
from shortzip.data.files import read_text, replace_file, sweep, writing
from shortzip.data.image_sources import DAMAGED, NETWORK_ERRORS, PASSING, Server, Source, SourceDown, in_words
from shortzip.data.images import BadImage, open_image

LONGEST_WAIT = 60.0  # seconds between two attempts

Fate = Literal["fetched", "there", "absent", "failed"]


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


def read_list(path: Path) -> list[str]:
    """The paths that images.txt lists, each once. Raises `UserError` for one that leads out of the image root."""
    paths: dict[str, None] = {}
    for number, name in enumerate(read_text(path).split("\n"), start=1):
        if not name.strip():
            continue
        paths[name] = None
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


def fetch(options: FetchOptions, progress: Callable[[Outcome, int], None] = lambda outcome, total: None) -> Outcome:
    """Fetches what is not there yet; `progress` hears of every image, with how many there are.

    Raises `UserError` for folders that no source serves, before anything is fetched; `CannotWrite` for a full disk.
    """
    groups = by_source(options.images, options.sources)
    outcome, total = Outcome(), len(options.images)
    for place in {options.to / PurePosixPath(name).parent for name in options.images}:
        with writing(place):
            place.mkdir(parents=True, exist_ok=True)
        sweep(place)
    files: list[tuple[Server, str]] = []
    for folder, names in groups.items():
        server = Server(folder, options.sources[folder], options.to, options.timeout)
        for name in names:
            if (options.to / name).is_file() and (options.to / name).stat().st_size > 0:
                outcome.fates["there"] += 1
            else:
                files.append((server, name))
    progress(outcome, total)
    stop = threading.Event()
    with ThreadPoolExecutor(options.workers) as pool:
        waiting: set[Future[tuple[str, Fate, int, str]]] = set()
        queue = iter(_mixed(files))
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


def _mixed(files: Sequence[tuple[Server, str]]) -> Iterator[tuple[Server, str]]:
    """The sources in turn, so that one that is slow holds up no other."""
    groups: dict[str, list[tuple[Server, str]]] = {}
    for server, name in files:
        groups.setdefault(server.folder, []).append((server, name))
    queues = [iter(group) for group in groups.values()]
    while queues:
        for queue in list(queues):
            item = next(queue, None)
            if item is None:
                queues.remove(queue)
            else:
                yield item


def _fetch(server: Server, name: str, options: FetchOptions, stop: threading.Event) -> tuple[str, Fate, int, str]:
    """Name, fate, bytes and (where it could not be had) the reason."""
    reason, pause = "", 0.0
    error: Exception | None = None
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
        except SourceDown as down:
            server.down = str(down)
            return name, "failed", 0, server.down
        except BadImage as bad:  # cut off on the way, perhaps
            error, reason = bad, f"what was sent is no whole picture: {bad.detail}"
        except (*NETWORK_ERRORS, *DAMAGED) as refused:
            error, reason = refused, in_words(refused)
            response = getattr(refused, "response", None)
            if response is not None and 400 <= response.status_code < 500 and response.status_code not in PASSING:
                server.count(refused)
                return name, "absent", 0, f"the source refuses it ({response.status_code})"
            if response is not None:
                pause = min(LONGEST_WAIT, _told_to_wait(response) or pause)
        else:
            server.count(None)
            replace_file(options.to / name, partial(_write, content))
            return name, "fetched", len(content), ""
    server.count(error)
    return name, "failed", 0, reason


def _told_to_wait(response: requests.Response) -> float | None:
    """Seconds that Retry-After says, in numbers or as a date."""
    try:
        return Retry().get_retry_after(response.raw)
    except HTTPError:  # neither
        return None


def _write(content: bytes, file: Path) -> None:
    file.write_bytes(content)
