"""Writes a release of half a megabyte: random weights, the real classes, of any family and in either layout.

    shortzip tiny --family mini_gemini --layout original --output tiny/mgm
    shortzip tune --config llava-1.5-7b --model tiny/mgm ...

What is written opens like a real release, is tuned and answers (nonsense). Every family has a file in `scripts/tiny/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from shortzip.data.errors import UserError
from shortzip.data.files import written_whole
from shortzip.train.settings.command_line import parse_config, run_command, say
from shortzip.train.settings.commands import TinyConfig


def main(argv: Sequence[str]) -> None:
    run(parse_config(TinyConfig, argv, program="make_tiny_release.py"))


def run(config: TinyConfig) -> None:
    """Writes the release. Raises `UserError` for a folder that is there already."""
    write_tiny_release(config.output, config.family, config.layout, config.seed)
    say(f"written: {config.output} (use it as --model)")


def write_tiny_release(folder: Path, family: str, layout: str = "transformers", seed: int = 0) -> Path:
    """Writes a tiny release, whole or not at all; the same seed gives the same weights.

    Args:
        family: one of `FAMILIES`, each of which has a file in `scripts/tiny/`, or "llava_interleave".
        layout: "transformers", or "original", the family's authors'.

    Raises:
        UserError: an original layout that is not read.
    """
    if (family, layout) == ("llava_interleave", "original"):
        raise UserError(f"layout is {layout!r}, and of {family} only transformers' is read: give transformers")
    module = import_module(f"shortzip.scripts.tiny.{family}")
    write = module.write_release if layout == "transformers" else module.write_original
    with written_whole(folder) as partial:
        write(partial, seed)
    return folder


if __name__ == "__main__":
    run_command(main)
