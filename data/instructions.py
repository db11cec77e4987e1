"""Instruction data in the formats people have, read into one shape.

LLaVA's JSON and JSONL (`conversations` of `from`/`value`, `image`), the messages format of TRL and LLaMA-Factory
(`messages` of `role`/`content`, `images`), and either of them as a `datasets` table (parquet, `save_to_disk`, Hub)
with embedded images. Each row is read by the format that its turns show; where no row fits any, that is stated.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shortzip.data.columns import refused_column
from shortzip.data.drops import BadSample, DropLog
from shortzip.data.errors import UserError
from shortzip.data.images import ImageSource
from shortzip.data.json_rows import JsonRowError, MalformedRow, iterate_json_rows
from shortzip.data.row_values import (
    check_text,
    found_in_words,
    image_of,
    images_of,
    malformed,
    stray_media,
    video_of,
    videos_of,
)
from shortzip.data.turns import format_of, misfit, role_of, row_id, system_turn, turn_list
from shortzip.data.videos import VideoSource

PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"
_MARKS = re.compile(f"{PLACEHOLDER}|{VIDEO_PLACEHOLDER}")
# What stands for an image elsewhere: the row means a place by it, and it is not to be learned as a text.
_FOREIGN_PLACEHOLDER = re.compile(
    r"<\|?\s*(image|img|picture)s?([_ -]?(\d+|pad|placeholder|token|soft_token|here|start))?\s*\|?>|<start_of_image>"
    r"|\[IMG\]",
    re.IGNORECASE,
)
_UNDECIDED = 100  # rows

EXPECTED = (
    "Expected one of: LLaVA's JSON or JSONL, rows like "
    '{"id": "1", "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nQ"}, '
    '{"from": "gpt", "value": "A"}]}; the messages format, rows like '
    '{"messages": [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}], '
    '"images": ["1.jpg"]} (videos likewise); or a datasets table (parquet, save_to_disk, Hub) with the same columns'
)


class UnknownFormat(UserError):
    """A file or table whose rows fit no format; the message says what was found and what is expected."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row.

    Attributes:
        id: the row's id; rows without one are called by their place in the file ("#12").
        images: the images in the order of their placeholders: paths relative to the image root, or embedded images.
        turns: (role, text), roles "system" (first only), "user", "assistant", the last two alternating from a
            "user" on. `<image>` in a text stands for the next image, `<video>` for the next video.
        is_placed: the row named no place for its images or videos, so they stand at the start of the first question.
        videos: the videos in the order of their placeholders: files, folders of frames, or the frames' files, by
            paths relative to the image root.
    """

    id: str
    images: tuple[ImageSource, ...]
    turns: tuple[tuple[str, str], ...]
    is_placed: bool = field(default=False, compare=False)
    videos: tuple[VideoSource, ...] = ()

    def messages(self) -> list[dict[str, Any]]:
        """The turns as transformers' chat messages, with content lists.

        The images and videos of a turn are moved to its start and its text is stripped then, as LLaVA does for
        training; a turn without any is left as it is.
        """
        marks = _MARKS if self.videos else re.compile(PLACEHOLDER)
        messages = []
        for role, text in self.turns:
            content: list[dict[str, str]] = [{"type": mark.strip("<>")} for mark in marks.findall(text)]
            if content:
                text = marks.sub("", text).strip()
            if text or not content:
                content = [*content, {"type": "text", "text": text}]
            messages.append({"role": role, "content": content})
        return messages


def read_instructions(
    source: str | os.PathLike[str], *, drops: DropLog | None = None, split: str = "train"
) -> list[Conversation]:
    """Read instruction data.

    Args:
        source: a .json, .jsonl or .parquet file, a folder written by `datasets.save_to_disk` or holding parquet
            files, or the name of a dataset on the Hub.
        drops: where bad rows go; None: the first one raises.
        split: the split of a folder or Hub dataset that has several.

    Returns:
        The usable rows, in the order of the source.

    Raises:
        FileNotFoundError: there is no such file or dataset.
        UnknownFormat: the rows fit no known format.
        BadSample: a malformed row, where `drops` does not skip them.
        ValueError: the source holds no rows.
    """
    drops = DropLog() if drops is None else drops
    path = Path(source)
    rows: Iterable[Any]
    if path.is_file() and path.suffix != ".parquet":
        rows = iterate_rows(path)
    else:
        # Imported here: it needs the `datasets` extra for its tables.
        from shortzip.data.tables import iterate_table

        rows = iterate_table(str(source), split)
    conversations: list[Conversation] = []
    seen = 0
    for _, parsed in parse_rows(rows, str(source)):
        seen += 1
        if isinstance(parsed, Conversation):
            conversations.append(parsed)
        else:
            drops.add(parsed)
            drops.check(seen)
    drops.check(seen, minimum=1)
    return conversations


def iterate_rows(path: Path) -> Iterator[Any]:
    """The rows of a JSON array or JSONL file, in a few megabytes of memory.

    Raises:
        UnknownFormat: it is neither.
    """
    try:
        yield from (row.value for row in iterate_json_rows(path))
    except JsonRowError as error:
        raise UnknownFormat(f"{path}: {error}. {EXPECTED}.") from error


def parse_rows(rows: Iterable[Any], source: str) -> Iterator[tuple[Any, Conversation | BadSample]]:
    """Each row, and the conversation that it is or what is wrong with it.

    Raises:
        UnknownFormat: none of the rows, or none of the first `_UNDECIDED`, fits a known format. A row that only lacks
            turns, at the start as anywhere, is a bad row.
        UserError: there are no rows.
    """
    waiting: list[Any] | None = []
    for index, row in enumerate(rows):
        if waiting is None:
            yield row, _parsed(row, index, source)
            continue
        waiting.append(row)
        if format_of(row) is not None:
            for number, held in enumerate(waiting):
                yield held, _parsed(held, number, source)
            waiting = None
        elif len(waiting) == _UNDECIDED:
            break
    if waiting == []:
        raise UserError(f"{source} holds no rows. {EXPECTED}.")
    if waiting is not None:
        raise UnknownFormat(f"{source}: {misfit(waiting[0])}. {EXPECTED}.")


def _parsed(row: Any, index: int, source: str) -> Conversation | BadSample:
    try:
        return parse_row(row, index, source)
    except BadSample as error:
        return error
    except RecursionError:
        return malformed(f"#{index}", source, "it is nested too deeply")


def parse_row(row: Any, index: int = 0, source: str = "") -> Conversation:
    """Read a row of any of the formats.

    Raises:
        BadSample: malformed, a column that changes its meaning is not read, or its images and placeholders do not
            match.
    """
    if isinstance(row, MalformedRow):
        raise malformed(row_id(row.value, index), source, row.problem)
    return (
        parse_messages_row(row, index, source) if format_of(row) == "messages" else parse_llava_row(row, index, source)
    )


def parse_llava_row(row: Any, index: int = 0, source: str = "") -> Conversation:
    """Read a row of LLaVA's JSON: id, image (a path, or a list of paths), video (likewise), conversations.

    Raises:
        BadSample: as `parse_row`.
    """
    sample_id = row_id(row, index, source)
    pairs: list[tuple[str, str]] = []
    for number, turn in enumerate(turn_list(row, sample_id, source)):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise malformed(sample_id, source, f"turn {number} has no text 'value': {found_in_words(turn)}")
        pairs.append((role_of(turn, "from", number, sample_id, source), turn["value"]))
    beside = images_of(row, sample_id, source), videos_of(row, sample_id, source)
    return _conversation(row, sample_id, *beside, pairs, source)


def parse_messages_row(row: Any, index: int = 0, source: str = "") -> Conversation:
    """Read a row of the messages format: messages of role and content, images and videos beside them or inside.

    Content is a text (with `<image>` where an image stands) or a list of parts: `{"type": "text", "text": …}`,
    `{"type": "image"}`, which may carry its path as `image`, `path` or `url`, and `{"type": "image_url", "image_url":
    {"url": …}}`; `{"type": "video"}` and `{"type": "video_url"}` likewise. TRL's `prompt` and `completion` are
    messages too: those of the prompt, then those of the completion.

    Raises:
        BadSample: as `parse_row`.
    """
    sample_id = row_id(row, index, source)
    pairs: list[tuple[str, str]] = []
    inline: dict[str, list[Any]] = {"image": [], "video": []}
    for number, turn in enumerate(turn_list(row, sample_id, source)):
        if not isinstance(turn, dict):
            raise malformed(sample_id, source, f"message {number} is {found_in_words(turn)}, not an object")
        role = role_of(turn, "role", number, sample_id, source)
        content = turn.get("content")
        if isinstance(content, str):
            pairs.append((role, content))
        elif isinstance(content, list):
            pairs.append((role, "".join(_part(part, number, inline, sample_id, source) for part in content)))
        else:
            raise malformed(sample_id, source, f"message {number} has no 'content': {found_in_words(turn)}")
    beside: dict[str, tuple[Any, ...]] = {
        "image": images_of(row, sample_id, source),
        "video": videos_of(row, sample_id, source),
    }
    for kind in inline:
        if inline[kind] and beside[kind]:
            raise malformed(sample_id, source, f"{kind}s stand both inside the messages and beside them")
    images, videos = (tuple(inline[kind]) or beside[kind] for kind in ("image", "video"))
    return _conversation(row, sample_id, images, videos, pairs, source)


def _part(part: Any, number: int, inline: dict[str, list[Any]], sample_id: str, source: str) -> str:
    """The text of a part of a message's content; an image or video that it carries is added to `inline`."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind not in ("image", "image_url", "video", "video_url"):
        what = f"of the type {kind!r}" if isinstance(kind, str) and kind != "text" else found_in_words(part)
        raise malformed(
            sample_id,
            source,
            f"message {number} has a content part {what}; read are 'text', 'image' and 'image_url', 'video' and "
            "'video_url'",
        )
    medium = kind.removesuffix("_url")
    held = next((part[key] for key in (medium, "path", "url", f"{medium}_url") if part.get(key) is not None), None)
    if isinstance(held, dict) and "url" in held:
        held = held["url"]
    if held is not None:
        inline[medium].append((image_of if medium == "image" else video_of)(held, sample_id, source))
    elif kind.endswith("_url"):
        raise malformed(sample_id, source, f"message {number} has an {kind} without a url")
    return f"<{medium}>"


