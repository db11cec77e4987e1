"""Conversions of LLaVA's own layout, kept under the content of all that they are made of."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from shortzip.data.errors import FileInTheWay
from shortzip.data.files import sweep, writing
from shortzip.data.kept import Kept, identity_of
from shortzip.train.release.content import content_of, folder_content
from shortzip.train.release.convert import convert_to_transformers, merged_config
from shortzip.train.release.layouts import layout_of

logger = logging.getLogger(__name__)

FORMAT = 1  # of what train/release/convert.py and train/release/layout_*.py write: to be raised when that changes


def keep_conversion(
    source: Path, cache: Path, *, tower: Path, projector: Path | None, more_towers: Sequence[Path] = ()
) -> Path:
    """The folder of a conversion: one of the same content that is whole, or one made now.

    Of processes that ask at once the first makes it. What killed ones left in `cache` is removed. Raises as
    `convert_to_transformers` does, and `CannotWrite`.
    """
    config = merged_config(source, projector)
    parts = {
        "format": FORMAT,
        "config": config,
        "release": folder_content(source),
        "tower": folder_content(tower),
        "projector": content_of([projector] if projector else []),
        "template": content_of([layout_of(config).template]),
        **({"more towers": [folder_content(folder) for folder in more_towers]} if more_towers else {}),
    }
    target = cache / f"{source.resolve().name}-{identity_of(parts)[:16]}"
    store = Kept(cache)

    def is_whole() -> bool:
        files = store.find(target.name, parts)
        return files is not None and target.is_dir() and content_of(sorted(target.iterdir())) == files

    if is_whole():
        return target
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
    sweep(cache)
    with _locked(target.with_name(target.name + ".lock")):
        if is_whole():  # by now: another process has made it
            return target
        if target.exists():
            logger.warning("%s is not as it was written: converting %s anew", target, source)
            shutil.rmtree(target)
        else:
            logger.warning("%s has LLaVA's own layout: converting it once into %s", source, target)
        try:
            convert_to_transformers(source, target, tower=tower, more_towers=more_towers, projector=projector)
        except FileInTheWay:  # on a file system without locks, another process was faster
            if not (target / "config.json").is_file():
                raise
        store.keep(target.name, parts, content_of(sorted(target.iterdir())))
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire()
    except NotImplementedError:  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        lock.release()
