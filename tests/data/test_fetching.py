"""Fetching the images of a subset from a server that serves files and ranges, and misbehaves."""

import errno
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from image_server import Server, archive, jpeg
from PIL import Image

from shortzip.data.errors import CannotWrite, UserError
from shortzip.data.fetching import FetchOptions, Outcome, fetch, read_list
from shortzip.data.image_sources import Source, read_sources


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


def options(server: Server, to: Path, images: list[str], **values: object) -> FetchOptions:
    sources = {
        "coco/train2017": Source(files=server.url + "/coco/{name}"),
        "gqa/images": Source(archive=server.url + "/gqa.zip", member="images/{name}"),
        "ocr_vqa/images": Source(index=server.url + "/dataset.json", key="imageURL"),
    }
    return FetchOptions(images, to, sources, **{"workers": 4, "retries": 2, "backoff": 0.01, **values})  # type: ignore[arg-type]


def images_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_files_members_and_an_index_give_the_images_that_are_listed_and_no_others(
    server: Server, tmp_path: Path
) -> None:
    names = [f"images/{number}.jpg" for number in range(300)]
    server.files = {
        "/coco/1.jpg": jpeg(1), "/coco/2.jpg": jpeg(2), "/gqa.zip": archive(names, padding=8 << 20),
        "/amazon/x.jpg": jpeg(7),
        "/dataset.json": json.dumps({"77": {"imageURL": server.url + "/amazon/x.jpg"}}).encode(),
    }  # fmt: skip
    listed = ["coco/train2017/1.jpg", "gqa/images/17.jpg", "gqa/images/250.jpg", "ocr_vqa/images/77.jpg"]
    outcome = fetch(options(server, tmp_path, listed))
    assert images_in(tmp_path) == set(listed)
    assert (tmp_path / "gqa/images/17.jpg").read_bytes() == jpeg(17)
    assert outcome.missing == {}
    assert outcome.fates["fetched"] == 4
    assert outcome.bytes == sum((tmp_path / name).stat().st_size for name in listed)
    assert server.sent < 1 << 20, "an archive is not fetched whole for two of its members"


def test_what_is_there_is_not_asked_for_again_and_the_rest_continues(server: Server, tmp_path: Path) -> None:
    server.files = {f"/coco/{n}.jpg": jpeg(n) for n in range(6)}
    listed = [f"coco/train2017/{n}.jpg" for n in range(6)]
    fetch(options(server, tmp_path, listed[:3]))
    (tmp_path / listed[1]).write_bytes(b"")  # an empty file is none
    server.asked.clear()
    outcome = fetch(options(server, tmp_path, listed))
    assert set(server.asked) == {"/coco/1.jpg", "/coco/3.jpg", "/coco/4.jpg", "/coco/5.jpg"}
    assert (outcome.fates["there"], outcome.fates["fetched"]) == (2, 4)


@pytest.mark.parametrize("fault", ["drops", "says more", "says less", "429", "vague 429", "503", "hangs"])
@pytest.mark.parametrize("kind", ["file", "member"])
def test_a_fault_that_passes_is_waited_out_and_nothing_damaged_is_kept(
    server: Server, tmp_path: Path, fault: str, kind: str
) -> None:
    server.files = {"/coco/1.jpg": jpeg(1), "/gqa.zip": archive(["images/1.jpg"], padding=300_000)}
    path, listed = ("/coco/1.jpg", "coco/train2017/1.jpg") if kind == "file" else ("/gqa.zip", "gqa/images/1.jpg")
    server.faults = {path: [fault]}
    outcome = fetch(options(server, tmp_path, [listed], timeout=0.3))
    assert outcome.missing == {}
    assert images_in(tmp_path) == {listed}
    Image.open(tmp_path / listed).load()


