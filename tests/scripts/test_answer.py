"""A file of questions: the answers of `generate`, whatever the batch, and after whatever kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shortzip.data.errors import FileInTheWay, UserError
from shortzip.data.images import open_image
from shortzip.data.supervision import Supervision
from shortzip.reduction.reductions import Reductions
from shortzip.scripts.answer import main
from shortzip.train.inputs.prompts import batch_prompts, encode_prompt
from shortzip.train.release.loading import load_release
from shortzip.train.serving.answers_file import Answerer, read_questions

LIMIT = 6


@pytest.fixture(scope="module")
def questions(tiny_held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The held-out conversations, one of them with an image that is not there."""
    rows = json.loads(tiny_held_out.read_text())[:8]
    rows.insert(
        3, {"id": "lost", "image": "images/none.png", "conversations": [{"from": "human", "value": "<image>x"}]}
    )
    path = tmp_path_factory.mktemp("questions") / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answer(questions: Path, release: Path, root: Path, *more: str) -> list[dict[str, Any]]:
    main([str(questions), "--model", str(release), "--image_root", str(root), "--max_new_tokens", str(LIMIT), *more])
    return [
        json.loads(line) for line in questions.with_name(f"{questions.stem}.answers.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def answers(questions: Path, tiny_release: Path, tiny_held_out: Path) -> list[dict[str, Any]]:
    return answer(questions, tiny_release, tiny_held_out.parent, "--batch_size", "4")


def test_they_are_those_of_generate_one_by_one(
    answers: list[dict[str, Any]], questions: Path, tiny_release: Path, tiny_held_out: Path
) -> None:
    model, processor = load_release(str(tiny_release))
    supervision = Supervision(processor, max_length=None)
    asked = read_questions(str(questions))
    assert [said["id"] for said in answers] == [question.id for question in asked]
    for question, said in zip(asked, answers, strict=True):
        assert question.turns[-1][0] == "user"
        if question.id == "lost":
            assert said["answer"] is None
            assert "there is no such file" in said["error"]
            continue
        images = [open_image(image, tiny_held_out.parent) for image in question.images]
        inputs = batch_prompts(supervision, [encode_prompt(supervision, question.turns, images)], model.device)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=LIMIT)[0, inputs["input_ids"].shape[1] :]
        assert said["answer"] == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert said["tokens"] == len(ids)
        assert "error" not in said


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_a_prompt_is_as_long_as_the_positions_that_it_takes(
    tiny_release: Path, tmp_path: Path, family: str, positions: str
) -> None:
    """Visual tokens that are left out keep their places where positions are original, and those end the model."""
    from tiny import write_next_release

    release = tiny_release if family == "llava" else write_next_release(tmp_path / "next")
    model, processor = load_release(str(release), Reductions.parse("6+3", positions=positions))
    _, plain = load_release(str(release), Reductions())
    Image.effect_noise((60, 20), 80).convert("RGB").save(tmp_path / "a.png")
    rows = [{"question_id": 1, "text": "<image>name the colour<image>", "image": ["a.png", "a.png"]}]
    (tmp_path / "asked.json").write_text(json.dumps(rows))
    questions = read_questions(str(tmp_path / "asked.json"))
    answerer = Answerer(model, Supervision(processor, max_length=None), str(tmp_path), LIMIT)
    counting = processor if positions == "compact" else plain
    tokens = len(Supervision(counting, max_length=None).prompt(questions[0], [(20, 60)] * 2))
    answerer.longest = tokens + LIMIT
    assert [said[0].error for said in answerer.answer(questions, [0], 1)] == [None]
    answerer.longest -= 1
    (said,) = (said[0] for said in answerer.answer(questions, [0], 1))
    assert said.answer is None
    assert f"and {LIMIT} of the answer, more than {answerer.longest} positions" in str(said.error)
    assert ("visual tokens that are left out" in str(said.error)) == (positions == "original")


def test_a_killed_command_continues_and_answers_nothing_twice(
    answers: list[dict[str, Any]],
    questions: Path,
    tiny_release: Path,
    tiny_held_out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = tmp_path / "asked.jsonl"
    copy.write_text(questions.read_text())
    batches: list[int] = []
    original = Answerer._batch

    def batch(self: Answerer, questions: Any, jobs: Any) -> Any:
        batches.append(len(jobs))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return original(self, questions, jobs)

    monkeypatch.setattr(Answerer, "_batch", batch)
    arguments = (copy, tiny_release, tiny_held_out.parent, "--batch_size", "2")
    with pytest.raises(KeyboardInterrupt, match="the same command continues"):
        answer(*arguments)
    partial = tmp_path / "asked.answers.jsonl.partial"
    assert not (tmp_path / "asked.answers.jsonl").exists()
    with partial.open("a") as file:
        file.write('{"place": 0, "id": "cut sh')  # as a kill leaves it
    assert answer(*arguments) == answers
    assert sum(batches) == 9 + 2  # the interrupted batch, once more
    assert [path.name for path in tmp_path.iterdir() if path != copy] == ["asked.answers.jsonl"]


@pytest.mark.parametrize("change", ["questions", "image", "model", "setting"])
def test_answers_of_something_else_are_not_continued(
    questions: Path, tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    from tiny import write_release

    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"question_id": 1, "text": "<image>is it bright?", "image": "a.png"}) + "\n")
    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "answer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            answer(asked, tiny_release, tmp_path)
    release, more = tiny_release, ()
    if change == "questions":
        asked.write_text(json.dumps({"question_id": 1, "text": "<image>name the colour", "image": "a.png"}) + "\n")
    elif change == "image":
        Image.new("RGB", (9, 9), "blue").save(tmp_path / "a.png")
    elif change == "model":
        release = write_release(tmp_path / "other", seed=1)
    else:
        more = ("--max_new_tokens", "3")
    with pytest.raises(FileInTheWay, match=r"other questions, of another model or other settings: give --overwrite"):
        answer(asked, release, tmp_path, *more)
    assert [said["id"] for said in answer(asked, release, tmp_path, *more, "--overwrite", "true")] == ["1"]


def test_answers_that_are_there_are_not_replaced_unasked(
    answers: list[dict[str, Any]], questions: Path, tiny_release: Path, tiny_held_out: Path
) -> None:
    with pytest.raises(FileInTheWay, match="exists already"):
        answer(questions, tiny_release, tiny_held_out.parent)


def test_rows_that_are_no_questions_are_refused(tmp_path: Path, tiny_release: Path) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text('{"id": 1, "value": "x"}\n')
    with pytest.raises(UserError, match=r"asked\.jsonl"):
        answer(path, tiny_release, tmp_path)
