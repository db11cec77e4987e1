"""What a model consists of, and what of it is trained."""

from __future__ import annotations

from shortzip.reduction.families import family_of
from shortzip.train.step.objective import Llava


def describe_components(model: Llava) -> list[tuple[str, int, str, bool]]:
    """(component, parameters, dtypes, is it trained) of every part of the model, for the report at the start."""
    parts = {
        **{name.replace("_", " "): getattr(model.model, name) for name in family_of(model.config.model_type).towers},
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
