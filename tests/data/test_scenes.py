"""The demo's scenes: reproducible, and every answer true of the picture's own list of objects."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from shortzip.data.generated.scene_questions import KINDS, NUMBERS, ask, scene_row, write_scenes
from shortzip.data.generated.scenes import CANVAS, CELL, PLACES, render_scene, sample_scene


def test_a_scene_is_a_function_of_seed_and_index():
    first, again, other = sample_scene(5, 7), sample_scene(5, 7), sample_scene(6, 7)
    assert first == again
    assert first != other
    assert np.array_equal(render_scene(first), render_scene(again))
    assert not np.array_equal(render_scene(first), render_scene(other))


def test_objects_keep_to_their_cell_and_are_told_apart():
    for index in range(300):
        objects = sample_scene(3, index).objects
        assert 1 <= len(objects) <= 5
        assert len({(item.color, item.shape) for item in objects}) == len(objects)
        assert [PLACES.index(item.place) for item in objects] == sorted(PLACES.index(item.place) for item in objects)
        for item in objects:
            cell = PLACES.index(item.place)
            assert (item.left // CELL, item.top // CELL) == (cell % 3, cell // 3)
            assert (item.left + item.diameter - 1) // CELL == cell % 3
            assert (item.top + item.diameter - 1) // CELL == cell // 3


def test_the_picture_shows_the_objects():
    """The middle of a filled shape has the shape's colour; the middle of a ring does not."""
    from shortzip.data.generated.scenes import COLORS

    seen = set()
    for index in range(100):
        scene = sample_scene(4, index)
        picture = render_scene(scene).astype(float)
        for item in scene.objects:
            y, x = item.top + item.diameter // 2, item.left + item.diameter // 2
            distance = np.abs(picture[y, x] - COLORS[item.color]).max()
            if item.shape != "ring":
                assert distance < 40, (index, item)
            seen.add(item.shape)
    assert len(seen) == 6


def _true_answer(scene, question: str) -> str | None:
    """Answers the plain question forms from the objects alone, by other code than the one that asks."""
    words = question.rstrip("?").split()
    objects = scene.objects
    if question.startswith("How many"):
        what = words[2]
        if what in ("objects", "shapes"):
            return NUMBERS[len(objects)]
        if words[3] == "objects":
            return NUMBERS[sum(item.color == what for item in objects)]
        return NUMBERS[sum(item.shape == {"crosses": "cross"}.get(what, what[:-1]) for item in objects)]
    if question.startswith("Is there a"):
        return "yes" if any((item.color, item.shape) == tuple(words[3:5]) for item in objects) else "no"
    if question.startswith("What is in the"):
        place = " ".join(words[4:])
        here = [item for item in objects if item.place == place]
        return f"a {here[0].size} {here[0].color} {here[0].shape}" if here else "nothing"
    if question.startswith(("Where is the", "In which part")):
        return next(item.place for item in objects if [item.color, item.shape] == words[-2:])
    if question.startswith("What size is the"):
        return next(item.size for item in objects if [item.color, item.shape] == words[-2:])
    return None


def test_answers_are_true():
    checked = set()
    for index in range(200):
        scene = sample_scene(8, index)
        for kind, question, answer in ask(scene, np.random.default_rng(index), turns=3):
            expected = _true_answer(scene, question)
            if expected is not None:
                assert answer == expected, (index, question)
                checked.add(kind)
            if kind in ("color", "shape"):
                told = [item for item in scene.objects if getattr(item, kind) == answer]
                other = "shape" if kind == "color" else "color"
                assert any(f" {getattr(item, other)}" in f" {question}" for item in told)
    assert checked >= {"count", "count_color", "count_shape", "existence", "at_place", "place", "size"}


def test_no_kind_can_be_guessed_beyond_half():
    answers: dict[str, list[str]] = {kind: [] for kind in (*KINDS, "follow_up")}
    for index in range(1000):
        for kind, _, answer in ask(sample_scene(9, index), np.random.default_rng(index), turns=2):
            answers[kind].append(answer)
    guessed = sum(max(given.count(answer) for answer in set(given)) for given in answers.values())
    assert guessed / sum(len(given) for given in answers.values()) < 0.4


def test_write_scenes_is_llavas_json_and_a_fraction_is_nested(tmp_path):
    tenth = json.loads(write_scenes(tmp_path / "tenth", seed=11, count=60, fraction=0.1).read_text())
    half = json.loads(write_scenes(tmp_path / "half", seed=11, count=60, fraction=0.5).read_text())
    assert (len(tenth), len(half)) == (6, 30)
    assert {row["id"] for row in tenth} < {row["id"] for row in half}
    assert len(list((tmp_path / "tenth" / "images").iterdir())) == 6
    for row in half:
        assert row["conversations"][0]["value"].startswith("<image>\n")
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * (len(row["conversations"]) // 2)
        with Image.open(tmp_path / "half" / "images" / row["image"]) as picture:
            assert picture.size == (CANVAS, CANVAS)
    with pytest.raises(ValueError, match="fraction"):
        write_scenes(tmp_path, seed=11, count=60, fraction=0.0)


def test_rows_and_pictures_are_the_recorded_ones():
    """The demo's figures hold for these very scenes: a change of the drawing code has to show."""
    row = scene_row(102, 3)
    digest = hashlib.sha256(json.dumps(row).encode() + render_scene(sample_scene(102, 3)).tobytes()).hexdigest()
    assert digest[:16] == "8aeaed25c4763b35"
