"""Times the first token of the second answer about an image: the conversation asked anew, and going on in its cache.

    python scripts/benchmarks/turns.py
    OMP_NUM_THREADS=1 python scripts/benchmarks/turns.py --clock cpu        # on a machine that others use too

All four sides in turn, medians. The limit, on paper: anew is tower, projector and prefill of all; what goes on is a
prefill of the new question alone, less than 20 tokens, so that no more than starting its operations is left (on the
demo's shape about 5 ms a pass), the same for all tokens and for a budget.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from shortzip.data.supervision import Supervision
from shortzip.reduction.reductions import Reductions
from shortzip.scripts.benchmarks.timing import CLOCKS, Clock
from shortzip.train.inputs.chat import Chat
from shortzip.train.release.loading import load_release
from shortzip.train.settings.command_line import parse_config, run_command

TURNS = [("user", "<image>\nWhat is in the image?"), ("assistant", "A red circle."), ("user", "What colour is it?")]


@dataclass
class BenchmarkConfig:
    """What `scripts/benchmarks/turns.py` takes."""

    model: str = "checkpoints/demo-llava"
    """A release."""
    dominant: int = 14
    """Dominant tokens of the reduced side."""
    contextual: int = 2
    """Contextual tokens of it."""
    layers: list[int] = field(default_factory=lambda: [0, 4, 5, 6, 7])
    """Frozen layers of it."""
    rounds: int = 9
    """Rounds, of which the median counts; one more comes before them and does not."""
    clock: Clock = "wall"
    """wall time; or the process's CPU time, for one thread (OMP_NUM_THREADS=1) on a machine that others use too."""


def main(argv: Sequence[str]) -> None:
    """Prints the times."""
    settings = parse_config(BenchmarkConfig, argv, program="turns.py")
    clock, image = CLOCKS[settings.clock], Image.fromarray(np.zeros((96, 96, 3), np.uint8))
    reduced = Reductions(
        {"dominant": settings.dominant, "contextual": settings.contextual}, {"layers": settings.layers}
    )
    chats: dict[str, Chat] = {}
    for name, reductions in (("all tokens", Reductions()), ("reduced", reduced)):
        model, processor = load_release(str(Path(settings.model)), reductions)
        supervision: Any = Supervision(processor, max_length=None)
        chats[f"{name}, anew"], going_on = Chat(model, supervision), Chat(model, supervision)
        going_on.reply(TURNS[:1], [image], 1)
        chats[f"{name}, going on"] = going_on
    seconds: dict[str, list[float]] = {name: [] for name in chats}
    computed: dict[str, int] = {}
    for turn in range(settings.rounds + 1):
        for name, chat in chats.items():
            started = clock()
            computed[name] = chat.reply(TURNS, [image], 1, keep=False).computed
            if turn:
                seconds[name].append(clock() - started)
    for name, rounds in seconds.items():
        text = f"{name}: {1000 * statistics.median(rounds):.1f} ms for {computed[name]} tokens of the prompt"
        Console().print(text, highlight=False)


if __name__ == "__main__":
    run_command(main)
