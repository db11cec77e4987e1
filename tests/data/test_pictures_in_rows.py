"""Odd pictures in rows to train on: lengths that hold, and rows that are left out by name."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processors import llava_next_processor, llava_processor

import shortzip.data.images
from shortzip.data.dataset import ConversationDataset, Sample
from shortzip.data.drops import BadSample, Drop, DropLog
from shortzip.data.images import HINTS
from shortzip.data.instructions import Conversation
from shortzip.data.subset_media import check_images
from shortzip.data.supervision import Supervision, load_template


def row(image: str) -> Conversation:
    return Conversation(image, (image,), (("user", "<image>\nQ"), ("assistant", "A boat.")))


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_the_planned_length_is_the_loaded_one_for_every_format_and_orientation(tmp_path: Path) -> None:
    """LLaVA-NeXT's tokens depend on the size of the picture as it is seen."""
    names = []
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for suffix in ("tiff", "png", "jpg", "webp", "avif"):
            names.append(f"{orientation}.{suffix}")
            noise(90, 20).save(tmp_path / names[-1], exif=exif)
    supervision = Supervision(llava_next_processor(), load_template("vicuna_v1"))
    dataset = ConversationDataset([row(name) for name in names], supervision, tmp_path)
    loaded = [dataset[index] for index in range(len(names))]
    assert dataset.lengths.tolist() == [len(sample.encoded.input_ids) for sample in loaded]  # type: ignore[union-attr]
    assert len(set(dataset.lengths[:5])) == len(set(dataset.lengths[20:25])) == 1
    assert dataset.lengths[0] != dataset.lengths[-1]


@pytest.fixture
def bad(tmp_path: Path) -> dict[str, str]:
    """Pictures that cannot be trained on, each with a word of what is said."""
    Image.new("1", (30_000, 1)).save(tmp_path / "thread.png")
    Image.new("1", (2, 30_000)).save(tmp_path / "thread.gif", save_all=True, append_images=[Image.new("1", (9, 9))])
    Image.new("1", (8_000, 8_000)).save(tmp_path / "huge.png")
    (tmp_path / "photo.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    noise(9, 9).save(tmp_path / "x.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "x.png").read_bytes()[:-60])
    return {
        "thread.png": "30000 x 1 pixels", "thread.gif": "2 x 30000 pixels", "huge.png": "more than 50000000",
        "photo.jpg": "PostScript", "cut.png": "cannot be decoded",
    }  # fmt: skip


def test_a_picture_that_cannot_be_trained_on_is_left_out_or_named(tmp_path: Path, bad: dict[str, str]) -> None:
    supervision = Supervision(llava_processor(), load_template("vicuna_v1"))
    rows = [row(name) for name in [*bad, "x.png"]]
    skipping = ConversationDataset(rows, supervision, tmp_path, drops=DropLog("skip", 1.0))
    raising = ConversationDataset(rows, supervision, tmp_path)
    for place, (name, words) in enumerate(bad.items()):
        left_out = skipping[place]
        assert isinstance(left_out, Drop)
        assert (left_out.sample_id, left_out.reason) == (name, "unreadable_image")
        with pytest.raises(BadSample, match=rf"row '{name}'.*{words}"):
            raising[place]
    assert isinstance(skipping[len(bad)], Sample)
    found = check_images([*bad, "x.png"], tmp_path, decode=True)
    assert {name: bad[name] in detail for name, (_, detail) in found.items()} == dict.fromkeys(bad, True)


def test_a_panorama_is_trained_on_as_its_square_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(800, 60).save(tmp_path / "pano.png")
    supervision = Supervision(llava_processor(), load_template("vicuna_v1"))
    dataset = ConversationDataset([row("pano.png")], supervision, tmp_path)
    plain = dataset.load(dataset.conversations[0]).pixels[0]
    monkeypatch.setattr(shortzip.data.images, "MAX_PIXELS", 100_000)
    assert dataset.load(dataset.conversations[0]).pixels[0].equal(plain)


def test_of_many_missing_images_it_is_looked_for_the_first_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise(9, 9).save(tmp_path / "x.png")
    asked: list[Path] = []
    monkeypatch.setattr(shortzip.data.images, "hint_for_missing", lambda file: asked.append(file) or " (a hint)")
    rows = [row("x.png"), *(row(f"{number}.jpg") for number in range(300))]
    supervision = Supervision(llava_processor(), load_template("vicuna_v1"))
    dataset = ConversationDataset(rows, supervision, tmp_path, drops=DropLog("skip", 1.0))
    assert len(dataset) == 1
    assert len(asked) == HINTS
    assert dataset.drops.counts == {"missing_image": 300}
