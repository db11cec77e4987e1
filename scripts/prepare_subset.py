"""Draw a share of an instruction mix: in proportion to its sources, the same on every machine.

    python scripts/prepare_subset.py llava_v1_5_mix665k.json --image-root DIR --fraction 0.1 --seed 0 -o OUT

Writes to OUT, a new folder: subset.json, images.txt (what to fetch), missing_images.txt (what is not in DIR yet),
dropped.jsonl (every row left out, and why) and report.json.
"""

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from shortzip.data.errors import printable
from shortzip.data.subset import SubsetOptions, prepare_subset
from shortzip.data.subset_folder import SUBSET
from shortzip.train.run.report import literal
from shortzip.train.settings.command_line import Options, run_command


def main(argv: Sequence[str]) -> None:
    """Draws the subset and says what is in it. Raises `UserError`."""
    options = parse(list(argv))
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


def parse(argv: list[str]) -> SubsetOptions:
    """The options on the command line."""
    parser = Options(prog="prepare_subset.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "instructions",
        type=str,
        help="a .json, .jsonl or .parquet file, a folder of a datasets table, or the name of a dataset on the Hub",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="new folder to write to")
    parser.add_argument(
        "--image-root", type=Path, help="folder that image paths are relative to; without it images are not looked for"
    )
    parser.add_argument("--fraction", type=float, default=0.1, help="share of the usable rows")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other rows")
    parser.add_argument(
        "--keep-text-only", action="store_true", help="keep rows without an image (they do not train the projector)"
    )
    parser.add_argument(
        "--drop-missing", action="store_true", help="drop chosen rows whose image is not there; default: list them"
    )
    parser.add_argument(
        "--verify-images", action="store_true", help="decode every image, and drop the rows of those that cannot be"
    )
    parser.add_argument(
        "--max-bad-fraction", type=float, default=0.01, help="stop when more than this share of the rows is malformed"
    )
    parser.add_argument("--num-workers", type=int, help="processes that decode images; default: one per core")
    parser.add_argument("--split", type=str, help="split of a datasets table; default: train")
    parser.add_argument(
        "--streaming", action="store_true", help="read a Hub dataset once, as a stream (shares hold on average)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a subset in the folder; files of other names in it stay"
    )
    given = parser.parse_args(argv)
    return SubsetOptions(
        instructions=given.instructions,
        output=given.output,
        image_root=given.image_root,
        fraction=given.fraction,
        seed=given.seed,
        keep_text_only=given.keep_text_only,
        missing="drop" if given.drop_missing else "keep",
        verify_images=given.verify_images,
        max_bad_fraction=given.max_bad_fraction,
        num_workers=given.num_workers,
        split=given.split,
        streaming=given.streaming,
        overwrite=given.overwrite,
    )


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
    if report["image_root"] is None:
        say("images were not looked for: give --image-root")
    elif report["missing_images"]:
        say(f"{report['missing_images']:,} of them are missing in {report['image_root']}:", style="bold")
        say(f"{options.output / 'missing_images.txt'}. Fetch them, or draw with --drop-missing.")
    elif options.image_root is not None and report["image_root"] != str(options.image_root):
        say(f"the table holds its images, which lie in {report['image_root']} now: --image-root was not needed")
    root = report["image_root"] or "images"
    say("next:", style="bold")
    if report["image_root"] is None or report["missing_images"]:
        say(f"  shortzip fetch {quote(str(options.output / 'images.txt'))} --to {quote(root)}")
    say("  shortzip estimate --model llava-1.5-7b --budget 54+10")
    say(
        f"  shortzip tune --config llava-1.5-7b-3090 --data.instructions {quote(str(options.output / SUBSET))} "
        f"--data.image_root {quote(root)} --data.fraction 1.0"
    )


if __name__ == "__main__":
    run_command(main)