def _conversation(
    row: dict[str, Any],
    sample_id: str,
    images: tuple[ImageSource, ...],
    videos: tuple[VideoSource, ...],
    pairs: list[tuple[str, str]],
    source: str,
) -> Conversation:
    refused = refused_column(row, bool(images), bool(videos))
    if refused is not None:
        raise malformed(sample_id, source, refused)
    system = system_turn(row, pairs, sample_id, source)
    turns = pairs[bool(pairs) and pairs[0][0] == "system" :]
    # As LLaVA does: a conversation that the assistant opens begins with the user's first turn.
    if turns and turns[0][0] == "assistant":
        turns = turns[1:]
    for number, (role, _) in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise malformed(sample_id, source, f"turn {number} is the {role}'s where the {expected}'s is due")
    if not turns:
        raise malformed(sample_id, source, "there is no user's turn")
    if videos and not images:
        system, turns = _in_place_of_images(system, len(videos)), _in_place_of_images(turns, len(videos))
    for role, text in system + turns:
        check_text(text, f"the {role}'s turn", sample_id, source)
        stray = stray_media(role, text.replace(VIDEO_PLACEHOLDER, "") if videos else text)
        if stray is not None:
            what = f"write {VIDEO_PLACEHOLDER}" if videos else "the row holds no video, and sound is not read"
            raise malformed(sample_id, source, f"the {role}'s turn has the placeholder {stray}: {what}")
    said = [text for _, text in system + turns]
    counts = {mark: sum(text.count(mark) for text in said) for mark in (PLACEHOLDER, VIDEO_PLACEHOLDER)}
    given = {PLACEHOLDER: len(images), VIDEO_PLACEHOLDER: len(videos)}
    unplaced = [mark for mark in given if given[mark] and not counts[mark]]
    for mark in unplaced:
        foreign = next((match[0] for _, text in turns if (match := _FOREIGN_PLACEHOLDER.search(text))), None)
        if foreign is not None and mark == PLACEHOLDER:
            detail = f"{len(images)} images, and {foreign} in a text, which is no placeholder here: write {mark}"
            raise BadSample("placeholder_count", sample_id, detail, source)
    for mark, what in ((PLACEHOLDER, "image"), (VIDEO_PLACEHOLDER, "video")):
        is_counted = mark == PLACEHOLDER or videos  # without a video, <video> is a word of a question about HTML
        if is_counted and mark not in unplaced and counts[mark] != given[mark]:
            detail = f"{given[mark]} {what}s but {counts[mark]} {mark} placeholders; each {what} needs one"
            raise BadSample("placeholder_count", sample_id, detail, source)
    if unplaced:
        turns = [("user", "".join(mark * given[mark] for mark in unplaced) + "\n" + turns[0][1]), *turns[1:]]
    return Conversation(sample_id, images, tuple(system + turns), bool(unplaced), videos)


def _in_place_of_images(turns: list[tuple[str, str]], videos: int) -> list[tuple[str, str]]:
    """Turns whose `<image>` stand for so many videos, as in LLaVA's own video mixes: written as `<video>`."""
    said = "".join(text for _, text in turns)
    if VIDEO_PLACEHOLDER in said or said.count(PLACEHOLDER) != videos:
        return turns
    return [(role, text.replace(PLACEHOLDER, VIDEO_PLACEHOLDER)) for role, text in turns]
