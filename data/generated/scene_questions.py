"""Questions about the demo's scenes, as conversations in LLaVA's instruction JSON.

Ten kinds: colour, shape, size, place, what is at a place, three counts, existence, and a description of everything.
One kind at random opens a conversation; a follow-up may refer back to the object just spoken of ("Where is it?").
Every answer follows from the picture alone, and few can be guessed: yes/no and small/large questions are a minority.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shortzip.data.errors import UserError
from shortzip.data.generated.scenes import (
    COLORS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    render_scene,
    sample_scene,
)

NUMBERS = ("zero", "one", "two", "three", "four", "five")

# (question, answer, the object that the question names or None)
QA = tuple[str, str, SceneObject | None]


def _pick(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


def _unique(scene: Scene, rng: np.random.Generator, attribute: str) -> SceneObject:
    """A random object, one whose `attribute` no other object shares where there is one."""
    values = [getattr(item, attribute) for item in scene.objects]
    alone = [item for item in scene.objects if values.count(getattr(item, attribute)) == 1]
    return _pick(rng, alone or scene.objects)


def _ask_color(scene: Scene, rng: np.random.Generator) -> QA:
    item = _unique(scene, rng, "shape")
    if [other.shape for other in scene.objects].count(item.shape) == 1:
        question = _pick(rng, ["What color is the {}?", "What is the color of the {}?"]).format(item.shape)
    else:
        question = f"What color is the {item.shape} in the {item.place}?"
    return question, item.color, item


def _ask_shape(scene: Scene, rng: np.random.Generator) -> QA:
    item = _unique(scene, rng, "color")
    if [other.color for other in scene.objects].count(item.color) == 1:
        question = _pick(rng, ["What shape is the {} object?", "What is the shape of the {} object?"])
        return question.format(item.color), item.shape, item
    return f"What shape is the {item.color} object in the {item.place}?", item.shape, item


def _ask_size(scene: Scene, rng: np.random.Generator) -> QA:
    item = _pick(rng, scene.objects)
    return f"What size is the {item.color} {item.shape}?", item.size, item


def _ask_place(scene: Scene, rng: np.random.Generator) -> QA:
    item = _pick(rng, scene.objects)
    question = _pick(rng, ["Where is the {} {}?", "In which part of the picture is the {} {}?"])
    return question.format(item.color, item.shape), item.place, item


def _ask_at_place(scene: Scene, rng: np.random.Generator) -> QA:
    if rng.random() < 0.15:
        empty = [place for place in PLACES if place not in {item.place for item in scene.objects}]
        return f"What is in the {_pick(rng, empty)}?", "nothing", None
    item = _pick(rng, scene.objects)
    return f"What is in the {item.place}?", f"a {item.size} {item.color} {item.shape}", item


def _ask_count(scene: Scene, rng: np.random.Generator) -> QA:
    question = _pick(rng, ["How many objects are there?", "How many shapes do you see?"])
    return question, NUMBERS[len(scene.objects)], None


def _ask_count_color(scene: Scene, rng: np.random.Generator) -> QA:
    color = _pick(rng, scene.objects).color if rng.random() < 0.75 else _pick(rng, tuple(COLORS))
    count = [item.color for item in scene.objects].count(color)
    return f"How many {color} objects are there?", NUMBERS[count], None


def _ask_count_shape(scene: Scene, rng: np.random.Generator) -> QA:
    shape = _pick(rng, scene.objects).shape if rng.random() < 0.75 else _pick(rng, SHAPES)
    count = [item.shape for item in scene.objects].count(shape)
    plural = {"cross": "crosses"}.get(shape, shape + "s")
    return f"How many {plural} are there?", NUMBERS[count], None


def _ask_existence(scene: Scene, rng: np.random.Generator) -> QA:
    item = _pick(rng, scene.objects)
    if rng.random() < 0.5:
        return f"Is there a {item.color} {item.shape}?", "yes", item
    present = {(other.color, other.shape) for other in scene.objects}
    while True:  # half right, so that neither colour nor shape alone gives the answer away
        pair = (item.color, _pick(rng, SHAPES)) if rng.random() < 0.5 else (_pick(rng, tuple(COLORS)), item.shape)
        if pair not in present:
            return f"Is there a {pair[0]} {pair[1]}?", "no", None


def _ask_description(scene: Scene, rng: np.random.Generator) -> QA:
    question = _pick(rng, ["Describe the picture.", "What do you see in this picture?"])
    parts = [f"a {item.size} {item.color} {item.shape} in the {item.place}" for item in scene.objects]
    text = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return question, text, None


_KINDS: dict[str, tuple[Callable[[Scene, np.random.Generator], QA], float]] = {
    "color": (_ask_color, 0.16),
    "shape": (_ask_shape, 0.16),
    "size": (_ask_size, 0.08),
    "place": (_ask_place, 0.16),
    "at_place": (_ask_at_place, 0.12),
    "count": (_ask_count, 0.06),
    "count_color": (_ask_count_color, 0.06),
    "count_shape": (_ask_count_shape, 0.06),
    "existence": (_ask_existence, 0.08),
    "description": (_ask_description, 0.06),
}
KINDS = tuple(_KINDS)
_FOLLOW_UPS = (
    ("Where is it?", "place"),
    ("What size is it?", "size"),
    ("What color is it?", "color"),
    ("What shape is it?", "shape"),
)


def ask(
    scene: Scene, rng: np.random.Generator, turns: int = 1, kinds: Sequence[str] = KINDS
) -> list[tuple[str, str, str]]:
    """A conversation of `turns` questions about `scene`, of the given kinds (and follow-ups).

    Returns `(kind, question, answer)` per turn; the kind of a follow-up about the same object is `"follow_up"`.
    """
    shares = np.array([_KINDS[kind][1] for kind in kinds])
    shares /= shares.sum()
    conversation: list[tuple[str, str, str]] = []
    topic: SceneObject | None = None
    while len(conversation) < turns:
        questions = {question for _, question, _ in conversation}
        text = " ".join(part for turn in conversation for part in turn[1:])
        open_ends = [
            (question, getattr(topic, attribute))
            for question, attribute in _FOLLOW_UPS
            if topic is not None and getattr(topic, attribute) not in text and question not in questions
        ]
        if open_ends and rng.random() < 0.5:
            question, answer = _pick(rng, open_ends)
            conversation.append(("follow_up", question, answer))
            continue
        kind = kinds[int(rng.choice(len(kinds), p=shares))]
        question, answer, item = _KINDS[kind][0](scene, rng)
        if question not in questions:
            conversation.append((kind, question, answer))
            topic = item
    return conversation


def scene_row(seed: int, index: int) -> dict[str, Any]:
    """Row `index` of the demo's instructions in LLaVA's JSON: one picture, and one to four turns about it."""
    scene = sample_scene(seed, index)
    rng = np.random.default_rng((seed, index, 2))
    turns = ask(scene, rng, int(rng.choice([1, 2, 3, 4], p=[0.4, 0.3, 0.2, 0.1])))
    conversations = []
    for position, (_, question, answer) in enumerate(turns):
        prefix = "<image>\n" if position == 0 else ""
        conversations.append({"from": "human", "value": prefix + question})
        conversations.append({"from": "gpt", "value": answer})
    return {"id": f"scene-{seed}-{index}", "image": f"scene-{seed}-{index}.png", "conversations": conversations}


def write_scenes(folder: str | Path, seed: int, count: int, fraction: float = 1.0) -> Path:
    """Writes `instructions.json` with a random `fraction` of `count` rows, and only the pictures that these rows need.

    Returns the JSON's path; the pictures lie in `folder/images`. Rows keep the index they have in the whole set, so a
    larger fraction of the same seed contains the smaller one.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"fraction is {fraction}: a number above 0 and up to 1 is needed")
    order = np.random.default_rng((seed, 3)).permutation(count)[: max(1, round(count * fraction))]
    rows = [scene_row(seed, int(index)) for index in sorted(order)]
    images = Path(folder) / "images"
    images.mkdir(parents=True, exist_ok=True)
    for index, row in zip(sorted(order), rows, strict=True):
        Image.fromarray(render_scene(sample_scene(seed, int(index)))).save(images / row["image"])
    path = Path(folder) / "instructions.json"
    path.write_text(json.dumps(rows, indent=1))
    return path


def vocabulary_text() -> list[str]:
    """Every sentence form the scenes use, for training the demo's tokenizer."""
    words = [*COLORS, *SHAPES, *SIZES, *PLACES, *NUMBERS, "crosses", "yes", "no", "nothing"]
    sentences = [question for question, _ in _FOLLOW_UPS] + [f"a {word}" for word in words]
    for index in range(400):
        sentences += [
            f"{question} {answer}"
            for _, question, answer in ask(sample_scene(0, index), np.random.default_rng(index), 4)
        ]
    return sentences
