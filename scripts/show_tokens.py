"""Draws what is chosen of images: the kept patches, the merged groups, the attention.

    python scripts/show_tokens.py photo.jpg --model checkpoints/demo-llava --budget 14+2,28+4 --output tokens.png

One image under one or several budgets and methods, side by side; or several images under one, one below the other.
Works with any release, reduced checkpoint or run's folder. A LLaVA-NeXT image gives two pictures: its base tile, and
the mosaic of the other tiles (`-tiles` is added to the name).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shortzip.data.errors import UserError
from shortzip.data.files import refuse_to_replace, replace_file, writing
from shortzip.data.images import open_image
from shortzip.data.pixels import shrunk
from shortzip.reduction.parsing import budget_by, parse_budget
from shortzip.reduction.pictures import TokenMap, draw_budgets, draw_images, map_tokens
from shortzip.reduction.reductions import Reductions
from shortzip.reduction.selectors import VISIONZIP
from shortzip.train.release.loading import load_viewer
from shortzip.train.release.opening import open_release
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.settings.command_line import parse_config, run_command, say
from shortzip.train.settings.commands import ShowConfig


def default_budgets(patches: int) -> list[dict[str, int]]:
    """VisionZip's budgets for LLaVA-1.5 (64, 128 and 192 of 576 patches), scaled to a grid."""
    return [
        {"dominant": max(2, round(dominant * patches / 576)), "contextual": max(1, round(contextual * patches / 576))}
        for dominant, contextual in [(54, 10), (108, 20), (162, 30)]
    ]


def show(settings: ShowConfig) -> list[Path]:
    """Draws and returns the files written. Raises `UserError` for what cannot be drawn, or written."""
    if not settings.images:
        raise UserError("no image: name at least one file")
    output = settings.output
    if output.suffix.lower() != ".png":
        if output.suffix and not output.is_dir():
            raise UserError(f"output {output}: a PNG is drawn, so its name must end with .png")
        output = output.with_name(output.name + ".png") if not output.is_dir() else output
    refuse_to_replace(output, overwrite=settings.overwrite, inputs=[*settings.images, settings.model])
    budgets: list[dict[str, Any]] | None = None
    if settings.budget:
        budgets = [dict(parse_budget(text)) for text in settings.budget.split(",")]
        budgets = _by_methods(budgets, settings.method or VISIONZIP)
    images = [open_image(name) for name in settings.images]
    release = open_release(ReleaseSpec(settings.model, settings.revision))
    model, processor = load_viewer(release, Reductions(budgets[0]) if budgets else None)
    if budgets is None:
        vision = model.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        budgets = [model.config.visionzip] if model.config.visionzip else default_budgets(patches)
        budgets = _by_methods(budgets, settings.method) if settings.method else budgets
    if len(images) > 1:
        budgets = budgets[:1]
    # Per image, per view, per budget.
    maps = [map_tokens(model, processor, shrunk(image, processor.image_processor), budgets) for image in images]
    names = [Path(name).name for name in settings.images]
    written = [output, output.with_stem(output.stem + "-tiles")][: max(len(views) for views in maps)]
    refuse_to_replace(*written, overwrite=settings.overwrite, inputs=[*settings.images, settings.model])
    for view, path in enumerate(written):
        having = [(name, views[view]) for name, views in zip(names, maps, strict=True) if view < len(views)]
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, partial(_draw, having))
    return written


def _by_methods(budgets: Sequence[Mapping[str, Any]], methods: str) -> list[dict[str, Any]]:
    return [budget_by(budget, method) for budget in budgets for method in methods.split(",")]


def _draw(images: list[tuple[str, list[TokenMap]]], path: Path) -> None:
    if len(images) == 1 and len(images[0][1]) > 1:
        draw_budgets(images[0][1], path, title=images[0][0])
    else:
        draw_images([maps[0] for _, maps in images], path, titles=[name for name, _ in images])


def main(argv: Sequence[str]) -> None:
    """Reads the command line, draws, and says where."""
    run(parse_config(ShowConfig, argv, program="show_tokens.py"))


def run(settings: ShowConfig) -> None:
    """Draws, and says where. Raises what `show` raises."""
    with torch.no_grad():
        written = show(settings)
    for path in written:
        say(f"written: {path}")


if __name__ == "__main__":
    run_command(main)
