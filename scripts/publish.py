"""Publishes a finished run's reduced checkpoint on the Hub, with a model card written from the run's own records.

    python scripts/publish.py checkpoints/RUN --repo_id user/name [--private] [--shape projector|full|llava]
    python scripts/publish.py checkpoints/RUN --repo_id user/name --dry_run

Log in first: hf auth login (a token that may write). A push that was cut off is made whole by the same command.
"""

from __future__ import annotations

from collections.abc import Sequence

from shortzip.train.publish.push import prepare, push, summary
from shortzip.train.settings.command_line import parse_config, run_command, say
from shortzip.train.settings.commands import PublishConfig


def main(argv: Sequence[str]) -> None:
    run(parse_config(PublishConfig, argv, program="publish.py"))


def run(config: PublishConfig) -> None:
    """Publishes, or shows what would be. Raises what `prepare` and `push` raise."""
    with prepare(config.run, config.repo_id, config.shape, base=config.base) as publication:
        if config.dry_run:
            say(summary(publication))
            return
        published = push(publication, private=config.private, update=config.update, tag=config.tag)
    say(published.describe())


if __name__ == "__main__":
    run_command(main)
