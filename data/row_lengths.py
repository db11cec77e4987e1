"""How long rows are, without reading their images, and what that depends on."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from shortzip.data.drops import BadSample
from shortzip.data.errors import UserError
from shortzip.data.images import BadImage, ImageSource
from shortzip.data.instructions import Conversation
from shortzip.data.known_images import KnownImages
from shortzip.data.supervision import Encoded, Supervision
from shortzip.data.video_frames import frames_seen
from shortzip.data.videos import VideoSource, video_name

_CACHE_FORMAT = 4
BudgetSource = Callable[[ImageSource, str | os.PathLike[str] | None], int]
"""The budget of an image, where each has its own. Raises BadImage."""


class Counted(NamedTuple):
    """A row that can be used: its place among all rows, tokens, supervised tokens, images left, `Encoded.cut`, and
    videos left."""

    number: int
    tokens: int
    supervised: int
    images: int
    cut: str | None
    videos: int = 0


def encode_unread(
    conversation: Conversation,
    supervision: Supervision,
    image_root: str | os.PathLike[str] | None,
    known_images: KnownImages,
    budget_of: BudgetSource | None = None,
) -> Encoded:
    """Tokens and labels of a conversation; of its images no more than the headers are read, where sizes matter, and
    what `budget_of` reads; of its videos their lengths, where the number of frames that are seen depends on them.

    Raises BadSample for a bad row, image or video.
    """
    frames: list[int] = []
    sizes = budgets = None
    try:
        if supervision.needs_image_sizes:
            sizes = [known_images.size(source, image_root) for source in conversation.images]
        if budget_of is not None:
            budgets = [budget_of(source, image_root) for source in conversation.images]
        if supervision.takes_videos:
            frames = [_frames_seen(source, supervision, image_root, known_images) for source in conversation.videos]
    except BadImage as error:
        raise BadSample(error.problem, conversation.id, str(error), error.file) from error
    return supervision.encode(conversation, sizes, budgets, frames)


def _frames_seen(
    source: VideoSource, supervision: Supervision, image_root: str | os.PathLike[str] | None, known: KnownImages
) -> int:
    if supervision.sampling is None:
        raise UserError(f"{video_name(source)}: how many frames of a video are seen is not said")
    return frames_seen(source, image_root, supervision.sampling, known)


def lengths_depend_on(
    conversations: Sequence[Conversation],
    supervision: Supervision,
    image_root: str | os.PathLike[str] | None,
    known_images: KnownImages,
    budget_of: BudgetSource | None = None,
) -> dict[str, Any]:
    """All that `Supervision.encode` reads of conversations, as the parts of an identity.

    Of an image that is the number of its placeholders, which processor, budget and (of LLaVA-NeXT) its size decide; of
    a video likewise, which processor and sampling decide.
    """
    tokenizer, digest = supervision.tokenizer, hashlib.sha256()
    for conversation in conversations:
        images: list[int | str] = []
        for source in conversation.images:
            try:
                size = known_images.size(source, image_root) if supervision.needs_image_sizes else (0, 0)
                own = None if budget_of is None else budget_of(source, image_root)
                images.append(supervision.placeholders(size, own))
            except BadImage as error:
                images.append(error.problem)
        row: list[Any] = [conversation.id, images, conversation.turns]
        if conversation.videos:
            row.append(_placeholders_of_videos(conversation, supervision, image_root, known_images))
        digest.update(json.dumps(row).encode() + b"\n")
    return {
        "format": _CACHE_FORMAT,
        "conversations and placeholders": digest.hexdigest(),
        "template": supervision.template,
        "max_length": supervision.max_length,
        "image token": [supervision.processor.image_token, supervision.processor.image_token_id],
        **_video_token(supervision),
        "special tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "opening": tokenizer("x").input_ids[:1],
        "splits special tokens": tokenizer.split_special_tokens,
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
    }


def _video_token(supervision: Supervision) -> dict[str, Any]:
    """What stands for a video where one is taken: to other families the same letters are a text's."""
    processor: Any = supervision.processor
    return {"video token": [processor.video_token, processor.video_token_id]} if supervision.takes_videos else {}


def _placeholders_of_videos(
    conversation: Conversation,
    supervision: Supervision,
    image_root: str | os.PathLike[str] | None,
    known: KnownImages,
) -> list[int | str]:
    if not supervision.takes_videos:
        return ["none is taken"] * len(conversation.videos)
    found: list[int | str] = []
    for source in conversation.videos:
        try:
            found.append(supervision.video_placeholders(_frames_seen(source, supervision, image_root, known)))
        except BadImage as error:
            found.append(error.problem)
    return found
