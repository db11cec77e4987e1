"""How well a model answers held-out conversations, and what its visual tokens cost.

Each answer of a conversation is asked for on its own, after the true turns before it. An answer is right when its
text, without surrounding white space, is exactly the true one. The loss is the mean over all supervised tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from shortzip.data.dataset import Collator, ConversationDataset, MicroBatch, Sample
from shortzip.data.errors import UserError
from shortzip.data.files import writing
from shortzip.data.supervision import IGNORE_INDEX
from shortzip.reduction.configuration_pruning import pruning_method
from shortzip.reduction.positions import COMPACT
from shortzip.reduction.question_tokens import QuestionReader
from shortzip.reduction.reductions import NONE, Reductions
from shortzip.reduction.selectors import BY_QUESTION, VISIONZIP
from shortzip.train.evaluation.questions import (
    Prefill,
    Question,
    Row,
    load_samples,
    placeholders_in,
    prompt_inputs,
    questions_of,
    text_of,
)
from shortzip.train.inputs.samples import check_positions
from shortzip.train.run.session import Session
from shortzip.train.step.objective import MODEL_INPUTS, Llava, count_supervised, fastv_query
from shortzip.train.step.visual_features import given_to_model


@dataclass(frozen=True)
class Answer:
    """One question of a held-out conversation and what the model said."""

    id: str
    turn: int
    expected: str
    answer: str
    correct: bool


@dataclass(frozen=True)
class Evaluation:
    """One row of the table."""

    name: str
    exact_match: float
    """Share of the answers that are right, 0 to 1."""
    loss: float
    """Mean cross-entropy over the supervised tokens, in nats."""
    questions: int
    supervised_tokens: int
    visual_tokens: float
    """Visual tokens per image, mean over the held-out images."""
    frozen_layers: int
    llm_flops: float
    """FLOPs of the language model for the mean prompt (text and visual tokens), one prefill."""
    prefill_ms: float
    """Milliseconds from pixels and prompts to the first answer token, `prefill_batch` prompts at once: the median."""
    prefill_batch: int
    seconds: float
    """Time that loss and answers took."""
    fastv: str = NONE
    """Pruning inside the language model, like 2+0.5 (FastV) or pyramiddrop:1+3:0.5+0.25; none."""
    method: str = VISIONZIP
    """How the visual tokens are chosen, with parameters, like scope:alpha=0.5."""
    positions: str = COMPACT
    """Where tokens stand: compact or original."""


def evaluate(
    name: str,
    model: Llava,
    dataset: ConversationDataset,
    accelerator: Accelerator,
    *,
    batch_size: int,
    max_new_tokens: int,
    timed: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
    reader: QuestionReader | None = None,
) -> tuple[Evaluation, list[Answer]]:
    """Loss, exact match and cost of `model` on `dataset`, whose supervision carries the model's own processor.

    Every process calls it with the whole dataset and takes its share; all get the same result, the answers in the
    dataset's order. `progress` is called with batches done and batches in all, first of the loss, then of the answers.
    `timed`: whether prefill is timed, too; without, `prefill_ms` and `prefill_batch` are 0.
    `reader`: chooses the budget's tokens by the question (CDPruner). Then each question is a row of its own, with the
    turns before it: tower and language model read a conversation as often as it has answers.
    Raises `UserError` if no conversation can be read, or one is longer than the model has positions.
    """
    start = time.perf_counter()
    config: Any = model.config
    check_positions(config, dataset, held_out=True)
    read = (model, dataset, accelerator, batch_size, max_new_tokens, progress)
    sums, answers, still_open = _read_answers(*read, reader)
    still_open = sorted(gather_object(still_open), key=lambda question: (question.sample, question.turn))
    share = _share([len(question.prompt) for question in still_open], batch_size, accelerator)
    for number, batch in enumerate(share):
        progress(number, len(share))
        questions = [still_open[index] for index in batch]
        texts = _generate(model, dataset, questions, max_new_tokens, reader)
        answers += [(q.sample, _answer(q, text)) for q, text in zip(questions, texts, strict=True)]
    gathered = sorted(gather_object(answers), key=lambda numbered: (numbered[0], numbered[1].turn))
    in_order = [answer for _, answer in gathered]
    totals = sums.over_processes(accelerator)
    if not in_order:
        raise UserError(f"no held-out conversation could be read. {dataset.drops.summary()}.")
    seconds = time.perf_counter() - start
    prefill = Prefill.of(model, dataset, batch_size, reader) if timed else None
    reductions = Reductions(config.visionzip, config.shortv, config.fastv, config.positions)
    evaluation = Evaluation(
        name=name,
        exact_match=sum(answer.correct for answer in in_order) / len(in_order),
        loss=totals.loss / totals.tokens,
        questions=len(in_order),
        supervised_tokens=int(totals.tokens),
        visual_tokens=totals.visual / max(totals.images, 1),
        frozen_layers=len(reductions.layers),
        llm_flops=reductions.prefill_flops(config.text_config, *totals.mean_prompt()),
        prefill_ms=prefill.measure() if prefill else 0.0,
        prefill_batch=len(prefill.inputs["input_ids"]) if prefill and prefill.inputs else 0,
        seconds=seconds,
        fastv=reductions.fastv_words,
        method=reductions.method_words if reader is None else BY_QUESTION,
        positions=reductions.positions,
    )
    return evaluation, in_order


@dataclass
class _Sums:
    """What the means of an `Evaluation` are taken of; floats, so that processes add them up in one tensor."""

    loss: float = 0.0
    tokens: float = 0.0
    """Supervised ones."""
    images: float = 0.0
    visual: float = 0.0
    """Visual tokens of `images`."""
    prompts: float = 0.0
    text: float = 0.0
    """Text tokens of `prompts`."""
    placeholders: float = 0.0
    """Those of `prompts`, of no image or of several."""

    def over_processes(self, accelerator: Accelerator) -> _Sums:
        own = torch.tensor(list(asdict(self).values()), dtype=torch.float64, device=accelerator.device)
        return _Sums(*accelerator.reduce(own).tolist())

    def mean_prompt(self) -> tuple[int, int]:
        """Text tokens and placeholders, rounded."""
        return round(self.text / self.prompts), round(self.placeholders / self.prompts)


def _read_answers(
    model: Llava,
    dataset: ConversationDataset,
    accelerator: Accelerator,
    batch_size: int,
    max_new_tokens: int,
    progress: Callable[[int, int], None],
    reader: QuestionReader | None,
) -> tuple[_Sums, list[tuple[int, Answer]], list[Question]]:
    """The sums over this process's share; the answers that the pass for the loss shows to be right, each with its
    sample's number; and the questions that are still to be asked."""
    sums = _Sums()
    answers: list[tuple[int, Answer]] = []
    still_open: list[Question] = []
    share = _share(dataset.lengths.tolist(), batch_size, accelerator)
    for number, batch in enumerate(share):
        progress(number, len(share))
        samples = load_samples(dataset, batch, dataset.drops)
        rows = [Row(sample, list(questions_of(dataset, sample, index))) for index, sample in samples.items()]
        if reader is not None:
            rows = [alone for row in rows for alone in row.alone(dataset)]
        for start in range(0, len(rows), batch_size):
            some = rows[start : start + batch_size]
            is_right = _read_rows(model, dataset, some, sums, max_new_tokens, reader)
            for question, known in zip((q for row in some for q, _ in row.questions), is_right, strict=True):
                if known:
                    answers.append((question.sample, _answer(question, question.expected)))
                else:
                    still_open.append(question)
    return sums, answers, still_open


