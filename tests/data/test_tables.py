"""`datasets` tables: parquet files, folders of them, and what save_to_disk writes, with images inside the table."""

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shortzip.data.images import BadImage, EmbeddedImage, open_image
from shortzip.data.instructions import UnknownFormat, read_instructions
from shortzip.data.tables import iterate_table

datasets = pytest.importorskip("datasets")


def encoded(colour: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def one_image_each() -> Any:
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    text = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    return datasets.Dataset.from_dict(
        {
            "id": ["a", "b", "c"],
            "image": [encoded("red"), None, encoded("blue")],
            "conversations": [turns, text, turns],
        }
    ).cast_column("image", datasets.Image())


def several_images() -> Any:
    content = [{"type": "image", "text": None}, {"type": "image", "text": None}, {"type": "text", "text": "Q"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
    ]
    return datasets.Dataset.from_dict(
        {"messages": [messages], "images": [[encoded("red"), encoded("blue")]]}
    ).cast_column("images", datasets.List(datasets.Image()))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    datasets.disable_progress_bars()


def store(table: Any, folder: Path, kind: str) -> Path:
    if kind == "save_to_disk":
        table.save_to_disk(folder / "table")
        return folder / "table"
    if kind == "dictionary":
        datasets.DatasetDict({"train": table}).save_to_disk(folder / "table")
        return folder / "table"
    (folder / "table").mkdir()
    table.to_parquet(folder / "table" / "part-0.parquet")
    return folder / "table" / "part-0.parquet" if kind == "parquet" else folder / "table"


@pytest.mark.parametrize("kind", ["parquet", "folder", "save_to_disk", "dictionary"])
def test_embedded_images_are_read_when_they_are_needed(tmp_path: Path, kind: str) -> None:
    conversations = read_instructions(store(one_image_each(), tmp_path, kind))
    assert [conversation.id for conversation in conversations] == ["a", "b", "c"]
    assert [len(conversation.images) for conversation in conversations] == [1, 0, 1]
    for conversation, colour in ((conversations[0], (255, 0, 0)), (conversations[2], (0, 0, 255))):
        assert isinstance(conversation.images[0], EmbeddedImage)
        assert open_image(conversation.images[0]).getpixel((0, 0)) == colour


def test_several_images_in_a_cell_and_the_messages_format(tmp_path: Path) -> None:
    (conversation,) = read_instructions(store(several_images(), tmp_path, "parquet"))
    assert conversation.turns == (("user", "<image><image>Q"), ("assistant", "A"))
    assert [open_image(image).getpixel((0, 0)) for image in conversation.images] == [(255, 0, 0), (0, 0, 255)]
    assert "row 0, column 'images', image 1" in conversation.images[1].name  # type: ignore[union-attr]


def test_columns_of_plain_bytes(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    table = datasets.Dataset.from_dict({"image": [encoded("red")["bytes"]], "conversations": [turns]})
    (conversation,) = read_instructions(store(table, tmp_path, "parquet"))
    assert open_image(conversation.images[0]).getpixel((0, 0)) == (255, 0, 0)


def test_an_image_that_is_only_a_path_is_not_followed(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": None, "path": "/etc/hostname"}], "conversations": [turns]},
        features=datasets.Features(
            {
                "image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
                "conversations": datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
            }
        ),
    )
    (conversation,) = read_instructions(store(table, tmp_path, "parquet"))
    with pytest.raises(BadImage, match="only the path '/etc/hostname'"):
        open_image(conversation.images[0])


def test_a_stream_gives_images_that_are_not_decoded(tmp_path: Path) -> None:
    store(one_image_each(), tmp_path, "folder")
    rows = list(iterate_table(str(tmp_path / "table"), "train", streaming=True))
    assert rows[0]["image"]["bytes"] == encoded("red")["bytes"]
    assert rows[1]["image"] is None


def test_tables_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="without parquet files"):
        read_instructions(tmp_path)
    folder = store(one_image_each(), tmp_path, "dictionary")
    with pytest.raises(ValueError, match="no split 'test'; it has train"):
        read_instructions(folder, split="test")
    with pytest.raises(ValueError, match="without streaming"):
        list(iterate_table(str(folder), "train", streaming=True))
    with pytest.raises(FileNotFoundError, match="neither a file, nor a folder, nor"):
        read_instructions("llava_v1_5_mix665k.json")


def test_a_table_that_fits_no_format_says_so(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"question": ["Q"], "answer": ["A"]})
    with pytest.raises(UnknownFormat, match=r"keys \['answer', 'question'\]"):
        read_instructions(store(table, tmp_path, "parquet"))
