"""A conversation that goes on in its cache is the whole conversation asked anew."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import write_next_release, write_release

from shortzip.data.errors import UserError
from shortzip.data.supervision import Supervision
from shortzip.reduction.reductions import Reductions
from shortzip.train.inputs.chat import Chat
from shortzip.train.inputs.prompts import batch_prompts, encode_prompt
from shortzip.train.release.loading import load_release

BUDGET, SHORTV = {"dominant": 6, "contextual": 3}, {"layers": [1, 2]}
REDUCTIONS = {
    "none": Reductions(),
    "both": Reductions(BUDGET, SHORTV),
    "original": Reductions(BUDGET, SHORTV, positions="original"),
    "fastv": Reductions(BUDGET, fastv={"layer": 2, "keep": 0.5}),
}
IMAGES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 60 + 30 * seed, 3), dtype=np.uint8))
    for seed in range(2)
]


@pytest.fixture(scope="module", params=["llava", "next"])
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    write = write_release if request.param == "llava" else write_next_release
    return write(tmp_path_factory.mktemp("release"))


def load(release: Path, reduction: str) -> tuple[Any, Supervision]:
    model, processor = load_release(str(release), REDUCTIONS[reduction])
    return model.eval(), Supervision(processor, max_length=None)


def anew(model: Any, supervision: Supervision, turns: Any, images: list[Image.Image], new_tokens: int) -> list[int]:
    """The answer's tokens, by transformers alone."""
    inputs = batch_prompts(supervision, [encode_prompt(supervision, turns, images)], model.device)
    ends = {"eos_token_id": supervision.tokenizer.eos_token_id, "pad_token_id": supervision.tokenizer.pad_token_id}
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, **ends)
    return list(ids[0, inputs["input_ids"].shape[1] :].tolist())


@pytest.mark.parametrize("reduction", list(REDUCTIONS))
def test_every_answer_is_that_of_the_whole_conversation(release: Path, reduction: str) -> None:
    model, supervision = load(release, reduction)
    chat, towers, passes = Chat(model, supervision), [], []
    model.model.vision_tower.embeddings.register_forward_hook(lambda *_: towers.append(1))
    model.model.language_model.layers[0].register_forward_pre_hook(lambda _, given: passes.append(given[0].shape[1]))
    asked = [
        ("what colour is the picture?", [IMAGES[0]]),
        ("name the colour", []),
        ("is it bright?", [IMAGES[1]]),
        ("what colour is the picture?", []),
    ]
    for question, images in asked:
        towers.clear()
        passes.clear()
        answer = chat.ask(question, images, max_new_tokens=5)
        turns = chat.turns[:-1]
        own = anew(model, supervision, turns, chat.images, 5)
        assert answer == supervision.tokenizer.decode(own, skip_special_tokens=True).strip()
        if reduction != "fastv":
            assert len(towers) - 1 == (1 if images else 0)  # one is of `anew`
            assert images or passes[0] < 40
    assert [role for role, _ in chat.turns] == ["user", "assistant"] * 4


@pytest.mark.parametrize("reduction", ["both", "original"])
def test_what_is_asked_otherwise_begins_where_it_differs(release: Path, reduction: str) -> None:
    """An earlier answer that was another one, an image that is another one, and a reply that is not kept."""
    model, supervision = load(release, reduction)
    chat, first = Chat(model, supervision), ("user", "<image>\nname the colour")
    whole = chat.reply([first], [IMAGES[0]], 5)
    later = [first, ("assistant", "red green"), ("user", "is it bright?")]
    again = chat.reply(later, [IMAGES[0]], 5, keep=False)
    assert again.ids == anew(model, supervision, later, [IMAGES[0]], 5)
    assert again.computed < whole.computed
    assert chat.reply(later, [IMAGES[0]], 5) == again
    assert chat.reply(later, [IMAGES[0]], 5).computed == 1
    other = chat.reply([first], [IMAGES[1]], 5)
    assert other.ids == anew(model, supervision, [first], [IMAGES[1]], 5)
    without = chat.reply([("user", "is it bright?")], [], 5)
    assert without.ids == anew(model, supervision, [("user", "is it bright?")], [], 5)


def test_a_pass_that_fails_leaves_nothing_behind(tiny_release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, supervision = load(tiny_release, "both")
    chat, turns = Chat(model, supervision), [("user", "<image>\nname the colour")]
    expected = chat.reply(turns, IMAGES[:1], 5)

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    hook = model.model.language_model.layers[3].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        chat.ask("is it bright?", IMAGES[:1])
    hook.remove()
    assert chat.turns == []
    assert chat.reply(turns, IMAGES[:1], 5) == expected


@pytest.mark.parametrize(("reduction", "beyond"), [("both", 0), ("original", 36 - 9)])
def test_a_conversation_that_is_too_long_is_refused(tiny_release: Path, reduction: str, beyond: int) -> None:
    model, supervision = load(tiny_release, reduction)
    chat = Chat(model, supervision)
    prompt = encode_prompt(supervision, [("user", "<image>\nis it bright?")], IMAGES[:1])
    model.config.text_config.max_position_embeddings = len(prompt.input_ids) + beyond + 2
    chat.ask("is it bright?", IMAGES[:1], max_new_tokens=2)
    chat = Chat(model, supervision)
    with pytest.raises(UserError, match="this model: begin a new one"):
        chat.ask("is it bright?", IMAGES[:1], max_new_tokens=3)
    model.config.text_config.max_position_embeddings = 512
    with pytest.raises(UserError, match="longer than the 512 tokens of this model"):
        chat.ask("is it bright?", max_new_tokens=600)
    assert chat.turns == []
