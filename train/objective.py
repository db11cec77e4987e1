"""What is minimised: cross-entropy, summed over a micro-batch's supervised tokens; and what is trained to do so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

Llava = LlavaForConditionalGeneration | LlavaNextForConditionalGeneration

MODEL_INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_sizes")
IGNORE_INDEX = -100


def count_supervised(labels: Tensor) -> int:
    """Supervised tokens of `labels` [B, L] that a next-token loss sees: the first position has nothing before it."""
    return int((labels[:, 1:] != IGNORE_INDEX).sum())


def fastv_query(model: Llava, labels: Tensor) -> dict[str, Tensor]:
    """With FastV, the position [B] whose attention decides what is kept: the end of the first prompt, as when it is
    answered; nothing otherwise. (The end of the row would see the answers.)"""
    config: Any = model.config
    if config.fastv is None:
        return {}
    supervised = labels != IGNORE_INDEX
    length = labels.shape[1]
    first = torch.where(supervised.any(dim=1), supervised.int().argmax(dim=1), length)
    return {"fastv_query": (first - 1).clamp(min=0)}


class SupervisedLoss(nn.Module):
    """The module that an engine wraps: a micro-batch in, the sum of its supervised tokens' cross-entropies out.

    A sum, not a mean, because the mean that training wants is over the global batch: the caller divides by its count,
    which no cut into micro-batches or processes changes.
    """

    def __init__(self, model: Llava) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """float32 scalar. `batch`: input_ids, attention_mask, labels [B, L], pixel_values and image_sizes if any.

        Logits are computed at supervised positions only. A micro-batch without images still runs an empty one through
        tower and projector, times zero: every process then calls the same modules in the same order, without which
        engines that average or shard by hooks would wait for each other for ever. The gradient gains exact zeros.
        """
        inputs = {key: batch[key] for key in MODEL_INPUTS if key in batch}
        outputs = self.model.model(**inputs, use_cache=False, **fastv_query(self.model, batch["labels"]))
        targets = batch["labels"][:, 1:]
        supervised = targets != IGNORE_INDEX
        logits = self.model.lm_head(outputs.last_hidden_state[:, :-1][supervised])
        loss = nn.functional.cross_entropy(logits.float(), targets[supervised], reduction="sum")
        if "pixel_values" not in batch:
            loss = loss + 0 * self._empty_image().float().sum()
        return loss

    def _empty_image(self) -> Tensor:
        config: Any = self.model.config
        side = config.vision_config.image_size
        zero = torch.zeros((), device=self.model.device, dtype=self.model.dtype)
        if isinstance(self.model, LlavaNextForConditionalGeneration):
            tiles = image_size_to_num_patches([side, side], config.image_grid_pinpoints, side)
            sizes = torch.tensor([[side, side]], device=self.model.device)
            features = self.model.model.get_image_features(zero.expand(1, tiles, 3, side, side), sizes)
        else:
            features = self.model.model.get_image_features(zero.expand(1, 3, side, side))
        return torch.cat(list(features.pooler_output))


def train_only_projector(model: Llava, compute_dtype: torch.dtype, gradient_checkpointing: bool) -> None:
    """Makes the projector, in fp32, all that requires a gradient; the rest: `compute_dtype` and eval mode."""
    model.requires_grad_(False)
    model.eval()  # no dropout in what is not trained
    # Parameters only: buffers such as the rotary frequencies stay exact, and 4-bit weights as they are.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(compute_dtype)
    model.model.multi_modal_projector.to(torch.float32).requires_grad_(True)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for layer in model.model.language_model.layers:
            layer.training = (
                True  # transformers checkpoints layers in training mode; what is in them stays in eval mode
            )


def projector_parameters(model: Llava) -> dict[str, nn.Parameter]:
    """The trained parameters under the names that the release gives them."""
    prefix = "model.multi_modal_projector."
    return {name: parameter for name, parameter in model.named_parameters() if name.startswith(prefix)}


def describe_components(model: Llava) -> list[tuple[str, int, str, bool]]:
    """(component, parameters, dtypes, is it trained) of every part of the model, for the report at the start."""
    parts = {
        "vision tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "language model": model.model.language_model,
        "LM head": model.lm_head,
    }
    rows = []
    for name, part in parts.items():
        parameters = list(part.parameters())
        dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})
        for trained in sorted({parameter.requires_grad for parameter in parameters}):
            count = sum(parameter.numel() for parameter in parameters if parameter.requires_grad is trained)
            rows.append((name, count, ", ".join(dtypes), trained))
    return rows
