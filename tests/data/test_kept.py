"""Kept results: what they depend on, what is damaged, and several processes at once."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shortzip.data.instructions import Conversation
from shortzip.data.kept import Kept, conversations_digest, identity_of


def test_a_result_is_made_once_and_anew_for_other_parts(tmp_path: Path) -> None:
    kept, made = Kept(tmp_path / "new" / "folder"), []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"value": [len(made), None, "é"]}

    assert kept.get("x", {"a": 1, "b": [2]}, make) == {"value": [1, None, "é"]}
    assert kept.get("x", {"b": (2,), "a": 1}, make) == {"value": [1, None, "é"]}
    assert kept.get("y", {"a": 1, "b": [2]}, make)["value"][0] == 2
    assert kept.get("x", {"a": 1, "b": [2], "c": None}, make)["value"][0] == 3
    assert kept.find("x", {"a": 1, "b": [2]}) is None
    assert json.loads(kept.path("x").read_text())["parts"] == {"a": 1, "b": [2], "c": None}


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", "null", "\x00" * 40, '{"result": 1}', "one digit", "folder"])
def test_what_is_damaged_counts_as_not_there(tmp_path: Path, damage: str) -> None:
    kept = Kept(tmp_path)
    kept.keep("x", {"a": 1}, {"lengths": [96, 111]})
    if damage == "folder":
        kept.path("x").unlink()
        kept.path("x").mkdir()
    else:
        text = kept.path("x").read_text()
        kept.path("x").write_text(text.replace("111", "112") if damage == "one digit" else damage)
    assert kept.find("x", {"a": 1}) is None


def test_what_is_not_utf8_or_nested_deeply_counts_as_not_there(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.path("x").write_bytes(b"\xff\xfe{}")
    assert kept.find("x", {}) is None
    kept.path("x").write_text("[" * 100_000)
    assert kept.find("x", {}) is None


def test_a_killed_writer_leaves_the_old_result_and_nothing_for_long(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.keep("x", {}, 1)
    child = os.fork()
    if child == 0:
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        kept.keep("x", {}, 2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert kept.find("x", {}) == 1
    assert len(list(tmp_path.iterdir())) == 2
    kept.keep("y", {}, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "y.json"]


def test_two_processes_that_keep_the_same_do_no_harm(tmp_path: Path) -> None:
    kept, children = Kept(tmp_path), []
    for number in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for turn in range(40):
                    kept.keep("x", {}, [number, turn])
                    assert kept.find("x", {}) is not None
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_identity_is_of_values_and_not_of_order_or_kind_of_list() -> None:
    assert identity_of({"a": 1, "b": (1, 2)}) == identity_of({"b": [1, 2], "a": 1})
    assert len({identity_of(parts) for parts in ({"a": 1}, {"a": "1"}, {"a": 1.5}, {"a": None}, {}, {"b": 1})}) == 6


def test_conversations_are_known_by_ids_turns_and_the_bytes_of_their_images(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    for folder in (tmp_path, tmp_path / "copy"):
        Image.new("RGB", (8, 8), "red").save(folder / "a.bmp")
    turns = (("user", "<image>Q"), ("assistant", "A"))
    one = [Conversation("1", ("a.bmp",), turns)]
    first = conversations_digest(one, tmp_path)
    assert conversations_digest(one, tmp_path / "copy") == first, "wherever they lie"
    content = (tmp_path / "a.bmp").read_bytes()
    assert conversations_digest([Conversation("1", (content,), turns)]) == first, "and in whatever they lie"
    others = {
        conversations_digest([Conversation("2", ("a.bmp",), turns)], tmp_path),
        conversations_digest([Conversation("1", ("a.bmp",), (turns[0], ("assistant", "B")))], tmp_path),
        conversations_digest([*one, *one], tmp_path),
        conversations_digest([Conversation("1", ("b.bmp",), turns)], tmp_path),
    }
    times = (tmp_path / "a.bmp").stat()
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "a.bmp")
    os.utime(tmp_path / "a.bmp", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (tmp_path / "a.bmp").stat().st_size == times.st_size
    assert len({first, *others, conversations_digest(one, tmp_path)}) == 6
