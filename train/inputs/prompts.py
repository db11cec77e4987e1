"""Prompts as a batch: padded on the left, with the images and videos that stand in them, ready for `generate`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from shortzip.data.dataset import Collator, Sample
from shortzip.data.instructions import Conversation
from shortzip.data.pixels import pixels_of_row
from shortzip.data.supervision import Encoded, Supervision
from shortzip.reduction.positions import keeps_positions
from shortzip.train.step.visual_features import given_to_model

VISUAL_INPUTS = ("pixel_values", "image_sizes", "image_budgets", "pixel_values_videos", "video_frames")


@dataclass(frozen=True)
class Prompt:
    """Token ids up to where an answer is generated, and the images and videos that stand in them.

    Attributes:
        input_ids: [L] ids, as many placeholders per image as the model fills.
        pixels: per image a float32 tensor, [3, H, W], for LLaVA-NeXT [tiles, 3, H, W].
        image_sizes: (height, width) of each image in pixels, before it was resized.
        frames: per video its frames' pixels, float32 [F, 3, H, W].
    """

    input_ids: list[int]
    pixels: Sequence[Tensor] = ()
    image_sizes: Sequence[tuple[int, int]] = ()
    frames: Sequence[Tensor] = ()


class LeftOut:
    """How many visual tokens an image of (height, width) pixels has beyond those of the budget: what a teacher reads
    besides, and the positions that it takes besides where tokens keep theirs."""

    def __init__(self, supervision: Supervision) -> None:
        every: Any = copy.copy(supervision.processor)
        every.visionzip = None  # every visual token
        self._supervision, self._every = supervision, every
        self._counts: dict[tuple[tuple[int, int], int | None], int] = {}

    def __call__(self, size: tuple[int, int], budget: int | None = None) -> int:
        """`budget`: the image's own, where it has one."""
        if not self._supervision.needs_image_sizes:
            size = (336, 336)
        if (size, budget) not in self._counts:
            whole = self._every._get_num_multimodal_tokens(image_sizes=[list(size)])["num_image_tokens"][0]
            self._counts[size, budget] = int(whole) - self._supervision.placeholders(size, budget)
        return self._counts[size, budget]

    def of_video(self, frames: int) -> int:
        """As the call, of a video of which so many frames are seen."""
        return int(self._every.video_tokens(frames)) - self._supervision.video_placeholders(frames)


def extra_positions(
    model_config: Any, supervision: Supervision, sizes: Sequence[tuple[int, int]], frames: Sequence[int] = ()
) -> int:
    """How many positions more than its tokens a prompt takes whose images have these (height, width), and whose videos
    so many frames each: with original positions those of what is left out, else 0."""
    if not keeps_positions(model_config):
        return 0
    left_out = LeftOut(supervision)
    return sum(map(left_out, sizes)) + sum(map(left_out.of_video, frames))


def encode_prompt(
    supervision: Supervision,
    turns: Sequence[tuple[str, str]],
    images: Sequence[Image.Image],
    name: str = "prompt",
    videos: Sequence[Tensor] = (),
) -> Prompt:
    """The prompt of a conversation that ends with the user's turn, as the release's template renders it.

    `turns` are (role, text) with one `<image>` per image of `images` (RGB), which come in the order of their
    placeholders; `videos` likewise, with `<video>`: the pixels of their frames, [F, 3, H, W] each. Raises
    `shortzip.data.drops.BadSample` where counts or roles do not fit; it calls the conversation `name`.
    """
    sizes = supervision.sizes_in_row([(image.height, image.width) for image in images])
    conversation = Conversation(name, ("",) * len(images), tuple(turns), videos=("",) * len(videos))
    ids = supervision.prompt(conversation, sizes, [len(video) for video in videos])
    return Prompt(ids, pixels_of(supervision, images), sizes, videos)


def pixels_of(supervision: Supervision, images: Sequence[Image.Image], several: bool | None = None) -> list[Tensor]:
    """What the release's image processor makes of RGB images, one tensor each; `several`: whether their prompt has
    more than one (by default, whether they are)."""
    several = len(images) > 1 if several is None else several
    return pixels_of_row(images, supervision.processor.image_processor, several)


def batch_prompts(supervision: Supervision, prompts: Sequence[Prompt], device: torch.device) -> dict[str, Tensor]:
    """Keyword arguments of the model: input_ids and attention_mask [B, L] int64, and pixel_values (and, for
    LLaVA-NeXT, image_sizes) where there are images, pixel_values_videos (and, where they differ in their number of
    frames, video_frames) where there are videos."""
    collator = Collator.of(supervision)
    length = max(len(prompt.input_ids) for prompt in prompts)
    input_ids = torch.full((len(prompts), length), collator.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, length - len(prompt.input_ids) :] = torch.tensor(prompt.input_ids)
        attention_mask[row, length - len(prompt.input_ids) :] = 1
    # The collator stacks the images (tiles filled up); its own rows, padded on the right, are not used.
    nothing = Encoded([], [], [], 0)
    shown = [
        Sample("", nothing, list(prompt.pixels), list(prompt.image_sizes), frames=list(prompt.frames))
        for prompt in prompts
    ]
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if any(prompt.pixels or prompt.frames for prompt in prompts):
        pictures = given_to_model(collator(shown).inputs)
        inputs |= {key: pictures[key] for key in VISUAL_INPUTS if key in pictures}
    return {key: tensor.to(device) for key, tensor in inputs.items()}
