"""`python scripts/show_tokens.py`: pictures of a photograph, under one and several budgets."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.images import BadImage
from scripts.show_tokens import ShowConfig, default_budgets, main, show


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
            "--budgets",
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


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"images": []}, ValueError, "no image"),
        ({"images": ["missing.jpg"]}, BadImage, "no such file"),
        ({"budgets": "30+10"}, ValueError, "the sum must be 1 to 37"),
        ({"budgets": "5+3,7"}, ValueError, r"54\+10"),
    ],
)
def test_refusals(values, error, message, tiny_release, photograph, tmp_path):
    settings = {"images": [photograph], "model": str(tiny_release), "output": tmp_path / "x.png", **values}
    with pytest.raises(error, match=message):
        show(ShowConfig(**settings))
    assert not (tmp_path / "x.png").exists()
