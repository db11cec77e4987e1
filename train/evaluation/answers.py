"""How well a model answers held-out conversations, and what its visual tokens cost.

Each answer of a conversation is asked for on its own, after the true turns before it. An answer is right when its
text, without surrounding white space, is exactly the true one. The loss is the mean over all supervised tokens.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from shortzip.data.dataset import Collator, ConversationDataset, MicroBatch, Sample
from shortzip.data.drops import Drop, DropLog
from shortzip.data.errors import UserError
from shortzip.data.files import writing
from shortzip.data.supervision import IGNORE_INDEX
from shortzip.reduction.configuration_pruning import pruning_method
from shortzip.reduction.positions import COMPACT
from shortzip.reduction.reductions import NONE, Reductions
from shortzip.reduction.selectors import VISIONZIP
from shortzip.train.calibration.choosing import with_prompt
from shortzip.train.inputs.samples import check_positions
from shortzip.train.run.report import synchronise
from shortzip.train.run.session import Session
from shortzip.train.step.objective import MODEL_INPUTS, Llava, count_supervised, fastv_query

WARM_UPS, TIMED_RUNS = 2, 5


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


@dataclass(frozen=True)
class _Question:
    sample: int
    id: str
    turn: int
    prompt: list[int]
    expected: str


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
) -> tuple[Evaluation, list[Answer]]:
    """Loss, exact match and cost of `model` on `dataset`, whose supervision carries the model's own processor.

    Every process calls it with the whole dataset and takes its share; all get the same result, the answers in the
    dataset's order. `progress` is called with batches done and batches in all, first of the loss, then of the answers.
    `timed`: whether prefill is timed, too; without, `prefill_ms` and `prefill_batch` are 0.
    Raises `UserError` if no conversation can be read, or one is longer than the model has positions.
    """
    start = time.perf_counter()
    config: Any = model.config
    check_positions(config, dataset, held_out=True)
    sums, answers, still_open = _read_answers(model, dataset, accelerator, batch_size, max_new_tokens, progress)
    still_open = sorted(gather_object(still_open), key=lambda question: (question.sample, question.turn))
    share = _share([len(question.prompt) for question in still_open], batch_size, accelerator)
    for number, batch in enumerate(share):
        progress(number, len(share))
        questions = [still_open[index] for index in batch]
        texts = _generate(model, dataset, questions, max_new_tokens)
        answers += [(q.sample, _answer(q, text)) for q, text in zip(questions, texts, strict=True)]
    gathered = sorted(gather_object(answers), key=lambda numbered: (numbered[0], numbered[1].turn))
    in_order = [answer for _, answer in gathered]
    totals = sums.over_processes(accelerator)
    if not in_order:
        raise UserError(f"no held-out conversation could be read. {dataset.drops.summary()}.")
    seconds = time.perf_counter() - start
    inputs = prefill_inputs(model, dataset, batch_size) if timed else {}
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
        prefill_ms=measure_prefill(model, inputs) if timed else 0.0,
        prefill_batch=len(inputs["input_ids"]) if inputs else 0,
        seconds=seconds,
        fastv=reductions.fastv_words,
        method=reductions.method_words,
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
) -> tuple[_Sums, list[tuple[int, Answer]], list[_Question]]:
    """The sums over this process's share; the answers that the pass for the loss shows to be right, each with its
    sample's number; and the questions that are still to be asked."""
    config: Any = model.config
    sums = _Sums()
    answers: list[tuple[int, Answer]] = []
    still_open: list[_Question] = []
    share = _share(dataset.lengths.tolist(), batch_size, accelerator)
    for number, batch in enumerate(share):
        progress(number, len(share))
        samples = _load(dataset, batch, dataset.drops)
        if not samples:
            continue
        collated = Collator.of(dataset.supervision)(list(samples.values())).to(accelerator.device)
        loss, tokens, greedy = _teacher_forced(model, collated)
        sums.loss, sums.tokens = sums.loss + loss, sums.tokens + tokens
        for row, (index, sample) in enumerate(samples.items()):
            sums.images += len(sample.image_sizes)
            sums.visual += sum(
                map(dataset.supervision.placeholders, sample.image_sizes, sample.budgets or repeat(None))
            )
            for question, (begin, end) in _questions(dataset, sample, index):
                placeholders = question.prompt.count(_placeholder(dataset))
                sums.prompts += 1
                sums.placeholders += placeholders
                sums.text += len(question.prompt) - placeholders
                # Pruning chooses by the question: what it keeps for the first tells nothing of a later one's answer.
                is_known = config.fastv is None or (question.turn == 0 and _ranks_by_first(config.fastv, sample))
                if is_known and end - begin - 1 <= max_new_tokens and greedy[row, begin:end].all():
                    # Each token is the greedy choice after the true ones before it: greedy decoding gives just this.
                    answers.append((index, _answer(question, question.expected)))
                else:
                    still_open.append(question)
    return sums, answers, still_open


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


