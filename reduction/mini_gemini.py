"""Mini-Gemini's two towers, and how its patches mine the high-resolution one (arXiv 2403.18814, §3.2; MGM's code).

One image goes in, at the high resolution A (768 pixels, HD 1536). CLIP sees it at S = 336: whole, or as T tiles. The
ConvNeXt sees it as it is. Each of CLIP's P patches has a window of the ConvNeXt's features to itself, attends to its
positions, and what it finds there is added to it: no token comes on top, and none is mixed with another.

N is the number of images, T of tiles (views, where a global one is among them), H CLIP's width (1024), F that of the
ConvNeXt's stages together (2880).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionModel
from transformers.models.convnext.modeling_convnext import ConvNextEmbeddings, ConvNextStage

from .configuration_reduced_mini_gemini import tiles_of
from .projector import DtypeProjector


class _ConvNext(nn.Module):
    """transformers' ConvNextModel without the norm after its last stage, of which MGM has no weights; stages never
    drop paths."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embeddings = ConvNextEmbeddings(config)
        widths = [config.hidden_sizes[0], *config.hidden_sizes]
        self.stages = nn.ModuleList(
            ConvNextStage(config, widths[number], widths[number + 1], stride=2 if number else 1, depth=depth)
            for number, depth in enumerate(config.depths)
        )

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class MiniGeminiTower(nn.Module):
    """CLIP and the ConvNeXt, both untrained. Called by its parts."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config.vision_config
        self.clip = CLIPVisionModel(config.vision_config)
        self.convnext = _ConvNext(config.aux_config)
        self.grid, self.has_global, self.tiles = config.image_grid, config.image_global, tiles_of(config)

    @property
    def dtype(self) -> torch.dtype:
        """That of CLIP's weights."""
        return self.clip.dtype

    def low_resolution(self, pixels: Tensor) -> Tensor:
        """What CLIP sees of normalised images [N, 3, A, A]: [N * T, 3, S, S], of each the global view first, if there
        is one, then its tiles, row by row.

        Resized as MGM does: the normalised pixels, bilinear without antialiasing, the global view from the tiles' own
        resolution.
        """
        side, grid = self.config.image_size, self.grid
        whole = interpolate(pixels.float(), size=(side * grid, side * grid), mode="bilinear", align_corners=False)
        views = _cut(whole, grid)
        if self.tiles > grid * grid:
            small = interpolate(whole, size=(side, side), mode="bilinear", align_corners=False)
            views = torch.cat([small.unsqueeze(1), views], dim=1)
        return views.flatten(0, 1).to(pixels.dtype)

    def high_resolution(self, pixels: Tensor) -> Tensor:
        """The ConvNeXt's features of normalised images [N, 3, A, A]: [N, F, A / 4, A / 4], each stage's resized to the
        first one's size (bilinear, in float32) and laid one upon the other."""
        hidden = self.convnext.embeddings(pixels.to(self.convnext.dtype))
        stages: list[Tensor] = []
        for stage in self.convnext.stages:
            hidden = stage(hidden)
            size = (stages[0] if stages else hidden).shape[-2:]
            resized = interpolate(hidden.float(), size=size, mode="bilinear", align_corners=False)
            stages.append(resized.to(hidden.dtype))
        return torch.cat(stages, dim=1)

    def views(self, features: Tensor) -> Tensor:
        """The ConvNeXt's features [N, F, X, X] as the tiles of `low_resolution` see them: [N * T, F, X / grid, X /
        grid]; the global view's are resized (bilinear, in float32)."""
        cut = _cut(features, self.grid)
        if self.tiles > self.grid**2:
            small = interpolate(features.float(), size=cut.shape[-2:], mode="bilinear", align_corners=False)
            cut = torch.cat([small.to(cut.dtype).unsqueeze(1), cut], dim=1)
        return cut.flatten(0, 1)


class PatchInfoMining(nn.Module):
    """Each patch attends to its own window (MGM's `unified_resampler`; its `vlm_uni_{query,aux,val}_projector`).

    MGM projects every position of every window: 36 864 of an image by two matrices [H, F]. Here the query goes through
    the keys' matrix instead, whose bias cancels in the softmax, and the average over the window through the values':
    q · (W LN(x)) = (Wᵀ q) · LN(x), and Σ a (W LN(x) + b) = W (Σ a LN(x)) + b. The same numbers for a fiftieth.
    """

    def __init__(self, width: int, aux_width: int) -> None:
        super().__init__()
        self.query: Any = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.key: Any = nn.Sequential(nn.LayerNorm(aux_width), nn.Linear(aux_width, width))
        self.value: Any = nn.Sequential(nn.LayerNorm(aux_width), nn.Linear(aux_width, width))

    def forward(self, patches: Tensor, features: Tensor) -> Tensor:
        """What the patches find.

        Args:
            patches: [N, P, H], row-major in a square of √P in a row.
            features: [N, F, X, X], X a multiple of √P.

        Returns:
            [N, P, H] in the dtype of `patches`; computed in that of the weights.
        """
        mined = []
        for image in zip(patches, features, strict=True):  # one by one: their windows take half a gigabyte in float32
            if torch.is_grad_enabled() and self.key[1].weight.requires_grad:
                mined.append(checkpoint(self._mine, *image, use_reentrant=False))
            else:
                mined.append(self._mine(*image))
        found = torch.stack(mined)
        if torch.is_grad_enabled() and self.key[1].weight.requires_grad:
            # No attention depends on the keys' two biases: engines wait for their gradient, which is of zeros.
            found = found + 0 * (self.key[0].bias.sum() + self.key[1].bias.sum())
        return found.to(patches.dtype)

    def _mine(self, patches: Tensor, features: Tensor) -> Tensor:
        """[P, H] of one image: patches [P, H], features [F, X, X]."""
        key_norm, value_norm, keys, values = (self.key[0], self.value[0], self.key[1], self.value[1])
        dtype, side = keys.weight.dtype, round(len(patches) ** 0.5)
        window = features.shape[-1] // side
        cut = features.unflatten(2, (side, window)).unflatten(1, (side, window))  # F, rows, window, columns, window
        positions = cut.permute(1, 3, 2, 4, 0).reshape(len(patches), window * window, len(features)).to(dtype)
        normed = nn.functional.layer_norm(positions, positions.shape[-1:], eps=key_norm.eps)
        query = self.query(patches.to(dtype))
        asked = query @ keys.weight * key_norm.weight  # what of LN(x)'s bias it sees is the same everywhere
        logits = torch.einsum("pf,pwf->pw", asked, normed) / query.shape[-1] ** 0.5
        attention = logits.float().softmax(dim=-1).to(dtype)
        found = torch.einsum("pw,pwf->pf", attention, normed)
        mined: Tensor = values(found * value_norm.weight + value_norm.bias)
        return mined


class MiniGeminiProjector(DtypeProjector):
    """LLaVA's projector, and the mining before it: what MGM trains in its first stage and keeps in one file."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.mining = PatchInfoMining(config.vision_config.hidden_size, sum(config.aux_config.hidden_sizes))


def _cut(images: Tensor, grid: int) -> Tensor:
    """Images [N, C, X, X] as tiles, row by row: [N, grid * grid, C, X / grid, X / grid]."""
    cut = images.unflatten(3, (grid, -1)).unflatten(2, (grid, -1))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
