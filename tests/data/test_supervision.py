"""Ids and supervised text equal to those of LLaVA's own code, row by row; what is cut, and what is dropped."""

import json
from typing import Any

import pytest
from processors import GOLDEN, llava_next_processor, llava_processor
from transformers import LlavaProcessor

from shortzip.data.drops import BadSample
from shortzip.data.instructions import Conversation, parse_llava_row
from shortzip.data.supervision import IGNORE_INDEX, Encoded, Supervision, choose_template, load_template

LABELS = json.loads((GOLDEN / "labels" / "labels_shared.json").read_text(encoding="utf-8"))
ROWS = {row["id"]: row for row in LABELS["conversations"]}
ORIGINAL_IMAGE_ID = -200


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return llava_processor()


@pytest.fixture(scope="module")
def supervision(processor: LlavaProcessor) -> Supervision:
    return Supervision(processor, load_template("vicuna_v1"))


def with_one_id_per_image(encoded: Encoded, processor: LlavaProcessor) -> tuple[list[int], list[int]]:
    """Ids and labels as the original has them: one id of -200 in the place of an image's 64 placeholders."""
    ids: list[int] = []
    labels: list[int] = []
    left = 0
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        if left:
            assert token == processor.image_token_id
            assert label == IGNORE_INDEX
            left -= 1
            continue
        if token == processor.image_token_id:
            token, left = ORIGINAL_IMAGE_ID, 63
        ids.append(token)
        labels.append(label)
    assert left == 0
    return ids, labels


def supervised_texts(encoded: Encoded, supervision: Supervision) -> list[str]:
    return [supervision.tokenizer.decode(encoded.input_ids[start:end]) for start, end in encoded.answers]


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if not row["v1"]["mismatch"]])
def test_ids_and_labels_equal_the_originals(name: str, supervision: Supervision, processor: LlavaProcessor) -> None:
    expected = ROWS[name]["v1"]
    encoded = supervision.encode(parse_llava_row(ROWS[name]["record"]))
    ids, labels = with_one_id_per_image(encoded, processor)
    assert ids == expected["input_ids"]
    assert labels == expected["labels"]
    assert supervised_texts(encoded, supervision) == expected["supervised_text"]
    assert encoded.supervised == expected["n_supervised"]


def test_a_row_that_the_original_masks_whole_keeps_its_ids_and_teaches_its_answers(
    supervision: Supervision, processor: LlavaProcessor
) -> None:
    row = ROWS["s15_role_string_in_answer"]
    assert row["v1"]["mismatch"]
    encoded = supervision.encode(parse_llava_row(row["record"]))
    assert with_one_id_per_image(encoded, processor)[0] == row["v1"]["input_ids"]
    assert supervised_texts(encoded, supervision) == ["It says USER: hi ASSISTANT: hello there.</s>", "Done.</s>"]


def test_an_empty_only_answer_is_dropped(supervision: Supervision) -> None:
    with pytest.raises(BadSample, match=r"s13_empty_answer.*answer is empty") as caught:
        supervision.encode(parse_llava_row(ROWS["s13_empty_answer"]["record"]))
    assert caught.value.reason == "no_answer"


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if not row["v1"]["mismatch"]])
def test_a_tokenizer_of_the_older_kind_gives_the_originals_counts(name: str) -> None:
    supervision = Supervision(llava_processor(legacy=True), load_template("vicuna_v1"))
    expected = ROWS[name]["v1_legacy_true_tokenizer"]
    encoded = supervision.encode(parse_llava_row(ROWS[name]["record"]))
    ids, _ = with_one_id_per_image(encoded, supervision.processor)
    assert (len(ids), encoded.supervised) == (expected["n_tokens"], expected["n_supervised"])


@pytest.mark.parametrize("number", range(4))
def test_the_plain_template_equals_the_originals_pretraining(number: int, processor: LlavaProcessor) -> None:
    golden = LABELS["plain"][number]
    supervision = Supervision(processor, load_template("plain"))
    encoded = supervision.encode(parse_llava_row(ROWS[golden["id"]]["record"]))
    ids, labels = with_one_id_per_image(encoded, processor)
    assert ids == golden["plain"]["input_ids"]
    assert labels == golden["plain"]["labels"]


def test_prompts_equal_the_originals(supervision: Supervision, processor: LlavaProcessor) -> None:
    golden = json.loads((GOLDEN / "llava_release" / "A_expected.json").read_text(encoding="utf-8"))
    for question, expected in zip(golden["prompts"], golden["input_ids"], strict=True):
        ids = supervision.prompt(Conversation("x", ("x.jpg",), (("user", f"<image>\n{question}"),)))
        encoded = Encoded(ids, [IGNORE_INDEX] * len(ids), [], 1)
        assert with_one_id_per_image(encoded, processor)[0] == expected


