"""A template that fails, or does not end, is an error that names it and the row; others render as in transformers."""

import pickle
from typing import Any

import pytest
from processors import llava_processor
from transformers.utils.chat_template_utils import render_jinja_template

from shortzip.data.chat_template import render
from shortzip.data.drops import BadSample
from shortzip.data.instructions import Conversation
from shortzip.data.supervision import TEMPLATES, Supervision, choose_template, load_template

TURNS = (("system", "S"), ("user", "<image>\nQ 20231225 20231226 %d {:99999999}"), ("assistant", "A"), ("user", "R"))
ROW = Conversation("row-7", ("x.jpg",), (*TURNS, ("assistant", "B")))


@pytest.fixture(scope="module")
def processor() -> Any:
    return llava_processor()


FAILING = {
    "texts added": ("{% for m in messages %}\n{{ m['role'] + m['content'] }}{% endfor %}", "in line 2: TypeError"),
    "division": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "include": ("{% include 'other.jinja' %}", "TypeError"),
    "missing": ("{{ messages[0].content.strip() }}", "UndefinedError"),
    "index": ("{{ [1].index(2) }}", "ValueError"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "files": ("{{ ''.__class__.__mro__ }}{{ cycler.__init__.__globals__.os.popen('id') }}", "SecurityError|Undefined"),
}


@pytest.mark.parametrize("name", FAILING)
def test_whatever_a_template_raises_names_it_and_the_row(name: str, processor: Any) -> None:
    template, said = FAILING[name]
    supervision = Supervision(processor, template)
    for fails in (lambda: supervision.encode(ROW), lambda: supervision.prompt(ROW)):
        with pytest.raises(BadSample, match=rf"row 'row-7'.*the chat template ['\"].*({said})") as caught:
            fails()
        assert caught.value.reason == "template"
        if name != "files":
            assert "The content of a message is a list of parts" in str(caught.value)


def test_a_template_chosen_from_a_release_fails_by_the_same_words() -> None:
    release = llava_processor()
    release.chat_template = FAILING["texts added"][0]
    with pytest.raises(BadSample, match="list of parts"):
        choose_template(release)


def test_what_is_no_template_is_named_before_any_row(processor: Any) -> None:
    with pytest.raises(ValueError, match=r"'\{% for m in messages %\}' is no jinja template.*line 1"):
        Supervision(processor, "{% for m in messages %}")


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over a text": "{% set t = 'a' * 999 %}{% for a in t %}{% for b in t %}{% for c in t %}x{% endfor %}"
    "{% endfor %}{% endfor %}",
    "loops over a filter": "{% for a in range(99999)|map('string') %}{% for b in range(99999)|reverse %}{% endfor %}"
    "{% endfor %}",
    "a text": "{{ 'a' * 10 ** 10 }}",
    "a text, the other way": "{{ 10 ** 10 * 'a' }}",
    "a list": "{{ ([0] * 10 ** 10) | length }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "powers": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubled": "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "added": "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loops": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 60 }}{% endfor %}",
    "a width": "{{ '%9999999999d' % 1 }}",
    "a width given": "{{ '%*d' % (10 ** 10, 1) }}",
    "a format": "{{ '{:>9999999999}'.format(1) }}",
    "a format given": "{{ '{:>{}}'.format(1, 10 ** 10) }}",
    "a format filter": "{{ '%9999999999d' | format(1) }}",
    "a method": "{{ 'a'.ljust(10 ** 10) }}",
    "a filter": "{{ 'a' | center(10 ** 10) }}",
    "a filter of constants": "{{ 'a' | center(9999999999) }}",
    "an indent": "{{ 'a\nb' | indent(9999999999) }}",
    "joined": "{{ ([('a' * 999999)] * 999999) | join }}",
    "joined by a method": "{{ ('a' * 999999).join(['b'] * 999999) }}",
    "replaced": "{{ ('a' * 999999).replace('a', 'b' * 999999) }}",
    "written": "{% for a in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_stopped(name: str, processor: Any) -> None:
    with pytest.raises(BadSample, match=r"row 'row-7'.*SecurityError: it (takes|makes)"):
        Supervision(processor, ENDLESS[name] + "{{ messages | length }}").encode(ROW)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_usual_template_renders_as_in_transformers(name: str, processor: Any) -> None:
    """Also with texts that look like formats and counts."""
    template, special = load_template(name), processor.tokenizer.special_tokens_map
    turns = TURNS[1:] if name in ("plain", "mgm_gemma", "mgm_mistral_instruct") else TURNS  # no system turn
    messages = Conversation("x", ("x.jpg",), turns).messages()
    for prompt in (True, False):
        texts, spans = render_jinja_template(
            [messages],
            chat_template=template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=prompt,
            **special,
        )
        assert render(template, messages, special, add_generation_prompt=prompt, marks=True) == (texts[0], spans[0])


def test_loops_keep_their_variables_and_long_conversations_their_end(processor: Any) -> None:
    template = (
        "{% for m in messages|selectattr('role', 'equalto', 'user') %}{{ loop.index }}/{{ loop.length }}"
        "{{ ',' if not loop.last }}{% else %}none{% endfor %}{% for x in missing %}x{% endfor %}"
        "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% if loop.first %}{% break %}{% endif %}{% endfor %}"
    )
    assert render(template, said(4, "x"), {}, add_generation_prompt=False, marks=False)[0] == "1/2,2/2a1"
    long = said(1000, "word " * 1000)
    special = {"eos_token": "</s>"}
    _, spans = render(load_template("vicuna_v1"), long, special, add_generation_prompt=False, marks=True)
    assert len(spans) == 500


def said(turns: int, text: str) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": text}]
    return [{"role": ("user", "assistant")[number % 2], "content": content} for number in range(turns)]


def test_a_supervision_can_be_sent_to_a_worker(processor: Any) -> None:
    supervision = Supervision(processor, load_template("vicuna_v1"))
    supervision.encode(ROW)
    assert pickle.loads(pickle.dumps(supervision)).encode(ROW) == supervision.encode(ROW)
