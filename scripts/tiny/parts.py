"""What tiny releases are made of: weights that let an image be seen, and ids of marks."""

from __future__ import annotations

from typing import Any

import torch


def random_model(model_class: Any, config: Any, seed: int = 0) -> Any:
    """A model of random weights, in eval mode, the same for the same seed."""
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():  # the default initialisation lets an image move the logits by next to nothing
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.normal_(0, 0.3)
    return model


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The ids of a tokenizer's own marks, as a language model's config has them."""
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
