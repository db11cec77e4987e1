"""Measures what choosing visual tokens costs beside the vision tower, each method in turn in every round.

    python scripts/benchmarks/selection.py
    OMP_NUM_THREADS=1 python scripts/benchmarks/selection.py --clock cpu   # on a machine that others use too

Random weights of CLIP ViT-L/14-336, 16 images, 64 of 576 tokens. The tower runs up to the selected block: the
embeddings and 23 equal blocks, of which `measured_blocks` are timed and multiplied. A method's time is all that it
adds: queries and keys in float32, scores, the choice, merging, putting in order; not the projector of what is chosen.

The limit, on paper. P = 576 patches of width H = 1024, n = 64; the tower is 366 GFLOP an image. What reads attention
or keys needs 2 P H² = 1.2 GFLOP (0.33 %) for the keys of the selected block. Cosines of all pairs are 2 P² H = 0.68
GFLOP (0.19 %; in float64 twice that). Expected, with 2 G elements a second for passes over memory and 50 GFLOP/s for
the tower:

    visionzip    0.4 %    keys; a product of 523 patches with 10
    fastervlm    0.35 %   keys
    divprune     0.25 %   cosines; 64 rows of 576
    vispruner    0.9 %    keys; cosines in float64; 64 rounds that gather 1.7 M of them and find their largest
    scope        1.0 %    keys; cosines; 64 times three passes over 576² (32 ms an image)
    dpp          0.8 %    keys; 64 products of 576 x 1024 with one column, bound by memory (20 ms)
    duet         0.4 %    keys; a product of 30 patches with 10
    prumerge+    0.5 %    keys; 64 rows of 576 cosines, sorted; a product of 64 x 576 with the patches

    divprune, projected   6.9 %   the projector of a 7B on every patch is 24 GFLOP. Of the 64 that are kept it is
                                  computed again for the language model: to pass it on would spare 0.8 % at
                                  inference (5.6 % would be left); in training a gradient goes through these alone

Measured, on one thread in CPU time: 0.44, 0.42, 0.20, 1.29, 0.84, 0.65, 0.46, 0.48 and 6.42 %. VisPruner's rounds take
more than expected: 0.4 s a batch, beside 0.3 s for its cosines and 0.35 s for the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from shortzip.data.files import refuse_to_replace
from shortzip.reduction.selectors import SELECTORS, Selector, selector_of
from shortzip.reduction.tower import embed_patches, queries_and_keys
from shortzip.reduction.visual_tokens import tokens_of_block
from shortzip.scripts.benchmarks.timing import Clock, Stopwatch, as_dicts, write_figures
from shortzip.train.settings.command_line import parse_config, run_command

EMBEDDINGS, BLOCKS = "embeddings", "measured blocks"


@dataclass
class BenchmarkConfig:
    """What `scripts/benchmarks/selection.py` takes. The tower has random weights of the given sizes."""

    methods: list[str] = field(default_factory=lambda: [*SELECTORS, "divprune, projected"])
    """Which to measure; `divprune, projected` is divprune on projected patches."""
    images: int = 16
    """Images in a batch."""
    tokens: int = 64
    """Visual tokens of an image; a method that merges makes 10 of 64 contextual."""
    image_size: int = 336
    """Pixels of an image's side; a patch is 14."""
    hidden_size: int = 1024
    """Width of the tower."""
    heads: int = 16
    """Its heads."""
    blocks: int = 23
    """Its blocks up to the selected one."""
    measured_blocks: int = 2
    """How many of them are timed."""
    projector_width: int = 4096
    """Width of the projector, which only `divprune, projected` asks."""
    device: str = "cpu"
    """cpu or cuda."""
    rounds: int = 5
    """Rounds, of which the median counts."""
    clock: Clock = "wall"
    """wall time; or the process's CPU time, for one thread (OMP_NUM_THREADS=1) on a machine that others use too."""
    output: Path | None = None
    """A JSON file to write the figures to."""
    overwrite: bool = False
    """Replace the file that is there already."""