def test_what_cannot_be_had_is_listed_and_the_others_go_on(server: Server, tmp_path: Path) -> None:
    server.files = {"/coco/1.jpg": jpeg(1), "/coco/3.jpg": b"<html>moved</html>", "/coco/4.jpg": jpeg(4)}
    server.faults = {"/coco/2.jpg": ["always 500"], "/coco/4.jpg": ["403"]}
    listed = [f"coco/train2017/{n}.jpg" for n in (0, 1, 2, 3, 4)]
    outcome = fetch(options(server, tmp_path, listed))
    assert images_in(tmp_path) == {listed[1]}
    assert outcome.missing[listed[0]] == "the source has no such image"
    assert "500" in outcome.missing[listed[2]]
    assert "no whole picture" in outcome.missing[listed[3]]
    assert "403" in outcome.missing[listed[4]]
    assert (outcome.fates["absent"], outcome.fates["failed"]) == (2, 2)
    assert server.asked["/coco/2.jpg"] == 3, "one attempt and two repetitions"
    assert server.asked["/coco/0.jpg"] == 1


def test_an_archive_whose_server_ignores_ranges_is_not_fetched_whole(server: Server, tmp_path: Path) -> None:
    server.files = {"/gqa.zip": archive([f"images/{n}.jpg" for n in range(9)]), "/coco/1.jpg": jpeg(1)}
    server.faults = {"/gqa.zip": ["no ranges"] * 99}
    listed = ["coco/train2017/1.jpg", *(f"gqa/images/{n}.jpg" for n in range(9))]
    outcome = fetch(options(server, tmp_path, listed))
    assert images_in(tmp_path) == {listed[0]}
    assert set(outcome.missing) == set(listed[1:])
    assert all("serves ranges" in reason for reason in outcome.missing.values())
    assert server.asked["/gqa.zip"] <= 4, "once per thread at most"


def test_a_server_that_stops_answering_ranges_ends_its_archive_alone(server: Server, tmp_path: Path) -> None:
    server.files = {"/gqa.zip": archive(["images/1.jpg"], padding=300_000), "/coco/1.jpg": jpeg(1)}
    server.faults, server.ranges_served = {"/gqa.zip": ["no ranges"] * 9}, 1
    outcome = fetch(options(server, tmp_path, ["gqa/images/1.jpg", "coco/train2017/1.jpg"]))
    assert images_in(tmp_path) == {"coco/train2017/1.jpg"}
    assert "serves ranges" in outcome.missing["gqa/images/1.jpg"]


def test_an_archives_directory_is_read_once_for_all_threads(server: Server, tmp_path: Path) -> None:
    server.files = {"/gqa.zip": archive([f"images/{n}.jpg" for n in range(40)], padding=1 << 20)}
    outcome = fetch(options(server, tmp_path, [f"gqa/images/{n}.jpg" for n in range(40)], workers=8))
    assert outcome.fates["fetched"] == 40
    assert server.asked["/gqa.zip"] <= 42, "its end, its directory, and each member"


def test_a_damaged_member_is_not_kept_and_the_others_are(server: Server, tmp_path: Path) -> None:
    content = bytearray(archive(["images/1.jpg", "images/2.jpg"], padding=300_000))
    start = content.index(b"images/1.jpg") + len("images/1.jpg")
    content[start : start + 40] = bytes(range(200, 240))
    server.files = {"/gqa.zip": bytes(content)}
    outcome = fetch(options(server, tmp_path, ["gqa/images/1.jpg", "gqa/images/2.jpg", "gqa/images/3.jpg"]))
    assert images_in(tmp_path) == {"gqa/images/2.jpg"}
    assert outcome.missing["gqa/images/3.jpg"] == "the source has no such image"
    assert (outcome.fates["absent"], outcome.fates["failed"]) == (1, 1)


@pytest.mark.parametrize(("status", "words"), [("404", r"refuses it \(404\)"), ("403", r"refuses it \(403\)")])
def test_an_archive_that_is_not_there_is_asked_for_once(
    server: Server, tmp_path: Path, status: str, words: str
) -> None:
    server.files = {"/gqa.zip": archive(["images/1.jpg"])}
    server.faults = {"/gqa.zip": [status] * 99}
    outcome = fetch(options(server, tmp_path, [f"gqa/images/{n}.jpg" for n in range(50)]))
    assert len(outcome.missing) == 50
    assert re.search(words, outcome.missing["gqa/images/7.jpg"])
    assert server.asked["/gqa.zip"] <= 4, "once per thread at most"


