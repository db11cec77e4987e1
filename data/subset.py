"""A share of an instruction mix as a file, with the lists of images and videos it needs and a report on what was left
out."""

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from shortzip.data.data_uris import InlineImage
from shortzip.data.drops import BadSample, DropLog
from shortzip.data.errors import UserError
from shortzip.data.images import (
    BadImage,
    image_bytes,
    image_suffix,
)
from shortzip.data.instructions import EXPECTED, Conversation, UnknownFormat, parse_row, parse_rows
from shortzip.data.json_rows import JsonRowError, iterate_json_rows
from shortzip.data.strata import Ranking, check_drawable, source_of, too_small
from shortzip.data.subset_folder import IMAGES, REPORT, SUBSET, new_subset
from shortzip.data.subset_media import Media, Progress
from shortzip.data.tables import iterate_table
from shortzip.data.videos import VideoSource


@dataclass(frozen=True, slots=True)
class SubsetOptions:
    """What to draw, and from what.

    Attributes:
        instructions: a JSON, JSONL or parquet file, a folder of a `datasets` table, or a dataset on the Hub.
        output: folder for the subset, its lists of images and videos and the report.
        image_root: folder that paths of images and videos are relative to; None: these are not looked for.
        fraction: share of the usable rows, above 0 and at most 1.
        seed: another seed draws other rows.
        keep_text_only: keep rows without an image; they give the projector no gradient.
        missing: "keep" rows whose image or video is not there yet, or "drop" them.
        verify_images: decode every image, and every video's frames at `VERIFIED_FRAMES` places; rows with one that
            cannot be decoded are dropped.
        max_bad_fraction: more malformed rows than this share are an error.
        num_workers: processes that decode; None: one per core.
        split: split of a `datasets` table; None: "train".
        streaming: read a dataset on the Hub once, as a stream: each row is taken with the probability `fraction`, by
            its hash, so that the sources' shares hold on average only.
        overwrite: write into a folder that is not empty, and replace what has the names of a subset's files there.
    """

    instructions: str
    output: Path
    image_root: Path | None = None
    fraction: float = 0.1
    seed: int = 0
    keep_text_only: bool = False
    missing: Literal["keep", "drop"] = "keep"
    verify_images: bool = False
    max_bad_fraction: float = 0.01
    num_workers: int | None = None
    split: str | None = None
    streaming: bool = False
    overwrite: bool = False


@dataclass(slots=True)
class _Reader:
    """Rows of the instructions, twice: all of them, then the chosen ones."""

    options: SubsetOptions
    starts: "array[int]" = field(default_factory=lambda: array("Q"))
    sizes: "array[int]" = field(default_factory=lambda: array("Q"))

    @property
    def is_json(self) -> bool:
        path = Path(self.options.instructions)
        return path.is_file() and path.suffix != ".parquet"

    def all(self) -> Iterator[Any]:
        """Every row. Raises UserError where they cannot be read."""
        source, split = self.options.instructions, self.options.split or "train"
        try:
            if not self.is_json:
                yield from iterate_table(source, split, self.options.streaming)
                return
            for row in iterate_json_rows(source):
                self.starts.append(row.start)
                self.sizes.append(row.size)
                yield row.value
        except JsonRowError as error:
            raise UnknownFormat(f"{source}: {error}. {EXPECTED}.") from error
        except UserError:
            raise
        except OSError as error:  # beneath a folder that is being written, where it would be taken for that one's
            raise UserError(f"{source} cannot be read: {error.strerror or error}") from error

    def chosen(self, numbers: Sequence[int]) -> Iterator[Any]:
        if not self.is_json:
            wanted = set(numbers)
            rows = iterate_table(self.options.instructions, self.options.split or "train")
            yield from (row for number, row in enumerate(rows) if number in wanted)
            return
        with open(self.options.instructions, "rb") as file:
            for number in numbers:
                file.seek(self.starts[number])
                yield json.loads(file.read(self.sizes[number]))


def prepare_subset(options: SubsetOptions, progress: Progress) -> dict[str, Any]:
    """Draw a subset and write `subset.json`, `images.txt`, `missing_images.txt`, `videos.txt` and `missing_videos.txt`
    where rows have videos, `dropped.jsonl` and `report.json`.

    The images of a table are written to `images/` in the output folder, which is the image root then. The folder
    appears whole when all is done; cut off before, the same command begins anew.

    Returns:
        The report: rows, sources, drops by reason, answer lengths, images.

    Raises:
        UnknownFormat: the rows fit no known format.
        TooManyBadSamples: more rows are malformed than `max_bad_fraction` allows.
        UserError: options that do not go together, a fraction outside (0, 1], or no row is left.
        FileInTheWay: the output folder holds something already.
        Busy: another process writes to it.
        CannotWrite: the disk is full, or the folder cannot be written to.
    """
    reader = _Reader(options)
    _check_options(options, reader.is_json)
    with new_subset(options.output, options.overwrite) as folder:
        return _write_subset(options, folder, reader, progress)


