"""Instruction data in the formats people have, read into one shape.

LLaVA's JSON and JSONL (`conversations` of `from`/`value`, `image`), the messages format of TRL and LLaMA-Factory
(`messages` of `role`/`content`, `images`), and either of them as a `datasets` table (parquet, `save_to_disk`, Hub)
with embedded images. The format is detected from the first row and stated when it fits none.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.drops import BadSample, DropLog
from data.errors import UserError
from data.images import EmbeddedImage, ImageSource
from data.json_rows import JsonRowError, iterate_json_rows

PLACEHOLDER = "<image>"
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}

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
    """

    id: str
    images: tuple[ImageSource, ...]
    turns: tuple[tuple[str, str], ...]

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
        from data.tables import iterate_table

        rows = iterate_table(str(source), split)
    conversations: list[Conversation] = []
    parse: Callable[[Any, int, str], Conversation] | None = None
    seen = 0
    for index, row in enumerate(rows):
        seen += 1
        parse = parse or parser_for(row, str(source))
        try:
            conversations.append(parse(row, index, str(source)))
        except BadSample as error:
            drops.add(error)
            drops.check(seen)
    if not seen:
        raise UserError(f"{source} holds no rows. {EXPECTED}.")
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


def detect_format(row: Any, source: str) -> InstructionFormat:
    """Which format a row is in.

    Raises:
        UnknownFormat: none that is known.
    """
    if not isinstance(row, dict):
        raise UnknownFormat(f"{source}: the first row is {_found(row)}. {EXPECTED}.")
    for key in ("conversations", "messages"):
        turns = row.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            if {"from", "value"} <= turns[0].keys():
                return "llava"
            if {"role", "content"} <= turns[0].keys():
                return "messages"
            raise UnknownFormat(
                f"{source}: the turns of the first row have the keys {sorted(turns[0])}, where 'from' and 'value' or "
                f"'role' and 'content' are known. {EXPECTED}."
            )
    raise UnknownFormat(f"{source}: the first row has the keys {sorted(map(str, row))}. {EXPECTED}.")


def parser_for(row: Any, source: str) -> Callable[[Any, int, str], Conversation]:
    """The function that reads rows of the format that `row` is in.

    Raises:
        UnknownFormat: none that is known.
    """
    return parse_llava_row if detect_format(row, source) == "llava" else parse_messages_row


def parse_llava_row(row: Any, index: int = 0, source: str = "") -> Conversation:
    """Read a row of LLaVA's JSON: id, image (a path, or a list of paths), conversations.

    Raises:
        BadSample: malformed, or its images and `<image>` placeholders do not match.
    """
    sample_id = row_id(row, index)
    turns = _turn_list(row, "conversations" if "conversations" in row else "messages", sample_id, source)
    said: list[tuple[str, str]] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise _malformed(sample_id, source, f"turn {number} has no text 'value': {_found(turn)}")
        said.append((_role(turn.get("from"), number, sample_id, source), turn["value"]))
    return _conversation(sample_id, _images(row, sample_id, source), said, source)


def parse_messages_row(row: Any, index: int = 0, source: str = "") -> Conversation:
    """Read a row of the messages format: messages of role and content, images beside them or inside the content.

    Content is a text (with `<image>` where an image stands) or a list of parts, `{"type": "text", "text": …}` and
    `{"type": "image"}`; an image part may carry its path as `image`, `path` or `url`.

    Raises:
        BadSample: malformed, or its images and placeholders do not match.
    """
    sample_id = row_id(row, index)
    said: list[tuple[str, str]] = []
    inline: list[ImageSource] = []
    for number, turn in enumerate(
        _turn_list(row, "messages" if "messages" in row else "conversations", sample_id, source)
    ):
        if not isinstance(turn, dict):
            raise _malformed(sample_id, source, f"message {number} is {_found(turn)}, not an object")
        role = _role(turn.get("role"), number, sample_id, source)
        content = turn.get("content")
        if isinstance(content, str):
            said.append((role, content))
        elif isinstance(content, list):
            text = ""
            for part in content:
                kind = part.get("type") if isinstance(part, dict) else None
                if kind == "text" and isinstance(part.get("text"), str):
                    text += part["text"]
                elif kind == "image":
                    text += PLACEHOLDER
                    held = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
                    if held is not None:
                        inline.append(_image(held, sample_id, source))
                else:
                    raise _malformed(sample_id, source, f"message {number} has a content part {_found(part)}")
            said.append((role, text))
        else:
            raise _malformed(sample_id, source, f"message {number} has no 'content': {_found(turn)}")
    beside = _images(row, sample_id, source)
    if inline and beside:
        raise _malformed(sample_id, source, "images stand both inside the messages and beside them")
    return _conversation(sample_id, tuple(inline) or beside, said, source)


def row_id(row: Any, index: int) -> str:
    """What a row is called: its id, or its place in the file."""
    given = row.get("id") if isinstance(row, dict) else None
    return f"#{index}" if given is None or given == "" else str(given)


def _conversation(
    sample_id: str, images: tuple[ImageSource, ...], said: list[tuple[str, str]], source: str
) -> Conversation:
    system = said[:1] if said and said[0][0] == "system" else []
    turns = said[len(system) :]
    # As LLaVA does: a conversation that the assistant opens begins with the user's first turn.
    if turns and turns[0][0] == "assistant":
        turns = turns[1:]
    for number, (role, _) in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise _malformed(sample_id, source, f"turn {number} is the {role}'s where the {expected}'s is due")
    if not turns:
        raise _malformed(sample_id, source, "there is no user's turn")
    placeholders = sum(text.count(PLACEHOLDER) for _, text in system + turns)
    if placeholders != len(images):
        raise BadSample(
            "placeholder_count",
            sample_id,
            f"{len(images)} images but {placeholders} {PLACEHOLDER} placeholders; each image needs one",
            source,
        )
    return Conversation(sample_id, images, tuple(system + turns))


def _turn_list(row: Any, key: str, sample_id: str, source: str) -> list[Any]:
    turns = row.get(key) if isinstance(row, dict) else None
    if not isinstance(turns, list) or not turns:
        raise _malformed(sample_id, source, f"there is no list {key!r} of turns in {_found(row)}")
    return turns


def _role(name: Any, number: int, sample_id: str, source: str) -> str:
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None or (role == "system" and number):
        raise _malformed(sample_id, source, f"turn {number} has the role {name!r}; known are {', '.join(ROLES)}")
    return role


def _images(row: dict[str, Any], sample_id: str, source: str) -> tuple[ImageSource, ...]:
    held = row.get("images")
    if held is None:
        held = row.get("image")
    if held is None or held == "":
        return ()
    many = held if isinstance(held, list | tuple) else [held]
    return tuple(_image(one, sample_id, source) for one in many)


def _image(held: Any, sample_id: str, source: str) -> ImageSource:
    if isinstance(held, str | bytes) and held:
        return held
    if isinstance(held, EmbeddedImage):
        return held
    # The form that `datasets` gives an image in when it does not decode it.
    if isinstance(held, dict) and (held.get("bytes") or held.get("path")):
        return held.get("bytes") or held["path"]
    raise _malformed(sample_id, source, f"an image is {_found(held)}, neither a path nor an encoded image")


def _malformed(sample_id: str, source: str, detail: str) -> BadSample:
    return BadSample("malformed_row", sample_id, detail, source)


def _found(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with the keys {sorted(map(str, value))}"
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return f"{type(value).__name__} {text[:80]}{'…' if len(text) > 80 else ''}"
