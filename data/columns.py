"""Columns that change what a row means, by the names they have in the formats of the field.

What a row holds beside its turns and images is mostly a note (`model`, `data_source`). Some columns are not: the row
means something else with them, so they are used as they are meant, or the row is not used.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

SYSTEM = ("system", "system_prompt", "system_message")
# Of each kind: the columns' names, and why a row with one of them is not used.
_KINDS = tuple(
    (re.compile(names), why)
    for names, why in (
        (
            r"(audios?|speech|sounds?|depths?|point_?clouds?)(_?(paths?|files?|urls?|names?|frames?))?",
            "it shows or plays something that is no image and no video, and only those are read",
        ),
        (
            r"tools?|tool_(calls?|choice|responses?|call_id)|functions?|function_calls?|observations?",
            "tools and their calls are not read",
        ),
        (r"documents", "documents beside the turns are not read"),
        (
            r"histor(y|ies)|instructions?",
            "what is said outside the list of turns is not read: put it into the list",
        ),
        (
            r"(chosen|rejected)(_(responses?|messages|images?|conversations?|answers?))?",
            "a pair of a better and a worse answer is not read: put the answer to learn at the end of the turns",
        ),
        (
            r"reasoning(_content)?|thinking|thoughts?",
            "reasoning beside the answer is not read: put it into the answer",
        ),
        (r"chat_template(_kwargs)?|enable_thinking", "the chat template is the run's: data.chat_template"),
    )
)
_WEIGHTS = re.compile(
    r"(loss|sample|token|turn|message)?_?weights?|loss(_scale)?|(is_)?(train(able|ed)?|supervised?|learn(able|ed)?)"
    r"|train_(detail|on_turn)|(compute|calculate|use|with|has)_loss|label|kto_tag"
)
_MASKS = re.compile(r"(loss_)?mask(ed)?|mask_(history|prompt|answer|loss)|ignore(_loss)?|no_loss|train_on(_\w+)?")
_IMAGE_LIKE = re.compile(r"(images?|imgs?|pictures?|photos?)(_?(paths?|files?|urls?|names?|filenames?|bytes))?")
_VIDEO_LIKE = re.compile(r"(videos?|clips?)(_?(paths?|files?|urls?|names?|filenames?|frames?))?|frames(_?paths?)?")
_FILE = re.compile(r"file_?names?|files?|paths?|urls?")
_IMAGE_FILE = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?)$", re.IGNORECASE)


def is_empty(value: Any) -> bool:
    """Whether a column says nothing: null, no text, nothing in it, as tables fill the rows that lack the column."""
    if isinstance(value, Mapping):
        return all(is_empty(held) for held in value.values())
    if isinstance(value, list | tuple):
        return all(is_empty(held) for held in value)
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return value is None


@lru_cache(maxsize=4096)
def _kind(name: str) -> str:
    """What a column of this name does, by its name alone: "" for a note, or why it is not read."""
    column = name.lower()
    if column in SYSTEM:
        return "system"
    if column in ("image", "images"):
        return "image"
    if column in ("video", "videos"):
        return "video"
    kinds = (("weight", _WEIGHTS), ("mask", _MASKS), ("file", _FILE), ("named image", _IMAGE_LIKE))
    for kind, names in (*kinds, ("named video", _VIDEO_LIKE)):
        if names.fullmatch(column):
            return kind
    return next((why for names, why in _KINDS if names.fullmatch(column)), "")


def refused_column(row: Mapping[Any, Any], has_images: bool, has_videos: bool = False) -> str | None:
    """Why a row is not to be used for one of its columns, in words that name it; None if it can be.

    Args:
        row: the row; its turns are looked at by `refused_key`.
        has_images: whether it has images in the columns that images are read from.
        has_videos: likewise videos.
    """
    for name, value in row.items():
        kind = _kind(str(name))
        if kind in ("", "system", "image", "video") or is_empty(value):
            continue
        if _is_named_image(kind, value):
            why = None if has_images else "images are read from 'image' and 'images': call it so"
        elif kind == "named video":
            is_there = has_videos or value is False
            why = None if is_there else "videos are read from 'video' and 'videos': call it so"
        else:
            why = _changed_meaning(kind, str(name), value, is_answer=True)
        if why is not None:
            return f"the column {name!r} changes what the row means: {why}"
    return None


def refused_key(turn: Mapping[Any, Any], role: str) -> str | None:
    """Why a turn is not to be used for one of its keys, in words that name it; None if it can be."""
    for name, value in turn.items():
        kind = _kind(str(name))
        if kind == "" or is_empty(value):
            continue
        if kind == "system":
            why: str | None = "a system prompt is read from the row's 'system', or from a turn of its own"
        elif kind == "image" or _is_named_image(kind, value):
            why = "images are read from the row's 'image' or 'images'"
        elif kind in ("video", "named video"):
            why = None if value is False else "videos are read from the row's 'video' or 'videos'"
        else:
            why = _changed_meaning(kind, str(name), value, is_answer=role == "assistant")
        if why is not None:
            return f"the key {name!r} changes what the turn means: {why}"
    return None


def _is_named_image(kind: str, value: Any) -> bool:
    if kind != "file":
        return kind == "named image"
    first = value[0] if isinstance(value, list | tuple) else value
    return isinstance(first, str) and _IMAGE_FILE.search(first) is not None


def _changed_meaning(kind: str, name: str, value: Any, is_answer: bool) -> str | None:
    if kind == "weight":
        return _weight(name, value, is_answer)
    if kind == "mask":
        # Turns that are not answered by the model have no loss in any case.
        is_note = isinstance(value, str) or value is False or value == 0
        return None if is_note or not is_answer else "every answer is learned alike"
    return None if value is False or kind == "file" else kind


def _weight(name: str, value: Any, is_answer: bool) -> str | None:
    if name.lower() in ("label", "kto_tag") and not isinstance(value, bool):
        return None  # the name of a class, as datasets of other tasks have it
    values = list(value) if isinstance(value, list | tuple) else [value]
    if all(one in (1, "1", "1.0", "true") for one in values) or (not is_answer and all(one == 0 for one in values)):
        return None
    return f"it is {str(value)[:40]}, and every answer is learned with the weight 1"
