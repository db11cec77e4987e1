"""Reduced checkpoints, and any release with a budget and frozen layers, as a model of lmms-eval (0.7).

    lmms-eval --model reduced_llava --model_args pretrained=checkpoints/RUN --tasks gqa --batch_size 16
    lmms-eval --model reduced_llava --model_args pretrained=llava-hf/llava-1.5-7b-hf,budget=54+10,layers=31+29+30 ...

`ReducedLlavaChat` is what lmms-eval takes by default: its tasks give chat messages. `ReducedLlava` is the same for its
older protocol of a text and images, which its tasks of type loglikelihood and multiple_choice still need
(`--force_simple`). Tasks with videos are for families that take them. Importing this module needs lmms-eval;
train/evaluation/lmms_plugin.py tells it where to look.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from loguru import logger
from torch.nn import functional
from tqdm import tqdm

from shortzip.data.dataset import Collator
from shortzip.data.errors import UserError
from shortzip.data.instructions import Conversation
from shortzip.data.supervision import Supervision
from shortzip.reduction.question_tokens import QuestionReader
from shortzip.reduction.reductions import ALL, NONE, Reductions
from shortzip.reduction.selectors import VISIONZIP
from shortzip.train.evaluation.lmms_visuals import Reader, with_marks, words
from shortzip.train.inputs.prompts import Prompt, batch_prompts, encode_prompt
from shortzip.train.inputs.videos import sampling_of
from shortzip.train.release.loading import load_release
from shortzip.train.release.opening import open_release
from shortzip.train.release.spec import ReleaseSpec

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GENERATION_KEYS = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "num_beams",
    "do_sample",
    "repetition_penalty",
    "length_penalty",
)
OTHER_KEYS = ("until", "image_aspect_ratio")
MAX_NEW_TOKENS = 1024
# What lmms-eval stops at where a task names nothing: it would cut longer answers after their first paragraph.
FILLER_STOP = ["\n\n"]


@dataclass(frozen=True)
class _Question:
    """One prompt, and the continuation whose loss is wanted; without one, an answer is."""

    prompt: Prompt
    text: str
    """What the user asked last, which CDPruner chooses by."""
    continuation: tuple[int, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    """(role, text) of the prompt, where a continuation follows."""


@dataclass(frozen=True)
class _Request:
    """What lmms-eval asks, its images still to be read: those of a whole benchmark would not fit into memory."""

    text: str
    generation: Mapping[str, Any]
    read: Callable[[], _Question]


class ReducedLlava(lmms):
    """A reduced LLaVA, for lmms-eval's text-and-images protocol.

    Args (each a key of `--model_args`):
        pretrained: whatever `load_release` takes: a reduced checkpoint, a run's folder, a release, a Hub id.
        revision: branch, tag or commit of a Hub id.
        budget: visual tokens, like 54+10 (dominant+contextual), or `all`; absent: as the checkpoint was saved.
        method: with `budget`, the way to choose them, like scope or vispruner:important=0.25; absent: that of the
            checkpoint, of a release VisionZip.
        seed: with method random, its seed.
        text_tower: CDPruner: tokens chosen by the question, read with this CLIP, a Hub id or folder (the one that the
            vision tower comes from, like openai/clip-vit-large-patch14-336); with a budget, given or saved.
        layers: frozen layers, like 31+29+30, or `none`; absent: as the checkpoint was saved.
        fastv: pruning inside the language model instead: FastV like 2+0.5 (after layer 2, keep half), another method
            like pyramiddrop:8+16+24:0.5+0.25+0.125 or sparsevlm:2+6+15:66+30+17, or `none`.
        positions: compact or original (reduction/positions.py); absent: as the checkpoint was saved.
        dtype: float32, bfloat16 or float16 of everything but the projector (float32); auto: bfloat16 on a GPU.
        device: where one process computes; several processes take theirs from Accelerate.
        load_in_4bit: the language model's layers in NF4.
        batch_size: prompts at once.
        max_frames_num: frames of a video that are seen, evenly spread; absent: as many as the release was trained
            with. With `fps`: at most so many.
        fps: instead of evenly spread frames, so many per second of a video.
        attn_implementation: eager or sdpa.
        chat_template: as data.chat_template of a run.
        trust_remote_code: true is allowed for reduced checkpoints only, and not needed: their classes are installed
            here, and no checkpoint's code is run.

    Raises:
        ValueError: an argument that cannot be read, or what `load_release` refuses.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        revision: str | int | None = None,  # lmms-eval reads what looks like a number as one
        budget: str | int | None = None,
        method: str | None = None,
        seed: int = 0,
        text_tower: str | None = None,
        layers: str | int | Sequence[int] | None = None,
        fastv: str | float | None = None,
        positions: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        load_in_4bit: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        attn_implementation: str = "sdpa",
        chat_template: str = "auto",
        trust_remote_code: bool = False,
        max_frames_num: int | None = None,
        fps: float | None = None,
    ) -> None:
        super().__init__()
        if str(batch_size).startswith("auto") or int(batch_size) < 1:
            raise UserError(f"batch_size is {batch_size!r}: a number of prompts, at least 1, is needed")
        if dtype not in DTYPES:
            raise UserError(f"dtype is {dtype!r}: choose one of {', '.join(DTYPES)}")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        single = self._world_size == 1 and device is not None
        self._device = torch.device(device if single else self.accelerator.device)  # type: ignore[arg-type]
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"device is {device!r}, and there is no GPU here: give --device cpu")
        spec = ReleaseSpec(
            pretrained,
            None if revision is None else str(revision),
            chat_template=chat_template,
            dtype=DTYPES[dtype] or (torch.float32 if self._device.type == "cpu" else torch.bfloat16),
            load_in_4bit=load_in_4bit,
            attn_implementation=attn_implementation,
        )
        release = open_release(spec)
        if trust_remote_code and not str(release.config["model_type"]).startswith("reduced_"):
            raise UserError(f"trust_remote_code: {pretrained} is no reduced checkpoint, and its code is not run here")
        reductions = _reductions(release.saved_reductions, budget, method, seed, layers, fastv, positions)
        self._reader = None if text_tower is None else _reader(text_tower, method, reductions)
        self._model, processor = load_release(release, reductions)
        self._model.to(self._device)
        self.batch_size = int(batch_size)
        sampling = sampling_of(processor, max_frames_num, fps)
        self.supervision = Supervision(processor, max_length=None, sampling=sampling)
        self.visuals = Reader(self.supervision)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def model(self) -> Any:
        return self._model

    @property
    def tokenizer(self) -> Any:
        return self.supervision.tokenizer

    # ------------------------------------------------------------------------------------------ lmms-eval's requests

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """An answer for each request, stripped and cut before the first of its `until` strings (but for lmms-eval's
        own blank line, which it sets where a task names none)."""
        items = []
        for context, generation, doc_to_visual, doc_id, task, split in (request.args for request in requests):
            read = partial(self._question, context, doc_to_visual, doc_id, task, split)
            items.append(_Request(context, generation, read))
        return self._batched(items, self._generate, "generate_until")

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(mean loss of the continuation and its end token, would greedy decoding say just that) for each request.

        The loss, not its negative: lmms-eval's own models return it, and its multiple_choice takes the smallest. In a
        GenerationResult, because lmms-eval 0.7 turns everything else into text, and then fails to read it.
        """
        items = []
        for context, target, doc_to_visual, doc_id, task, split in (request.args for request in requests):
            read = partial(self._continued, target, context, doc_to_visual, doc_id, task, split)
            items.append(_Request(context, {}, read))
        scores = self._batched(items, self._score, "loglikelihood")
        return [GenerationResult(pair) for pair in scores]  # annotated as text

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("reduced_llava: tasks of several rounds are not supported; LLaVA's are single-round")

    # --------------------------------------------------------------------------------------------------------- prompts

    def _question(
        self, context: str, doc_to_visual: Callable[[Any], Any], doc_id: int, task: str, split: str
    ) -> _Question:
        shown = self.visuals.read(doc_to_visual(self.task_dict[task][split][doc_id]) or [])
        turns = [("user", with_marks(context, shown))]
        prompt = encode_prompt(self.supervision, turns, shown.images, videos=shown.videos)
        return _Question(prompt, words(context), turns=tuple(turns))

    def _continued(
        self,
        target: str | Callable[[Any], Any],
        context: str,
        doc_to_visual: Callable[[Any], Any],
        doc_id: int,
        task: str,
        split: str,
    ) -> _Question:
        continuation = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
        question = self._question(context, doc_to_visual, doc_id, task, split)
        prompt, sizes = question.prompt, list(question.prompt.image_sizes)
        turns = (*question.turns, ("assistant", str(continuation).strip()))
        conversation = Conversation("", ("",) * len(sizes), turns, videos=("",) * len(prompt.frames))
        encoded = self.supervision.encode(conversation, sizes, frames=[len(video) for video in prompt.frames])
        start, end = encoded.answers[-1]
        prompt = replace(prompt, input_ids=encoded.input_ids[:start])
        return replace(question, prompt=prompt, continuation=tuple(encoded.input_ids[start:end]))

    # --------------------------------------------------------------------------------------------------------- batches

    def _batched(
        self, items: Sequence[_Request], run: Callable[[list[_Question], Mapping[str, Any]], list[Any]], title: str
    ) -> list[Any]:
        """`run` on batches of requests that generate alike, long ones first; results in the order of `items`."""
        order = sorted(range(len(items)), key=lambda index: (repr(items[index].generation), -len(items[index].text)))
        results: list[Any] = [None] * len(items)
        with tqdm(total=len(items), desc=title, disable=self.rank != 0) as bar:
            while order:
                generation = items[order[0]].generation
                alike = repr(generation)  # as they are sorted: settings that are equal, like 0 and 0.0, may lie apart
                batch = [index for index in order[: self.batch_size] if repr(items[index].generation) == alike]
                order = order[len(batch) :]
                of_batch = run([items[index].read() for index in batch], generation)
                for index, result in zip(batch, of_batch, strict=True):
                    results[index] = result
                bar.update(len(batch))
        return results

    def _inputs(self, batch: list[_Question], prompts: list[Prompt]) -> dict[str, Any]:
        """What the model is given; with CDPruner, the visual tokens in place of the images."""
        inputs: dict[str, Any] = batch_prompts(self.supervision, prompts, self.device)
        if self._reader is not None:
            if any(question.prompt.frames for question in batch):
                raise UserError("text_tower is given, and the task gives videos: CDPruner chooses of images only")
            questions = [question.text for question in batch for _ in question.prompt.image_sizes]
            inputs = self._reader.given(self.model, inputs, questions)
        return inputs

    @torch.inference_mode()
    def _generate(self, batch: list[_Question], generation: Mapping[str, Any]) -> list[str]:
        strange = sorted(generation.keys() - {*GENERATION_KEYS, *OTHER_KEYS})
        if strange:
            logger.warning("generation settings that mean nothing here are left out: {}", ", ".join(strange))
        settings = {key: generation[key] for key in GENERATION_KEYS if generation.get(key) is not None}
        temperature = settings.get("temperature")  # tasks give 0 to mean greedy decoding, which transformers refuses
        settings["do_sample"] = temperature != 0 and settings.get("do_sample", temperature is not None)
        if not settings["do_sample"]:
            settings = {key: value for key, value in settings.items() if key not in ("temperature", "top_p", "top_k")}
        inputs = self._inputs(batch, [question.prompt for question in batch])
        output = self.model.generate(
            **inputs,
            **{"max_new_tokens": MAX_NEW_TOKENS, "num_beams": 1, **settings},
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=Collator.of(self.supervision).pad_token_id,
        )
        until = generation.get("until") or []
        until = [] if until == FILLER_STOP else until
        texts = self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [_cut(text, [until] if isinstance(until, str) else until) for text in texts]

    @torch.inference_mode()
    def _score(self, batch: list[_Question], _: Mapping[str, Any]) -> list[tuple[float, bool]]:
        rows = [replace(item.prompt, input_ids=[*item.prompt.input_ids, *item.continuation]) for item in batch]
        inputs = self._inputs(batch, rows)
        # Pruning chooses by the question's last token, as it does before an answer is generated.
        last = [inputs["input_ids"].shape[1] - len(item.continuation) - 1 for item in batch]
        query = torch.tensor(last, device=self.device)
        hidden = self.model.model(**inputs, use_cache=False, fastv_query=query).last_hidden_state
        results = []
        for row, question in enumerate(batch):
            count = len(question.continuation)
            # Padding is on the left: a row ends with its continuation, and each token is said by the one before it.
            logits = self.model.lm_head(hidden[row, -count - 1 : -1]).float()
            targets = inputs["input_ids"][row, -count:]
            loss = functional.cross_entropy(logits, targets)
            results.append((loss.item(), bool((logits.argmax(-1) == targets).all())))
        return results


class ReducedLlavaChat(ReducedLlava):
    """A reduced LLaVA, for tasks that give chat messages: several turns, images anywhere."""

    is_simple = False

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """As `ReducedLlava.generate_until`."""
        items = []
        for context, doc_to_messages, generation, doc_id, task, split in (request.args for request in requests):
            read = partial(self._conversation, doc_to_messages, doc_id, task, split)
            items.append(_Request(context, generation, read))
        return self._batched(items, self._generate, "generate_until")

    def _conversation(self, doc_to_messages: Callable[[Any], Any], doc_id: int, task: str, split: str) -> _Question:
        turns, shown = self.visuals.turns(doc_to_messages(self.task_dict[task][split][doc_id]))
        prompt = encode_prompt(self.supervision, turns, shown.images, videos=shown.videos)
        return _Question(prompt, words(turns[-1][1]))


def _reductions(
    saved: Reductions,
    budget: str | int | None,
    method: str | None,
    seed: int,
    layers: str | int | Sequence[int] | None,
    fastv: str | float | None,
    positions: str | None,
) -> Reductions:
    """What the model's arguments ask for; what they do not name is as saved."""
    if budget is None and method is not None:
        raise UserError(f"method is {method!r}, and no budget is given: a budget like 54+10 is needed")
    listed = layers if layers is None or isinstance(layers, (str, int)) else "+".join(map(str, layers)) or NONE
    reductions = Reductions.parse(
        ALL if budget is None else str(budget),
        NONE if listed is None else str(listed),
        NONE if fastv is None else str(fastv),
        method=method or VISIONZIP,
        seed=seed,
    )
    visionzip = saved.visionzip if budget is None else reductions.visionzip
    if method is None and budget is not None and visionzip is not None and saved.visionzip is not None:
        visionzip = saved.one_budget.with_budget(visionzip).visionzip  # what was tuned, was tuned for its own method
    return Reductions(
        visionzip,
        saved.shortv if layers is None else reductions.shortv,
        saved.fastv if fastv is None else reductions.fastv,
        saved.positions if positions is None else positions,
    )


def _reader(text_tower: str, method: str | None, reductions: Reductions) -> QuestionReader:
    if method is not None or reductions.visionzip is None:
        given = "no budget" if method is None else f"method {method}"
        raise UserError(f"text_tower is {text_tower!r}, with {given}: CDPruner takes a budget and no other method")
    return QuestionReader.from_pretrained(text_tower)


def _cut(text: str, until: Sequence[str]) -> str:
    text = text.strip()
    for stop in until:
        if stop:
            text = text.split(stop, 1)[0]
    return text.strip()
