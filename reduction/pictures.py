"""Pictures of what is chosen of an image: which patches are kept, which are merged, and what was looked at.

The pixels drawn are those that the vision tower was given (padded, resized, tiled), so the grid fits exactly.
Needs matplotlib; nothing that travels to the Hub imports this file.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from .configuration_reduced_llava import TOWER_HAS_CLS, validate
from .errors import ReductionError
from .parsing import format_budget, format_method
from .selectors import BASELINES, VISIONZIP, selector_of, settled

INK = "#222222"


@dataclass(frozen=True)
class TokenMap:
    """Where the patches of one image went under one budget.

    A LLaVA-NeXT image has two: its base tile (the whole image, scaled down), and the mosaic of its other tiles.

    Attributes:
        pixels: [H, W, 3] uint8, what the vision tower was given.
        grid: patches from top to bottom and from left to right.
        attention: [P] float32, share of the attention (of CLS, or of all patches where the tower has no CLS) that each
            patch receives, at most 1 per tile in all; None for baselines, which choose by something else.
        kept: [P] bool, dominant patches.
        groups: [P] int64, the token that a patch was merged into, -1 for none; each tile has its own.
        targets: [C] int64, the patches that the contextual tokens grew from.
        visual_tokens: how many the language model gets for all this.
        cls_tokens: how many of them are CLS tokens, which have no place in the image.
        from_cls: whether the attention is that from CLS.
        title: of the method: VisionZip, SCOPE, baseline pool.
        name: of the budget, "54+10", and of another method than VisionZip.
    """

    pixels: NDArray[np.uint8]
    grid: tuple[int, int]
    attention: NDArray[np.float32] | None
    kept: NDArray[np.bool_]
    groups: NDArray[np.int64]
    targets: NDArray[np.int64]
    visual_tokens: int
    cls_tokens: int
    from_cls: bool
    title: str
    name: str


@contextmanager
def under_budget(model: Any, budget: dict[str, Any]) -> Iterator[None]:
    """Within it, `model` (a reduced LLaVA) works under another budget. Raises ValueError for one it cannot take."""
    saved = model.config.visionzip
    model.config.visionzip = budget
    try:
        validate(model.config)
        yield
    finally:
        model.config.visionzip = saved


@torch.no_grad()
def map_tokens(
    model: Any, processor: Any, image: Image.Image, budgets: Sequence[dict[str, Any]] | None = None
) -> list[list[TokenMap]]:
    """What becomes of `image`: per view (LLaVA-NeXT: base tile, then the mosaic) one map per budget.

    `model` is a reduced LLaVA or LLaVA-NeXT, `processor` its processor; `budgets` defaults to the model's own.
    Raises ValueError when there is no budget or one that the grid cannot fill.
    """
    if not budgets:
        if model.config.visionzip is None:
            raise ReductionError(
                "the model keeps every visual token: give a budget, such as dominant 54 and contextual 10."
            )
        budgets = [model.config.visionzip]
    inputs = processor.image_processor(image, return_tensors="pt")
    tiles = inputs["pixel_values"][0]
    views: list[tuple[Any, tuple[int, int]]] = [(slice(0, 1), (1, 1))]
    if tiles.dim() == 4:
        if len(tiles) > 1:
            side = model.config.vision_config.image_size
            rows, columns = get_anyres_image_grid_shape(
                inputs["image_sizes"][0], model.config.image_grid_pinpoints, side
            )
            views.append((slice(1, 1 + rows * columns), (rows, columns)))
    else:
        tiles = tiles[None]
    pixels = _as_seen(tiles, processor.image_processor)
    maps: list[list[TokenMap]] = [[] for _ in views]
    for budget in budgets:
        with under_budget(model, budget):
            found = model.model.get_visual_tokens(tiles.to(model.device))
        for view, (tiles_of_view, shape) in enumerate(views):
            maps[view].append(_one_map(model, found, pixels, tiles_of_view, shape, budget))
    return maps


def _as_seen(tiles: torch.Tensor, image_processor: Any) -> NDArray[np.uint8]:
    """[N, 3, S, S] normalised pixels -> [N, S, S, 3] grey levels 0 to 255."""
    values = tiles.float()
    if image_processor.do_normalize:
        deviation = torch.tensor(image_processor.image_std)[:, None, None]
        values = values * deviation + torch.tensor(image_processor.image_mean)[:, None, None]
    levels = values * 255 if image_processor.do_rescale else values
    return levels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _one_map(
    model: Any, found: Any, pixels: NDArray[np.uint8], tiles: slice, shape: tuple[int, int], budget: dict[str, Any]
) -> TokenMap:
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    method, from_cls = budget.get("method", VISIONZIP), TOWER_HAS_CLS[vision.model_type]
    selector = None if method in BASELINES else selector_of(budget)
    keeps_cls = from_cls and selector is not None and selector.keeps_cls
    kept = torch.zeros_like(found.groups[tiles], dtype=torch.bool).scatter(1, found.kept[tiles], True)
    is_target = torch.zeros_like(kept).scatter(1, found.targets[tiles], True)
    count, number = len(kept), int(found.groups.max()) + 1
    own = torch.arange(count, device=kept.device)[:, None] * number
    groups = torch.where(found.groups[tiles] < 0, -1, found.groups[tiles] + own)
    # With CLS the scores are sums over heads of a softmax, without it means: as shares, both add up to at most one.
    heads = vision.num_attention_heads if from_cls else 1

    def mosaic(values: torch.Tensor) -> NDArray[Any]:
        rows, columns = shape
        return (
            values.cpu().reshape(rows, columns, side, side).transpose(1, 2).reshape(-1).numpy()
        )  # row-major over the whole mosaic

    size = pixels.shape[1]
    stitched = pixels[tiles].reshape(*shape, size, size, 3).swapaxes(1, 2).reshape(shape[0] * size, shape[1] * size, 3)
    return TokenMap(
        pixels=stitched,
        grid=(shape[0] * side, shape[1] * side),
        attention=None if found.attention is None else mosaic(found.attention[tiles].float() / heads),
        kept=mosaic(kept),
        groups=mosaic(groups),
        targets=mosaic(is_target).nonzero()[0],
        visual_tokens=count * (budget["dominant"] + budget["contextual"]),
        cls_tokens=count if keeps_cls else 0,
        from_cls=from_cls,
        title=f"baseline {method}" if selector is None else selector.title,
        name=format_budget(budget) + ("" if method == VISIONZIP else f" ({format_method(settled(budget))})"),
    )


# ------------------------------------------------------------------------------------------------------- drawing


def draw_images(maps: Sequence[TokenMap], path: str | Path, titles: Sequence[str] | None = None) -> None:
    """A PNG with one row per image: the image, the attention, the kept patches, the merged groups.

    `maps` are of one budget. `titles`, one per image, stand above its row. Raises ValueError without maps.
    """
    sheet = _Sheet(len(maps), 4, maps)
    for row, item in enumerate(maps):
        _show_image(sheet.panel(row, 0), item, titles[row] if titles is not None else "")
        _show_attention(sheet, sheet.panel(row, 1), item)
        _show_kept(sheet.panel(row, 2), item)
        _show_groups(sheet.panel(row, 3), item)
    sheet.save(f"{maps[0].title} with budget {maps[0].name}: {_reduction_of(maps[0])}", path)


def draw_budgets(maps: Sequence[TokenMap], path: str | Path, title: str = "") -> None:
    """A PNG of one image under several budgets or methods side by side: kept patches above, merged groups below, and
    on the left the image and the attention, which none of them changes. `title` stands above the image.

    Raises ValueError without maps.
    """
    sheet = _Sheet(
        2, 1 + len(maps), maps, headings=["", *(f"{item.name} = {item.visual_tokens} visual tokens" for item in maps)]
    )
    _show_image(sheet.panel(0, 0), maps[0], title)
    _show_attention(sheet, sheet.panel(1, 0), next((item for item in maps if item.attention is not None), maps[0]))
    for column, item in enumerate(maps, start=1):
        _show_kept(sheet.panel(0, column), item)
        _show_groups(sheet.panel(1, column), item)
    patches = maps[0].grid[0] * maps[0].grid[1]
    titles = list(dict.fromkeys(item.title for item in maps))
    sheet.save(
        f"What {', '.join(titles)} {'make' if len(titles) > 1 else 'makes'} of the {patches} patches of an image", path
    )


def _reduction_of(item: TokenMap) -> str:
    return f"{item.grid[0] * item.grid[1]} patches become {item.visual_tokens} visual tokens"


class _Sheet:
    """A figure of equal panels; every length is in inches, so that nothing overlaps whatever the number of panels."""

    WIDTH, TITLE, HEADING, CAPTION, LEGEND, GAP, BAR = 3.3, 0.5, 0.3, 0.3, 0.55, 0.2, 0.55

    def __init__(
        self, rows: int, columns: int, maps: Sequence[TokenMap], headings: Sequence[str] | None = None
    ) -> None:
        if not maps:
            raise ReductionError("nothing to draw: give at least one image and one budget.")
        # Mosaics may be wide or high; the longer side gets the full length.
        tall, wide = max(maps[0].grid), max(maps[0].grid)
        self._width = self.WIDTH * max(maps[0].grid[1] / wide, 0.5)
        self._height = self.WIDTH * max(maps[0].grid[0] / tall, 0.5)
        self._scale = min(1.0, self._width / self.WIDTH)
        heading = self.HEADING if headings else 0.0
        # The first two columns have room on their right for the attention's scale.
        self._size = (
            2 * self.GAP + columns * (self._width + self.GAP) + self.BAR,
            self.TITLE + heading + rows * (self._height + self.CAPTION + self.GAP) + self.LEGEND,
        )
        self._bar_after = 0 if headings else 1
        self._top = self.TITLE + heading
        self.figure = Figure(figsize=self._size, dpi=150, facecolor="white")
        FigureCanvasAgg(self.figure)
        for column, text in enumerate(headings or []):
            x = self._left(column) + self._width / 2
            self.figure.text(x / self._size[0], 1 - (self.TITLE + 0.17) / self._size[1], text, ha="center",
                             fontsize=11, fontweight="bold", color=INK)  # fmt: skip

    def _left(self, column: int) -> float:
        return self.GAP + column * (self._width + self.GAP) + (self.BAR if column > self._bar_after else 0)

    def _axes(self, left: float, row: int, width: float, height: float) -> Any:
        bottom = self._size[1] - self._top - row * (self._height + self.CAPTION + self.GAP) - self.CAPTION - height
        return self.figure.add_axes(
            (left / self._size[0], bottom / self._size[1], width / self._size[0], height / self._size[1])
        )

    def panel(self, row: int, column: int) -> Any:
        """The axes of one panel, without ticks."""
        axes = self._axes(self._left(column), row, self._width, self._height)
        axes.set_axis_off()
        axes.row = row
        return axes

    def bar(self, row: int) -> Any:
        """The axes for a colour scale, right of the attention's panel."""
        return self._axes(self._left(self._bar_after) + self._width + 0.06, row, 0.09, self._height)

    def save(self, title: str, path: str | Path) -> None:
        """Adds title and legend and writes the PNG, making its folder."""
        self.figure.text(
            0.5,
            1 - 0.3 / self._size[1],
            title,
            ha="center",
            fontsize=13,
            fontweight="bold",
            color=INK,
            parse_math=False,
        )
        kept = Patch(facecolor="#cccccc", edgecolor=INK, label="kept patch (dominant): bright, black among the merged")
        merged = Patch(facecolor="#5aa0e0", edgecolor=INK, label="of one colour: merged into one token (contextual)")
        target = Line2D(
            [],
            [],
            marker="o",
            linestyle="",
            markersize=8,
            markerfacecolor="#5aa0e0",
            markeredgecolor=INK,
            label="the patch that it grew from",
        )
        handles = [kept, merged, target]
        columns = 3 if self._size[0] > 9 else 1
        self.figure.legend(handles=handles, loc="lower center", ncols=columns, fontsize=9.5, frameon=False)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.figure.savefig(path, format="png")


