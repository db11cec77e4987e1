"""Images that stand in the row itself are decoded; addresses and what is no path are refused, in a short message."""

import base64
import io
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image

from shortzip.data.data_uris import InlineImage
from shortzip.data.drops import BadSample
from shortzip.data.images import EmbeddedImage, image_name, open_image
from shortzip.data.instructions import parse_row, read_instructions
from shortzip.data.subset import SubsetOptions, prepare_subset


def encoded(colour: str, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(buffer, kind)
    return buffer.getvalue()


def uri(colour: str) -> str:
    return "data:image/png;base64," + base64.b64encode(encoded(colour)).decode()


SAID = {"role": "assistant", "content": "A"}


def in_parts(part: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "Q"}]}, SAID]}


def beside(image: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "<image>Q"}, SAID], "images": image}


RED = uri("red")


@pytest.mark.parametrize(
    "row",
    [
        beside(RED),
        beside([RED]),
        beside(RED.replace("data:image/png", "DATA:image/PNG;name=x.png")),
        beside("data:image/png," + quote(encoded("red"))),
        beside("data:;base64," + base64.urlsafe_b64encode(encoded("red")).decode().rstrip("=")),
        beside(RED[:60] + "\n" + RED[60:]),
        in_parts({"type": "image_url", "image_url": {"url": RED, "detail": "high"}}),
        in_parts({"type": "image_url", "image_url": RED}),
        in_parts({"type": "image", "image": RED}),
        in_parts({"type": "image", "url": RED}),
    ],
)
def test_a_data_uri_is_decoded(row: dict[str, Any]) -> None:
    conversation = parse_row(row)
    (image,) = conversation.images
    assert isinstance(image, InlineImage)
    assert isinstance(image, EmbeddedImage)
    assert open_image(image).getpixel((0, 0)) == (255, 0, 0)
    assert conversation.turns[0] == ("user", "<image>Q")
    assert len(image_name(image)) < 80


def test_its_name_tells_one_content_from_another() -> None:
    names = [image_name(parse_row(beside(uri(colour))).images[0]) for colour in ("red", "blue", "red")]
    assert names[0] == names[2] != names[1]


def test_a_path_in_an_image_url_part_is_a_path() -> None:
    assert parse_row(in_parts({"type": "image_url", "image_url": {"url": "a/1.jpg"}})).images == ("a/1.jpg",)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("https://example.com/a.png", "'https://example.com/a.png' is an address: fetch the images"),
        ("http://example.com/" + "a" * 5000, "is an address"),
        ("s3://bucket/a.png", "is an address"),
        ("file:///data/a.png", "is an address"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64,*" + "A" * 200_000, "does not hold base64"),
        ("data:image/png;base64,AAAAA", "does not hold base64"),
        ("A" * 200_000, "path of 200000 characters.*begins with data:image/png;base64,"),
    ],
)
def test_what_is_no_image_is_refused_in_a_short_message(image: str, said: str) -> None:
    for row in (beside(image), in_parts({"type": "image_url", "image_url": {"url": image}})):
        with pytest.raises(BadSample, match=said) as caught:
            parse_row(row)
        assert caught.value.reason == "malformed_row"
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", ["audio", "input_audio", "audio_url"])
def test_parts_that_are_not_read_are_named(kind: str) -> None:
    with pytest.raises(BadSample, match=f"a content part of the type '{kind}'; read are 'text', 'image' and"):
        parse_row(in_parts({"type": kind, kind: "x"}))
    with pytest.raises(BadSample, match="an image_url without a url"):
        parse_row(in_parts({"type": "image_url"}))


def test_a_subset_keeps_the_images_in_its_rows(tmp_path: Path) -> None:
    broken = "data:image/png;base64," + base64.b64encode(b"no image").decode()
    rows = [beside(RED), {"id": "b", **beside(broken)}, beside(uri("blue"))]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    options = SubsetOptions(str(file), tmp_path / "out", tmp_path, 1.0, max_bad_fraction=0.5)
    report = prepare_subset(options, lambda *step: None)
    assert report["dropped"] == {"unreadable_image": 1}
    assert (report["images"], report["missing_images"]) == (0, 0)
    kept = read_instructions(tmp_path / "out" / "subset.json")
    assert [open_image(row.images[0]).getpixel((0, 0)) for row in kept] == [(255, 0, 0), (0, 0, 255)]
