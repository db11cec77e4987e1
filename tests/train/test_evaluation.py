"""Exact match and loss: what a user would get by asking one question after the other."""

import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import write_instructions
from transformers import LlavaForConditionalGeneration

from shortzip.data.dataset import ConversationDataset
from shortzip.data.drops import Drop
from shortzip.data.instructions import read_instructions
from shortzip.data.supervision import Supervision
from shortzip.reduction.flops import llm_prefill_flops_grouped
from shortzip.reduction.reductions import Reductions
from shortzip.train.evaluation.answers import Answer, Evaluation, evaluate, held_out_loss
from shortzip.train.evaluation.comparison import Candidate, compare, recovered_share, table_of, write_evaluation
from shortzip.train.release.loading import load_processor, load_release
from shortzip.train.release.opening import Release, open_release, release_projector
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.release.writing import write_reduced_checkpoint
from shortzip.train.run.processes import StopRequest
from shortzip.train.run.report import Reporter
from shortzip.train.run.session import Session
from shortzip.train.settings.config import DataConfig
from shortzip.train.step.objective import SupervisedLoss, count_supervised

TOKENS = 12


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(mixed_precision="no")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of which a model that learned the colours gets some right: every third answer is not true."""
    path = write_instructions(tmp_path_factory.mktemp("asked"), 12, seed=5)
    rows = json.loads(path.read_text())
    answers = [turn for row in rows for turn in row["conversations"] if turn["from"] == "gpt"]
    for number, turn in enumerate(answers):
        turn["value"] = ("it is bright" if number % 2 else "no") if number % 3 == 0 else turn["value"]
    path.write_text(json.dumps(rows))
    return path


def answers_one_by_one(release: Path, held_out: Path) -> list[str]:
    """Plain LLaVA, one question at a time, the true turns before it written out by hand."""
    model = LlavaForConditionalGeneration.from_pretrained(release).eval()
    _, processor = load_release(str(release), Reductions())
    tokenizer = processor.tokenizer
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    )
    said = []
    for row in json.loads(held_out.read_text()):
        names = row.get("image", [])
        names = [names] if isinstance(names, str) else names
        prompt = system
        for number, turn in enumerate(row["conversations"]):
            if turn["from"] == "human":
                text = turn["value"]
                if "<image>" in text:
                    text = "<image>" * len(names) + "\n" + text.replace("<image>", "").strip()
                prompt += f" USER: {text} ASSISTANT:"
                continue
            images = [Image.open(held_out.parent / name) for name in names] or None
            inputs = processor(text=prompt, images=images, return_tensors="pt")
            output = model.generate(
                **inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=tokenizer.eos_token_id
            )
            said.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
            prompt += f" {turn['value']}</s>" if number else ""
    return said


@pytest.fixture(scope="module")
def evaluated(learned_release: Path, held_out: Path, accelerator: Accelerator) -> tuple[Evaluation, list[Answer]]:
    return run(learned_release, held_out, accelerator, batch_size=5)


def run(
    release: Path, held_out: Path, accelerator: Accelerator, batch_size: int, **reductions: Any
) -> tuple[Evaluation, list[Answer]]:
    model, processor = load_release(str(release), Reductions(**reductions))
    dataset = ConversationDataset(read_instructions(held_out), Supervision(processor), held_out.parent)
    return evaluate("model", model, dataset, accelerator, batch_size=batch_size, max_new_tokens=TOKENS)


def test_answers_are_those_of_plain_llava_asked_one_by_one(
    evaluated: tuple[Evaluation, list[Answer]], learned_release: Path, held_out: Path
) -> None:
    evaluation, answers = evaluated
    assert [answer.answer for answer in answers] == answers_one_by_one(learned_release, held_out)
    assert 0.1 < evaluation.exact_match < 0.98, "right and wrong answers are both needed here"
    assert evaluation.exact_match == sum(a.answer == a.expected for a in answers) / len(answers)
    rows = json.loads(held_out.read_text())
    assert [(a.id, a.expected) for a in answers] == [
        (row["id"], turn["value"]) for row in rows for turn in row["conversations"] if turn["from"] == "gpt"
    ]


def test_with_pyramiddrop_only_a_single_answer_is_told_by_the_loss_s_pass(
    learned_release: Path, held_out: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All answers of a row rank together in it: what is asked in several turns is generated."""
    generated: list[int] = []

    def counted(*arguments: Any) -> list[str]:
        generated.append(len(arguments[2]))
        return [""] * len(arguments[2])

    monkeypatch.setattr("shortzip.train.evaluation.answers._generate", counted)
    fastv = {"method": "pyramiddrop", "layers": [1], "keep": [1.0]}  # the greedy tokens are those of the plain model
    rows = json.loads(held_out.read_text())
    single = {row["id"] for row in rows if len(row["conversations"]) == 2}
    _, answers = run(learned_release, held_out, accelerator, batch_size=12, fastv=fastv)
    told = [answer for answer in answers if answer.answer]
    assert sum(generated) + len(told) == len(answers)
    assert {answer.id for answer in told} <= single < {row["id"] for row in rows}
    assert told


