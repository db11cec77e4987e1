"""A generated stand-in for LLaVA-1.5's instruction mix: its size, its sources, the shape and length of its rows.

Rows per task are the published thousands (arXiv 2310.03744, table 7), completed so that they sum to the 665 298
rows of the released file, 40 688 of them without an image. The turns per row follow from the published question counts
of each dataset. The lengths of LLaVA-Instruct's three kinds are log-normal fits to 30 real instruction/answer pairs of
each; those of the others are set by hand to their datasets' published mean lengths. The words mean nothing: only
lengths do.
"""

import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class MixTask:
    """One dataset of the mix.

    Attributes:
        folder: what its image paths begin with; "" without images.
        rows: how many rows it has.
        turns: fewest and most questions of a row (uniform).
        question: mean and deviation of the logarithm of a question's words.
        answer: the same of an answer's words.
        form: "words", a "box" of four numbers, or a "letter" out of four options.
        prompt: what is said once, after the first question.
    """

    folder: str
    rows: int
    turns: tuple[int, int]
    question: tuple[float, float]
    answer: tuple[float, float]
    form: Literal["words", "box", "letter"] = "words"
    prompt: str = ""


SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
BOX = "\nPlease provide the bounding box coordinate of the region this sentence describes."
CAPTION = "\nProvide a one-sentence caption for the provided image."

MIX665K: dict[str, MixTask] = {
    "llava conversation": MixTask("coco/train2017", 58_000, (3, 6), (2.20, 0.25), (2.72, 0.44)),
    "llava detail": MixTask("coco/train2017", 23_000, (1, 1), (2.02, 0.36), (4.35, 0.24)),
    "llava reasoning": MixTask("coco/train2017", 77_000, (1, 1), (2.47, 0.24), (4.63, 0.21)),
    "sharegpt": MixTask("", 40_688, (1, 6), (3.0, 1.0), (4.9, 0.8)),
    "vqav2": MixTask("coco/train2017", 82_783, (3, 8), (1.80, 0.25), (0.1, 0.2), prompt=SHORT),
    "gqa": MixTask("gqa/images", 72_140, (4, 22), (2.07, 0.35), (0.05, 0.2), prompt=SHORT),
    "okvqa": MixTask("coco/train2017", 8_998, (1, 1), (2.10, 0.3), (0.2, 0.3), prompt=SHORT),
    "ocrvqa": MixTask("ocr_vqa/images", 80_000, (4, 6), (1.80, 0.25), (1.0, 0.7), prompt=SHORT),
    "a-okvqa": MixTask("coco/train2017", 66_160, (1, 1), (2.15, 0.3), (0.0, 0.0), "letter", LETTER),
    "textcaps": MixTask("textvqa/train_images", 21_953, (1, 1), (3.2, 0.6), (2.45, 0.3), prompt=CAPTION),
    "refcoco": MixTask("coco/train2017", 48_159, (3, 10), (1.3, 0.5), (1.3, 0.5), "box", BOX),
    "vg": MixTask("vg/VG_100K", 86_417, (8, 10), (1.6, 0.4), (1.6, 0.4), "box", BOX),
}
ROWS = sum(task.rows for task in MIX665K.values())

_WORDS = re.findall(
    r"\w+",
    """
    the a of in and is on to with are there an it image at this that which as from by for be can its their one two
    man woman person people street table train cat dog bus kitchen water plate pizza food window building small
    large white black red blue green wooden standing sitting holding wearing riding playing next near behind front
    left right side background while appears possibly including various situated overall suggests scene atmosphere
    environment additionally surrounding visible located several different importance enjoying conversation what
    color how many where who does why picture shown type animal time day kind likely might reason could because
    """,
)


def rows_of_the_mix(seed: int = 0, rows: int = ROWS) -> Iterator[dict[str, Any]]:
    """Rows in LLaVA's JSON, tasks mixed, in the proportions of the mix."""
    rng = random.Random(seed)
    # Slices of one long text: drawing every word would take minutes at full size.
    words = rng.choices(_WORDS, k=200_000)
    # A comma or full stop every nine words, as in the real pairs.
    words[::9] = [word + rng.choice(",.") for word in words[::9]]
    names = list(MIX665K)
    order = rng.choices(names, weights=[MIX665K[name].rows for name in names], k=rows) if rows != ROWS else []
    if not order:
        order = [name for name in names for _ in range(MIX665K[name].rows)]
        rng.shuffle(order)
    for number, name in enumerate(order):
        yield _row(number, MIX665K[name], words, rng)


def write_mix(path: Path, seed: int = 0, rows: int = ROWS, indent: int | None = 2) -> None:
    """Write the rows as a JSON array: about 1 GB at full size."""
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows_of_the_mix(seed, rows)):
            file.write("[\n" if number == 0 else ",\n")
            file.write(json.dumps(row, indent=indent))
        file.write("\n]\n" if rows else "[]\n")


def _row(number: int, task: MixTask, words: list[str], rng: random.Random) -> dict[str, Any]:
    name = f"{rng.randrange(10**6):012d}"
    row: dict[str, Any] = {"id": name}
    if task.folder:
        row["image"] = f"{task.folder}/{name}.jpg"
    turns = []
    for turn in range(rng.randint(*task.turns)):
        question = _said(task.question, words, rng).capitalize() + "?"
        if task.form == "letter":
            question += "".join(f"\n{letter}. {_said((0.3, 0.4), words, rng)}" for letter in "ABCD")
        if turn == 0:
            question += task.prompt
            question = f"<image>\n{question}" if task.folder else question
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": _answer(task, words, rng)}]
    row["conversations"] = turns
    return row


def _answer(task: MixTask, words: list[str], rng: random.Random) -> str:
    if task.form == "letter":
        return rng.choice("ABCD")
    if task.form == "box" and rng.random() < 0.5:
        return "[" + ", ".join(f"{rng.random():.2f}" for _ in range(4)) + "]"
    return _said(task.answer, words, rng).capitalize()


def _said(length: tuple[float, float], words: list[str], rng: random.Random) -> str:
    count = min(900, max(1, round(math.exp(rng.gauss(*length)))))
    start = int(rng.random() * (len(words) - count))
    return " ".join(words[start : start + count])


def estimated_tokens(text: str) -> int:
    """Tokens of an English text in Llama's vocabulary, roughly: a word is one, a long one two, a digit or mark one."""
    return sum(1 + (len(piece) > 8) for piece in re.findall(r"[A-Za-z]+|\d|[^\sA-Za-z\d]|\n", text))


def estimated_length(row: dict[str, Any], visual_tokens: int) -> int:
    """Tokens of a row in the Vicuna prompt: 35 before the first turn, 9 around each question and answer."""
    turns = row["conversations"]
    text = sum(estimated_tokens(turn["value"].replace("<image>", "")) for turn in turns)
    return 35 + text + 9 * (len(turns) // 2) + (visual_tokens if "image" in row else 0)
