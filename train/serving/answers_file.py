"""A file of questions, answered in batches of similar length, and continued where it was interrupted.

Answers are appended to `NAME.partial`, whole lines after each batch, whose first line says what they belong to. When
the last one is there they are written to `NAME` in the order of the questions, and the partial file goes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from shortzip.data.dataset import Collator
from shortzip.data.drops import BadSample
from shortzip.data.errors import FileInTheWay
from shortzip.data.files import read_text, write_atomically, writing
from shortzip.data.images import BadImage, image_size, open_image
from shortzip.data.instructions import Conversation, iterate_rows, parse_rows, read_instructions
from shortzip.data.known_images import KnownImages
from shortzip.data.pixels import frames_pixels
from shortzip.data.supervision import Supervision
from shortzip.data.video_frames import frames_seen, read_frames
from shortzip.data.videos import Sampling, VideoSource
from shortzip.train.inputs.prompts import Prompt, batch_prompts, extra_positions, pixels_of


@dataclass(frozen=True)
class Answer:
    """A line of the file of answers."""

    id: str
    answer: str | None
    """None where there is none."""
    tokens: int = 0
    """Of the answer, its end token included where it came."""
    error: str | None = None
    """Why there is no answer: an image or video that cannot be read, a prompt that does not fit."""


def read_questions(source: str) -> list[Conversation]:
    """The conversations of a file up to their last question: what LLaVA's instructions may look like, and LLaVA's own
    question files (question_id, text, image or video). Raises `BadSample` and `UserError`, as `read_instructions`."""
    if not Path(source).is_file() or Path(source).suffix == ".parquet":
        return [_up_to_the_question(conversation) for conversation in read_instructions(source)]
    questions = []
    for _, parsed in parse_rows(map(_as_instruction, iterate_rows(Path(source))), source):
        if isinstance(parsed, BadSample):
            raise parsed
        questions.append(_up_to_the_question(parsed))
    return questions


def _as_instruction(row: Any) -> Any:
    if not isinstance(row, dict) or not {"question_id", "text"} <= row.keys() or "conversations" in row:
        return row
    shown = {key: row[key] for key in ("image", "video") if key in row}
    turn = {"from": "human", "value": row["text"]}
    return {"id": str(row["question_id"]), **shown, "conversations": [turn]}


def _up_to_the_question(conversation: Conversation) -> Conversation:
    turns = conversation.turns
    turns = turns[:-1] if turns[-1][0] == "assistant" else turns
    return replace(conversation, turns=turns)


@dataclass(frozen=True)
class _Job:
    """A question that waits for its answer: its place in the file, its prompt's ids, (height, width) of its images."""

    place: int
    ids: list[int]
    sizes: list[tuple[int, int]]


