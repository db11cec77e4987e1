"""Other ways to as few visual tokens as VisionZip's, to compare with: `visionzip: {..., method: ...}`.

random      patches drawn at random, the same for the same image and seed
grid        patches on a uniform grid
pool        the patches' features averaged over the cells of a uniform grid
downsample  the image made smaller before the tower, whose position embeddings are interpolated
            (which several published methods lose to on some benchmarks: VTC-Bench, arXiv 2510.07143)

VisionZip with `contextual: 0` is the baseline "dominant only". None of the four keeps CLS or merges: `dominant` is the
number of patches, `contextual` 0. B is the number of images, P of patches, n of tokens, H the hidden size.
"""

import zlib
from typing import NamedTuple

import torch
from torch import Tensor, nn

METHODS = ("visionzip", "random", "grid", "pool", "downsample")
ON_A_GRID = ("grid", "pool", "downsample")
MOST_OBLONG = 2


class BaselineTokens(NamedTuple):
    """What a baseline keeps of B images.

    Attributes:
        tokens: [B, n, H].
        kept: [B, n] int64, patch indices, ascending, for `random` and `grid`; [B, 0] for the others.
        groups: [B, P] int64: for `pool` and `downsample` the token that a patch goes into, else -1.
    """

    tokens: Tensor
    kept: Tensor
    groups: Tensor


def grid_shape(count: int, side: int) -> tuple[int, int]:
    """(rows, columns) of a uniform grid of `count` cells over `side` x `side` patches, as square as possible.

    Raises:
        ValueError: no grid of at most 1:2 has so many cells; names the nearest numbers that do.
    """
    possible = grid_counts(side)
    if count not in possible:
        near = sorted(possible, key=lambda other: (abs(other - count), other))[:4]
        raise ValueError(f"{count} tokens make no grid over {side} by {side} patches: choose one of {sorted(near)}")
    return possible[count]


def grid_counts(side: int) -> dict[int, tuple[int, int]]:
    """Every number of cells that `grid_shape` takes, with its rows and columns."""
    shapes: dict[int, tuple[int, int]] = {}
    for rows in range(1, side + 1):
        for columns in range(rows, min(side, MOST_OBLONG * rows) + 1):
            shapes[rows * columns] = max(shapes.get(rows * columns, (0, 0)), (rows, columns))
    return shapes


def random_patches(pixel_values: Tensor, count: int, patches: int, seed: int) -> Tensor:
    """`count` of `patches` indices per image, [B, count] int64, ascending, on the device of the images.

    A function of seed and image alone, so that an image is read alike in every batch, epoch and process.
    """
    rows = []
    for image in pixel_values.detach().to("cpu", torch.float32):
        # torch's generator reads 32 bits of its seed: both must be in them.
        start = zlib.crc32(image.contiguous().numpy().tobytes(), zlib.crc32(str(seed).encode()))
        generator = torch.Generator().manual_seed(start)
        rows.append(torch.randperm(patches, generator=generator)[:count].sort().values)
    return torch.stack(rows).to(pixel_values.device)


def grid_patches(shape: tuple[int, int], side: int) -> Tensor:
    """[rows * columns] int64: the patch in the middle of each cell, row by row."""
    row, column = ((torch.arange(cells) * 2 + 1) * side // (2 * cells) for cells in shape)
    return (row[:, None] * side + column).flatten()


def cells_of_patches(shape: tuple[int, int], side: int) -> Tensor:
    """[side * side] int64: the cell that the middle of each patch lies in."""
    row, column = ((torch.arange(side) * 2 + 1) * cells // (2 * side) for cells in shape)
    return (row[:, None] * shape[1] + column).flatten()


def pool_patches(hidden: Tensor, shape: tuple[int, int]) -> Tensor:
    """Patches [B, side * side, H] averaged over the cells of a grid, [B, rows * columns, H], dtype as it comes."""
    side = round(hidden.shape[1] ** 0.5)
    image = hidden.transpose(1, 2).unflatten(-1, (side, side))
    return nn.functional.adaptive_avg_pool2d(image.float(), shape).flatten(2).transpose(1, 2).to(hidden.dtype)


def downsample_images(pixel_values: Tensor, shape: tuple[int, int], patch_size: int) -> Tensor:
    """Images [B, 3, S, S] as [B, 3, rows * patch_size, columns * patch_size], smoothed first (bicubic)."""
    size = (shape[0] * patch_size, shape[1] * patch_size)
    small = nn.functional.interpolate(pixel_values.float(), size=size, mode="bicubic", antialias=True)
    return small.to(pixel_values.dtype)


def keep_patches(hidden: Tensor, pixel_values: Tensor, method: str, count: int, seed: int) -> BaselineTokens:
    """The baselines that work on the tower's output: `random`, `grid` and `pool` on patches [B, P, H]."""
    batch, patches, width = hidden.shape
    side = round(patches**0.5)
    nowhere = torch.full((batch, patches), -1, device=hidden.device)
    if method == "pool":
        shape = grid_shape(count, side)
        return BaselineTokens(pool_patches(hidden, shape), nowhere[:, :0], _cells(nowhere, shape, side))
    if method == "random":
        kept = random_patches(pixel_values, count, patches, seed)
    else:
        kept = grid_patches(grid_shape(count, side), side).to(hidden.device).expand(batch, -1)
    return BaselineTokens(hidden.gather(1, kept.unsqueeze(-1).expand(-1, -1, width)), kept, nowhere)


def downsampled_tokens(hidden: Tensor, count: int, side: int) -> BaselineTokens:
    """The patches [B, n, H] of images that were down-sampled, with what they stand for on the full grid."""
    nowhere = torch.full((hidden.shape[0], side * side), -1, device=hidden.device)
    return BaselineTokens(hidden, nowhere[:, :0], _cells(nowhere, grid_shape(count, side), side))


def _cells(like: Tensor, shape: tuple[int, int], side: int) -> Tensor:
    return cells_of_patches(shape, side).to(like.device).expand(like.shape)