def original_prompt(turns: list[tuple[str, str]]) -> str:
    """LLaVA's conversation template written out: an empty turn is its role and a colon alone."""
    text = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. "
    )
    for role, said in turns:
        name, end = ("USER", " ") if role == "user" else ("ASSISTANT", "</s>")
        if "<image>" in said:
            said = ("<image>\n" + said.replace("<image>", "").strip()).strip()
        text += f"{name}: {said}{end}" if said else f"{name}:"
    return text


TURNS: dict[str, tuple[list[tuple[str, str]], list[str]]] = {
    "an empty answer in the middle": (
        [
            ("user", "<image>\nQ"),
            ("assistant", "A"),
            ("user", "R"),
            ("assistant", ""),
            ("user", "S"),
            ("assistant", "B"),
        ],
        [" A</s>", " B</s>"],
    ),
    "the end token in a question": ([("user", "say </s> now"), ("assistant", "A")], [" A</s>"]),
    "the end token in an answer": ([("user", "Q"), ("assistant", "it is </s> there")], [" it is </s> there</s>"]),
    "the unknown token": ([("user", "a <unk> b"), ("assistant", "x <unk> y")], [" x <unk> y</s>"]),
    "the begin token": ([("user", "<s> Q"), ("assistant", "<s>A")], [" <s>A</s>"]),
    "an empty question": ([("user", ""), ("assistant", "A")], [" A</s>"]),
    "an image alone": ([("user", "<image>"), ("assistant", "A")], [" A</s>"]),
    "an image in the second turn": (
        [("user", "Q"), ("assistant", "A"), ("user", "And this? <image>"), ("assistant", "B")],
        [" A</s>", " B</s>"],
    ),
    "no last answer": ([("user", "Q"), ("assistant", "A"), ("user", "R")], [" A</s>"]),
    "blank answers": ([("user", "Q"), ("assistant", " \n")], ["  \n</s>"]),
}


@pytest.mark.parametrize("name", TURNS)
def test_the_template_writes_the_originals_prompt(name: str, supervision: Supervision) -> None:
    turns, answers = TURNS[name]
    images = sum(text.count("<image>") for _, text in turns)
    conversation = Conversation(name, ("x.jpg",) * images, tuple(turns))
    text, spans = supervision.render(conversation)
    assert text == original_prompt(turns)
    assert [text[start:end] for start, end in spans] == answers
    encoded = supervision.encode(conversation)
    # The tokens of the spans are those of the answers, and nothing else is supervised.
    for (start, end), answer in zip(encoded.answers, answers, strict=True):
        assert encoded.labels[start:end] == encoded.input_ids[start:end]
        assert supervision.tokenizer.decode(encoded.input_ids[start:end]).strip() == answer.strip()
        assert encoded.input_ids[end - 1] == supervision.tokenizer.eos_token_id
    assert encoded.supervised == sum(end - start for start, end in encoded.answers)


def test_an_image_inside_an_answer_is_not_supervised(supervision: Supervision) -> None:
    conversation = Conversation("x", ("x.jpg",), (("user", "Q"), ("assistant", "<image>\nhere")))
    encoded = supervision.encode(conversation)
    image = supervision.processor.image_token_id
    assert encoded.input_ids.count(image) == 64
    assert image not in encoded.labels
    assert encoded.supervised > 2


def test_two_images_in_a_turn_both_stand_at_its_start(supervision: Supervision) -> None:
    conversation = Conversation("x", ("a.jpg", "b.jpg"), (("user", "is <image> like <image>?"), ("assistant", "A")))
    assert "USER: <image>\n<image>\nis  like ? ASSISTANT: A</s>" in supervision.render(conversation)[0]
    assert supervision.encode(conversation).input_ids.count(supervision.processor.image_token_id) == 128


def test_a_system_message_replaces_the_system_sentence(supervision: Supervision) -> None:
    conversation = Conversation("x", (), (("system", "Be brief."), ("user", "Q"), ("assistant", "A")))
    assert supervision.render(conversation)[0] == "Be brief. USER: Q ASSISTANT: A</s>"


def long_row(turns: int, words: int = 12) -> Conversation:
    said = [("user", "<image>\nWhat is it?")]
    said += [("assistant", "boat " * words), ("user", "<image>\nAnd here?")] * turns
    return Conversation("long", ("x.jpg",) * turns, tuple(said[: 2 * turns]))