def _check_options(options: SubsetOptions, is_json: bool) -> None:
    if not 0 < options.fraction <= 1:
        raise UserError(f"fraction is {options.fraction}; above 0 and at most 1")
    if is_json and options.split is not None:
        raise UserError(f"split is {options.split!r}, but {options.instructions} is a JSON file, which has no splits")
    if is_json and options.streaming:
        raise UserError(f"streaming is for datasets on the Hub, and {options.instructions} is a JSON file")
    if is_json and options.image_root is None:
        _refuse_without_root(options)


def _refuse_without_root(options: SubsetOptions) -> None:
    for is_set, name in ((options.verify_images, "verify_images"), (options.missing == "drop", "drop_missing")):
        if is_set:
            raise UserError(f"{name} needs image_root, the folder that image paths are relative to")


def _write_subset(options: SubsetOptions, folder: Path, reader: _Reader, progress: Progress) -> dict[str, Any]:
    drops = DropLog("skip", options.max_bad_fraction)
    pick = _pick_from_stream if options.streaming else _pick
    ranking, picked = pick(reader, folder / IMAGES, drops, progress)
    embedded = _embedded(picked, folder / IMAGES, options)
    root = folder / IMAGES if embedded else options.image_root
    if root is None:
        _refuse_without_root(options)
    media = Media(root, options.verify_images, options.num_workers, options.missing == "keep")
    media.look([conversation for conversation, _ in picked], progress)
    pairs = [pair for pair in picked if not _drop_for_media(pair[0], media, options, drops)]
    if ranking.ranks and not picked:
        raise UserError(too_small(options.fraction, len(ranking.ranks)))
    if not pairs:
        raise UserError(f"no row is left for the subset. {drops.summary()}.")
    drops.placed = sum(conversation.is_placed for conversation, _ in pairs)
    images = sorted({path for conversation, _ in pairs for path in conversation.images if isinstance(path, str)})
    missing = media.missing_images(images)
    if embedded:
        root = options.output / IMAGES
    digest = _write_rows(folder / SUBSET, [row for _, row in pairs])
    _write_lines(folder / "images.txt", images)
    _write_lines(folder / "missing_images.txt", missing)
    videos = list(dict.fromkeys(video for conversation, _ in pairs for video in conversation.videos))
    missing_videos = media.missing_videos(videos)
    if videos:
        _write_lines(folder / "videos.txt", _paths_of(videos))
        _write_lines(folder / "missing_videos.txt", _paths_of(missing_videos))
    drops.write(folder / "dropped.jsonl")
    report = {
        "instructions": options.instructions,
        "fraction": options.fraction,
        "seed": options.seed,
        "image_root": None if root is None else str(root),
        "rows": len(ranking.ranks) + sum(drops.counts.get(reason, 0) for reason in _BEFORE_THE_DRAW),
        "usable": len(ranking.ranks),
        "selected": len(picked),
        "written": len(pairs),
        "dropped": drops.counts,
        "images_placed_at_the_start": drops.placed,
        "sources": _by_source(ranking.counts(), picked, pairs),
        "answer_characters": answer_histogram([conversation for conversation, _ in pairs]),
        "images": len(images),
        "missing_images": len(missing),
        "videos": len(videos),
        "missing_videos": len(missing_videos),
        "images_verified": options.verify_images,
        "sha256": digest,
    }
    (folder / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return report


_BEFORE_THE_DRAW = ("malformed_row", "placeholder_count", "text_only", "no_answer", "outside_image_root")
Picked = list[tuple[Conversation, dict[str, Any]]]


def _by_source(rows: Mapping[str, int], picked: Picked, pairs: Picked) -> dict[str, dict[str, int]]:
    """Of each source: its rows, those picked for the subset, and those written, whose images can be used."""
    selected, written = (Counter(source_of(conversation) for conversation, _ in part) for part in (picked, pairs))
    return {name: {"rows": rows[name], "selected": selected[name], "written": written[name]} for name in sorted(rows)}


def _usable(reader: _Reader, drops: DropLog, progress: Progress) -> Iterator[tuple[int, Conversation, Any]]:
    """Number, conversation and row of every row that could be chosen; the others are dropped."""
    source, root = reader.options.instructions, reader.options.image_root
    number = -1
    for number, (row, parsed) in enumerate(parse_rows(reader.all(), source)):
        if number % 4096 == 0:
            progress("reading", number, None)
        try:
            if isinstance(parsed, BadSample):
                raise parsed
            check_drawable(parsed, source, root, reader.options.keep_text_only)
        except BadSample as error:
            drops.add(error)
            drops.check(number + 1)
        else:
            yield number, parsed, row
    progress("reading", number + 1, number + 1)
    drops.check(number + 1, minimum=1)


def _pick(reader: _Reader, images: Path, drops: DropLog, progress: Progress) -> tuple[Ranking, Picked]:
    ranking = Ranking()
    for number, conversation, _ in _usable(reader, drops, progress):
        ranking.add(conversation, number, reader.options.seed)
    numbers = ranking.select(reader.options.fraction)
    picked: Picked = []
    for done, (number, row) in enumerate(zip(numbers, reader.chosen(numbers), strict=True)):
        _take(picked, parse_row(row, number, reader.options.instructions), row, number, images, drops)
        if done % 1024 == 0:
            progress("fetching the chosen rows", done, len(numbers))
    progress("fetching the chosen rows", len(numbers), len(numbers))
    return ranking, picked


def _pick_from_stream(reader: _Reader, images: Path, drops: DropLog, progress: Progress) -> tuple[Ranking, Picked]:
    ranking = Ranking()
    picked: Picked = []
    limit = int(reader.options.fraction * 2**64)
    for number, conversation, row in _usable(reader, drops, progress):
        ranking.add(conversation, number, reader.options.seed)
        if ranking.ranks[-1] < limit:
            _take(picked, conversation, row, number, images, drops)
    return ranking, picked


def _take(picked: Picked, conversation: Conversation, row: Any, number: int, folder: Path, drops: DropLog) -> None:
    """Put a chosen row on the list. A table's images become files in `folder`, and their row one that names them."""
    files: dict[str, bytes] = {}
    try:
        if all(isinstance(image, str | InlineImage) for image in conversation.images):
            for image in conversation.images:
                if isinstance(image, InlineImage):
                    image_suffix(image)  # is it an image at all?
            picked.append((conversation, row))
            return
        for place, image in enumerate(conversation.images):
            if isinstance(image, str):
                raise BadImage("missing_image", image, "stands beside embedded images in the same row")
            content = image_bytes(image)
            files[f"{number:08d}-{place}.{image_suffix(content)}"] = content
    except BadImage as error:
        drops.add(BadSample(error.problem, conversation.id, str(error)))
        return
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    renamed = replace(conversation, images=tuple(files))
    picked.append((renamed, as_llava_row(renamed)))


def _embedded(picked: Picked, folder: Path, options: SubsetOptions) -> bool:
    """Whether the images came with the rows, and lie in `folder` now. Raises UserError where only some did."""
    if not folder.is_dir():
        return False
    written = set(os.listdir(folder))
    for conversation, _ in picked:
        if not written.issuperset(image for image in conversation.images if isinstance(image, str)):
            raise UserError(
                f"{options.instructions}: row {conversation.id!r} names the image {conversation.images[0]!r}, while "
                "others hold their images: divide them into two tables"
            )
    return True


def as_llava_row(conversation: Conversation) -> dict[str, Any]:
    """A conversation, its images being paths, as a row of LLaVA's JSON."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    row: dict[str, Any] = {"id": conversation.id}
    if conversation.images:
        row["image"] = conversation.images[0] if len(conversation.images) == 1 else list(conversation.images)
    if conversation.videos:
        row["video"] = list(conversation.videos)
    row["conversations"] = [{"from": names[role], "value": text} for role, text in conversation.turns]
    return row


def _drop_for_media(conversation: Conversation, media: Media, options: SubsetOptions, drops: DropLog) -> bool:
    found = media.problem_of(conversation)
    if found is not None:
        drops.add(BadSample(found[0], conversation.id, found[1], options.instructions))
    return found is not None


def _paths_of(videos: Sequence[VideoSource]) -> list[str]:
    """The paths that videos are named by: of files and folders, or of frames."""
    return sorted({path for video in videos for path in ((video,) if isinstance(video, str) else video)})


def answer_histogram(conversations: Sequence[Conversation]) -> dict[str, int]:
    """Answers by their length in characters, in steps of a factor of two."""
    bins: Counter[int] = Counter()
    for conversation in conversations:
        for role, text in conversation.turns:
            if role == "assistant":
                bins[len(text).bit_length()] += 1
    steps = range(max(bins, default=-1) + 1)
    names = {0: "0", 1: "1"}
    return {names.get(step, f"{2 ** (step - 1)}-{2**step - 1}"): bins[step] for step in steps}


def _write_rows(file: Path, rows: Sequence[Any]) -> str:
    """A JSON array with one row a line; returns its SHA-256."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    content = f"[\n{lines}\n]\n".encode(errors="backslashreplace")  # half a character becomes JSON's escape for it
    file.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def _write_lines(file: Path, lines: Sequence[str]) -> None:
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