class Answerer:
    """Answers questions with one model.

    Args:
        model: in eval mode, on its device.
        supervision: its template and processor.
        image_root: where image paths start from.
    """

    def __init__(self, model: Any, supervision: Supervision, image_root: str, max_new_tokens: int) -> None:
        self.model, self.supervision, self.image_root = model, supervision, image_root
        self.max_new_tokens = max_new_tokens
        self.longest = int(model.config.text_config.max_position_embeddings)

    def answer(
        self, questions: Sequence[Conversation], places: Iterable[int], batch_size: int
    ) -> Iterator[dict[int, Answer]]:
        """The answers to the questions at `places`, a batch of similar length after the other, the longest first."""
        jobs, refused = self._jobs(questions, places)
        if refused:
            yield refused
        jobs.sort(key=lambda job: (-len(job.ids), job.place))
        for start in range(0, len(jobs), batch_size):
            yield self._batch(questions, jobs[start : start + batch_size])

    def _jobs(self, questions: Sequence[Conversation], places: Iterable[int]) -> tuple[list[_Job], dict[int, Answer]]:
        """Prompts, and the answers of those that cannot be asked."""
        jobs, refused = [], {}
        for place in places:
            question = questions[place]
            try:
                sizes = [(0, 0)] * len(question.images)
                if self.supervision.needs_image_sizes:
                    sizes = [image_size(source, self.image_root) for source in question.images]
                frames = self._frames_seen(question)
                ids = self.supervision.prompt(question, sizes, frames)
            except (BadImage, BadSample) as error:
                refused[place] = Answer(question.id, None, error=str(error))
                continue
            left_out = extra_positions(self.model.config, self.supervision, sizes, frames)
            if len(ids) + left_out + self.max_new_tokens > self.longest:
                kept = f", the places of {left_out} visual tokens that are left out" if left_out else ""
                answer = f"{self.max_new_tokens} of the answer"
                words = f"{len(ids)} tokens{kept} and {answer}, more than {self.longest} positions"
                refused[place] = Answer(question.id, None, error=words)
            else:
                jobs.append(_Job(place, ids, sizes))
        return jobs, refused

    def _frames_seen(self, question: Conversation) -> list[int]:
        """How many frames of each video are seen. Raises BadSample where the family takes none, and BadImage."""
        sampling = self.supervision.sampling
        if sampling is None and question.videos:
            raise BadSample("video", question.id, f"{len(question.videos)} videos, and this release takes none")
        known = KnownImages()
        return [frames_seen(video, self.image_root, sampling or Sampling(1), known) for video in question.videos]

    def _frames(self, video: VideoSource) -> torch.Tensor:
        assert self.supervision.sampling is not None
        frames = read_frames(video, self.image_root, self.supervision.sampling)
        return frames_pixels(frames, self.supervision.processor)

    @torch.inference_mode()
    def _batch(self, questions: Sequence[Conversation], jobs: Sequence[_Job]) -> dict[int, Answer]:
        prompts: dict[int, Prompt] = {}
        answers: dict[int, Answer] = {}
        for job in jobs:
            question = questions[job.place]
            try:
                images = [open_image(source, self.image_root) for source in question.images]
                frames = [self._frames(source) for source in question.videos]
            except BadImage as error:
                answers[job.place] = Answer(question.id, None, error=str(error))
                continue
            sizes = [(image.height, image.width) for image in images]
            prompts[job.place] = Prompt(job.ids, pixels_of(self.supervision, images), sizes, frames)
        if not prompts:
            return answers
        inputs = batch_prompts(self.supervision, list(prompts.values()), self.model.device)
        tokenizer = self.supervision.tokenizer
        output = self.model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=Collator.of(self.supervision).pad_token_id,
        )
        for place, row in zip(prompts, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            ids = row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row
            text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
            answers[place] = Answer(questions[place].id, text, len(ids))
        return answers


class PartialAnswers:
    """The answers that there are already, and the file to which the next ones are appended.

    Args:
        output: of the whole answers.
        identity: of questions, model and settings; answers of another are not continued.
        overwrite: whether such answers are replaced; those of the same identity are continued all the same.
    """

    def __init__(self, output: Path, identity: str, *, overwrite: bool) -> None:
        self.output, self.path = output, output.with_name(output.name + ".partial")
        self.answers: dict[int, Answer] = {}
        lines = self._whole_lines()
        head = json.dumps({"identity": identity})
        if lines and lines[0] != head and not overwrite:
            raise FileInTheWay(
                f"{self.path} holds answers to other questions, of another model or other settings: give --overwrite "
                "to begin anew, or choose another output"
            )
        if lines and lines[0] == head:
            self._read(lines[1:])
        else:
            lines = [head]
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, "\n".join(lines) + "\n")  # without what a kill cut short

    def _whole_lines(self) -> list[str]:
        return read_text(self.path).split("\n")[:-1] if self.path.is_file() else []

    def _read(self, lines: Sequence[str]) -> None:
        for number, line in enumerate(lines, start=2):
            try:
                entry = json.loads(line)
                place = entry.pop("place")
                self.answers[place] = Answer(**entry)
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise FileInTheWay(
                    f"{self.path}: line {number} is damaged: take it out, or remove the file"
                ) from error

    def add(self, answers: Mapping[int, Answer]) -> None:
        """Appends answers, which are on the disk when it returns. Raises `CannotWrite`."""
        lines = [json.dumps({"place": place, **asdict(answer)}) + "\n" for place, answer in answers.items()]
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())
        self.answers.update(answers)

    def finish(self) -> None:
        """Writes the answers in the order of their questions."""
        ordered = [asdict(self.answers[place]) for place in sorted(self.answers)]
        text = "".join(
            json.dumps({key: value for key, value in entry.items() if key != "error" or value}, ensure_ascii=False)
            + "\n"
            for entry in ordered
        )
        write_atomically(self.output, text)
        self.path.unlink()


def answer_file(
    answerer: Answerer,
    questions: Sequence[Conversation],
    partial: PartialAnswers,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """Answers what is not answered yet; `progress` hears of each batch. Returns all answers in order."""
    left = [place for place in range(len(questions)) if place not in partial.answers]
    progress(len(partial.answers), len(questions))
    for answers in answerer.answer(questions, left, batch_size):
        partial.add(answers)
        progress(len(partial.answers), len(questions))
    partial.finish()
    return [partial.answers[place] for place in range(len(questions))]
