"""`evaluate` with CDPruner: every question is read by itself, with the visual tokens that it chooses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import write_clip, write_next_release
from torch.nn import functional
from transformers import CLIPVisionConfig, LlavaConfig

from shortzip.data.instructions import PLACEHOLDER, read_instructions
from shortzip.data.supervision import Supervision
from shortzip.reduction.errors import ReductionError
from shortzip.reduction.question_tokens import QuestionReader
from shortzip.reduction.reductions import Reductions
from shortzip.scripts.evaluate_models import main
from shortzip.train.inputs.prompts import batch_prompts, encode_prompt
from shortzip.train.release.loading import load_release
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.frontier import FrontierConfig

TOKENS, ROWS = 6, 5


@pytest.fixture(scope="module")
def clip(learned_release: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    config: Any = LlavaConfig.from_pretrained(learned_release).vision_config
    return str(write_clip(tmp_path_factory.mktemp("clip"), config))


def given(release: Path, held_out: Path, output: Path, *more: str) -> list[str]:
    data = ["--instructions", str(held_out), "--data.samples", str(ROWS)]
    options = ["--max_new_tokens", str(TOKENS), "--batch_size", "3", "--output", str(output)]
    return ["--model", str(release), *data, *options, *more]


def one_by_one(release: Path, held_out: Path, clip: str, reductions: Reductions) -> tuple[list[str], float]:
    """The answers, and the mean loss, of each question alone: its own prompt, its own tokens."""
    model, processor = load_release(str(release), reductions)
    supervision, reader = Supervision(processor, max_length=None), QuestionReader.from_pretrained(clip)
    end = supervision.tokenizer.eos_token_id
    said, losses = [], []
    for conversation in read_instructions(held_out)[:ROWS]:
        pictures = [Image.open(held_out.parent / str(image)).convert("RGB") for image in conversation.images]
        for place, (role, text) in enumerate(conversation.turns):
            if role != "user":
                continue
            prompt = encode_prompt(supervision, conversation.turns[: place + 1], pictures)
            words = text.replace(PLACEHOLDER, "").strip()
            inputs = batch_prompts(supervision, [prompt], model.device)
            inputs = reader.given(model, inputs, [words] * len(pictures))
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS, eos_token_id=end, pad_token_id=0)
            answer: Any = supervision.tokenizer.decode(ids[0, len(prompt.input_ids) :], skip_special_tokens=True)
            said.append(answer.strip())
            whole = supervision.encode(conversation, [(image.height, image.width) for image in pictures])
            begin, stop = whole.answers[place // 2]
            inputs |= {"input_ids": torch.tensor([whole.input_ids[:stop]]), "attention_mask": torch.ones(1, stop)}
            with torch.no_grad():
                logits = model(**inputs).logits[0, begin - 1 : stop - 1]
            target = torch.tensor(whole.input_ids[begin:stop])
            losses += functional.cross_entropy(logits, target, reduction="none").tolist()
    return said, sum(losses) / len(losses)


@pytest.mark.parametrize(
    "more", [(), pytest.param(("--positions", "original", "--freeze", "[1]"), marks=pytest.mark.slow)]
)
def test_each_question_has_its_own_tokens(
    learned_release: Path, tiny_held_out: Path, clip: str, tmp_path: Path, more: tuple[str, ...]
) -> None:
    main(given(learned_release, tiny_held_out, tmp_path, "--budget", "4+2", "--text_tower", clip, *more))
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["all tokens", "reduced, untuned", "reduced by the question, untuned"]
    assert [row["method"] for row in rows] == ["visionzip", "visionzip", "cdpruner"]
    every, by_image, by_question = rows
    assert by_question["visual_tokens"] == 6
    assert by_question["questions"] == every["questions"]
    assert by_question["supervised_tokens"] == every["supervised_tokens"]
    assert by_question["llm_flops"] == by_image["llm_flops"]
    assert by_question["prefill_ms"] > 0
    reductions = Reductions.parse("4+2", "1" if more else "none", positions="original" if more else "compact")
    said, loss = one_by_one(learned_release, tiny_held_out, clip, reductions)
    answers = [json.loads(line) for line in (tmp_path / by_question["answers"]).read_text().splitlines()]
    assert [answer["answer"] for answer in answers] == said
    assert by_question["loss"] == pytest.approx(loss, rel=1e-4)
    assert by_question["loss"] != pytest.approx(by_image["loss"], rel=1e-4)


def test_what_cannot_choose_by_questions_is_refused_before_anything_is_evaluated(
    learned_release: Path, tiny_held_out: Path, clip: str, tmp_path: Path
) -> None:
    def refused(release: Path, tower: str, message: str, *budget: str) -> None:
        with pytest.raises((ReductionError, ConfigError), match=message):
            main(given(release, tiny_held_out, tmp_path / "out", "--text_tower", tower, *budget))
        assert not (tmp_path / "out").exists()

    budget = ("--budget", "4+2")
    refused(learned_release, clip, "text_tower is .*, with no budget")
    refused(learned_release, "/nowhere", "text_tower is '/nowhere': it must be a CLIP release", *budget)
    wide = CLIPVisionConfig(hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    other = str(write_clip(tmp_path / "wide", wide))
    refused(learned_release, other, "projects patches of width 32, the model's tower gives 24: name the CLIP", *budget)
    refused(write_next_release(tmp_path / "next"), clip, "it must be a reduced_llava", *budget)
    settings: dict[str, Any] = {"recipe": "r.yaml", "output": "out", "tokens": [8]}
    with pytest.raises(ConfigError, match=r"cdpruner chooses by each question, .*: evaluate it with text_tower"):
        FrontierConfig(**settings, methods=["cdpruner"])