def test_a_long_row_is_cut_at_a_turn_and_loses_the_images_of_the_turns_it_loses(processor: LlavaProcessor) -> None:
    template = load_template("vicuna_v1")
    whole = Supervision(processor, template, max_length=None).encode(long_row(4))
    assert (whole.images, whole.cut, len(whole.answers)) == (4, None, 4)
    for max_length in range(whole.answers[0][1], len(whole.input_ids)):
        encoded = Supervision(processor, template, max_length).encode(long_row(4))
        fitting = [answer for answer in whole.answers if answer[1] <= max_length]
        assert encoded.cut == "turn"
        assert encoded.answers == fitting
        assert encoded.images == len(fitting)
        assert encoded.input_ids == whole.input_ids[: fitting[-1][1]]
        assert encoded.labels == whole.labels[: fitting[-1][1]]
        assert encoded.input_ids.count(processor.image_token_id) == 64 * encoded.images


def test_a_first_answer_that_does_not_fit_is_cut_as_the_original_cuts_it(processor: LlavaProcessor) -> None:
    template = load_template("vicuna_v1")
    whole = Supervision(processor, template, max_length=None).encode(long_row(2, words=40))
    start, _ = whole.answers[0]
    encoded = Supervision(processor, template, start + 5).encode(long_row(2, words=40))
    assert (encoded.cut, encoded.supervised, encoded.images) == ("answer", 5, 1)
    assert encoded.input_ids == whole.input_ids[: start + 5]
    for max_length in (2, 72, 100, start):
        with pytest.raises(BadSample, match=f"{start} tokens stand before.*{max_length}") as caught:
            Supervision(processor, template, max_length).encode(long_row(2, words=40))
        assert caught.value.reason == "too_long"


def test_an_image_inside_the_first_answer_is_not_cut_through(processor: LlavaProcessor) -> None:
    template = load_template("vicuna_v1")
    row = Conversation("x", ("x.jpg",), (("user", "Q"), ("assistant", "<image>\nhere")))
    whole = Supervision(processor, template, max_length=None).encode(row)
    first = whole.input_ids.index(processor.image_token_id)
    with pytest.raises(BadSample) as caught:
        Supervision(processor, template, first + 10).encode(row)
    assert caught.value.reason == "too_long"


LLAVA_HF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}{% for content in "
    "message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}{{ content['text'] + ' '}}"
    "{% endgeneration %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_the_template_follows_from_the_release(processor: LlavaProcessor) -> None:
    vicuna = load_template("vicuna_v1")
    own = llava_processor()
    assert choose_template(own) == vicuna
    own.chat_template = LLAVA_HF
    assert choose_template(own) == vicuna
    assert choose_template(own, "release") == LLAVA_HF
    own.tokenizer.eos_token = "<|im_end|>"
    own.chat_template = CHATML
    assert choose_template(own) == CHATML
    assert choose_template(own, "vicuna_v1") == vicuna
    own.tokenizer.eos_token = "</s>"
    own.chat_template = vicuna
    assert choose_template(own) == vicuna


# What llava-hf's ChatML and Mistral releases come with: spaces that no model was trained with and marks that leave out
# the end token, and an end token that is misspelt.
SPACED_CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISSPELT_MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}{% for content in "
    "message['content'] %}{{ '<image>' if content['type'] == 'image' else '\n' + content['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + message['content'][0]['text'] + '<\\\\s> ' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("own", "eos", "family", "text", "answers"),
    [
        (
            SPACED_CHATML, "<|im_end|>", "chatml",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nQ<|im_end|>\n"
            "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nR<|im_end|>\n"
            "<|im_start|>assistant\nB<|im_end|>\n",
            ["A<|im_end|>", "B<|im_end|>"],
        ),
        (
            MISSPELT_MISTRAL, "</s>", "mistral_instruct",
            "[INST] <image>\nQ [/INST] A</s>[INST] R [/INST] B</s>",
            [" A</s>", " B</s>"],
        ),
    ],
)  # fmt: skip
def test_templates_that_teach_no_end_give_way_to_what_llava_was_trained_with(
    own: str, eos: str, family: str, text: str, answers: list[str]
) -> None:
    release = llava_processor()
    release.tokenizer.add_special_tokens({"eos_token": eos})
    release.chat_template = own
    chosen = choose_template(release)
    assert chosen == load_template(family)
    turns = (("user", "Q\n<image>"), ("assistant", "A"), ("user", "R"), ("assistant", "B"))
    supervision, conversation = Supervision(release, chosen), Conversation("x", ("x.jpg",), turns)
    rendered, spans = supervision.render(conversation)
    assert rendered == text
    assert [rendered[start:end] for start, end in spans] == answers
    encoded = supervision.encode(conversation)
    assert [encoded.labels[end - 1] for _, end in encoded.answers] == [release.tokenizer.eos_token_id] * 2
    asked = Conversation("x", ("x.jpg",), turns[:1])
    assert supervision.prompt(asked) == encoded.input_ids[: encoded.answers[0][0]]
    assert choose_template(release, "release") == own


def test_a_template_that_teaches_no_end_and_is_nothing_known_is_refused() -> None:
    release = llava_processor()
    release.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] %}"
        "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"user:<image>Qassistant:A.*not end with the end token '</s>'.*'release'"):
        choose_template(release)