def _read_rows(
    model: Llava,
    dataset: ConversationDataset,
    rows: Sequence[Row],
    sums: _Sums,
    max_new_tokens: int,
    reader: QuestionReader | None,
) -> list[bool]:
    """Adds the rows to the sums; of each of their questions, whether their pass shows that it is answered right."""
    config: Any = model.config
    collated = Collator.of(dataset.supervision)([row.sample for row in rows]).to(model.device)
    asked = [row.questions[0][0].asked for row in rows for _ in row.sample.image_sizes] if reader else []
    loss, tokens, greedy = _teacher_forced(model, collated, reader, asked)
    sums.loss, sums.tokens = sums.loss + loss, sums.tokens + tokens
    is_right = []
    for number, row in enumerate(rows):
        sums.images += len(row.sample.image_sizes) + len(row.sample.frames)
        sums.visual += sum(
            map(dataset.supervision.placeholders, row.sample.image_sizes, row.sample.budgets or repeat(None))
        )
        sums.visual += sum(map(dataset.supervision.video_placeholders, row.sample.frame_counts))
        for question, (begin, end) in row.questions:
            placeholders = placeholders_in(dataset, question.prompt)
            sums.prompts += 1
            sums.placeholders += placeholders
            sums.text += len(question.prompt) - placeholders
            # Pruning chooses by the question: what it keeps for the first tells nothing of a later one's answer.
            is_known = config.fastv is None or (question.turn == 0 and _ranks_by_first(config.fastv, row.sample))
            # Each token is the greedy choice after the true ones before it: greedy decoding gives just this.
            is_known = is_known and end - begin - 1 <= max_new_tokens
            is_right.append(is_known and bool(greedy[number, begin:end].all()))
    return is_right


