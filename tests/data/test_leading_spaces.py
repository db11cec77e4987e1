"""A text that begins with a space has the tokens that LLaVA's own (slow, sentencepiece) tokenizer gives it."""

import pytest
from processors import GOLDEN, llava_processor

from shortzip.data.instructions import Conversation
from shortzip.data.supervision import Supervision, load_template

sentencepiece = pytest.importorskip("sentencepiece")
MODEL = GOLDEN / "llava_release" / "llava-v1.5-tiny" / "tokenizer.model"


def original_ids(pieces: list[str]) -> list[int]:
    """Beginning token, then each text between the images on its own, with sentencepiece's space before it."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))
    ids = [tokenizer.bos_id()]
    for number, piece in enumerate(pieces):
        ids += [-200] * bool(number)
        for place, text in enumerate(piece.split("</s>")):
            ids += [tokenizer.eos_id()] * bool(place)
            ids += tokenizer.encode(text)
    return ids


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
CASES = {
    "an image alone": (
        "vicuna_v1",
        [("user", "<image>"), ("assistant", "A boat.")],
        [SYSTEM + "USER: ", " ASSISTANT: A boat.</s>"],
    ),
    "an image alone with white space": (
        "vicuna_v1",
        [("user", " <image>\n"), ("assistant", "A boat.")],
        [SYSTEM + "USER: ", " ASSISTANT: A boat.</s>"],
    ),
    "a later turn that is an image alone": (
        "mistral_instruct",
        [("user", "Hi"), ("assistant", "Yes"), ("user", "<image>"), ("assistant", "A boat.")],
        ["[INST] Hi [/INST] Yes</s>[INST] ", " [/INST] A boat.</s>"],
    ),
    "a system sentence that begins with spaces": (
        "vicuna_v1",
        [("system", "  Be brief."), ("user", "<image>\nWhat?"), ("assistant", "A boat.")],
        ["  Be brief. USER: ", "\nWhat? ASSISTANT: A boat.</s>"],
    ),
    "a caption that begins with a space": (
        "plain",
        [("user", "<image>"), ("assistant", " A boat.")],
        ["", " A boat.\n"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_equal_the_originals(name: str) -> None:
    template, turns, pieces = CASES[name]
    # A tokenizer of the older kind, for which sentencepiece's own prefix is all there is.
    supervision = Supervision(llava_processor(legacy=True), load_template(template))
    images = sum(text.count("<image>") for _, text in turns)
    encoded = supervision.encode(Conversation("x", ("x.jpg",) * images, tuple(turns)))
    image, ids = supervision.processor.image_token_id, []
    for token in encoded.input_ids:
        if token != image:
            ids.append(token)
        elif not ids or ids[-1] != -200:
            ids.append(-200)
    assert ids == original_ids(pieces)
    start, end = encoded.answers[-1]
    assert supervision.tokenizer.decode(encoded.input_ids[start:end]).strip().startswith("A boat.")
    asked = Conversation("x", ("x.jpg",) * images, tuple(turns[:-1]))
    if template != "plain":
        assert supervision.prompt(asked) == encoded.input_ids[:start]


@pytest.mark.parametrize("legacy", [True, False])
def test_an_image_alone_has_one_token_more_than_its_text(legacy: bool) -> None:
    supervision = Supervision(llava_processor(legacy=legacy), load_template("vicuna_v1"))
    row = Conversation("x", ("x.jpg",), (("user", "<image>"), ("assistant", "A")))
    ids = supervision.encode(row).input_ids
    after = ids[len(ids) - ids[::-1].index(supervision.processor.image_token_id) :]
    assert supervision.tokenizer.convert_ids_to_tokens(after)[:2] == ["▁▁", "A"]
