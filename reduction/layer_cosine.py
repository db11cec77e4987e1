"""How far each LLM layer turns the visual tokens: the ranking that ShortV compares its LC with (arXiv 2504.00502)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .layer_contribution import CalibrationSample, embed_prompt


@torch.no_grad()
def cosine_changes(model: Any, samples: Sequence[CalibrationSample]) -> list[list[float]]:
    """1 - cosine of a layer's input and output, mean over the visual tokens: per sample, one value for every layer.

    `model` is a reduced or plain LLaVA without frozen layers, in eval mode. The lowest are the layers to freeze first.
    """
    decoder = model.model.language_model
    changes: list[list[float]] = []
    for sample in samples:
        prompt = embed_prompt(model, sample)
        visual = prompt.visual
        row: list[float] = []

        def note(
            _layer: nn.Module, given: Any, output: Tensor, visual: Tensor = visual, row: list[float] = row
        ) -> None:
            before, after = given[0][0, visual].float(), output[0, visual].float()
            row.append(1 - nn.functional.cosine_similarity(before, after, dim=-1).mean().item())

        hooks = [layer.register_forward_hook(note) for layer in decoder.layers]
        try:
            kept: dict[str, Tensor] = {}
            if prompt.positions is not None:  # with a mask, for without one a jump would begin another text
                mask = torch.ones(1, len(visual), dtype=torch.long, device=visual.device)
                kept = {"position_ids": prompt.positions[None], "attention_mask": mask}
            decoder(inputs_embeds=prompt.embeds[None], **kept, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        changes.append(row)
    return changes
