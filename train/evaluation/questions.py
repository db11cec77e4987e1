"""The questions of held-out conversations: what is asked, what a model is given, and how long it takes to read it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shortzip.data.dataset import Collator, ConversationDataset, Sample
from shortzip.data.drops import Drop, DropLog
from shortzip.data.instructions import PLACEHOLDER, VIDEO_PLACEHOLDER
from shortzip.data.supervision import IGNORE_INDEX, Encoded
from shortzip.reduction.question_tokens import QuestionReader
from shortzip.train.calibration.choosing import with_prompt
from shortzip.train.inputs.prompts import VISUAL_INPUTS
from shortzip.train.inputs.videos import visual_tokens_of
from shortzip.train.run.report import synchronise
from shortzip.train.step.objective import Llava
from shortzip.train.step.visual_features import given_to_model

WARM_UPS, TIMED_RUNS = 2, 5


@dataclass(frozen=True)
class Question:
    """A question of a held-out conversation."""

    sample: int
    """The conversation's number in the dataset."""
    id: str
    turn: int
    asked: str
    """The user's words."""
    prompt: list[int]
    """Token ids, the true turns before it included."""
    expected: str


@dataclass(frozen=True)
class Row:
    """What the pass for the loss reads as one row: a conversation, or of it one answer and what stands before."""

    sample: Sample
    questions: list[tuple[Question, tuple[int, int]]]
    """Those whose answers are supervised, each with the answer's range of tokens."""

    def alone(self, dataset: ConversationDataset) -> list[Row]:
        """A row for each of the questions."""
        rows = []
        for question, (begin, end) in self.questions:
            ids = [*question.prompt, *self.sample.encoded.input_ids[begin:end]]
            shown = with_prompt(self.sample, dataset.supervision, ids)
            labels = [IGNORE_INDEX] * begin + ids[begin:]
            encoded = Encoded(ids, labels, [(begin, end)], len(shown.image_sizes), videos=len(shown.frames))
            rows.append(Row(replace(shown, encoded=encoded), [(question, (begin, end))]))
        return rows


def load_samples(
    dataset: ConversationDataset, indices: Iterable[int], drops: DropLog | None = None
) -> dict[int, Sample]:
    """The conversations that can be read, by number; the others are counted in `drops`."""
    loaded = {index: dataset[index] for index in indices}
    if drops is not None:
        drops.extend(sample for sample in loaded.values() if isinstance(sample, Drop))
    return {index: sample for index, sample in loaded.items() if isinstance(sample, Sample)}


def placeholders_in(dataset: ConversationDataset, ids: Sequence[int]) -> int:
    """How many of these ids stand for visual tokens, of images and of videos."""
    return sum(map(ids.count, visual_tokens_of(dataset.supervision.processor)))


def questions_of(
    dataset: ConversationDataset, sample: Sample, index: int
) -> Iterator[tuple[Question, tuple[int, int]]]:
    """The sample's questions, each with the token range of its true answer."""
    ids = sample.encoded.input_ids
    asked = [text for role, text in dataset.conversations[index].turns if role == "user"]
    for turn, (start, end) in enumerate(sample.encoded.answers):
        words = asked[turn].replace(PLACEHOLDER, "").replace(VIDEO_PLACEHOLDER, "").strip()
        yield Question(index, sample.id, turn, words, ids[:start], text_of(dataset, ids[start:end])), (start, end)


def text_of(dataset: ConversationDataset, ids: Sequence[int]) -> str:
    """What an answer's token ids say."""
    text: Any = dataset.supervision.tokenizer.decode(list(ids), skip_special_tokens=True)
    return text.strip()


def prompt_inputs(
    model: Llava, dataset: ConversationDataset, questions: Sequence[Question]
) -> tuple[dict[str, Tensor], list[str]]:
    """Prompts padded on the left, with the images and videos that stand in them; and each image's question."""
    collator = Collator.of(dataset.supervision)
    length = max(len(question.prompt) for question in questions)
    input_ids = torch.full((len(questions), length), collator.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    samples = load_samples(dataset, sorted({question.sample for question in questions}))
    rows = []
    for row, question in enumerate(questions):
        input_ids[row, length - len(question.prompt) :] = torch.tensor(question.prompt)
        attention_mask[row, length - len(question.prompt) :] = 1
        rows.append(with_prompt(samples[question.sample], dataset.supervision, question.prompt))
    pictures = given_to_model(collator(rows).inputs)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    inputs.update({key: pictures[key] for key in VISUAL_INPUTS if key in pictures})
    asked = [question.asked for question, row in zip(questions, rows, strict=True) for _ in row.image_sizes]
    return {key: tensor.to(model.device) for key, tensor in inputs.items()}, asked


@dataclass(frozen=True)
class Prefill:
    """A model's pass over the first questions of the first conversations, to be timed."""

    model: Llava
    inputs: dict[str, Tensor]
    """On its device; empty where no conversation could be read."""
    asked: Sequence[str] = ()
    """Each image's question."""
    reader: QuestionReader | None = None

    @classmethod
    def of(
        cls, model: Llava, dataset: ConversationDataset, batch_size: int, reader: QuestionReader | None = None
    ) -> Prefill:
        """Of `batch_size` conversations."""
        samples = load_samples(dataset, range(min(batch_size, len(dataset))))
        questions = [next(questions_of(dataset, sample, index))[0] for index, sample in samples.items()]
        return cls(model, *(prompt_inputs(model, dataset, questions) if questions else ({}, [])), reader)

    @torch.no_grad()
    def measure(self) -> float:
        """Median milliseconds from pixels (and questions, where they choose) to the first new token's logits; NaN
        without inputs."""
        if not self.inputs:
            return float("nan")
        times = []
        for run in range(WARM_UPS + TIMED_RUNS):
            synchronise(self.model.device)
            start = time.perf_counter()
            reader, inputs = self.reader, self.inputs
            given = inputs if reader is None else reader.given(self.model, inputs, self.asked)
            self.model(**given, use_cache=True, logits_to_keep=1)
            synchronise(self.model.device)
            if run >= WARM_UPS:
                times.append(time.perf_counter() - start)
        return 1000 * statistics.median(times)
