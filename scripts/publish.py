"""Publishes a finished run's reduced checkpoint on the Hub, with a model card written from the run's own records.

    python scripts/publish.py checkpoints/RUN --repo-id user/name [--private] [--shape projector|full|llava]
    python scripts/publish.py checkpoints/RUN --repo-id user/name --dry-run

Log in first: hf auth login (a token that may write). A push that was cut off is made whole by the same command.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from shortzip.train.publish.push import prepare, push, summary
from shortzip.train.release.writing import SHAPES
from shortzip.train.settings.command_line import Options, run_command, say


def main(argv: Sequence[str]) -> None:
    parser = Options(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder (its output_dir)")
    parser.add_argument("--repo-id", required=True, metavar="USER/NAME", help="the repository on the Hub")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        default="projector",
        help="projector: the projector alone, naming its release (default); full: everything, loads anywhere; "
        "llava: LLaVA's own layout",
    )
    parser.add_argument("--base", metavar="USER/NAME", help="the run's release on the Hub, when the run used a folder")
    parser.add_argument("--tag", help="name of the revision (default: v1, or the next number)")
    parser.add_argument("--update", action="store_true", help="write to a repository that holds other files")
    parser.add_argument("--dry-run", action="store_true", help="show every file and the card; touch nothing")
    given = parser.parse_args(argv)
    with prepare(given.run, given.repo_id, given.shape, base=given.base) as publication:
        if given.dry_run:
            say(summary(publication))
            return
        published = push(publication, private=given.private, update=given.update, tag=given.tag)
    say(published.describe())


if __name__ == "__main__":
    run_command(main)
