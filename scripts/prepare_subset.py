"""Draw a share of an instruction mix: in proportion to its sources, the same on every machine.

    python scripts/prepare_subset.py llava_v1_5_mix665k.json --image_root DIR --fraction 0.1 --seed 0 --output OUT

Writes to OUT, a new folder: subset.json, images.txt (what to fetch), missing_images.txt (what is not in DIR yet),
videos.txt and missing_videos.txt likewise where rows have videos, dropped.jsonl (every row left out, and why) and
report.json.
"""

from collections.abc import Sequence
from dataclasses import asdict
from shlex import quote
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from shortzip.data.errors import printable
from shortzip.data.subset import SubsetOptions, prepare_subset
from shortzip.data.subset_folder import SUBSET
from shortzip.scripts.fetch_images import tune_command
from shortzip.train.run.report import literal
from shortzip.train.settings.command_line import parse_config, run_command
from shortzip.train.settings.commands import PrepareConfig


def main(argv: Sequence[str]) -> None:
    run(parse_config(PrepareConfig, argv, program="prepare_subset.py"))


def run(config: PrepareConfig) -> None:
    """Draws the subset and says what is in it. Raises `UserError`."""
    options = options_of(config)
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(printable(what), total=total)
            bars.update(tasks[what], completed=done, total=total)

        report = prepare_subset(options, show)
    print_report(report, options, Console())


def options_of(config: PrepareConfig) -> SubsetOptions:
    """What is drawn with these settings."""
    values = asdict(config)
    return SubsetOptions(missing="drop" if values.pop("drop_missing") else "keep", **values)


def print_report(report: dict[str, Any], options: SubsetOptions, console: Console) -> None:
    """The report for people, and what to do next."""

    def say(words: str, style: str = "") -> None:
        console.print(Text(printable(words), style), soft_wrap=True)

    table = Table("source", "rows", "selected", "written", title=f"{report['written']} of {report['rows']} rows")
    for name, counts in report["sources"].items():
        table.add_row(literal(name), *(f"{counts[key]:,}" for key in ("rows", "selected", "written")))
    console.print(table)
    for reason, count in report["dropped"].items():
        say(f"dropped, {reason}: {count:,}")
    if report["images_placed_at_the_start"]:
        placed = report["images_placed_at_the_start"]
        say(f"rows that name no place for their images, put at the start of the first question: {placed:,}")
    lengths = ", ".join(f"{length}: {count:,}" for length, count in report["answer_characters"].items())
    say(f"answers by characters: {lengths}")
    say(f"images needed: {report['images']:,} ({options.output / 'images.txt'})")
    if report["videos"]:
        say(f"videos needed: {report['videos']:,} ({options.output / 'videos.txt'}); they are not fetched here")
    if report["missing_videos"]:
        say(f"{report['missing_videos']:,} of them are missing in {report['image_root']}:", style="bold")
        say(f"{options.output / 'missing_videos.txt'}. Put them there, or draw with --drop_missing.")
    if report["image_root"] is None:
        say("images were not looked for, without --image_root")
    elif report["missing_images"]:
        say(f"{report['missing_images']:,} of them are missing in {report['image_root']}:", style="bold")
        say(f"{options.output / 'missing_images.txt'}. Fetch them, or draw with --drop_missing.")
    elif options.image_root is not None and report["image_root"] != str(options.image_root):
        say(f"the table holds its images, which lie in {report['image_root']} now: --image_root was not needed")
    root = report["image_root"] or "images"
    say("next:", style="bold")
    if report["image_root"] is None or report["missing_images"]:
        say(f"  shortzip fetch {quote(str(options.output / 'images.txt'))} --to {quote(root)}")
    say("  shortzip estimate --model llava-1.5-7b --budget 54+10")
    say(f"  {tune_command(options.output / SUBSET, root)}")


if __name__ == "__main__":
    run_command(main)
