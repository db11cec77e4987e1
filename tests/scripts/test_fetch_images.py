"""The command that fetches a subset's images, from prepare_subset's own lists."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from image_server import Server, archive, jpeg

from shortzip.data.errors import UserError
from shortzip.data.generated.mixture import write_mix
from shortzip.scripts.fetch_images import main
from shortzip.scripts.prepare_subset import main as prepare
from shortzip.train.settings.command_line import load_config

FOLDERS = ("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture
def subset(tmp_path: Path) -> Path:
    """A third of a small mix of LLaVA's shape, drawn without its images."""
    write_mix(tmp_path / "mix.json", rows=120)
    prepare([str(tmp_path / "mix.json"), "-o", str(tmp_path / "subset"), "--fraction", "0.35"])
    return tmp_path / "subset"


def serve(server: Server, names: list[str], folder: Path) -> Path:
    """Every image: COCO and TextVQA file by file, GQA and VG out of archives, OCR-VQA by its index."""
    sources = {}
    for place in FOLDERS:
        below = [name.removeprefix(place + "/") for name in names if name.startswith(place)]
        if place in ("gqa/images", "vg/VG_100K"):
            server.files[f"/{place}.zip"] = archive([f"in/{name}" for name in below], padding=100_000)
            sources[place] = {"archive": f"{server.url}/{place}.zip", "member": "in/{name}"}
        elif place == "ocr_vqa/images":
            server.files |= {f"/shop/{name}": jpeg(3) for name in below}
            index = {name.removesuffix(".jpg"): {"imageURL": f"{server.url}/shop/{name}"} for name in below}
            server.files["/dataset.json"] = json.dumps(index).encode()
            sources[place] = {"index": f"{server.url}/dataset.json", "key": "imageURL"}
        else:
            server.files |= {f"/{place}/{name}": jpeg(4) for name in below}
            sources[place] = {"files": f"{server.url}/{place}/{{name}}"}
    (folder / "mirrors.yaml").write_text(yaml.safe_dump(sources))
    return folder / "mirrors.yaml"


def test_a_subsets_images_are_fetched_and_what_the_missing_ones_cost_is_said(
    server: Server, subset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = (subset / "images.txt").read_text().split()
    given = ["--to", str(tmp_path / "images"), "--sources", str(serve(server, listed, tmp_path)), "--retries", "0"]
    lost, failing = [name for name in listed if name.startswith("coco")][:2]
    del server.files[f"/{lost}"]
    server.faults[f"/{failing}"] = ["503"]
    with pytest.raises(SystemExit, match=r"^1 images failed, which may pass: the same command tries them again$"):
        main([str(subset / "images.txt"), *given])
    said = capsys.readouterr().out
    assert re.search(rf"^{len(listed)} of {len(listed)} images, \d+ MiB fetched, 0 min left$", said, re.MULTILINE)
    assert f"{len(listed) - 2} fetched (0 MiB), 0 were there" in said
    assert f"1 missing ({lost}): the source has no such image" in said
    rows = json.loads((subset / "subset.json").read_text())
    assert f"2 of {len(rows)} rows of the subset need them ({2 / len(rows):.1%})" in said
    config = load_config(shlex.split(said.splitlines()[-1])[2:])
    assert config.data.on_bad_sample == "skip"
    assert config.data.max_bad_fraction >= 2 / len(rows)
    assert set((subset / "missing_images.txt").read_text().split()) == {lost, failing}

    # The same command continues: what failed comes now, and what is not there is no failure.
    server.faults.clear()
    server.asked.clear()
    main([str(subset / "images.txt"), *given])
    assert set(server.asked) == {f"/{lost}", f"/{failing}"}
    said = capsys.readouterr().out
    assert f"1 fetched (0 MiB), {len(listed) - 2} were there" in said
    assert f"1 of {len(rows)} rows" in said
    assert (subset / "missing_images.txt").read_text().split() == [lost]

    server.files[f"/{lost}"] = jpeg(9)
    main([str(subset / "images.txt"), *given])
    said = capsys.readouterr().out
    assert f"all {len(listed)} images are in {tmp_path / 'images'}" in said
    config = load_config(shlex.split(said.splitlines()[-1])[2:])
    assert (config.data.instructions, config.data.max_bad_fraction) == (str(subset / "subset.json"), 0.05)
    assert (subset / "missing_images.txt").read_text() == ""
    assert {str(path.relative_to(tmp_path / "images")) for path in (tmp_path / "images").rglob("*.jpg")} == set(listed)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: images"),
        (["nothing.txt"], "there is no such file"),
        (["images.txt", "--workers", "0"], "give 1 to 256"),
        (["images.txt", "--retries", "-1"], "give 0 to 100"),
        (["images.txt", "--timeout", "0"], "give seconds"),
        (["images.txt", "--form", "x"], "there is no key 'form'"),
        (["images.txt"], r"no source serves mine/ \(mine/1.jpg\)"),
    ],
)
def test_what_cannot_be_fetched_is_refused(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("images.txt").write_text("mine/1.jpg\n")
    with pytest.raises(UserError, match=words):
        main(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["images.txt"]
