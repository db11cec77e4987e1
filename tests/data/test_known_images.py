"""What is known of image files: nothing is opened twice, and nothing is believed of a file that has changed."""

import os
import time
from pathlib import Path

import pytest
from PIL import Image

from shortzip.data.images import BadImage
from shortzip.data.known_images import KnownImages


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.bmp"
    Image.new("RGB", (28, 84)).save(path)
    return path


def test_a_file_is_read_once_and_again_when_it_has_changed(file: Path) -> None:
    known, root = KnownImages(), file.parent
    assert not known.has("size", "a.bmp", root)
    assert known.size("a.bmp", root) == (84, 28)
    assert known.has("size", "a.bmp", root)
    assert not known.has("key", "a.bmp", root)
    assert known.get("size", "a.bmp", root, lambda *_: pytest.fail("read again")) == [84, 28]
    times = file.stat()
    Image.new("RGB", (84, 28)).save(file)  # of as many bytes, and the times are set back
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == times.st_size
    assert known.size("a.bmp", root) == (28, 84)
    file.unlink()
    with pytest.raises(BadImage, match="there is no such file"):
        known.size("a.bmp", root)


def test_the_next_run_knows_it_unless_it_changed_just_before(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = KnownImages()
    known.size("a.bmp", tmp_path)
    known.keep(tmp_path / "kept")
    assert not KnownImages(tmp_path / "kept").files, "it may change once more within its disk's tick"
    monkeypatch.setattr("shortzip.data.known_images.SETTLED", 0)
    time.sleep(0.01)
    known.keep(tmp_path / "kept")
    later = KnownImages(tmp_path / "kept")
    assert later.has("size", "a.bmp", tmp_path)
    assert later.has("size", str(file), None)
    (kept,) = (tmp_path / "kept").iterdir()
    kept.write_text(kept.read_text().replace("84", "85"))
    assert not KnownImages(tmp_path / "kept").files, "what is damaged counts as not there"


def test_two_processes_learn_from_each_other_what_holds_for_the_same_file(file: Path) -> None:
    one, other = KnownImages(), KnownImages()
    one.size("a.bmp", file.parent)
    other.get("key", "a.bmp", file.parent, lambda *_: "k")
    one.learn(other.files)
    assert one.has("size", "a.bmp", file.parent)
    assert one.has("key", "a.bmp", file.parent)
    Image.new("RGB", (5, 5)).save(file)
    changed = KnownImages()
    changed.size("a.bmp", file.parent)
    one.learn(changed.files)
    assert one.size("a.bmp", file.parent) == (5, 5)
    assert not one.has("key", "a.bmp", file.parent)


def test_what_is_no_file_is_read_each_time() -> None:
    known = KnownImages()
    assert [known.get("key", b"bytes", None, lambda source, _: len(source)) for _ in range(2)] == [5, 5]
    assert not known.files