def _caption(axes: Any, text: str) -> None:
    axes.set_title(text, fontsize=9.5, color=INK, loc="left", pad=4, parse_math=False)


def _extent(item: TokenMap) -> tuple[float, float, float, float]:
    # One unit per patch, the first row on top.
    return (0, item.grid[1], item.grid[0], 0)


def _show_image(axes: Any, item: TokenMap, title: str) -> None:
    axes.imshow(item.pixels, extent=_extent(item))
    _caption(axes, title or "as the vision tower sees it")


def _show_attention(sheet: _Sheet, axes: Any, item: TokenMap) -> None:
    axes.imshow(item.pixels.mean(axis=2), extent=_extent(item), cmap="gray", vmin=0, vmax=255)
    if item.attention is None:
        sheet.bar(axes.row).set_axis_off()
        _caption(axes, "attention plays no part")
        return
    heat = 100 * item.attention.reshape(item.grid)
    # A few patches take most of the attention: on a linear scale the rest would be one colour.
    norm = PowerNorm(0.5, vmin=0, vmax=float(heat.max()))
    shown = axes.imshow(heat, extent=_extent(item), cmap="inferno", norm=norm, alpha=0.7, interpolation="nearest")
    ticks = [float(heat.max()) * share for share in (0, 0.05, 0.25, 0.5, 1)]
    bar = sheet.figure.colorbar(shown, cax=sheet.bar(axes.row), ticks=ticks, format="%.2g%%")
    bar.ax.tick_params(labelsize=7, length=2)
    bar.outline.set_visible(False)
    _caption(axes, "share of the attention from CLS" if item.from_cls else "share of the attention received")


