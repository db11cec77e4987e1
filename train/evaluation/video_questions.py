"""Questions about videos in the layout of Video-ChatGPT's zero-shot evaluation, as a task of lmms-eval with a judge.

Two files, `test_q.json` and `test_a.json`: rows of `question`, `question_id` and `video_name`, and rows of `answer`,
`question_id` and, for ActivityNet-QA, `type`. The videos lie in one folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from shortzip.data.errors import MissingFile, UserError
from shortzip.data.files import refuse_to_replace, write_atomically, writing
from shortzip.data.hints import VIDEO_SUFFIXES
from shortzip.data.json_rows import JsonRowError, MalformedRow, iterate_json_rows
from shortzip.train.evaluation.lmms_plugin import TEMPLATES, check_task

TEMPLATE = "_video_qa_template_yaml"
SHIPPED_TASKS = ("tgif_qa", "msvd_qa", "msrvtt_qa", "activitynet_qa")
SHIPPED_FOLDER = Path("checkpoints/video-qa")  # where the shipped tasks look for their questions
SHOWN = 5  # names in a message


def read_video_questions(questions: Path, answers: Path, videos: Path, samples: int | None = None) -> list[str]:
    """The lines of a task: question, answer, question_id, type ("" where there is none), video_name and video, which
    is the path of its file, absolute. `samples`: of the first so many questions.

    Answers are those at the questions' places, as Video-LLaVA pairs them, where both files have the same ids in the
    same order; else those of their ids. A video is NAME.mp4 or v_NAME.mp4 (ActivityNet's), or has another suffix.

    Raises `MissingFile` or `UserError` for files that cannot be read, and for questions without an answer or a video.
    """
    asked = _rows(questions, ("question", "question_id", "video_name"))
    paired = _paired(asked, _rows(answers, ("answer",)), answers)[:samples]
    without = [row["question_id"] for row, answer in paired if answer is None]
    _refuse(questions, without, len(paired), f"answer in {answers}", "give the answers of these questions")
    there = _videos(videos)
    names = [row["video_name"] for row, _ in paired]
    files = [there.get(name) or there.get(f"v_{name}") for name in names]
    missing = [name for name, file in zip(names, files, strict=True) if file is None]
    cure = f"needed is NAME.mp4 or v_NAME.mp4 (or {', '.join(VIDEO_SUFFIXES[1:])})"
    _refuse(questions, missing, len(paired), f"video in {videos}", cure)
    return [
        json.dumps(
            {
                **{key: row[key] for key in ("question", "question_id", "video_name")},
                "answer": answer and answer["answer"],
                "type": (answer or {}).get("type", ""),
                "video": str(file),
            },
            ensure_ascii=False,
        )
        + "\n"
        for (row, answer), file in zip(paired, files, strict=True)
    ]


def write_video_task(folder: Path, name: str, lines: Sequence[str], *, overwrite: bool = False) -> None:
    """Writes the task NAME for `lmms-eval --include_path folder`, and its questions. Raises as `check_task`, and
    `FileInTheWay` where a file would be replaced unasked."""
    check_task(folder, name)
    refuse_to_replace(folder / f"{name}.yaml", folder / f"{name}.jsonl", overwrite=overwrite)
    write_lines(folder / f"{name}.jsonl", lines)
    entry = {"include": str(TEMPLATES / TEMPLATE), "task": name}
    data = {"dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}}
    write_atomically(folder / f"{name}.yaml", yaml.safe_dump({**entry, **data}, sort_keys=False))


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Writes a task's questions. Raises `CannotWrite`."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(lines))


def _rows(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a file, their values as texts."""
    if not path.is_file():
        raise MissingFile(f"{path}: there is no such file")
    rows = []
    try:
        for number, found in enumerate(iterate_json_rows(path)):
            rows.append(_row(found.value, f"{path}, row {number}", needed))
    except JsonRowError as error:
        raise UserError(f"{path}: {error}") from error
    if not rows:
        raise UserError(f"{path} holds no rows: needed are rows of {', '.join(needed)}")
    return rows


def _row(value: Any, where: str, needed: Sequence[str]) -> dict[str, str]:
    if isinstance(value, MalformedRow):
        raise UserError(f"{where}: {value.problem}")
    if not isinstance(value, dict):
        raise UserError(f"{where} is a {type(value).__name__}; needed is an object with {', '.join(needed)}")
    texts = {
        key: str(entry).strip()
        for key, entry in value.items()
        if isinstance(entry, str | int | float) and not isinstance(entry, bool)
    }
    empty = [key for key in needed if not texts.get(key)]
    if empty:
        raise UserError(f"{where} has no {', '.join(empty)}; needed are {', '.join(needed)}")
    return texts


def _paired(
    questions: list[dict[str, str]], answers: list[dict[str, str]], source: Path
) -> list[tuple[dict[str, str], dict[str, str] | None]]:
    """Each question with its answer, or None. Raises UserError where an id has two answers."""
    ids = [row["question_id"] for row in questions]
    if [row.get("question_id", at) for row, at in zip(answers, ids, strict=False)] == ids and len(answers) == len(ids):
        return list(zip(questions, answers, strict=True))
    by_id: dict[str, dict[str, str]] = {}
    for row in answers:
        if "question_id" not in row:
            raise UserError(
                f"{source}: answers without a question_id belong to the questions at their places; there are "
                f"{len(answers)} answers and {len(ids)} questions"
            )
        if by_id.setdefault(row["question_id"], row)["answer"] != row["answer"]:
            raise UserError(f"{source}: question_id {row['question_id']} stands there with two answers; one is needed")
    return [(row, by_id.get(row["question_id"])) for row in questions]


def _videos(folder: Path) -> dict[str, Path]:
    """The video files of a folder by their names without suffix; of several, the first in `VIDEO_SUFFIXES`."""
    if not folder.is_dir():
        raise MissingFile(f"{folder}: there is no such folder")
    found: dict[str, Path] = {}
    for suffix in reversed(VIDEO_SUFFIXES):
        for name in os.listdir(folder):
            if name.lower().endswith(suffix):
                found[name[: -len(suffix)]] = (folder / name).resolve()
    return found


def _refuse(source: Path, without: Sequence[str], total: int, what: str, cure: str) -> None:
    """Raises UserError where questions are `without` something, with their number and the first names."""
    if not without:
        return
    names = list(dict.fromkeys(without))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    raise UserError(
        f"{source}: {len(without)} of {total} questions have no {what}: {', '.join(names[:SHOWN])}{more}: {cure}"
    )