def held_out_loss(loss_module: nn.Module, batches: Iterable[MicroBatch], session: Session) -> float | None:
    """Mean cross-entropy over the supervised tokens of this and all other processes' `batches`, without gradients.

    None if one of the processes was asked to stop meanwhile.
    """
    device = session.accelerator.device
    total = torch.zeros(3, dtype=torch.float64, device=device)
    with torch.no_grad():
        for batch in batches:
            # Agreed on, not each for itself: engines that shard weights need all processes in every forward pass.
            if session.asked_to_stop():
                total[2] = 1
                break
            moved = batch.to(device)
            total[0] += loss_module(moved).double()
            total[1] += count_supervised(moved.inputs["labels"])
    loss, tokens, stopped = session.total(*total.tolist())
    return loss / tokens if tokens and not stopped else None


def write_answers(path: Path, answers: Sequence[Answer]) -> None:
    """One JSON object per line: id, turn, expected, answer, correct."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in answers), encoding="utf-8")


def _share(lengths: Sequence[int], size: int, accelerator: Accelerator) -> list[list[int]]:
    """This process's batches of item numbers, of similar lengths so that little is padding."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return batches[accelerator.process_index :: accelerator.num_processes]


def _ranks_by_first(fastv: Any, sample: Sample) -> bool:
    """Whether the loss's pass ranks by the first question alone, as answering it does; PyramidDrop's by all."""
    return pruning_method(fastv) != "pyramiddrop" or len(sample.encoded.answers) == 1


def _answer(question: Question, text: str) -> Answer:
    return Answer(question.id, question.turn, question.expected, text, text == question.expected)


@torch.no_grad()
def _teacher_forced(
    model: Llava, batch: MicroBatch, reader: QuestionReader | None, asked: Sequence[str]
) -> tuple[float, int, Tensor]:
    """Summed cross-entropy, number of supervised tokens, and [B, L] bool: is the token the greedy choice? `asked`:
    with `reader`, each image's question."""
    device = model.lm_head.weight.device
    labels = batch.inputs["labels"]  # on the CPU, as all integers of a micro-batch
    given = given_to_model({key: batch.inputs[key] for key in MODEL_INPUTS if key in batch.inputs})
    inputs: dict[str, Any] = {key: tensor.to(device) for key, tensor in given.items()}
    inputs = inputs if reader is None else reader.given(model, inputs, asked)
    chosen_by = {key: query.to(device) for key, query in fastv_query(model, labels).items()}
    targets, supervised = labels[:, 1:], labels[:, 1:] != IGNORE_INDEX
    wanted, ends = targets[supervised].to(device), supervised.flatten().nonzero()[:, 0].to(device)
    hidden = model.model(**inputs, use_cache=False, **chosen_by).last_hidden_state[:, :-1]
    logits = model.lm_head(hidden.flatten(0, 1)[ends]).float()
    loss = nn.functional.cross_entropy(logits, wanted, reduction="sum")
    greedy = torch.zeros_like(labels, dtype=torch.bool)
    greedy[:, 1:][supervised] = (logits.argmax(-1) == wanted).cpu()
    return loss.item(), len(wanted), greedy


@torch.no_grad()
def _generate(
    model: Llava,
    dataset: ConversationDataset,
    questions: Sequence[Question],
    max_new_tokens: int,
    reader: QuestionReader | None,
) -> list[str]:
    inputs, asked = prompt_inputs(model, dataset, questions)
    given = inputs if reader is None else reader.given(model, inputs, asked)
    generator: Any = model
    output = generator.generate(
        **given,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=dataset.supervision.tokenizer.eos_token_id,
        pad_token_id=Collator.of(dataset.supervision).pad_token_id,
    )
    return [text_of(dataset, row.tolist()) for row in output[:, inputs["input_ids"].shape[1] :]]