def test_a_source_that_sends_pages_instead_of_pictures_is_given_up(server: Server, tmp_path: Path) -> None:
    server.files = {f"/coco/{n}.jpg": b"<html>are you a robot?</html>" for n in range(200)}
    outcome = fetch(options(server, tmp_path, [f"coco/train2017/{n}.jpg" for n in range(200)], retries=1))
    assert not images_in(tmp_path)
    assert len(outcome.missing) == 200
    assert sum(server.asked.values()) < 100
    assert any("images in a row failed" in reason for reason in outcome.missing.values())


def test_hundreds_that_are_absent_are_asked_for_once_each(server: Server, tmp_path: Path) -> None:
    server.files = {"/coco/499.jpg": jpeg(1)}
    outcome = fetch(options(server, tmp_path, [f"coco/train2017/{n}.jpg" for n in range(500)], workers=16))
    assert outcome.fates == {"fetched": 1, "there": 0, "absent": 499, "failed": 0}
    assert set(server.asked.values()) == {1}


@pytest.mark.parametrize("kind", ["file", "member"])
def test_names_with_blanks_brackets_and_other_letters(server: Server, tmp_path: Path, kind: str) -> None:
    names = ["a b.jpg", "[1] (2).jpg", "ä#?%20&.jpg", "深/図.jpg", "{name}.jpg"]
    server.files = {"/coco/" + quote(name): jpeg(5) for name in names}
    server.files["/gqa.zip"] = archive([f"images/{name}" for name in names])
    folder = {"file": "coco/train2017", "member": "gqa/images"}[kind]
    listed = tmp_path / "images.txt"
    listed.write_text("".join(f"{folder}/{name}\n" for name in names), encoding="utf-8")
    outcome = fetch(options(server, tmp_path / "to", read_list(listed)))
    assert outcome.missing == {}
    assert images_in(tmp_path / "to") == {f"{folder}/{name}" for name in names}


def test_an_index_that_lacks_an_image_or_is_none_is_said(server: Server, tmp_path: Path) -> None:
    server.files = {"/dataset.json": json.dumps({"1": {"imageURL": "file:///etc/passwd"}, "2": {}}).encode()}
    outcome = fetch(options(server, tmp_path, ["ocr_vqa/images/2.jpg", "ocr_vqa/images/3.jpg"]))
    assert set(outcome.missing.values()) == {"the source has no such image"}
    outcome = fetch(options(server, tmp_path, ["ocr_vqa/images/1.jpg"]))
    assert "no http(s) address" in outcome.missing["ocr_vqa/images/1.jpg"]
    server.files = {}
    outcome = fetch(options(server, tmp_path, ["ocr_vqa/images/1.jpg"]))
    assert "there is no index at http" in outcome.missing["ocr_vqa/images/1.jpg"]
    given = options(server, tmp_path, ["ocr_vqa/images/1.jpg"])
    given.sources["ocr_vqa/images"] = Source(index="ocr_vqa/dataset.json")
    assert "is missing: the index" in fetch(given).missing["ocr_vqa/images/1.jpg"]
    (tmp_path / "ocr_vqa/dataset.json").write_text("{")
    assert "is not readable as JSON" in fetch(given).missing["ocr_vqa/images/1.jpg"]