def sides(settings: BenchmarkConfig) -> dict[str, Callable[[], Any]]:
    """The tower's embeddings and measured blocks, and every method on what the last of them gives."""
    selectors = {method: _selector(method) for method in settings.methods}
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=settings.hidden_size, intermediate_size=4 * settings.hidden_size,
        num_hidden_layers=settings.measured_blocks, num_attention_heads=settings.heads,
        image_size=settings.image_size, patch_size=14,
    )  # fmt: skip
    tower: Any = CLIPVisionModel(config).eval()
    tower.to(settings.device)
    projector = nn.Sequential(
        nn.Linear(settings.hidden_size, settings.projector_width),
        nn.GELU(),
        nn.Linear(settings.projector_width, settings.projector_width),
    ).to(settings.device)
    pixels = torch.randn(settings.images, 3, settings.image_size, settings.image_size, device=settings.device)
    blocks = tower.encoder.layers

    @torch.no_grad()
    def embed() -> Any:
        return embed_patches(tower, pixels)

    embedded = embed()

    @torch.no_grad()
    def run_blocks() -> Any:
        hidden = embedded
        for block in blocks:
            hidden = block(hidden, None)
        return hidden

    hidden = run_blocks()

    def method_side(selector: Selector) -> Callable[[], Any]:
        contextual = round(settings.tokens * 10 / 64) if selector.merges else 0
        budget = {"dominant": settings.tokens - contextual, "contextual": contextual}

        @torch.no_grad()
        def run() -> Any:
            queries = keys = None
            if selector.reads & {"attention", "keys"}:
                queries, keys = queries_and_keys(blocks[-1], hidden, True)
            scale = blocks[-1].self_attn.scale
            return tokens_of_block(hidden, queries, keys, scale, selector, budget, True, projector, pixels)

        return run

    return {EMBEDDINGS: embed, BLOCKS: run_blocks, **{name: method_side(one) for name, one in selectors.items()}}


def _selector(method: str) -> Selector:
    name, _, space = method.partition(", ")
    return selector_of({"method": name, **({"space": space} if space else {})})


def benchmark(settings: BenchmarkConfig) -> dict[str, Any]:
    """Seconds of the tower and of every method, and the share of the tower that a method adds."""
    watch = Stopwatch(torch.device(settings.device), settings.rounds, 1, settings.clock, False)
    timings = watch.alternate(sides(settings), settings.images)
    block = timings[BLOCKS].seconds / settings.measured_blocks
    tower = timings[EMBEDDINGS].seconds + settings.blocks * block
    shares = {method: timings[method].seconds / tower for method in settings.methods}
    return {"timings": as_dicts(timings), "tower_seconds": tower, "shares": shares}


def main(argv: Sequence[str]) -> None:
    """Prints the table, and writes it to `output` when given."""
    settings = parse_config(BenchmarkConfig, argv, program="selection.py")
    if settings.output is not None:
        refuse_to_replace(settings.output, overwrite=settings.overwrite)
    result = benchmark(settings)
    table = Table(title=f"{settings.images} images, {settings.tokens} tokens, {torch.get_num_threads()} threads")
    for heading in ("method", "seconds a batch", "fastest", "slowest", "of the tower"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method in settings.methods:
        rounds = result["timings"][method]["all_seconds"]
        cells = (f"{seconds:.3f}" for seconds in (result["timings"][method]["seconds"], min(rounds), max(rounds)))
        table.add_row(method, *cells, f"{result['shares'][method]:.2%}")
    console = Console()
    console.print(table)
    console.print(
        f"tower, {settings.blocks} blocks: {result['tower_seconds']:.1f} s a batch, from {settings.measured_blocks} "
        f"measured; median of {settings.rounds} rounds",
        highlight=False,
    )
    if settings.output is not None:
        write_figures(settings.output, {"settings": asdict(settings), **result})


if __name__ == "__main__":
    run_command(main)
