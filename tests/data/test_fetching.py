"""Fetching the images of a subset from a server that serves files and ranges, and misbehaves."""

import io
import json
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from shortzip.data.errors import UserError
from shortzip.data.fetching import FetchOptions, Outcome, Source, fetch, read_list, read_sources


def jpeg(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (shade, 90, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """Serves `files`; what stands in `faults` for a path happens to its next requests, one after the other."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.asked: Counter[str] = Counter()
        self.sent = 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        faults = self.server.faults.get(self.path, [])
        fault = (faults.pop(0) if len(faults) > 1 or faults[0] != "always 500" else faults[0]) if faults else ""
        content = self.server.files.get(self.path)
        if fault.split()[-1:] and fault.split()[-1].isdigit():
            self.send_response(int(fault.split()[-1]))
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if content is None:
            self.send_error(404)
            return
        wanted = self.headers.get("Range")
        if wanted and fault != "no ranges":
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) if first else len(content) - int(last)
            start = max(0, start)
            end = int(last) if first and last else len(content) - 1
            part = content[start : end + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}")
        else:
            part = content
            self.send_response(200)
        told = {"says more": len(part) + 50, "says less": len(part) // 2}.get(fault, len(part))
        self.send_header("Content-Length", str(told))
        self.end_headers()
        part = part[: len(part) // 2] if fault == "drops" else part[:told]
        self.wfile.write(part)
        self.server.sent += len(part)
        if fault in ("drops", "says more"):
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def options(server: Server, to: Path, images: list[str], **values: object) -> FetchOptions:
    sources = {
        "coco/train2017": Source(files=server.url + "/coco/{name}"),
        "gqa/images": Source(archive=server.url + "/gqa.zip", member="images/{name}"),
        "ocr_vqa/images": Source(index=server.url + "/dataset.json", key="imageURL"),
    }
    return FetchOptions(images, to, sources, **{"workers": 4, "retries": 2, "backoff": 0.01, **values})  # type: ignore[arg-type]


def archive(names: list[str], padding: int = 0) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for shade, name in enumerate(names):
            file.writestr(name, jpeg(shade))
        if padding:
            file.writestr(zipfile.ZipInfo("large"), bytes(padding))
    return buffer.getvalue()


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


@pytest.mark.parametrize("fault", ["drops", "says more", "says less", "429", "503"])
@pytest.mark.parametrize("kind", ["file", "member"])
def test_a_fault_that_passes_is_waited_out_and_nothing_damaged_is_kept(
    server: Server, tmp_path: Path, fault: str, kind: str
) -> None:
    server.files = {"/coco/1.jpg": jpeg(1), "/gqa.zip": archive(["images/1.jpg"], padding=300_000)}
    path, listed = ("/coco/1.jpg", "coco/train2017/1.jpg") if kind == "file" else ("/gqa.zip", "gqa/images/1.jpg")
    server.faults = {path: [fault]}
    outcome = fetch(options(server, tmp_path, [listed]))
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
        ("- a", "holds a list"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_sources_are_refused_with_the_file(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=r"mine\.yaml") as refused:
        read_sources(tmp_path / "mine.yaml")
    assert words in str(refused.value)