def _load(dataset: ConversationDataset, indices: Iterable[int], drops: DropLog | None = None) -> dict[int, Sample]:
    loaded = {index: dataset[index] for index in indices}
    if drops is not None:
        drops.extend(sample for sample in loaded.values() if isinstance(sample, Drop))
    return {index: sample for index, sample in loaded.items() if isinstance(sample, Sample)}


def _placeholder(dataset: ConversationDataset) -> int:
    return dataset.supervision.processor.image_token_id


def _questions(
    dataset: ConversationDataset, sample: Sample, index: int
) -> Iterator[tuple[_Question, tuple[int, int]]]:
    """The sample's questions, each with the token range of its true answer."""
    ids = sample.encoded.input_ids
    for turn, (start, end) in enumerate(sample.encoded.answers):
        yield _Question(index, sample.id, turn, ids[:start], _text(dataset, ids[start:end])), (start, end)


def _ranks_by_first(fastv: Any, sample: Sample) -> bool:
    """Whether the loss's pass ranks by the first question alone, as answering it does; PyramidDrop's by all."""
    return pruning_method(fastv) != "pyramiddrop" or len(sample.encoded.answers) == 1


def _answer(question: _Question, text: str) -> Answer:
    return Answer(question.id, question.turn, question.expected, text, text == question.expected)


def _text(dataset: ConversationDataset, ids: Sequence[int]) -> str:
    text: Any = dataset.supervision.tokenizer.decode(list(ids), skip_special_tokens=True)
    return text.strip()


@torch.no_grad()
def _teacher_forced(model: Llava, batch: MicroBatch) -> tuple[float, int, Tensor]:
    """Summed cross-entropy, number of supervised tokens, and [B, L] bool: is the token the greedy choice?"""
    device = model.lm_head.weight.device
    labels = batch.inputs["labels"]  # on the CPU, as all integers of a micro-batch
    inputs = {key: batch.inputs[key].to(device) for key in MODEL_INPUTS if key in batch.inputs}
    chosen_by = {key: query.to(device) for key, query in fastv_query(model, labels).items()}
    targets, supervised = labels[:, 1:], labels[:, 1:] != IGNORE_INDEX
    wanted, ends = targets[supervised].to(device), supervised.flatten().nonzero()[:, 0].to(device)
    hidden = model.model(**inputs, use_cache=False, **chosen_by).last_hidden_state[:, :-1]
    logits = model.lm_head(hidden.flatten(0, 1)[ends]).float()
    loss = nn.functional.cross_entropy(logits, wanted, reduction="sum")
    greedy = torch.zeros_like(labels, dtype=torch.bool)
    greedy[:, 1:][supervised] = (logits.argmax(-1) == wanted).cpu()
    return loss.item(), len(wanted), greedy


def _prompt_inputs(model: Llava, dataset: ConversationDataset, questions: Sequence[_Question]) -> dict[str, Tensor]:
    """Prompts padded on the left, with the images that stand in them."""
    collator = Collator.of(dataset.supervision)
    length = max(len(question.prompt) for question in questions)
    input_ids = torch.full((len(questions), length), collator.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    samples = _load(dataset, sorted({question.sample for question in questions}))
    rows = []
    for row, question in enumerate(questions):
        input_ids[row, length - len(question.prompt) :] = torch.tensor(question.prompt)
        attention_mask[row, length - len(question.prompt) :] = 1
        rows.append(with_prompt(samples[question.sample], dataset.supervision, question.prompt))
    pictures = collator(rows).inputs
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    of_images = ("pixel_values", "image_sizes", "image_budgets")
    inputs.update({key: pictures[key] for key in of_images if key in pictures})
    return {key: tensor.to(model.device) for key, tensor in inputs.items()}


@torch.no_grad()
def _generate(
    model: Llava, dataset: ConversationDataset, questions: Sequence[_Question], max_new_tokens: int
) -> list[str]:
    inputs = _prompt_inputs(model, dataset, questions)
    generator: Any = model
    output = generator.generate(
        **inputs,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=dataset.supervision.tokenizer.eos_token_id,
        pad_token_id=Collator.of(dataset.supervision).pad_token_id,
    )
    return [_text(dataset, row.tolist()) for row in output[:, inputs["input_ids"].shape[1] :]]


def prefill_inputs(model: Llava, dataset: ConversationDataset, batch_size: int) -> dict[str, Tensor]:
    """The first questions of the first conversations as the model's inputs, on its device; empty if none is read."""
    samples = _load(dataset, range(min(batch_size, len(dataset))))
    questions = [next(_questions(dataset, sample, index))[0] for index, sample in samples.items()]
    return _prompt_inputs(model, dataset, questions) if questions else {}


@torch.no_grad()
def measure_prefill(model: Llava, inputs: Mapping[str, Tensor]) -> float:
    """Median milliseconds up to the first new token's logits of what `prefill_inputs` gave; NaN for none."""
    if not inputs:
        return float("nan")
    times = []
    for run in range(WARM_UPS + TIMED_RUNS):
        synchronise(model.device)
        start = time.perf_counter()
        model(**inputs, use_cache=True, logits_to_keep=1)
        synchronise(model.device)
        if run >= WARM_UPS:
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)