def _show_kept(axes: Any, item: TokenMap) -> None:
    kept = item.kept.reshape(item.grid)
    axes.imshow(_dim(item.pixels, ~kept), extent=_extent(item))
    axes.add_collection(LineCollection(_borders(kept.astype(np.int64)), colors="white", linewidths=1.0))
    plus = {0: "", 1: ", and CLS"}.get(item.cls_tokens, f", and {item.cls_tokens} CLS")
    _caption(axes, f"kept: {int(kept.sum())} patches{plus}")


def _show_groups(axes: Any, item: TokenMap) -> None:
    groups, kept = item.groups.reshape(item.grid), item.kept.reshape(item.grid)
    number = int(groups.max()) + 1
    colors = _colors(number)
    tint = _blow_up(colors[np.maximum(groups, 0)] if number else np.zeros((*item.grid, 3)), item.pixels)
    shown = _dim(item.pixels, groups < 0)
    merged = _blow_up((groups >= 0)[..., None], item.pixels)
    axes.imshow(np.where(merged, 0.4 * shown + 0.6 * tint, shown), extent=_extent(item))
    axes.add_collection(LineCollection(_borders(groups), colors="black", linewidths=0.8))
    rows, columns = np.unravel_index(item.targets, item.grid)
    points = min(16.0, 72 * _Sheet.WIDTH / max(item.grid))
    axes.scatter(columns + 0.5, rows + 0.5, s=(0.8 * points) ** 2, facecolors=colors[groups[rows, columns]],
                 edgecolors="white", linewidths=1.5, zorder=3)  # fmt: skip
    dropped = int((~kept & (groups < 0)).sum())
    if dropped and not number:
        _caption(axes, f"dropped: {dropped} patches")
    else:
        rest = f", dropped: {dropped}" if dropped else ""
        _caption(axes, f"merged: {int((groups >= 0).sum())} patches into {number} tokens{rest}")


