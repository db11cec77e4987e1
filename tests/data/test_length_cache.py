"""Kept lengths: whatever changes what is counted has them counted anew."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from processors import llava_next_processor, llava_processor

from shortzip.data.dataset import ConversationDataset
from shortzip.data.drops import BadSample
from shortzip.data.instructions import Conversation
from shortzip.data.supervision import Supervision, load_template
from shortzip.reduction import ReducedLlavaNextProcessor, ReducedLlavaProcessor

TEMPLATE = load_template("vicuna_v1")
TURNS = (("user", "<image>What is <it>?"), ("assistant", "A boat on the water, it is."))


def reduced(plain: Any, kind: Any, visionzip: dict[str, int] | None) -> Any:
    return kind(
        plain.image_processor, plain.tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, visionzip=visionzip,
    )  # fmt: skip


def next_of(dominant: int | None) -> Any:
    visionzip = None if dominant is None else {"dominant": dominant, "contextual": 1}
    return reduced(llava_next_processor(), ReducedLlavaNextProcessor, visionzip)


def one_of(dominant: int | None) -> Any:
    visionzip = None if dominant is None else {"dominant": dominant, "contextual": 1}
    return reduced(llava_processor(), ReducedLlavaProcessor, visionzip)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (50, 30)).save(folder / "a.png")
    return folder


def lengths(supervision: Supervision, root: Path, cache: Path | None, rows: list[Conversation] | None = None) -> Any:
    rows = rows or [Conversation("a", ("a.png",), TURNS), Conversation("b", (), (("user", "Q"), ("assistant", "A")))]
    dataset = ConversationDataset(rows, supervision, root, cache_dir=cache)
    return dataset.lengths.tolist(), dataset.supervised.tolist()


@pytest.mark.parametrize("of", [one_of, next_of])
def test_every_budget_has_its_own_lengths(of: Callable[[int | None], Any], root: Path, tmp_path: Path) -> None:
    expected = [lengths(Supervision(of(budget), TEMPLATE), root, None) for budget in (None, 1, 2)]
    found = [lengths(Supervision(of(budget), TEMPLATE), root, tmp_path / "kept") for budget in (None, 1, 2)]
    assert found == expected
    assert len({str(one) for one in expected}) == 3
    assert len(list((tmp_path / "kept").iterdir())) == 3


def other_grid(processor: Any) -> None:
    processor.image_processor.image_grid_pinpoints = [[28, 84], [84, 28]]


def other_tile(processor: Any) -> None:
    processor.image_processor.size = {"shortest_edge": 56}
    processor.image_processor.crop_size = {"height": 56, "width": 56}


def one_more_token(processor: Any) -> None:
    processor.tokenizer.add_tokens(["<it>"])


def other_opening(processor: Any) -> None:
    processor.tokenizer.bos_token = "</s>"


def other_end(processor: Any) -> None:
    processor.tokenizer.eos_token = "<unk>"


@pytest.mark.parametrize("change", [other_grid, other_tile, one_more_token, other_opening, other_end])
def test_whatever_of_the_processor_counts_has_lengths_counted_anew(
    change: Callable[[Any], None], root: Path, tmp_path: Path
) -> None:
    processor = next_of(2)
    lengths(Supervision(processor, TEMPLATE), root, tmp_path / "kept")
    change(processor)
    expected = lengths(Supervision(processor, TEMPLATE), root, None)
    assert lengths(Supervision(processor, TEMPLATE), root, tmp_path / "kept") == expected
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_template_limit_and_rows_count(root: Path, tmp_path: Path) -> None:
    processor, kept = one_of(2), tmp_path / "kept"
    rows = [Conversation("a", ("a.png",), TURNS)]
    whole = len(Supervision(processor, TEMPLATE).encode(rows[0]).input_ids)
    asked: list[tuple[Supervision, list[Conversation]]] = [
        (Supervision(processor, TEMPLATE), rows),
        (Supervision(processor, TEMPLATE.replace("USER", "A HUMAN BEING")), rows),
        (Supervision(processor, TEMPLATE, max_length=whole - 2), rows),
        (Supervision(processor, TEMPLATE), [Conversation("a", ("a.png",), (TURNS[0], ("assistant", "No.")))]),
        (Supervision(processor, TEMPLATE), [Conversation("a", (), (("user", "Q"), TURNS[1]))]),
        (Supervision(processor, TEMPLATE), [*rows, *rows]),
    ]
    expected = [lengths(supervision, root, None, wanted) for supervision, wanted in asked]
    for _ in range(2):
        assert [lengths(supervision, root, kept, wanted) for supervision, wanted in asked] == expected
    assert len(list(kept.iterdir())) == len(asked)


def test_what_stands_for_a_video_counts(root: Path, tmp_path: Path) -> None:
    """Where no video is taken, <video> is a word; its row's length is none of a family that takes some."""
    row = Conversation("a", (), (("user", "What is <video> in HTML?"), TURNS[1]))
    lengths(Supervision(one_of(2), TEMPLATE), root, tmp_path / "kept", [row])
    processor = one_of(2)
    processor.video_token, processor.video_token_id = "<video>", 3
    with pytest.raises(BadSample, match="0 videos but the chat template renders 1 <video>"):
        lengths(Supervision(processor, TEMPLATE), root, tmp_path / "kept", [row])


def test_an_image_of_another_size_under_the_same_name_size_and_time_counts(root: Path, tmp_path: Path) -> None:
    processor, file, kept = next_of(2), root / "a.bmp", tmp_path / "kept"
    processor.image_processor.image_grid_pinpoints = [[28, 84], [56, 28]]
    supervision, rows = Supervision(processor, TEMPLATE), [Conversation("a", ("a.bmp",), TURNS)]
    Image.new("RGB", (84, 28)).save(file)
    times = file.stat()
    lying = lengths(supervision, root, kept, rows)
    Image.new("RGB", (28, 84)).save(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == times.st_size
    upright = lengths(supervision, root, kept, rows)
    assert upright == lengths(supervision, root, None, rows) != lying


@pytest.mark.parametrize("damage", ["[]", "{}", '{"kept": [0]}', "digit"])
def test_damaged_lengths_are_counted_anew(damage: str, root: Path, tmp_path: Path) -> None:
    supervision = Supervision(one_of(2), TEMPLATE)
    expected = lengths(supervision, root, tmp_path / "kept")
    (file,) = (tmp_path / "kept").iterdir()
    text = file.read_text()
    file.write_text(text.replace(str(expected[0][0]), str(expected[0][0] + 1)) if damage == "digit" else damage)
    assert lengths(supervision, root, tmp_path / "kept") == expected
    assert file.read_text() == text
