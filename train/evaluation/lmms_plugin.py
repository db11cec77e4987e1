"""What ShortZip gives to lmms-eval: where its model is, and held-out conversations as a local task.

lmms-eval finds `manifest` through the entry point group `lmms_eval.models`. A task is a YAML file
(configs/eval/tasks/) over a questions file: one JSON line per question of the held-out conversations, with the turns
before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from shortzip.data.errors import FileInTheWay, MissingFile, UserError
from shortzip.data.files import refuse_to_replace, write_atomically, writing
from shortzip.data.images import open_image, resolve_image_path
from shortzip.data.instructions import PLACEHOLDER, VIDEO_PLACEHOLDER, Conversation

TEMPLATES = Path(__file__).resolve().parents[2] / "configs" / "eval" / "tasks"
HELD_OUT_TEMPLATE = "_held_out_template_yaml"


def manifest() -> Any:
    """The entry of lmms-eval's table of models."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        "reduced_llava",
        simple_class_path="shortzip.train.evaluation.lmms_model.ReducedLlava",
        chat_class_path="shortzip.train.evaluation.lmms_model.ReducedLlavaChat",
    )


def write_questions(conversations: Sequence[Conversation], image_root: str | None, path: Path) -> int:
    """Writes one line per question, in the order of the conversations; returns their number.

    A line: id, turn (which answer, from 0), roles and texts (the turns up to the question), images (absolute paths of
    all images in them), where any conversation has videos their paths likewise, and expected. Raises ValueError for
    images that are embedded and for videos that are lists of frames, and FileNotFoundError for what is not there.
    """
    lines, has_videos = [], any(conversation.videos for conversation in conversations)
    for conversation in conversations:
        for source in conversation.images:
            if not isinstance(source, str):
                raise UserError(f"{conversation.id}: a local task reads its images from files; this one is embedded")
        for video in conversation.videos:
            if not isinstance(video, str):
                raise UserError(f"{conversation.id}: a local task's videos are files or folders; this one is a list")
        answers = [place for place, (role, _) in enumerate(conversation.turns) if role == "assistant"]
        for turn, place in enumerate(answers):
            before = conversation.turns[:place]
            shown = conversation.images[: sum(text.count(PLACEHOLDER) for _, text in before)]
            question = {
                "id": conversation.id,
                "turn": turn,
                "roles": [role for role, _ in before],
                "texts": [text for _, text in before],
                "images": [str(_existing(conversation.id, str(image), image_root)) for image in shown],
                "expected": conversation.turns[place][1].strip(),
            }
            if has_videos:
                count = sum(text.count(VIDEO_PLACEHOLDER) for _, text in before) if conversation.videos else 0
                seen = conversation.videos[:count]
                question["videos"] = [str(_existing(conversation.id, str(video), image_root)) for video in seen]
            if question["expected"]:
                lines.append(json.dumps(question, ensure_ascii=False) + "\n")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(lines))
    return len(lines)


def _existing(name: str, image: str, image_root: str | None) -> Path:
    path = resolve_image_path(image, image_root).resolve()
    if not path.exists():
        raise MissingFile(f"{name}: there is no image or video {path}: give its folder as data.image_root")
    return path


def write_task(
    folder: Path,
    name: str,
    conversations: Sequence[Conversation],
    image_root: str | None,
    *,
    overwrite: bool = False,
) -> int:
    """Writes the tasks NAME and NAME_likelihood for `lmms-eval --include_path folder`, and their questions.

    Returns the number of questions. Raises `UserError` for a name that is no plain word, and `FileInTheWay` where a
    file would be replaced unasked, or in the folder of the shipped tasks at all.
    """
    check_task(folder, name)
    written = [folder / file for file in (f"{name}.yaml", f"{name}_likelihood.yaml", f"{name}.jsonl")]
    refuse_to_replace(*written, overwrite=overwrite)
    count = write_questions(conversations, image_root, folder / f"{name}.jsonl")
    for task, template in ((name, HELD_OUT_TEMPLATE), (f"{name}_likelihood", "_likelihood_template_yaml")):
        entry = {"include": str(TEMPLATES / template), "task": task}
        data = {"dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}}
        write_atomically(folder / f"{task}.yaml", yaml.safe_dump({**entry, **data}, sort_keys=False))
    return count


def check_task(folder: Path, name: str) -> None:
    """Raises `UserError` for a name that is no plain word, and `FileInTheWay` for the folder of the shipped tasks."""
    if not name.replace("_", "").replace("-", "").isalnum():
        raise UserError(f"task {name!r}: letters, digits, - and _ are allowed")
    if folder.resolve() == TEMPLATES:
        raise FileInTheWay(f"{folder} is the folder of the shipped tasks: choose another one")


# --------------------------------------------------------------------------- what the YAML files of the tasks refer to


def doc_to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns before an answer as lmms-eval's chat messages, the images and videos of a turn before its text."""
    images, videos = iter(doc["images"]), doc.get("videos") or []
    left = iter(videos)
    marks = re.compile(f"{PLACEHOLDER}|{VIDEO_PLACEHOLDER}" if videos else PLACEHOLDER)
    messages = []
    for role, text in zip(doc["roles"], doc["texts"], strict=True):
        content: list[dict[str, Any]] = [
            {"type": "image", "url": open_image(next(images))}
            if mark == PLACEHOLDER
            else {"type": "video", "url": next(left)}
            for mark in marks.findall(text)
        ]
        words = marks.sub("", text).strip() if content else text
        messages.append({"role": role, "content": [*content, {"type": "text", "text": words}]})
    return messages


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    """The images and videos of a question."""
    return [*(open_image(path) for path in doc["images"]), *(doc.get("videos") or [])]


def middle_image(doc: dict[str, Any]) -> list[Any]:
    """Of a SEED-Bench document the one image, or the frame in the middle of its video, as LLaVA-1.5 was measured."""
    return [doc["image"][len(doc["image"]) // 2].convert("RGB")]


def doc_to_text(doc: dict[str, Any]) -> str:
    """The question alone, for the protocol of a text and images; a later turn's does not show what was said before."""
    return str(doc["texts"][-1])


def first_turns(dataset: Any) -> Any:
    """The questions that nothing was said before: what the protocol of a text and images can ask."""
    return dataset.filter(lambda turn: turn == 0, input_columns="turn")


def likelihood_results(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Loss of the true answer, and whether greedy decoding says it. (lmms-eval 0.7 itself unpacks the list that holds
    the two, and fails.)"""
    ((loss, is_greedy),) = results
    return {"perplexity": loss, "acc": float(is_greedy)}


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """An answer is right when its text, without surrounding white space, is exactly the true one."""
    return {"exact_match": float(results[0].strip() == doc["expected"])}
