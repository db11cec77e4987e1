"""Fetches the images that prepare_subset listed, and no others: a tenth of the data without the other nine.

    python scripts/fetch_images.py subset/images.txt --to images/

The same command continues after an interruption. Where the images are served stands in configs/sources.yaml;
`--sources mine.yaml` names mirrors. What cannot be had is listed in missing_images.txt beside images.txt.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shortzip.data.fetching import FetchOptions, Outcome, fetch, read_list
from shortzip.data.files import write_atomically
from shortzip.data.image_sources import read_sources
from shortzip.data.json_rows import iterate_json_rows
from shortzip.data.subset_folder import SUBSET
from shortzip.train.settings.command_line import parse_config, run_command
from shortzip.train.settings.commands import FetchConfig
from shortzip.train.settings.config import DataConfig
from shortzip.train.settings.recipes import CONFIGS

EVERY_S = 5.0  # between lines where there is no terminal


class Display:
    """A bar on a terminal, else a line now and then: images, size so far, speed, time left."""

    def __init__(self, console: Console) -> None:
        self.console, self.started, self.shown = console, time.monotonic(), 0.0
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[size]}"), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("images", total=None, size="")

    def __call__(self, outcome: Outcome, total: int) -> None:
        done, now = sum(outcome.fates.values()), time.monotonic()
        size = f"{outcome.bytes / 2**20:,.0f} MiB"
        self.bar.update(self.task, completed=done, total=total, size=size)
        if not self.console.is_terminal and (now - self.shown >= EVERY_S or done == total):
            self.shown = now
            requests = done - outcome.fates["there"]
            left = (total - done) * (now - self.started) / requests if requests else 0.0
            self.console.print(f"{done:,} of {total:,} images, {size} fetched, {left / 60:.0f} min left")


def rows_without(subset: Path, missing: Sequence[str]) -> tuple[int, int] | None:
    """Of a subset: rows that need one of `missing`, and all rows; None where there is none."""
    if not subset.is_file():
        return None
    gone, lost, rows = set(missing), 0, 0
    for row in iterate_json_rows(subset):
        value = row.value if isinstance(row.value, dict) else {}
        needed = value.get("image") or value.get("images") or []
        rows += 1
        lost += any(
            name in gone for name in ([needed] if isinstance(needed, str) else needed) if isinstance(name, str)
        )
    return lost, rows


def tune_command(subset: Path, root: str, lost: float = 0.0) -> str:
    """The run on a subset; `lost` is the share of its rows whose images are missing, which it then leaves out."""
    words = ["shortzip", "tune", "--config", "llava-1.5-7b-3090", "--instructions", str(subset)]
    words += ["--image_root", root, "--data.fraction", "1.0"]
    if lost > 0:
        words += ["--data.on_bad_sample", "skip"]
    if lost > 0.9 * DataConfig.max_bad_fraction:  # others may turn out to be bad
        words += ["--data.max_bad_fraction", f"{min(1.0, lost + 0.05):.2f}"]
    return shlex.join(words)


def main(argv: Sequence[str]) -> None:
    run(parse_config(FetchConfig, argv, program="fetch_images.py"))


def run(config: FetchConfig) -> None:
    """Fetches, and says what is there and what is missing."""
    listed, console = Path(config.images), Console(highlight=False, soft_wrap=True)
    options = FetchOptions(
        images=read_list(listed),
        to=Path(config.to),
        sources=read_sources(CONFIGS / "sources.yaml", Path(config.sources) if config.sources else None),
        workers=config.workers,
        retries=config.retries,
        timeout=config.timeout,
    )
    display = Display(console)
    try:
        with display.bar:
            outcome = fetch(options, display)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command continues") from None
    fates = outcome.fates
    print(f"{fates['fetched']:,} fetched ({outcome.bytes / 2**20:,.0f} MiB), {fates['there']:,} were there")
    report = listed.with_name("missing_images.txt")
    write_atomically(report, "".join(f"{name}\n" for name in outcome.missing))
    subset = listed.with_name(SUBSET)
    if not outcome.missing:
        print(f"all {len(options.images):,} images are in {config.to}")
        if subset.is_file():
            print(f"next:\n  {tune_command(subset, config.to)}")
        return
    reasons: dict[str, list[str]] = {}
    for name, reason in outcome.missing.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        print(f"{len(names):,} missing ({names[0]}{', …' if len(names) > 1 else ''}): {reason}")
    print(f"listed in {report}")
    share = rows_without(subset, list(outcome.missing))
    if share is not None:
        lost, rows = share
        print(f"{lost:,} of {rows:,} rows of the subset need them ({lost / max(1, rows):.1%})")
        print(f"next, without these rows:\n  {tune_command(subset, config.to, lost / max(1, rows))}")
    if fates["failed"]:
        sys.exit(f"{fates['failed']:,} images failed, which may pass: the same command tries them again")


if __name__ == "__main__":
    run_command(main)
