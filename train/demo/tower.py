"""Stage 1 of the demo model: its vision tower, trained by dense labels (scripts/make_demo_model.py says why)."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionModel

from shortzip.data.generated.scene_questions import NUMBERS
from shortzip.data.generated.scenes import CANVAS, COLORS, PLACES, SHAPES, SIZES, render_scene, sample_scene
from shortzip.train.demo.model import GRID, PATCH, DemoModelConfig, Optimizer


def _draw(task: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 `[n, 96, 96, 3]` and patch labels int8 `[n, 5, 144]` of scenes `first ... last - 1`."""
    seed, first, last = task
    pictures = np.empty((last - first, CANVAS, CANVAS, 3), np.uint8)
    labels = np.zeros((last - first, 5, GRID, GRID), np.int8)
    words = [list(COLORS), list(SHAPES), list(SIZES), list(PLACES)]
    edges = np.arange(GRID) * PATCH
    for row, index in enumerate(range(first, last)):
        scene = sample_scene(seed, index)
        pictures[row] = render_scene(scene)
        for item in scene.objects:
            across = np.minimum(edges + PATCH, item.left + item.diameter) - np.maximum(edges, item.left)
            down = np.minimum(edges + PATCH, item.top + item.diameter) - np.maximum(edges, item.top)
            covered = np.outer(np.clip(down, 0, None), np.clip(across, 0, None)) >= 0.4 * PATCH * PATCH
            for channel, word in enumerate((item.color, item.shape, item.size, item.place)):
                labels[row, channel][covered] = 1 + words[channel].index(word)
            middle = item.diameter // 2
            labels[row, 4, (item.top + middle) // PATCH, (item.left + middle) // PATCH] = 1
    return pictures, labels.reshape(last - first, 5, -1)


def draw_scenes(seed: int, count: int, processes: int) -> tuple[torch.Tensor, torch.Tensor]:
    tasks = [(seed, first, min(first + 500, count)) for first in range(0, count, 500)]
    with ProcessPoolExecutor(processes) as pool:
        parts = list(pool.map(_draw, tasks))
    return (
        torch.from_numpy(np.concatenate([pictures for pictures, _ in parts])),
        torch.from_numpy(np.concatenate([labels for _, labels in parts])),
    )


def normalise(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 `[n, H, W, 3]` to float32 `[n, 3, H, W]`, with CLIP's mean and standard deviation."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return ((pictures.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def tower_layers(tower: CLIPVisionModel, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`hidden_states[-2]` `[n, 1 + 144, width]` and the CLS row of attention `[n, 144]` in the block that makes it."""
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    read = tower.encoder.layers[:-1]
    for layer in read[:-1]:
        hidden = layer(hidden, None)
    block: Any = read[-1]
    normed = block.layer_norm1(hidden)
    heads, width = block.self_attn.num_heads, hidden.shape[-1] // block.self_attn.num_heads
    query = block.self_attn.q_proj(normed[:, :1]).unflatten(-1, (heads, width)).transpose(1, 2)
    key = block.self_attn.k_proj(normed).unflatten(-1, (heads, width)).transpose(1, 2)
    attention = (query @ key.transpose(-1, -2) * width**-0.5).float().softmax(-1).mean(1)[:, 0, 1:]
    return block(hidden, None), attention


class TowerHeads(nn.Module):
    """Linear read-outs that exist during stage 1 only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [1 + len(COLORS), 1 + len(SHAPES), 1 + len(SIZES), 1 + len(PLACES), 2]
        self.patch_head = nn.Linear(width, sum(self.sizes))
        self.kinds_head = nn.Linear(width, len(COLORS) * len(SHAPES) + len(NUMBERS))
        self.norm = nn.LayerNorm(width)

    def forward(self, hidden: torch.Tensor, attention: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        labels = labels.long()
        hidden = self.norm(hidden.float())
        parts = self.patch_head(hidden[:, 1:]).split(self.sizes, dim=-1)
        losses = {}
        on_object = labels[:, 0] > 0
        for name, part, target in zip(
            ("color", "shape", "size", "place", "middle"), parts, labels.unbind(1), strict=True
        ):
            each = F.cross_entropy(part.transpose(1, 2), target, reduction="none")
            losses[name] = each[on_object].mean() + each[~on_object].mean()
        middle = labels[:, 4].bool()
        kind = (labels[:, 0] - 1) * len(SHAPES) + labels[:, 1] - 1
        present = torch.zeros(len(labels), len(COLORS) * len(SHAPES))
        present.scatter_reduce_(1, kind.clamp(min=0), middle.float(), reduce="amax")
        kinds, count = self.kinds_head(hidden[:, 0]).split([present.shape[1], len(NUMBERS)], dim=-1)
        losses["kinds"] = 10 * F.binary_cross_entropy_with_logits(kinds, present)
        losses["count"] = F.cross_entropy(count, middle.sum(1))
        losses["attention"] = -(attention * on_object).sum(1).clamp(min=1e-6).log().mean()
        with torch.no_grad():
            right = [
                (p.argmax(-1) == t)[on_object].float().mean()
                for p, t in zip(parts[:4], labels.unbind(1)[:4], strict=True)
            ]
            self.accuracy = {
                name: round(float(r), 4) for name, r in zip(("color", "shape", "size", "place"), right, strict=True)
            }
            self.accuracy["count"] = round(float((count.argmax(-1) == middle.sum(1)).float().mean()), 4)
            self.accuracy["attention_on_objects"] = round(float((attention * on_object).sum(1).mean()), 4)
        return losses


def train_tower(
    tower: CLIPVisionModel, pictures: torch.Tensor, labels: torch.Tensor, config: DemoModelConfig
) -> Iterator[dict[str, object]]:
    heads = TowerHeads(tower.config.hidden_size)
    named = [(n, p) for n, p in tower.named_parameters() if "post_layernorm" not in n]
    named += [("head." + n, p) for n, p in heads.named_parameters()]
    optimizer = Optimizer(named, config.learning_rate)
    generator = torch.Generator().manual_seed(config.seed)
    for step in range(config.tower_steps):
        rows = torch.randint(len(pictures), (config.tower_batch,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            hidden, attention = tower_layers(tower, normalise(pictures[rows]))
        losses = heads(hidden, attention, labels[rows])
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step(step / config.tower_steps)
        if step % 50 == 0 or step == config.tower_steps - 1:
            yield {
                "stage": "tower",
                "step": step,
                **{k: round(v.item(), 4) for k, v in losses.items()},
                **heads.accuracy,
            }


@torch.no_grad()
def tower_features(tower: CLIPVisionModel, pictures: torch.Tensor, batch: int = 128) -> torch.Tensor:
    """`hidden_states[-2]` without CLS for all pictures, bfloat16 `[n, 144, width]`: the tower is finished by now."""
    parts = []
    for chunk in pictures.split(batch):
        with torch.autocast("cpu", torch.bfloat16):
            hidden, _ = tower_layers(tower, normalise(chunk))
        parts.append(hidden[:, 1:].to(torch.bfloat16))
    return torch.cat(parts)
