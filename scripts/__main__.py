"""`shortzip`: one command with a verb for each file of this folder, in the order of a user's day."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """One command."""

    name: str
    module: str
    """Below `shortzip`; its `main(argv)` is run."""
    words: str
    """What it does, in a line."""
    given: tuple[str, ...] = ()
    """Arguments that come before the user's."""


GROUPS: dict[str, tuple[Verb, ...]] = {
    "Try it": (
        Verb(
            "demo",
            "train.tune_projector",
            "tune the demo model on 2 CPU cores in 4 minutes, and show the table",
            ("--config", "demo", "--overwrite_output_dir", "true"),
        ),
        Verb("show", "scripts.show_tokens", "draw which patches of a picture are kept, and which are merged"),
        Verb("app", "scripts.demo_app", "a page in the browser: all tokens, reduced and tuned side by side"),
    ),
    "Prepare": (
        Verb("estimate", "scripts.estimate_cost", "what a run takes: memory, FLOPs, time"),
        Verb("prepare", "scripts.prepare_subset", "draw a tenth of the instruction data, and list its images"),
        Verb("fetch", "scripts.fetch_images", "fetch the images that were listed, and no others"),
        Verb("calibrate", "scripts.calibrate_shortv", "measure which layers of the language model may freeze"),
    ),
    "Tune": (
        Verb(
            "tune",
            "train.tune_projector",
            "tune the projector; several processes: accelerate launch -m shortzip.train.tune_projector",
        ),
    ),
    "Compare": (
        Verb("evaluate", "scripts.evaluate_models", "models side by side on held-out conversations"),
        Verb("papers", "scripts.evaluate_papers", "the papers' tables, through lmms-eval"),
        Verb("frontier", "scripts.frontier", "accuracy against tokens for every method and budget"),
    ),
    "Publish": (
        Verb("convert", "scripts.convert_release", "between LLaVA's own layout and transformers'"),
        Verb("publish", "scripts.publish", "a run's checkpoint to the Hub, with its card"),
    ),
}
VERBS = {verb.name: verb for verbs in GROUPS.values() for verb in verbs}


def overview() -> str:
    """All verbs, in groups."""
    width = max(map(len, VERBS))
    lines = [
        "ShortZip tunes the projector of a LLaVA for a tenth of its visual tokens.",
        "",
        "  shortzip VERB [--help]",
    ]
    for title, verbs in GROUPS.items():
        lines += ["", title, *(f"  {verb.name:<{width}}  {verb.words}" for verb in verbs)]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a verb; without one, shows them."""
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given[0] in ("-h", "--help", "help"):
        print(overview())
        return
    verb = VERBS.get(given[0])
    if verb is None:
        near = difflib.get_close_matches(given[0], VERBS, n=1, cutoff=0.5)
        sys.exit(
            f"error: there is no verb {given[0]!r}"
            + (f"; did you mean {near[0]!r}?" if near else "; `shortzip` lists them")
        )
    # Imported here: `shortzip` alone answers at once.
    from shortzip.train.settings.command_line import run_command

    run_command(importlib.import_module(f"shortzip.{verb.module}").main, [*verb.given, *given[1:]])


if __name__ == "__main__":
    main()