def _blow_up(values: NDArray[Any], pixels: NDArray[np.uint8]) -> NDArray[Any]:
    """Values per patch [rows, columns, x] -> per pixel."""
    rows, columns = values.shape[0], values.shape[1]
    across = np.arange(pixels.shape[1]) * columns // pixels.shape[1]
    down = np.arange(pixels.shape[0]) * rows // pixels.shape[0]
    return values[down][:, across]


def _dim(pixels: NDArray[np.uint8], dark: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The image with the patches `dark` [rows, columns] nearly black and without colour."""
    values = pixels / 255
    return np.where(_blow_up(dark[..., None], pixels), 0.2 * values.mean(axis=2, keepdims=True) + 0.03, values)


def _colors(number: int) -> NDArray[np.float64]:
    """`number` colours [n, 3]; neighbours in the list differ as much as the golden angle lets them."""
    return np.array(
        [
            colorsys.hsv_to_rgb(
                (0.58 + index * 0.61803398875) % 1, (0.85, 0.6)[index % 2], (0.95, 0.75)[index // 2 % 2]
            )
            for index in range(number)
        ]
    ).reshape(number, 3)


def _borders(labels: NDArray[np.int64]) -> list[list[tuple[int, int]]]:
    """Line segments (x, y) between neighbouring patches of different labels, and around labelled ones at the edge."""
    framed = np.pad(labels, 1, constant_values=labels.min())
    rows, columns = labels.shape
    segments = []
    for y in range(rows + 1):
        for x in range(columns + 1):
            here = framed[y + 1, x + 1]
            if x < columns and here != framed[y, x + 1]:
                segments.append([(x, y), (x + 1, y)])
            if y < rows and here != framed[y + 1, x]:
                segments.append([(x, y), (x, y + 1)])
    return segments
