"""`python scripts/show_tokens.py`: pictures of a photograph, under one and several budgets."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shortzip.data.errors import CannotWrite, FileInTheWay, UserError
from shortzip.data.images import BadImage
from shortzip.scripts.show_tokens import ShowConfig, default_budgets, main, show


@pytest.fixture
def photograph(tmp_path: Path) -> str:
    path = tmp_path / "photo.jpg"
    values = np.random.default_rng(0).integers(0, 256, (30, 60, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return str(path)


def test_default_budgets_are_the_papers_scaled_to_the_grid():
    assert [tuple(budget.values()) for budget in default_budgets(576)] == [(54, 10), (108, 20), (162, 30)]
    assert [tuple(budget.values()) for budget in default_budgets(36)] == [(3, 1), (7, 1), (10, 2)]


def test_several_budgets_several_images_and_the_command(tiny_release, photograph, tmp_path, capsys):
    written = show(ShowConfig(images=[photograph], model=str(tiny_release), output=tmp_path / "out" / "several.png"))
    assert written == [tmp_path / "out" / "several.png"]
    wide = Image.open(written[0])
    main(
        [
            photograph,
            photograph,
            "--model",
            str(tiny_release),
            "--budget",
            "5+3",
            "--output",
            str(tmp_path / "two.png"),
        ]
    )
    assert "two.png" in capsys.readouterr().out
    square = Image.open(tmp_path / "two.png")
    # Four columns of panels each: two rows, with headings above one of them.
    assert wide.width == square.width
    assert wide.height > square.height > 500


def test_methods_stand_side_by_side(tiny_release, photograph, tmp_path):
    settings = ShowConfig(images=[photograph], model=str(tiny_release), budget="5+3", method="visionzip,duet:window=2",
                          output=tmp_path / "methods.png")  # fmt: skip
    assert Image.open(show(settings)[0]).width > 500


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"images": []}, ValueError, "no image"),
        ({"images": ["missing.jpg"]}, BadImage, "no such file"),
        ({"budget": "30+10"}, ValueError, "the sum must be 1 to 37"),
        ({"budget": "5+3,7"}, ValueError, r"54\+10"),
        ({"method": "scop"}, ValueError, "method is 'scop'; it must be one of"),
        ({"budget": "5+3", "method": "scope:beta=1"}, ValueError, "method scope has no parameter 'beta'"),
    ],
)
def test_refusals(values, error, message, tiny_release, photograph, tmp_path):
    settings = {"images": [photograph], "model": str(tiny_release), "output": tmp_path / "x.png", **values}
    with pytest.raises(error, match=message):
        show(ShowConfig(**settings))
    assert not (tmp_path / "x.png").exists()


def test_pictures_take_nobodys_place(tiny_release, photograph, tmp_path, monkeypatch, capsys):
    """Neither the photograph's, by name, link or default, nor an earlier picture's unasked."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", str(tiny_release), "--budget", "5+3"]
    tokens = tmp_path / "tokens.png"
    Image.open(photograph).save(tokens)
    before = tokens.read_bytes()
    for more in ([], ["--output", "tokens.png", "--overwrite"], ["--output", "tokens", "--overwrite", "true"]):
        with pytest.raises(FileInTheWay, match=r"tokens.png would replace the input tokens.png"):
            main(["tokens.png", *arguments, *more])
    assert tokens.read_bytes() == before
    odd = tmp_path / "a$b_{[x].png"
    odd.write_bytes(before)
    main([str(odd), *arguments, "--output", "abc"])
    assert capsys.readouterr().out == "written: abc.png\n"
    with pytest.raises(FileInTheWay, match=r"abc.png exists already: give --overwrite"):
        main([str(odd), *arguments, "--output", "abc"])
    main([str(odd), *arguments, "--output", "abc", "--overwrite"])
    with pytest.raises(UserError, match=r"its name must end with \.png"):
        main([str(odd), *arguments, "--output", "abc.jpg"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [odd.name, "abc.png", "photo.jpg", "tokens.png"]


def test_a_full_disk_is_named_with_the_cure(tiny_release, photograph, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(CannotWrite, match=r"x\.png cannot be written: No space left on device\. Make space"):
        show(ShowConfig(images=[photograph], model=str(tiny_release), budget="5+3", output=tmp_path / "x.png"))
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]