def test_marks_around_the_answer_alone_are_widened_to_its_end_token() -> None:
    release = llava_processor()
    release.tokenizer.eos_token = "<|im_end|>"
    text, spans = Supervision(release, SPACED_CHATML).render(
        Conversation("x", ("x.jpg",), (("user", "<image>\nQ"), ("assistant", "A")))
    )
    assert [text[start:end] for start, end in spans] == ["\nA<|im_end|>"]


def test_templates_that_are_not_there_are_named(processor: LlavaProcessor) -> None:
    with pytest.raises(FileNotFoundError, match=r"'vicuna'.*vicuna_v1"):
        choose_template(processor, "vicuna")
    with pytest.raises(ValueError, match="no chat template"):
        choose_template(llava_processor(), "release")
    with pytest.raises(ValueError, match="no chat template"):
        Supervision(llava_processor())


def test_a_template_from_a_file(processor: LlavaProcessor, tmp_path: Any) -> None:
    (tmp_path / "mine.jinja").write_text(CHATML, encoding="utf-8")
    assert choose_template(processor, str(tmp_path / "mine.jinja")) == CHATML


def test_without_marks_answers_are_found_by_rendering_turn_by_turn(processor: LlavaProcessor) -> None:
    turns = (
        ("user", "<image>\nQ"),
        ("assistant", "A"),
        ("user", "R"),
        ("assistant", ""),
        ("user", "S"),
        ("assistant", "B"),
    )
    text, spans = Supervision(processor, CHATML).render(Conversation("x", ("x.jpg",), turns))
    assert [text[start:end] for start, end in spans] == ["A<|im_end|>\n", "B<|im_end|>\n"]


def test_marks_around_an_empty_answer_are_left_out(processor: LlavaProcessor) -> None:
    turns = (("user", "<image>\nQ"), ("assistant", "A"), ("user", "R"), ("assistant", ""))
    text, spans = Supervision(processor, LLAVA_HF).render(Conversation("x", ("x.jpg",), turns))
    assert [text[start:end] for start, end in spans] == ["A "]


def test_a_template_that_rewrites_earlier_turns_is_refused(processor: LlavaProcessor) -> None:
    forgetful = CHATML.replace("messages %}", "messages[-2:] %}", 1)
    turns = (("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B"))
    with pytest.raises(BadSample, match="generation %} marks") as caught:
        Supervision(processor, forgetful).encode(Conversation("x", (), turns))
    assert caught.value.reason == "template"


def test_a_template_that_loses_an_image_is_refused(processor: LlavaProcessor) -> None:
    blind = CHATML.replace("'<image>' if part['type'] == 'image' else part['text']", "part['text']")
    with pytest.raises(BadSample, match="1 images but the chat template renders 0") as caught:
        Supervision(processor, blind).encode(
            Conversation("x", ("x.jpg",), (("user", "<image>\nQ"), ("assistant", "A")))
        )
    assert caught.value.reason == "placeholder_count"


def test_a_template_that_raises_names_the_row(processor: LlavaProcessor) -> None:
    with pytest.raises(BadSample, match=r"row 'x'.*tool"):
        Supervision(processor, load_template("vicuna_v1")).encode(
            Conversation("x", (), (("tool", "Q"), ("assistant", "A")))
        )


def test_a_template_that_writes_the_begin_token_gets_no_second_one(processor: LlavaProcessor) -> None:
    template = "{{ bos_token }}" + load_template("vicuna_v1")
    row = Conversation("x", (), (("user", "Q"), ("assistant", "A")))
    ids = Supervision(processor, template).encode(row).input_ids
    assert ids[:2].count(processor.tokenizer.bos_token_id) == 1


def test_visual_tokens_of_llava_next_depend_on_the_image() -> None:
    supervision = Supervision(llava_next_processor(), load_template("vicuna_v1"))
    assert supervision.needs_image_sizes
    row = Conversation("x", ("x.jpg",), (("user", "<image>\nQ"), ("assistant", "A")))
    image = supervision.processor.image_token_id
    counts = [supervision.encode(row, [size]).input_ids.count(image) for size in ((28, 28), (28, 56), (56, 56))]
    assert counts == [supervision.placeholders(size) for size in ((28, 28), (28, 56), (56, 56))]
    assert counts[1] < counts[2]
    with pytest.raises(ValueError, match="image_sizes are needed"):
        supervision.encode(row)


@pytest.mark.parametrize("max_length", [1, 0, -5])
def test_a_senseless_max_length_is_refused(processor: LlavaProcessor, max_length: int) -> None:
    with pytest.raises(ValueError, match=f"max_length is {max_length}"):
        Supervision(processor, load_template("vicuna_v1"), max_length)
