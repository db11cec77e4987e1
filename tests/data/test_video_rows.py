"""Rows with videos: how they are written, what they mean, and what becomes of them where no video is taken."""

import json
from pathlib import Path
from typing import Any

import pytest
from made_videos import write_frames, write_video
from processors import llava_processor

from shortzip.data.chat_template import reading_videos, render
from shortzip.data.dataset import ConversationDataset
from shortzip.data.drops import BadSample, DropLog
from shortzip.data.instructions import Conversation, parse_row, read_instructions
from shortzip.data.kept import conversations_digest
from shortzip.data.strata import check_drawable, rank_of, source_of
from shortzip.data.subset import SubsetOptions, prepare_subset
from shortzip.data.supervision import TEMPLATES, Supervision, load_template

ANSWER = {"from": "gpt", "value": "A"}


def llava(text: str = "<video>\nQ", **more: Any) -> dict[str, Any]:
    return {"id": "r", "conversations": [{"from": "human", "value": text}, ANSWER], **more}


def parts(*content: Any, **more: Any) -> dict[str, Any]:
    said = {"role": "assistant", "content": "A"}
    return {"id": "r", "messages": [{"role": "user", "content": list(content)}, said], **more}


TEXT = {"type": "text", "text": "Q"}


@pytest.mark.parametrize(
    ("row", "videos"),
    [
        (llava(video="a.mp4"), ("a.mp4",)),
        (llava(videos=["a.mp4"]), ("a.mp4",)),
        (llava("<video><video>\nQ", video=["a.mp4", "b.mp4"]), ("a.mp4", "b.mp4")),
        (llava(video=["f/1.jpg", "f/2.PNG"]), (("f/1.jpg", "f/2.PNG"),)),
        (llava("<video>\n<video>\nQ", videos=[["1.jpg", "2.jpg"], "b.mp4"]), (("1.jpg", "2.jpg"), "b.mp4")),
        (llava(video="folder/of/frames"), ("folder/of/frames",)),
        (llava(video={"path": "a.mp4", "bytes": None}), ("a.mp4",)),
        (llava(video="a.mp4", video_path="/elsewhere/a.mp4"), ("a.mp4",)),
        (parts({"type": "video", "video": "a.mp4", "fps": 1.0}, TEXT), ("a.mp4",)),
        (parts({"type": "video", "video": ["1.jpg", "2.jpg"]}, TEXT), (("1.jpg", "2.jpg"),)),
        (parts({"type": "video_url", "video_url": {"url": "a.mp4"}}, TEXT), ("a.mp4",)),
        (parts({"type": "video", "path": "a.mp4"}, TEXT), ("a.mp4",)),
        (parts({"type": "video"}, TEXT, videos=["a.mp4"]), ("a.mp4",)),
    ],
)
def test_the_ways_to_write_a_video(row: dict[str, Any], videos: Any) -> None:
    conversation = parse_row(row)
    assert conversation.videos == videos
    assert conversation.turns[0][1].count("<video>") == len(videos)
    assert conversation.images == ()
    assert not conversation.is_placed


def test_placeholders() -> None:
    """LLaVA's own video mixes write <image> where the video stands; a row may name no place at all."""
    assert parse_row(llava("<image>\nQ", video="a.mp4")) == parse_row(llava(video="a.mp4"))
    placed = parse_row(llava("Q", video="a.mp4"))
    assert (placed.turns[0][1], placed.is_placed) == ("<video>\nQ", True)
    both = parse_row(llava("<video>\n<image>\nQ", video="a.mp4", image="1.jpg"))
    assert (both.images, both.videos) == (("1.jpg",), ("a.mp4",))
    content = [part["type"] for part in both.messages()[0]["content"]]
    assert content == ["video", "image", "text"]
    assert parse_row(llava("Q", video="a.mp4", image="1.jpg")).turns[0][1] == "<image><video>\nQ"
    assert parse_row(llava("<image>\nQ", video="a.mp4", image="1.jpg")).turns[0][1] == "<video>\n<image>\nQ"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (llava("<video><video>Q", video="a.mp4"), "1 videos but 2 <video> placeholders; each video needs one"),
        (llava("<image><image>Q", video="a.mp4"), "0 images but 2 <image> placeholders"),
        (llava("<video>\nQ"), "placeholder <video>: the row holds no video"),
        (llava("<|video_pad|>\nQ", video="a.mp4"), "placeholder <|video_pad|>: write <video>"),
        (llava(video="a.mp4", videos=["b.mp4"]), "'video' and 'videos' hold different videos"),
        (llava(video="https://a.org/a.mp4"), "is an address: fetch the videos"),
        (llava(video="data:video/mp4;base64,AAAA"), "a video is a data: URI: write it to a file"),
        (llava(video={"bytes": "AAAA"}), "stands in the row as bytes: write it to a file"),
        (llava(video=b"AAAA"), "stands in the row as bytes: write it to a file"),
        (llava(video=3), "a video is int 3, neither a path nor a list of frames"),
        (llava(video=[["1.jpg", "a.mp4"]]), "a frame of a video is str .a.mp4., no path of an image"),
        (llava(video="a\0.mp4"), "the video path .* has a NUL character"),
        (llava(video_path="a.mp4"), "'video_path' changes what the row means: videos are read from 'video'"),
        (llava(frames=["1.jpg"]), "'frames' changes what the row means: videos are read from"),
        (llava(video="a.mp4", audio="a.wav"), "'audio' changes what the row means"),
        (parts({"type": "video", "video": "a.mp4"}, TEXT, video="a.mp4"), "videos stand both inside"),
        (parts({"type": "video_url"}, TEXT), "an video_url without a url"),
    ],
)
def test_what_is_no_video_is_a_bad_row_that_names_it(row: dict[str, Any], words: str) -> None:
    with pytest.raises(BadSample, match=words.replace("|", r"\|")) as caught:
        parse_row(row)
    assert caught.value.reason in ("malformed_row", "placeholder_count")


