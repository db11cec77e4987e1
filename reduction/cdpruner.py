"""CDPruner (NeurIPS 2025, arXiv 2506.10967): keep patches that matter to the question and are unlike each other.

CLIP places patches and the question in one space: v_i = visual_projection(post_layernorm(f_i)), and t_m of the m-th
77 tokens of the question. A patch's relevance is the mean over m of -cos(v_i, t_m) (CLIP's cosines of patches and
text are inverted, and so is the authors' sign); min-max scaled per image it is the quality in the determinant of
dpp.py, over the patches after the projector. O(P M E) beside what dpp.py costs, and CLIP's text tower.

The authors take minimum, maximum and the mean over m over the whole batch; in their evaluation that is one image with
one question, which is what is done here for every image. Their weight theta is no part of their code either.

What depends on the question can be held by no cache of features, and tunes no projector: these functions are for
evaluation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dpp import choose_determinant, scale_quality
from .tensors import unit_rows


@torch.no_grad()
def relevance(image_embeds: Tensor, text_embeds: Tensor, present: Tensor | None = None) -> Tensor:
    """How much each patch matters to its image's question: [B, P] in float32 or finer, not scaled.

    Args:
        image_embeds: [B, P, E], patches in CLIP's joint space.
        text_embeds: [B, M, E], each image's question in segments; or [M, E], one question for all images.
        present: [B, M] bool, which segments a question has; None: all.
    """
    likeness = unit_rows(image_embeds) @ unit_rows(text_embeds).transpose(-1, -2)
    if present is None:
        return -likeness.mean(dim=-1)
    weights = present.to(likeness.dtype).unsqueeze(1)
    return -(likeness * weights).sum(dim=-1) / weights.sum(dim=-1).clamp(min=1)


@torch.no_grad()
def choose_for_question(
    projected: Tensor, image_embeds: Tensor, text_embeds: Tensor, count: int, present: Tensor | None = None
) -> Tensor:
    """`count` patches [B, count] int64, as chosen: of patches after the projector [B, P, W]; otherwise `relevance`.

    Raises:
        ReductionError: `count` outside 0 to P.
    """
    return choose_determinant(projected, scale_quality(relevance(image_embeds, text_embeds, present)), count)


@torch.no_grad()
def embed_patches_with_text(features: Tensor, post_layernorm: Any, visual_projection: Any) -> Tensor:
    """The tower's output [B, P, H] in CLIP's joint space, [B, P, E].

    `post_layernorm` (the vision tower's) was trained for the last block's CLS; it is used as the authors use it.
    """
    return visual_projection(post_layernorm(features))


def cut_text(ids: Sequence[int], length: int) -> tuple[Tensor, Tensor]:
    """A question's token ids in segments of the text tower's `length` (77): ids and mask [M, length] int64, M from 1.

    Filled up with zeros that the mask leaves out. Nothing is cut off; only the last segment has an end token.
    """
    segments = max(1, -(-len(ids) // length))
    flat = torch.zeros(segments * length, dtype=torch.long)
    flat[: len(ids)] = torch.as_tensor(ids, dtype=torch.long)
    mask = (torch.arange(len(flat)) < len(ids)).long()
    return flat.view(segments, length), mask.view(segments, length)


@torch.no_grad()
def embed_text(text_tower: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Segments [M, 77] through a CLIPTextModelWithProjection, [M, E].

    The tower reads a segment at its end token. One without (all but the last of a long question) it reads where its
    config makes it, as the authors': CLIP's, whose `eos_token_id` is 2, at the largest id, another's at the first.
    """
    return text_tower(input_ids=ids, attention_mask=mask).text_embeds