@pytest.mark.parametrize(
    "reductions", [{}, {"visionzip": {"dominant": 4, "contextual": 2}, "shortv": {"layers": [2]}}]
)
def test_the_batch_size_changes_nothing(
    learned_release: Path, held_out: Path, accelerator: Accelerator, reductions: dict[str, Any]
) -> None:
    first, answers = run(learned_release, held_out, accelerator, batch_size=1, **reductions)
    second, again = run(learned_release, held_out, accelerator, batch_size=7, **reductions)
    assert answers == again
    assert first.loss == pytest.approx(second.loss, rel=1e-5)
    assert first.supervised_tokens == second.supervised_tokens


def test_the_costs_are_those_of_the_model(
    evaluated: tuple[Evaluation, list[Answer]], learned_release: Path, held_out: Path, accelerator: Accelerator
) -> None:
    plain, _ = evaluated
    reductions: dict[str, Any] = {"visionzip": {"dominant": 4, "contextual": 2}, "shortv": {"layers": [2, 3]}}
    reduced, _ = run(learned_release, held_out, accelerator, batch_size=5, **reductions)
    assert (plain.visual_tokens, plain.frozen_layers) == (36, 0)
    assert (reduced.visual_tokens, reduced.frozen_layers) == (6, 2)
    text = LlavaForConditionalGeneration.from_pretrained(learned_release).config.text_config
    _, processor = load_release(str(learned_release), Reductions())
    dataset = ConversationDataset(read_instructions(held_out), Supervision(processor), held_out.parent)
    lengths, images = [], []
    for index, row in enumerate(json.loads(held_out.read_text())):
        sample = dataset[index]
        assert not isinstance(sample, Drop)
        for start, _ in sample.encoded.answers:
            lengths.append(start)
            images.append(len([row["image"]] if isinstance(row.get("image"), str) else row.get("image", [])))
    assert {0, 1, 2} <= set(images)
    shown = statistics.fmean(images)
    tokens = round(statistics.fmean(lengths) - 36 * shown)
    assert plain.llm_flops == llm_prefill_flops_grouped(text, tokens, round(36 * shown), 0)
    assert reduced.llm_flops == llm_prefill_flops_grouped(text, tokens, round(6 * shown), 2)
    assert plain.prefill_ms > 0
    assert plain.prefill_batch == 5


def test_no_answer_is_longer_than_asked_right_or_wrong(
    learned_release: Path, held_out: Path, accelerator: Accelerator
) -> None:
    model, processor = load_release(str(learned_release), Reductions())
    dataset = ConversationDataset(read_instructions(held_out), Supervision(processor), held_out.parent)
    answers = [
        evaluate("model", model, dataset, accelerator, batch_size=5, max_new_tokens=tokens)[1]
        for tokens in (1, TOKENS)
    ]
    first, whole = answers
    cut = [(a, b) for a, b in zip(first, whole, strict=True) if a.answer != b.answer]
    assert any(b.correct for _, b in cut)
    assert all(b.answer.startswith(a.answer) and not a.correct for a, b in cut)


def test_the_held_out_loss_of_the_loop_is_the_table_s(
    evaluated: tuple[Evaluation, list[Answer]], learned_release: Path, held_out: Path, accelerator: Accelerator
) -> None:
    from shortzip.data.dataset import Collator

    model, processor = load_release(str(learned_release), Reductions())
    dataset = ConversationDataset(read_instructions(held_out), Supervision(processor), held_out.parent)
    collate = Collator.of(dataset.supervision)
    batches = [collate([dataset[index] for index in rows]) for rows in (range(3), range(3, 12), [])]
    session = Session(accelerator, Reporter(is_main=False), StopRequest())
    loss = held_out_loss(SupervisedLoss(model), batches, session)
    assert loss == pytest.approx(evaluated[0].loss, rel=1e-5)
    assert sum(count_supervised(b.inputs["labels"]) for b in batches) == evaluated[0].supervised_tokens
    session.stop.signal = "SIGTERM"
    assert held_out_loss(SupervisedLoss(model), batches, session) is None