def test_the_word_video_in_a_question_about_html_is_a_word() -> None:
    row = llava("How do I loop a `<video>`?")
    assert parse_row(row).messages()[0]["content"] == [{"type": "text", "text": "How do I loop a `<video>`?"}]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_shows_videos_in_their_order_and_images_as_before(name: str) -> None:
    template, special = load_template(name), {"eos_token": "</s>", "bos_token": "<s>"}
    both = reading_videos(template)
    row = parse_row(llava("<video><image>\nQ", video="a.mp4", image="1.jpg"))
    shown, _ = render(both, row.messages(), special, add_generation_prompt=False, marks=True)
    assert shown.index("<video>") < shown.index("<image>")
    assert shown.count("<video>") == shown.count("<image>") == 1
    for text, images in (("Q", ()), ("<image>\nQ", ("1",)), ("<image><image>", ("1", "2"))):
        said = (("user", text), ("assistant", "A"), ("user", "R"), ("assistant", ""))
        if name == "plain":  # it shows one image for every question
            said, images = (("user", "<image>\nQ"), ("assistant", "A")), ("1",)  # type: ignore[assignment]
        turns = Conversation("", images, said).messages()
        asked = (turns, special)
        assert render(both, *asked, add_generation_prompt=False, marks=True) == render(
            template, *asked, add_generation_prompt=False, marks=True
        )


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    write_video(tmp_path / "clips" / "a.mp4", 6)
    write_frames(tmp_path / "frames", 3)
    (tmp_path / "clips" / "bad.mp4").write_bytes(b"no video" * 20)
    held = [
        {**llava(video="clips/a.mp4"), "id": "file"},
        {**llava(video="frames"), "id": "folder"},
        {**llava(video=["frames/frame0.png", "frames/frame1.png"]), "id": "listed"},
        {**llava(video="clips/bad.mp4"), "id": "bad"},
        {**llava(video="clips/gone.mp4"), "id": "gone"},
        {**llava("Q"), "id": "text"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(held))
    return tmp_path / "rows.json"


def test_a_family_without_videos_drops_their_rows_counts_and_says_it(rows: Path, tmp_path: Path) -> None:
    """They are not trained on as text, and are no bad rows: the data is right, the release is another."""
    drops = DropLog("raise")
    supervision = Supervision(llava_processor(), load_template("vicuna_v1"))
    dataset = ConversationDataset(read_instructions(rows), supervision, tmp_path, drops=drops)
    assert [row.id for row in dataset.conversations] == ["text"]
    assert drops.counts == {"video": 5}
    assert (drops.bad, dataset.has_videos) == (0, False)
    assert "5 rows were left out: 5 video" in drops.summary()
    assert "this release takes none" in drops.drops[0].detail


def test_prepare_lists_videos_and_verify_decodes_them(rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = prepare_subset(SubsetOptions(str(rows), out, tmp_path, 1.0, max_bad_fraction=1), lambda *step: None)
    listed = ["clips/a.mp4", "clips/bad.mp4", "clips/gone.mp4", "frames", "frames/frame0.png", "frames/frame1.png"]
    assert (out / "videos.txt").read_text().split() == listed
    assert (out / "missing_videos.txt").read_text().split() == ["clips/gone.mp4"]
    assert (report["videos"], report["missing_videos"], report["dropped"]) == (5, 1, {"text_only": 1})
    assert [row.videos for row in read_instructions(out / "subset.json")][1:3] == [
        ("frames",),
        (("frames/frame0.png", "frames/frame1.png"),),
    ]
    checked = tmp_path / "checked"
    options = SubsetOptions(
        str(rows), checked, tmp_path, 1.0, missing="drop", verify_images=True, max_bad_fraction=1, num_workers=1
    )
    report = prepare_subset(options, lambda *step: None)
    assert report["dropped"] == {"text_only": 1, "unreadable_video": 1, "missing_video": 1}
    assert "clips/bad.mp4" not in (checked / "videos.txt").read_text()
    assert report["sources"]["clips"]["written"] == 1


def test_what_a_row_s_videos_are_counts_wherever_rows_are_told_apart(tmp_path: Path) -> None:
    one, other = (parse_row(llava(video=name)) for name in ("set/a.mp4", "set/b.mp4"))
    assert rank_of(one, 0) != rank_of(other, 0)
    assert source_of(one) == "set"
    assert source_of(parse_row(llava(video=["f/1.jpg", "f/2.jpg"]))) == "f"
    check_drawable(one)
    with pytest.raises(BadSample) as caught:
        check_drawable(parse_row(llava(video="../a.mp4")))
    assert caught.value.reason == "outside_image_root"
    write_video(tmp_path / "set" / "a.mp4", 3)
    before = conversations_digest([one], tmp_path)
    assert before == conversations_digest([one], tmp_path)
    write_video(tmp_path / "set" / "a.mp4", 4)
    assert conversations_digest([one], tmp_path) != before
