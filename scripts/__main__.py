"""`shortzip`: one command with a verb for each file of this folder, in the order of a user's day."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Verb:
    """One command."""

    name: str
    module: str
    """Below `shortzip`; its `run(settings)` is called."""
    settings: str
    """Below `shortzip.train.settings`: the module and the dataclass that the command line is read into."""
    words: str
    """What it does, in a line."""
    given: tuple[str, ...] = ()
    """Arguments that come before the user's."""
    recipe: str | None = None
    """The YAML that is read where the user names none."""

    @property
    def section(self) -> type:
        """The dataclass of its settings."""
        module, _, name = self.settings.partition(".")
        section: type = getattr(importlib.import_module(f"shortzip.train.settings.{module}"), name)
        return section

    def run(self, argv: Sequence[str]) -> None:
        """Reads the command line, and then imports what does the work: --help waits for no torch."""
        from shortzip.train.settings.command_line import parse_config
        from shortzip.train.settings.recipes import find_recipe

        default = Path(find_recipe(self.recipe)) if self.recipe else None
        settings = parse_config(self.section, [*self.given, *argv], default=default, program=f"shortzip {self.name}")
        importlib.import_module(f"shortzip.{self.module}").run(settings)


GROUPS: dict[str, tuple[Verb, ...]] = {
    "Try it": (
        Verb(
            "demo",
            "train.tune_projector",
            "config.TuneConfig",
            "tune the demo model on 2 CPU cores in 4 minutes, and show the table",
            given=("--config", "demo", "--overwrite", "true"),
        ),
        Verb(
            "show",
            "scripts.show_tokens",
            "commands.ShowConfig",
            "draw which patches of a picture are kept, and which are merged",
        ),
        Verb(
            "app",
            "scripts.demo_app",
            "commands.AppConfig",
            "a page in the browser: all tokens, reduced and tuned side by side",
        ),
        Verb(
            "tiny",
            "scripts.make_tiny_release",
            "commands.TinyConfig",
            "write a random release of half a megabyte, of any family in either layout",
        ),
    ),
    "Prepare": (
        Verb(
            "estimate",
            "scripts.estimate_cost",
            "commands.EstimateConfig",
            "what a run takes: memory, FLOPs, time",
        ),
        Verb(
            "rehearse",
            "scripts.rehearse_memory",
            "commands.RehearseConfig",
            "a step's code at full size on tensors that hold nothing: where its memory goes",
        ),
        Verb(
            "prepare",
            "scripts.prepare_subset",
            "commands.PrepareConfig",
            "draw a tenth of the instruction data, and list its images",
        ),
        Verb(
            "fetch", "scripts.fetch_images", "commands.FetchConfig", "fetch the images that were listed, and no others"
        ),
        Verb(
            "calibrate",
            "scripts.calibrate_shortv",
            "commands.CalibrateConfig",
            "measure which layers of the language model may freeze",
        ),
        Verb(
            "calibrate_budget",
            "scripts.calibrate_budget",
            "calibrating.CalibrateBudgetConfig",
            "find what gives each image its own budget, for a mean of so many tokens",
        ),
    ),
    "Tune": (
        Verb(
            "tune",
            "train.tune_projector",
            "config.TuneConfig",
            "tune the projector; several processes: accelerate launch -m shortzip.train.tune_projector",
            recipe="demo",
        ),
    ),
    "Compare": (
        Verb(
            "evaluate",
            "scripts.evaluate_models",
            "comparing.EvaluateConfig",
            "models side by side on held-out conversations",
        ),
        Verb(
            "papers",
            "scripts.evaluate_papers",
            "comparing.PapersConfig",
            "the papers' tables, through lmms-eval",
        ),
        Verb(
            "frontier",
            "scripts.frontier",
            "frontier.FrontierConfig",
            "accuracy against tokens for every method and budget",
            recipe="frontier-demo",
        ),
    ),
    "Answer": (
        Verb(
            "answer",
            "scripts.answer",
            "serving.AnswerConfig",
            "a file of questions, continued where it was interrupted",
        ),
        Verb(
            "serve",
            "scripts.serve",
            "serving.ServeConfig",
            "OpenAI's interface: images here, the language model in an engine",
        ),
    ),
    "Publish": (
        Verb(
            "convert",
            "scripts.convert_release",
            "commands.ConvertConfig",
            "between LLaVA's own layout and transformers'",
        ),
        Verb(
            "publish",
            "scripts.publish",
            "commands.PublishConfig",
            "a run's checkpoint to the Hub, with its card",
        ),
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
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return
    verb = VERBS.get(arguments[0])
    if verb is None:
        near = difflib.get_close_matches(arguments[0], VERBS, n=1, cutoff=0.5)
        sys.exit(
            f"error: there is no verb {arguments[0]!r}"
            + (f"; did you mean {near[0]!r}?" if near else "; `shortzip` lists them")
        )
    # Imported here: `shortzip` alone answers at once.
    from shortzip.train.settings.command_line import run_command

    run_command(verb.run, arguments[1:])


if __name__ == "__main__":
    main()
