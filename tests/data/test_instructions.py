"""Instruction files in every format give the same conversations; a malformed row is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from shortzip.data.drops import BadSample, DropLog, TooManyBadSamples
from shortzip.data.instructions import Conversation, UnknownFormat, read_instructions

EXPECTED = [
    Conversation("a", ("1.jpg",), (("user", "<image>\nQ"), ("assistant", "A"), ("user", "R"), ("assistant", "B"))),
    Conversation("b", ("1.jpg", "2.jpg"), (("user", "<image><image>Q"), ("assistant", "A"))),
    Conversation("c", (), (("user", "Q"), ("assistant", "A"))),
]


def llava(conversation: Conversation) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt"}
    row: dict[str, Any] = {"id": conversation.id}
    if conversation.images:
        row["image"] = conversation.images[0] if len(conversation.images) == 1 else list(conversation.images)
    row["conversations"] = [{"from": names[role], "value": text} for role, text in conversation.turns]
    return row


def llama_factory(conversation: Conversation) -> dict[str, Any]:
    turns = [{"role": role, "content": text} for role, text in conversation.turns]
    return {"id": conversation.id, "messages": turns, "images": list(conversation.images)}


def parts(text: str, paths: list[str] | None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split("<image>")):
        if number:
            found.append({"type": "image"} if paths is None else {"type": "image", "image": paths.pop(0)})
        if piece:
            found.append({"type": "text", "text": piece})
    return found


def trl(conversation: Conversation) -> dict[str, Any]:
    turns = [{"role": role, "content": parts(text, None)} for role, text in conversation.turns]
    return {"id": conversation.id, "messages": turns, "images": list(conversation.images)}


def inline(conversation: Conversation) -> dict[str, Any]:
    paths = [str(image) for image in conversation.images]
    turns = [{"role": role, "content": parts(text, paths)} for role, text in conversation.turns]
    return {"id": conversation.id, "messages": turns}


@pytest.mark.parametrize("form", [llava, llama_factory, trl, inline])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_every_format_gives_the_same_conversations(tmp_path: Path, form: Any, suffix: str) -> None:
    rows = [form(conversation) for conversation in EXPECTED]
    text = json.dumps(rows, indent=1) if suffix == "json" else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / f"rows.{suffix}").write_text(text, encoding="utf-8")
    assert read_instructions(tmp_path / f"rows.{suffix}") == EXPECTED


def write(tmp_path: Path, rows: Any) -> Path:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def good(name: str = "good") -> dict[str, Any]:
    return {"id": name, "image": "1.jpg", "conversations": turns("<image>\nQ", "A")}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([{"instruction": "Q", "output": "A"}], r"first row has the keys \['instruction', 'output'\]"),
        ([{"conversations": [{"speaker": "human", "text": "Q"}]}], r"have the keys \['speaker', 'text'\]"),
        ([["Q", "A"]], r"first row is list \[\"Q\", \"A\"\]"),
        ({"data": [good()]}, r"first row has the keys \['data'\]"),
        ([{"conversations": []}], "conversations"),
    ],
)
def test_a_file_that_fits_no_format_says_what_was_found_and_what_is_expected(
    tmp_path: Path, content: Any, found: str
) -> None:
    with pytest.raises(UnknownFormat, match=found) as caught:
        read_instructions(write(tmp_path, content))
    assert str(tmp_path / "rows.json") in str(caught.value)
    assert "LLaVA's JSON" in str(caught.value)
    assert "messages format" in str(caught.value)


def test_files_without_rows_and_files_that_are_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no rows"):
        read_instructions(write(tmp_path, []))
    (tmp_path / "x.json").write_text(json.dumps([good()])[:-1] + ", {")
    with pytest.raises(UnknownFormat, match=r"x\.json: row 1, byte \d+: the file breaks off"):
        read_instructions(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match=r"not-there\.json"):
        read_instructions(tmp_path / "not-there.json")


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no turns": ({"conversations": []}, "malformed_row", "no list 'conversations'"),
    "turns that are a text": ({"conversations": "Q"}, "malformed_row", "no list 'conversations'"),
    "a turn without text": ({"conversations": [{"from": "human", "value": None}]}, "malformed_row", "turn 0"),
    "an unknown role": ({"conversations": [{"from": "bot", "value": "Q"}]}, "malformed_row", "role 'bot'"),
    "two questions in a row": (
        {"conversations": [{"from": "human", "value": "Q"}] * 2},
        "malformed_row",
        "turn 1 is the user's where the assistant's is due",
    ),
    "an answer alone": ({"conversations": [{"from": "gpt", "value": "A"}]}, "malformed_row", "no user's turn"),
    "an image that is a number": ({"image": 5, "conversations": turns("<image>", "A")}, "malformed_row", "int 5"),
    "a placeholder without an image": (
        {"conversations": turns("<image>\nQ", "A")},
        "placeholder_count",
        "0 images but 1 <image> placeholders",
    ),
    "an image without a placeholder": (
        {"image": ["1.jpg", "2.jpg"], "conversations": turns("<image>\nQ", "A")},
        "placeholder_count",
        "2 images but 1 <image> placeholders",
    ),
    "a text": ("row", "malformed_row", "no list"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_an_error_that_names_it_or_is_skipped_and_counted(tmp_path: Path, name: str) -> None:
    row, reason, message = BAD[name]
    if isinstance(row, dict):
        row = {"id": "bad-one", **row}
    file = write(tmp_path, [good(), row, good("last")])
    with pytest.raises(BadSample, match=message) as caught:
        read_instructions(file)
    assert caught.value.reason == reason
    assert caught.value.sample_id == ("bad-one" if isinstance(row, dict) else "#1")
    assert str(file) in str(caught.value)
    drops = DropLog("skip", max_bad_fraction=0.5)
    assert [conversation.id for conversation in read_instructions(file, drops=drops)] == ["good", "last"]
    assert drops.counts == {reason: 1}


def test_too_many_bad_rows_stop_the_reading(tmp_path: Path) -> None:
    bad = {"id": "bad", "conversations": turns("<image>", "A")}
    file = write(tmp_path, [good()] * 97 + [bad] * 3)
    assert len(read_instructions(file, drops=DropLog("skip", 0.03))) == 97
    with pytest.raises(TooManyBadSamples, match=r"3 of 100 rows are bad.*placeholder_count"):
        read_instructions(file, drops=DropLog("skip", 0.029))


def test_a_conversation_that_the_assistant_opens_begins_with_the_user(tmp_path: Path) -> None:
    row = {"id": 7, "conversations": [{"from": "gpt", "value": "Hi"}, *turns("Q", "A")]}
    assert read_instructions(write(tmp_path, [row])) == [Conversation("7", (), (("user", "Q"), ("assistant", "A")))]


def test_rows_without_an_id_are_called_by_their_place(tmp_path: Path) -> None:
    row = {"conversations": turns("Q", "A")}
    assert [found.id for found in read_instructions(write(tmp_path, [row, row]))] == ["#0", "#1"]


def test_the_images_of_a_turn_move_to_its_start() -> None:
    text = {"type": "text"}
    conversation = Conversation("x", ("1", "2"), (("user", "Look at <image> and <image>."), ("assistant", " A ")))
    assert conversation.messages() == [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, text | {"text": "Look at  and ."}]},
        {"role": "assistant", "content": [text | {"text": " A "}]},
    ]
    alone = Conversation("x", ("1",), (("user", "<image>\n"), ("assistant", "")))
    assert alone.messages()[0]["content"] == [{"type": "image"}]
    assert alone.messages()[1]["content"] == [text | {"text": ""}]
