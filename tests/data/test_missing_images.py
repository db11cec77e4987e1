"""What a message says of an image that is not there, and that it costs no listing of its folder."""

import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from shortzip.data.hints import hint_for_missing
from shortzip.data.images import HINTS, BadImage, check_image_file
from shortzip.data.subset_media import check_images


def touch(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x")


@pytest.mark.parametrize(
    ("asked", "lies", "words"),
    [
        ("ocr/1.jpg", "ocr/1.gif", "there is ocr/1.gif|there is 1.gif"),
        ("ocr/1.jpg", "ocr/1.JPG", "1.JPG"),
        ("ocr/1.PNG", "ocr/1.png", "1.png"),
        ("ocr/1", "ocr/1.jpeg", "1.jpeg"),
        ("OCR/1.jpg", "ocr/1.jpg", "capitals count"),
        ("coco\\train\\1.jpg", "coco/train/1.jpg", "there is coco/train/1.jpg: write / instead of"),
        ("C:\\me\\coco\\1.jpg", "coco/1.jpg", "there is coco/1.jpg: image paths are relative"),
        ("images/coco/1.jpg", "coco/1.jpg", "there is coco/1.jpg: image paths are relative"),
        ("C:\\me\\coco\\1.jpg", "other.jpg", "a path of Windows with its drive"),
        ("D:/me/coco/1.jpg", "other.jpg", "a path of Windows with its drive"),
        ("\\\\server\\share\\1.jpg", "other.jpg", "a path of Windows with its drive"),
        ("coco\\1.jpg", "other.jpg", "separated as on Windows"),
        (unicodedata.normalize("NFC", "fotos/Köln.jpg"), unicodedata.normalize("NFD", "fotos/Köln.jpg"), "form NFD"),
        (unicodedata.normalize("NFD", "Ärger/Köln.jpg"), unicodedata.normalize("NFC", "Ärger/Köln.jpg"), "form NFC"),
        ("kö\\Köln.jpg", unicodedata.normalize("NFD", "kö/Köln.jpg"), "form NFD"),
    ],
)
def test_the_hint_fits_what_lies_there(tmp_path: Path, asked: str, lies: str, words: str) -> None:
    touch(tmp_path / lies)
    with pytest.raises(BadImage, match=words) as caught:
        check_image_file(tmp_path / asked)
    assert caught.value.problem == "missing_image"


def test_no_hint_where_nothing_is_like_it(tmp_path: Path) -> None:
    touch(tmp_path / "coco" / "2.jpg")
    assert hint_for_missing(tmp_path / "coco" / "1.jpg") == ""
    assert hint_for_missing(tmp_path / "coco" / "2.jpg" / "1.jpg") == ""
    assert hint_for_missing(Path("/no/such/folder/1.jpg")) == ""


def test_a_missing_image_costs_no_listing_and_many_of_them_no_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        touch(tmp_path / "ocr" / f"{number}.gif")

    def listed(*_: Any) -> Any:
        raise AssertionError("a folder was listed")

    looked: list[str] = []
    isfile = os.path.isfile
    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, listed)
    monkeypatch.setattr(os.path, "isfile", lambda path: looked.append(str(path)) or isfile(path))
    problems = check_images([f"ocr/{number}.jpg" for number in range(400)], tmp_path)
    assert len(problems) == 400
    assert [path for path, (_, detail) in problems.items() if "but there is" in detail] == [
        f"ocr/{number}.jpg" for number in range(5)
    ]
    assert len(looked) < HINTS * 60


def test_a_name_that_the_locale_cannot_write_is_not_called_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under LC_ALL=C without Python's own coercion to UTF-8."""

    def stat(file: Path) -> None:
        str(file).encode("ascii")

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")
    with pytest.raises(BadImage, match="names in ascii cannot have: set PYTHONUTF8=1"):
        check_image_file(Path("café.png"))