def test_a_full_disk_ends_it_with_the_cure_and_leaves_nothing_half_written(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files = {f"/coco/{n}.jpg": jpeg(n) for n in range(9)}

    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CannotWrite, match="Make space"):
        fetch(options(server, tmp_path, [f"coco/train2017/{n}.jpg" for n in range(9)]))
    assert not images_in(tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
from shortzip.data import fetching
from shortzip.data.image_sources import Source

flush, files = fetching.replace_file.__globals__["flush_to_disk"], []

def kill(path):  # the fifth file is written, and not yet in its place
    files.append(path)
    if len(files) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    flush(path)

fetching.replace_file.__globals__["flush_to_disk"] = kill
images = [f"coco/train2017/{n}.jpg" for n in range(30)]
source = {"coco/train2017": Source(files=sys.argv[1] + "/coco/{name}")}
fetching.fetch(fetching.FetchOptions(images, Path(sys.argv[2]), source, workers=2))
"""


def test_killed_in_the_middle_a_file_is_whole_or_absent_and_the_same_command_continues(
    server: Server, tmp_path: Path
) -> None:
    server.files = {f"/coco/{n}.jpg": jpeg(n) for n in range(30)}
    killed = subprocess.run([sys.executable, "-c", KILLED, server.url, str(tmp_path)], check=False, timeout=100)
    assert killed.returncode == -signal.SIGKILL
    there = list(tmp_path.rglob("[0-9]*.jpg"))
    whole = [path for path in there if path.parent.name == "train2017"]
    assert 0 < len(whole) < 30
    assert all(path.read_bytes() == jpeg(int(path.stem)) for path in whole)
    assert len(there) > len(whole), "what was under way lies beside"
    outcome = fetch(options(server, tmp_path, [f"coco/train2017/{n}.jpg" for n in range(30)]))
    assert (outcome.fates["there"], outcome.fates["fetched"]) == (len(whole), 30 - len(whole))
    assert images_in(tmp_path) == {f"coco/train2017/{n}.jpg" for n in range(30)}


def test_a_source_that_is_down_is_given_up_and_the_others_go_on(server: Server, tmp_path: Path) -> None:
    server.files = {"/coco/1.jpg": jpeg(1)}
    listed = ["coco/train2017/1.jpg", *(f"vg/VG_100K/{n}.jpg" for n in range(300))]
    given = options(server, tmp_path, listed, retries=0)
    given.sources["vg/VG_100K"] = Source(files="http://127.0.0.1:9/{name}")  # nobody listens there
    outcome = fetch(given)
    assert images_in(tmp_path) == {listed[0]}
    assert len(outcome.missing) == 300
    assert sum("images in a row failed" in reason for reason in outcome.missing.values()) > 250


def test_progress_hears_of_every_image(server: Server, tmp_path: Path) -> None:
    server.files = {f"/coco/{n}.jpg": jpeg(n) for n in range(5)}
    seen: list[int] = []

    def progress(outcome: Outcome, total: int) -> None:
        assert total == 5
        seen.append(sum(outcome.fates.values()))

    fetch(options(server, tmp_path, [f"coco/train2017/{n}.jpg" for n in range(5)]), progress)
    assert seen[0] == 0
    assert seen[-1] == 5


def test_a_folder_without_a_source_is_refused_before_anything_is_fetched(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no source serves sam/ \(sam/1.jpg\).*--sources"):
        fetch(options(server, tmp_path, ["coco/train2017/1.jpg", "sam/1.jpg"]))
    assert not any(tmp_path.iterdir())
    assert not server.asked


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "coco/../../x.jpg", "coco\\x.jpg"])
def test_a_list_cannot_lead_out_of_the_image_root(tmp_path: Path, name: str) -> None:
    (tmp_path / "images.txt").write_text(f"coco/train2017/1.jpg\n{name}\n")
    with pytest.raises(UserError, match=r"line 2: .* leads out of the image root"):
        read_list(tmp_path / "images.txt")


def test_a_list_names_each_image_once(tmp_path: Path) -> None:
    (tmp_path / "images.txt").write_text("a/1.jpg\n\na/2.jpg\na/1.jpg\n")
    assert read_list(tmp_path / "images.txt") == ["a/1.jpg", "a/2.jpg"]


def test_sources_of_ones_own_replace_folder_by_folder(tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text("a: {files: 'http://x/{name}'}\nb: {archive: 'http://x/b.zip'}\n")
    (tmp_path / "mine.yaml").write_text("b: {files: 'http://mirror/{name}'}\n")
    sources = read_sources(tmp_path / "all.yaml", tmp_path / "mine.yaml")
    assert sources == {"a": Source(files="http://x/{name}"), "b": Source(files="http://mirror/{name}")}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: {file: 'http://x/{name}'}", "its keys are archive, files"),
        ("a: {files: 'http://x/', archive: 'http://x'}", "one of files, archive and index"),
        ("a: {files: 'http://x/all.jpg'}", "neither {name} nor {stem}"),
        ("a: {files: 'http://x/{id}'}", "no other braces"),
        ("a: {archive: 'http://x/a.zip', member: 'images/a.jpg'}", "neither {name} nor {stem}"),
        ("a: {archive: 'a.zip'}", "begins with http"),
        ("- a", "holds a list"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_sources_are_refused_with_the_file(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=r"mine\.yaml") as refused:
        read_sources(tmp_path / "mine.yaml")
    assert words in str(refused.value)
