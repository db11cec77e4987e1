"""Columns, keys and placeholders that change what a row means are used as meant, or the row is left out by name."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from processors import llava_processor

from shortzip.data.dataset import ConversationDataset
from shortzip.data.drops import BadSample, DropLog
from shortzip.data.instructions import Conversation, UnknownFormat, parse_row, read_instructions
from shortzip.data.strata import draw, source_of
from shortzip.data.subset import SubsetOptions, prepare_subset
from shortzip.data.supervision import Supervision, load_template

QUESTION, ANSWER = {"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}
ASKED, SAID = {"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}


def llava(**columns: Any) -> dict[str, Any]:
    return {"id": "r", "image": "a/1.jpg", "conversations": [QUESTION, ANSWER]} | columns


def messages(*said: Any, **columns: Any) -> dict[str, Any]:
    return {"id": "r", "images": ["a/1.jpg"], "messages": list(said) or [ASKED, SAID]} | columns


@pytest.mark.parametrize("column", ["system", "system_prompt", "System"])
@pytest.mark.parametrize("form", [llava, messages])
def test_a_system_column_is_the_system_turn(form: Any, column: str) -> None:
    turns = parse_row(form(**{column: "Answer in rhymes."})).turns
    assert turns[0] == ("system", "Answer in rhymes.")
    assert turns[1:] == parse_row(form()).turns
    same = form(**{column: "S"})
    key, turn = ("conversations", {"from": "system", "value": "S"}) if form is llava else (
        "messages", {"role": "system", "content": "S"})  # fmt: skip
    same[key] = [turn, *same[key]]
    assert parse_row(same).turns[0] == ("system", "S")
    with pytest.raises(BadSample, match=f"'{column}' and another system prompt differ"):
        parse_row(same | {column: "T"})


@pytest.mark.parametrize(
    "column",
    [
        {"tools": '[{"name": "search"}]'},
        {"tools": [{"type": "function"}]},
        {"functions": [{"name": "f"}]},
        {"history": [["earlier", "answer"]]},
        {"video_path": "clip.mp4"},
        {"audio": "a.wav"},
        {"audios": ["a.wav"]},
        {"chosen": {"from": "gpt", "value": "A"}},
        {"rejected_response": "B"},
        {"loss": 0},
        {"weight": 0.5},
        {"label": False},
        {"loss_mask": [0, 1]},
        {"mask_history": True},
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"instruction": "Answer in rhymes."},
    ],
    ids=lambda column: next(iter(column)),
)
@pytest.mark.parametrize("form", [llava, messages])
def test_a_column_that_changes_the_meaning_is_a_bad_row(form: Any, column: dict[str, Any]) -> None:
    with pytest.raises(BadSample, match=f"the column '{next(iter(column))}' changes what the row means") as caught:
        parse_row(form(**column))
    assert caught.value.reason == "malformed_row"


@pytest.mark.parametrize("empty", [None, "", [], {}, "[]", "null", [None], {"bytes": None, "path": None}, False])
def test_columns_that_say_nothing_and_notes_change_nothing(empty: Any) -> None:
    notes = {"model": "gpt-4", "data_source": "coco", "label": "cat", "source": "x", "width": 10, "weight": 1.0}
    row = llava(tools=empty, videos=empty, history=empty, rejected=empty, audio=empty, loss=True, **notes)
    assert parse_row(row) == parse_row(llava())
    if empty is not False:
        assert parse_row(llava(system=empty)) == parse_row(llava())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loss", False), ("weight", 0), ("weight", 0.3), ("train", False), ("loss_scale", "0.2"), ("mask", True),
        ("learn", False), ("is_supervised", False), ("compute_loss", 0), ("video", "a.mp4"),
        ("tool_calls", [{"name": "f"}]), ("reasoning_content", "because"), ("image", "2.jpg"),
    ],
)  # fmt: skip
def test_a_key_of_a_turn_that_changes_the_meaning_is_a_bad_row(key: str, value: Any) -> None:
    for row in (llava(conversations=[QUESTION, ANSWER | {key: value}]), messages(ASKED, SAID | {key: value})):
        with pytest.raises(BadSample, match=f"in turn 1, the key '{key}' changes what the turn means"):
            parse_row(row)


@pytest.mark.parametrize(
    ("key", "value"), [("loss", True), ("weight", 1), ("weight", 1.0), ("weight", "1"), ("name", "x"), ("loss", None)]
)
def test_turns_that_are_learned_as_all_are_pass(key: str, value: Any) -> None:
    assert parse_row(llava(conversations=[QUESTION, ANSWER | {key: value}])) == parse_row(llava())
    # A question is not learned in any case.
    assert parse_row(llava(conversations=[QUESTION | {"loss": False, "weight": 0}, ANSWER])) == parse_row(llava())


@pytest.mark.parametrize(
    "mark", ["<video>", "<audio>", "<VIDEO>", "<|video_pad|>", "<videos>", "<audio_1>", "<|audio_1|>", "< video >"]
)
def test_a_stray_placeholder_of_a_video_or_sound_is_a_bad_row(mark: str) -> None:
    for text in (f"<image>{mark}\nQ", f"<image>\nWhat is said in {mark}?"):
        with pytest.raises(BadSample, match=f"placeholder {re.escape(mark)}: the row holds no video, and sound"):
            parse_row(llava(conversations=[{"from": "human", "value": text}, ANSWER]))
    with pytest.raises(BadSample, match="the assistant's turn has the placeholder"):
        parse_row(llava(conversations=[QUESTION, {"from": "gpt", "value": f"{mark}"}]))


def test_html_in_a_text_is_no_placeholder() -> None:
    said = (
        "How do I loop a `<video>`?\n```\n<video>\n```\n~~~html\n<audio>\n~~~\n``a <video> b``",
        "The <video> tag has loop: <video loop><source></video>.",
    )
    row = {"conversations": [{"from": who, "value": text} for who, text in zip(("human", "gpt"), said, strict=True)]}
    assert parse_row(row).turns[1] == ("assistant", said[1])


@pytest.mark.parametrize("column", ["image_path", "img", "image_url", "pictures", "file_name"])
def test_an_image_under_another_name_is_a_bad_row(column: str) -> None:
    text = [{"from": "human", "value": "Q"}, ANSWER]
    with pytest.raises(BadSample, match=f"'{column}'.*images are read from 'image' and 'images'"):
        parse_row({"conversations": text, column: "a/1.jpg"})
    assert parse_row(llava(**{column: "a/1.jpg"})) == parse_row(llava())


def test_two_columns_that_contradict_each_other_are_a_bad_row() -> None:
    with pytest.raises(BadSample, match="'image' and 'images' hold different images"):
        parse_row(llava(images=["a/2.jpg"]))
    assert parse_row(llava(images=["a/1.jpg"])) == parse_row(llava())
    with pytest.raises(BadSample, match="both 'conversations' and 'messages'"):
        parse_row(llava(messages=[ASKED, SAID]))


HALF = json.loads('"\\ud83d"')


@pytest.mark.parametrize(
    ("row", "name", "said"),
    [
        (llava(conversations=[QUESTION, {"from": "gpt", "value": f"a {HALF}"}]), "r", "the assistant's turn has"),
        (llava(system=HALF), "r", "the system's turn has"),
        (llava(id=f"x{HALF}"), "#1", "its id has"),
        (llava(image=f"a/{HALF}.jpg"), "r", "the image path"),
        (llava(conversations=[QUESTION, {"from": HALF, "value": "A"}]), "r", "role"),
        (llava(conversations=[QUESTION, HALF]), "r", "turn 1 has no text"),
        (llava(image="a/\0.jpg"), "r", "has a NUL character"),
    ],
)
def test_half_a_surrogate_pair_is_one_rows_matter(tmp_path: Path, row: Any, name: str, said: str) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([llava(), row, *[llava()] * 8]))
    with pytest.raises(BadSample, match=said) as caught:
        read_instructions(file)
    assert caught.value.sample_id == name
    report = prepare_subset(
        SubsetOptions(str(file), tmp_path / "out", fraction=1.0, max_bad_fraction=0.1), lambda *step: None
    )
    assert (report["written"], report["dropped"]) == (9, {"malformed_row": 1})
    (drop,) = map(json.loads, (tmp_path / "out" / "dropped.jsonl").read_text(encoding="utf-8").splitlines())
    assert drop["sample_id"] == name


@pytest.mark.parametrize(
    "first",
    [
        {"id": "0", "conversations": []},
        {"id": "0", "conversations": None},
        {"id": "0", "conversations": [None, ANSWER]},
        {"id": "0", "conversations": [{"from": "human"}]},
        {},
        None,
        "a note",
    ],
)
@pytest.mark.parametrize("form", [llava, messages])
def test_first_rows_without_turns_do_not_decide_the_format(tmp_path: Path, first: Any, form: Any) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([first, first, *[form()] * 18]))
    with pytest.raises(BadSample) as caught:
        read_instructions(file)
    assert caught.value.reason == "malformed_row"
    drops = DropLog("skip", 0.1)
    assert len(read_instructions(file, drops=drops)) == 18
    assert drops.counts == {"malformed_row": 2}
    report = prepare_subset(
        SubsetOptions(str(file), tmp_path / "out", fraction=1.0, max_bad_fraction=0.1), lambda *step: None
    )
    assert report["written"] == 18


def test_a_file_of_another_format_is_known_after_a_hundred_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "Q", "output": "A"}\n' * 100 + "no JSON any more")
    with pytest.raises(UnknownFormat, match=r"first row has the keys \['instruction', 'output'\]"):
        read_instructions(file, drops=DropLog("skip"))


def test_images_without_a_place_stand_at_the_start_of_the_first_question(tmp_path: Path) -> None:
    system = {"role": "system", "content": "S"}
    asked = [
        {"role": "user", "content": [{"type": "text", "text": "Q"}]},
        SAID,
        {"role": "user", "content": "R"},
        SAID,
    ]
    row = parse_row(messages(system, *asked, images=["1.jpg", "2.jpg"]))
    assert row.turns[1] == ("user", "<image><image>\nQ")
    assert row.is_placed
    assert not parse_row(messages()).is_placed
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([llava(), messages(*asked), messages(*asked, id="s")]))
    report = prepare_subset(SubsetOptions(str(file), tmp_path / "out", fraction=1.0), lambda *step: None)
    assert (report["written"], report["images_placed_at_the_start"]) == (3, 2)
    with pytest.raises(BadSample, match="2 images but 1 <image> placeholders"):
        parse_row(messages(images=["1.jpg", "2.jpg"]))


@pytest.mark.parametrize("mark", ["<|image|>", "<img>", "<image_1>", "<|image_pad|>", "[IMG]", "<Image>"])
def test_another_placeholder_is_not_learned_as_text(mark: str) -> None:
    with pytest.raises(BadSample, match="is no placeholder here: write <image>") as caught:
        parse_row(messages({"role": "user", "content": f"{mark}\nQ"}, SAID))
    assert caught.value.reason == "placeholder_count"


@pytest.mark.parametrize("images", [{"images": ["1.jpg"]}, {"image": "1.jpg"}])
def test_prompts_and_completions_are_read(images: dict[str, Any]) -> None:
    turns = (("user", "<image>\nQ"), ("assistant", "A"))
    asked, said = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    for prompt, completion in (([asked], [said]), ("Q", "A")):
        row = {"prompt": prompt, "completion": completion, **images}
        assert parse_row(row) == Conversation("#0", ("1.jpg",), turns)
    several = {"prompt": [asked, said, asked], "completion": [said], **images}
    with pytest.raises(BadSample, match="the prompt holds an answer, which would be learned as well"):
        parse_row(several)


def test_the_part_that_a_run_draws_is_the_subset(tmp_path: Path) -> None:
    """Rows without image, without answer and outside the root are left out of both before the share is taken."""
    rows = [llava(id=str(number), image=f"{'ab'[number % 2]}/{number}.jpg") for number in range(40)]
    rows += [{"id": f"t{n}", "conversations": [{"from": "human", "value": "Q"}, ANSWER]} for n in range(30)]
    rows += [llava(id="out", image="../x.jpg"), llava(id="empty", conversations=[QUESTION, ANSWER | {"value": ""}])]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    options = SubsetOptions(str(file), tmp_path / "out", tmp_path, 0.3, seed=3, max_bad_fraction=0.1)
    report = prepare_subset(options, lambda *step: None)
    written = read_instructions(tmp_path / "out" / "subset.json")
    drops = DropLog("skip")
    assert draw(read_instructions(file), 0.3, 3, drops=drops, image_root=tmp_path) == written
    assert drops.counts == report["dropped"] == {"text_only": 30, "outside_image_root": 1, "no_answer": 1}
    with pytest.raises(ValueError, match=r"fraction 0\.001 of 40 usable rows chooses no row: give 0\.025 or more"):
        draw(read_instructions(file), 0.001, 3, drops=DropLog("skip"), image_root=tmp_path)


@pytest.mark.parametrize("path", ["coco\\train\\1.jpg", "coco\\1.jpg", ".\\coco\\1.jpg", "coco\\train/1.jpg"])
def test_a_path_from_windows_is_counted_under_its_folder(path: str) -> None:
    assert source_of(Conversation("x", (path,), ())) == "coco"


def test_a_run_says_of_how_many_rows_it_placed_the_images(tmp_path: Path) -> None:
    rows = [parse_row(messages({"role": "user", "content": "Q"}, SAID)), parse_row(llava())]
    drops = DropLog()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(b"x")
    ConversationDataset(rows, Supervision(llava_processor(), load_template("vicuna_v1")), tmp_path, drops=drops)
    assert drops.summary() == (
        "No row was left out. 1 rows name no place for their images: put at the start of the first question"
    )


@pytest.mark.parametrize("nothing", [[None], [""], {"bytes": None, "path": None}, "null"])
def test_an_image_column_that_says_nothing_is_a_row_without_an_image(nothing: Any) -> None:
    text = [{"from": "human", "value": "Q"}, ANSWER]
    assert parse_row({"conversations": text, "image": nothing}).images == ()
    with pytest.raises(BadSample, match="0 images but 1 <image>"):
        parse_row(llava(image=nothing))


def test_the_bytes_of_an_image_as_json_text_are_no_path() -> None:
    with pytest.raises(BadSample, match="'bytes' are a text: write data:image/png;base64"):
        parse_row(llava(image={"bytes": "iVBORw0KGgo=", "path": "a/1.jpg"}))