def test_prefill_is_timed_side_by_side(
    learned_release: Path, held_out: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is busy in one round (here the second) changes no row."""
    times = iter([99.0, 99.0, 8.0, 4.0, 80.0, 40.0, 7.0, 5.0])
    monkeypatch.setattr("shortzip.train.evaluation.questions.Prefill.measure", lambda _: next(times))
    data = DataConfig(instructions=str(held_out), eval_instructions=str(held_out), eval_samples=2)
    candidates = [
        Candidate("all tokens", ReleaseSpec(str(learned_release)), Reductions()),
        Candidate("reduced", ReleaseSpec(str(learned_release)), Reductions({"dominant": 2, "contextual": 1})),
    ]
    rows, _ = compare(candidates, data, accelerator, batch_size=4, max_new_tokens=2)
    assert [row.prefill_ms for row in rows] == [8.0, 5.0]


def test_rows_of_the_same_weights_share_them_and_are_what_each_is_alone(
    learned_release: Path, held_out: Path, accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, reduced = (
        open_release(str(learned_release)),
        Reductions({"dominant": 4, "contextual": 2}, {"layers": [1]}),
    )
    projector = {name: 1.5 * tensor for name, tensor in release_projector(release).items()}
    write_reduced_checkpoint(tmp_path / "tuned", release, projector, load_processor(release, reduced), reduced)
    other = shutil.copytree(learned_release, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    head = next(name for name in weights if name.endswith("lm_head.weight"))
    save_file({**weights, head: 0.5 * weights[head]}, other / "model.safetensors")
    candidates = [
        Candidate("reduced", ReleaseSpec(str(learned_release)), reduced),
        Candidate("other", ReleaseSpec(str(other)), Reductions()),
        Candidate("all", ReleaseSpec(str(learned_release)), Reductions()),
        Candidate("tuned", ReleaseSpec(str(tmp_path / "tuned"))),
        Candidate("bfloat16", ReleaseSpec(str(tmp_path / "tuned"), dtype=torch.bfloat16)),
    ]
    loaded = []

    def load(release: Release, reductions: Reductions | None) -> Any:
        loaded.append((Path(release.name).name, str(release.spec.dtype)))
        return load_release(release, reductions)

    monkeypatch.setattr("shortzip.train.evaluation.comparison.load_release", load)
    data = DataConfig(instructions=str(held_out), eval_instructions=str(held_out), eval_samples=3)
    rows, answers = compare(candidates, data, accelerator, batch_size=4, max_new_tokens=4)
    assert loaded == [
        (learned_release.name, "torch.float32"), ("other", "torch.float32"), ("tuned", "torch.bfloat16")
    ]  # fmt: skip
    for candidate, row, said in zip(candidates, rows, answers, strict=True):
        (alone,), (its,) = compare([candidate], data, accelerator, batch_size=4, max_new_tokens=4)
        assert replace(row, seconds=0, prefill_ms=0) == replace(alone, seconds=0, prefill_ms=0)
        assert said == its
    assert len({row.loss for row in rows}) == len(rows)


def test_side_by_side_with_answers_in_files(
    learned_release: Path, held_out: Path, accelerator: Accelerator, tmp_path: Path
) -> None:
    data = DataConfig(instructions=str(held_out), eval_instructions=str(held_out), eval_samples=4)
    candidates = [
        Candidate("all tokens", ReleaseSpec(str(learned_release)), Reductions()),
        Candidate(
            "reduced, untuned", ReleaseSpec(str(learned_release)), Reductions.parse("3+0", method="scope:alpha=.5")
        ),
    ]
    results, answers = compare(candidates, data, accelerator, batch_size=4, max_new_tokens=4)
    write_evaluation(tmp_path, results, answers, recovered_share=None)
    assert [row.name for row in results] == ["all tokens", "reduced, untuned"]
    assert [row.visual_tokens for row in results] == [36, 3]
    lines = (tmp_path / "answers" / "reduced--untuned.jsonl").read_text().splitlines()
    assert len(lines) == results[1].questions
    assert sum(json.loads(line)["correct"] for line in lines) == results[1].exact_match * len(lines)
    table = table_of(results, "title")
    assert list(table.columns[3].cells) == ["36", "3, scope:alpha=0.5"]
    assert json.loads((tmp_path / "evaluation.json").read_text())["rows"][0]["loss"] == results[0].loss


@pytest.mark.parametrize(("tuned", "share"), [(0.7, 0.5), (0.6, 0.0), (0.5, -0.5)])
def test_the_recovered_share_is_of_what_was_lost(
    evaluated: tuple[Evaluation, list[Answer]], tuned: float, share: float
) -> None:
    full, untuned = (replace(evaluated[0], exact_match=value) for value in (0.8, 0.6))
    assert recovered_share(full, untuned, replace(full, exact_match=tuned)) == pytest.approx(share)
    assert recovered_share(untuned, full, full) is None
