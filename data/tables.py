"""`datasets` tables (parquet, `save_to_disk`, Hub) as rows, with embedded images left where they are."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from shortzip.data.errors import MissingExtra, MissingFile, UserError


@dataclass(frozen=True, slots=True)
class TableImage:
    """An image in a cell of a table; it is read when it is needed.

    Attributes:
        column: the dataset, memory-mapped, with this one column and in arrow's own format, which decodes nothing.
        column_name: its name.
        row: number of the row.
        place: which image of the cell; None where the cell is not a list.
    """

    column: Any
    column_name: str
    row: int
    place: int | None

    @property
    def name(self) -> str:
        """What messages call it."""
        place = "" if self.place is None else f", image {self.place}"
        return f"row {self.row}, column {self.column_name!r}{place}"

    def read(self) -> bytes:
        """The encoded image.

        Raises:
            OSError: the cell has no bytes but a path, which the table's author may have had a file at.
        """
        cell = self.column[self.row].column(0)[0].as_py()
        held = cell if self.place is None else cell[self.place]
        if isinstance(held, bytes):
            return held
        if not held["bytes"]:
            raise OSError(f"the table holds no bytes, only the path {held['path']!r}: embed the images into it")
        return held["bytes"]


def iterate_table(source: str, split: str, streaming: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, a folder (`save_to_disk`, or parquet files), or a dataset on the Hub.

    Columns of embedded images give `TableImage`s; as a stream, which is read once and not kept, they give
    `datasets`' own form of an image that is not decoded (its bytes and path).

    Raises:
        ImportError: the `datasets` extra is not installed.
        FileNotFoundError: there is no such file, folder or dataset.
        ValueError: no such split.
    """
    if streaming:
        yield from open_table(source, split, streaming=True).decode(False)
        return
    table = open_table(source, split).with_format("arrow")
    images = {name: table.select_columns([name]) for name in table.column_names if _holds_images(table, name)}
    number = 0
    for batch in table.iter(batch_size=256):
        held = {name: _images_per_row(batch.column(name)) for name in images}
        for place, row in enumerate(batch.drop_columns(list(images)).to_pylist()):
            for name, column in images.items():
                there = held[name][place]
                if there is None:
                    row[name] = TableImage(column, name, number, None)
                else:
                    row[name] = [
                        TableImage(column, name, number, image) if is_there else None
                        for image, is_there in enumerate(there)
                    ]
            yield row
            number += 1


def check_source(source: str) -> None:
    """Raises FileNotFoundError for what is neither a file, nor a folder, nor could be the name of a Hub dataset."""
    is_hub_name = (
        source.count("/") == 1 and not source.startswith((".", "/")) and Path(source).suffix not in (".json", ".jsonl")
    )
    if not Path(source).exists() and not is_hub_name:
        raise MissingFile(f"{source} is neither a file, nor a folder, nor the name of a dataset on the Hub")


def open_table(source: str, split: str, streaming: bool = False) -> Any:
    """The `datasets.Dataset`, memory-mapped; as a stream, the `datasets.IterableDataset`.

    Raises:
        ImportError: the `datasets` extra is not installed.
        FileNotFoundError: there is no such file, folder or dataset.
        ValueError: no such split, or a stream of what `save_to_disk` wrote.
    """
    check_source(source)
    path = Path(source)
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra(f"reading {source} needs the datasets package: pip install 'shortzip[datasets]'") from error
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        if streaming:
            raise UserError(f"{source} was written by save_to_disk and lies here whole: read it without streaming")
        table: Any = datasets.load_from_disk(str(path))
        if isinstance(table, datasets.DatasetDict):
            if split not in table:
                raise UserError(f"{source} has no split {split!r}; it has {', '.join(sorted(table))}")
            table = table[split]
        return table
    if path.exists():
        files = [str(path)] if path.is_file() else sorted(str(file) for file in path.rglob("*.parquet"))
        if not files:
            raise MissingFile(f"{source} is a folder without parquet files and was not written by save_to_disk")
        return datasets.load_dataset("parquet", data_files={split: files}, split=split, streaming=streaming)
    try:
        return datasets.load_dataset(source, split=split, streaming=streaming)
    except OSError as error:
        raise MissingFile(
            f"{source} is neither a file or folder here nor a dataset that the Hub gives out ({error})"
        ) from error


def _holds_images(table: Any, name: str) -> bool:
    """Whether a column holds encoded images: bytes, `datasets`' struct of bytes and path, or lists of either."""
    import pyarrow

    held = table.features.arrow_schema.field(name).type
    if pyarrow.types.is_list(held) or pyarrow.types.is_large_list(held):
        held = held.value_type
    if pyarrow.types.is_struct(held):
        return {held.field(place).name for place in range(held.num_fields)} == {"bytes", "path"}
    return pyarrow.types.is_binary(held) or pyarrow.types.is_large_binary(held)


def _images_per_row(cells: Any) -> list[list[bool] | None]:
    """For each cell of a list column, which of its images are there (one may be null); for a cell that is a single
    image None, or nothing where there is none."""
    import pyarrow
    import pyarrow.compute

    if pyarrow.types.is_list(cells.type) or pyarrow.types.is_large_list(cells.type):
        there = iter(pyarrow.compute.list_flatten(cells).is_valid().to_pylist())
        lengths = pyarrow.compute.list_value_length(cells).to_pylist()
        return [list(islice(there, length or 0)) for length in lengths]
    return [None if valid else [] for valid in cells.is_valid().to_pylist()]
