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
from typing import Any, Literal

from shortzip.data.columns import SYSTEM, is_empty, refused_column, refused_key
from shortzip.data.drops import BadSample, DropLog
from shortzip.data.errors import UserError
from shortzip.data.images import ImageSource
from shortzip.data.json_rows import JsonRowError, MalformedRow, iterate_json_rows
from shortzip.data.row_values import check_text, found_in_words, image_of, images_of, malformed, stray_media

PLACEHOLDER = "<image>"
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
# What stands for an image elsewhere: the row means a place by it, and it is not to be learned as a text.
_FOREIGN_PLACEHOLDER = re.compile(
    r"<\|?\s*(image|img|picture)s?([_ -]?(\d+|pad|placeholder|token|soft_token|here|start))?\s*\|?>|<start_of_image>"
    r"|\[IMG\]",
    re.IGNORECASE,
)
_UNDECIDED = 100  # rows

InstructionFormat = Literal["llava", "messages"]

EXPECTED = (
    "Expected one of: LLaVA's JSON or JSONL, rows like "
    '{"id": "1", "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nQ"}, '
    '{"from": "gpt", "value": "A"}]}; the messages format, rows like '
    '{"messages": [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}], '
    '"images": ["1.jpg"]}; or a datasets table (parquet, save_to_disk, Hub) with the same columns'
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
            "user" on. `<image>` in a text stands for the next image.
        is_placed: the row named no place for its images, so they stand at the start of the first question.
    """

    id: str
    images: tuple[ImageSource, ...]
    turns: tuple[tuple[str, str], ...]
    is_placed: bool = field(default=False, compare=False)

    def messages(self) -> list[dict[str, Any]]:
        """The turns as transformers' chat messages, with content lists.

        The images of a turn are moved to its start and its text is stripped then, as LLaVA does for training; a turn
        without images is left as it is.
        """
        messages = []
        for role, text in self.turns:
            count = text.count(PLACEHOLDER)
            content: list[dict[str, str]] = [{"type": "image"}] * count
            if count:
                text = text.replace(PLACEHOLDER, "").strip()
            if text or not count:
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
        raise UnknownFormat(f"{source}: {_misfit(waiting[0])}. {EXPECTED}.")


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


def format_of(row: Any) -> InstructionFormat | None:
    """Which format a row is in; None if it fits none, or has no turn to tell it by."""
    turns = _given_turns(row)
    first = next((turn for turn in turns if isinstance(turn, dict) and turn), {})
    if {"from", "value"} <= first.keys():
        return "llava"
    return "messages" if {"role", "content"} <= first.keys() else None


def _given_turns(row: Any) -> list[Any]:
    """What a row has as turns, under any of the names; nothing where it has no list of them."""
    if not isinstance(row, dict):
        return []
    if _is_prompt_and_completion(row):
        return _spoken(row["prompt"], "user") + _spoken(row["completion"], "assistant")
    turns = row.get("conversations") or row.get("messages")
    return turns if isinstance(turns, list) else []


def _is_prompt_and_completion(row: dict[str, Any]) -> bool:
    named = [bool(row.get(key)) for key in ("prompt", "completion", "messages", "conversations")]
    return named == [True, True, False, False]


def _spoken(content: Any, role: str) -> list[Any]:
    """TRL's prompts and completions: a list of messages, or a text that is one."""
    return content if isinstance(content, list) else [{"role": role, "content": content}]


def _misfit(row: Any) -> str:
    """Why the first row fits no format."""
    if isinstance(row, MalformedRow):
        return f"in the first row {row.problem}"
    if not isinstance(row, dict):
        return f"the first row is {found_in_words(row)}"
    first = next((turn for turn in _given_turns(row) if isinstance(turn, dict) and turn), None)
    if first is None:
        return f"the first row has the keys {sorted(map(str, row))} and no turns"
    return (
        f"the turns of the first row have the keys {sorted(map(str, first))}, where 'from' and 'value' or 'role' and "
        "'content' are known"
    )


def parse_llava_row(row: Any, index: int = 0, source: str = "") -> Conversation:
    """Read a row of LLaVA's JSON: id, image (a path, or a list of paths), conversations.

    Raises:
        BadSample: as `parse_row`.
    """
    sample_id = row_id(row, index, source)
    pairs: list[tuple[str, str]] = []
    for number, turn in enumerate(_turn_list(row, sample_id, source)):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise malformed(sample_id, source, f"turn {number} has no text 'value': {found_in_words(turn)}")
        pairs.append((_role(turn, "from", number, sample_id, source), turn["value"]))
    return _conversation(row, sample_id, images_of(row, sample_id, source), pairs, source)


def parse_messages_row(row: Any, index: int = 0, source: str = "") -> Conversation:
    """Read a row of the messages format: messages of role and content, images beside them or inside the content.

    Content is a text (with `<image>` where an image stands) or a list of parts: `{"type": "text", "text": …}`,
    `{"type": "image"}`, which may carry its path as `image`, `path` or `url`, and `{"type": "image_url", "image_url":
    {"url": …}}`. TRL's `prompt` and `completion` are messages too: those of the prompt, then those of the completion.

    Raises:
        BadSample: as `parse_row`.
    """
    sample_id = row_id(row, index, source)
    pairs: list[tuple[str, str]] = []
    inline: list[ImageSource] = []
    for number, turn in enumerate(_turn_list(row, sample_id, source)):
        if not isinstance(turn, dict):
            raise malformed(sample_id, source, f"message {number} is {found_in_words(turn)}, not an object")
        role = _role(turn, "role", number, sample_id, source)
        content = turn.get("content")
        if isinstance(content, str):
            pairs.append((role, content))
        elif isinstance(content, list):
            pairs.append((role, "".join(_part(part, number, inline, sample_id, source) for part in content)))
        else:
            raise malformed(sample_id, source, f"message {number} has no 'content': {found_in_words(turn)}")
    beside = images_of(row, sample_id, source)
    if inline and beside:
        raise malformed(sample_id, source, "images stand both inside the messages and beside them")
    return _conversation(row, sample_id, tuple(inline) or beside, pairs, source)


def _part(part: Any, number: int, inline: list[ImageSource], sample_id: str, source: str) -> str:
    """The text of a part of a message's content; an image that it carries is added to `inline`."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind not in ("image", "image_url"):
        what = f"of the type {kind!r}" if isinstance(kind, str) and kind != "text" else found_in_words(part)
        raise malformed(
            sample_id, source, f"message {number} has a content part {what}; read are 'text', 'image' and 'image_url'"
        )
    held = next((part[key] for key in ("image", "path", "url", "image_url") if part.get(key) is not None), None)
    if isinstance(held, dict) and "url" in held:
        held = held["url"]
    if held is not None:
        inline.append(image_of(held, sample_id, source))
    elif kind == "image_url":
        raise malformed(sample_id, source, f"message {number} has an image_url without a url")
    return PLACEHOLDER


def row_id(row: Any, index: int, source: str = "") -> str:
    """What a row is called: its id, or its place in the file.

    Raises:
        BadSample: an id that is no text (half of a surrogate pair).
    """
    own_id = row.get("id") if isinstance(row, dict) else None
    if own_id is None or own_id == "":
        return f"#{index}"
    check_text(str(own_id), "its id", f"#{index}", source)
    return str(own_id)


def _conversation(
    row: dict[str, Any], sample_id: str, images: tuple[ImageSource, ...], pairs: list[tuple[str, str]], source: str
) -> Conversation:
    refused = refused_column(row, bool(images))
    if refused is not None:
        raise malformed(sample_id, source, refused)
    system = _system(row, pairs, sample_id, source)
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
    for role, text in system + turns:
        check_text(text, f"the {role}'s turn", sample_id, source)
        stray = stray_media(role, text)
        if stray is not None:
            raise malformed(
                sample_id, source, f"the {role}'s turn has the placeholder {stray}: videos and sound are not read"
            )
    placeholders = sum(text.count(PLACEHOLDER) for _, text in system + turns)
    is_placed = bool(images) and not placeholders
    if is_placed:
        foreign = next((match[0] for _, text in turns if (match := _FOREIGN_PLACEHOLDER.search(text))), None)
        if foreign is not None:
            raise BadSample(
                "placeholder_count",
                sample_id,
                f"{len(images)} images, and {foreign} in a text, which is no placeholder here: write {PLACEHOLDER}",
                source,
            )
        turns = [("user", PLACEHOLDER * len(images) + "\n" + turns[0][1]), *turns[1:]]
    elif placeholders != len(images):
        raise BadSample(
            "placeholder_count",
            sample_id,
            f"{len(images)} images but {placeholders} {PLACEHOLDER} placeholders; each image needs one",
            source,
        )
    return Conversation(sample_id, images, tuple(system + turns), is_placed)


def _system(row: dict[str, Any], pairs: list[tuple[str, str]], sample_id: str, source: str) -> list[tuple[str, str]]:
    """The system turn: the one among the turns, or what a column beside them says."""
    system = pairs[:1] if pairs and pairs[0][0] == "system" else []
    for name, value in row.items():
        if str(name).lower() not in SYSTEM or is_empty(value):
            continue
        if not isinstance(value, str):
            raise malformed(sample_id, source, f"the column {name!r} is {found_in_words(value)}, not a text")
        if system and system[0][1] != value:
            raise malformed(sample_id, source, f"the column {name!r} and another system prompt differ: keep one")
        system = [("system", value)]
    return system


def _turn_list(row: Any, sample_id: str, source: str) -> list[Any]:
    if isinstance(row, dict) and row.get("conversations") and row.get("messages"):
        raise malformed(sample_id, source, "it has both 'conversations' and 'messages': keep one")
    turns = _given_turns(row)
    prompt = row["prompt"] if turns and _is_prompt_and_completion(row) else None
    if isinstance(prompt, list) and any(isinstance(one, dict) and one.get("role") == "assistant" for one in prompt):
        raise malformed(sample_id, source, "the prompt holds an answer, which would be learned as well: use messages")
    if not turns:
        key = (
            "messages"
            if isinstance(row, dict) and row.get("conversations") is None and "messages" in row
            else "conversations"
        )
        raise malformed(sample_id, source, f"there is no list {key!r} of turns in {found_in_words(row)}")
    return turns


def _role(turn: dict[str, Any], key: str, number: int, sample_id: str, source: str) -> str:
    name = turn.get(key)
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None or (role == "system" and number):
        raise malformed(sample_id, source, f"turn {number} has the role {name!r}; known are {', '.join(ROLES)}")
    refused = refused_key(turn, role) if len(turn) > 2 else None  # beside its role and text
    if refused is not None:
        raise malformed(sample_id, source, f"in turn {number}, {refused}")
    return role
