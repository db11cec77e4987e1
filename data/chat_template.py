"""Chat templates of strangers: rendered as transformers renders them, but with an end.

Jinja's sandbox keeps a template from files and code, not from loops within loops or texts of gigabytes. Here loops,
calls and sizes are counted, and what goes beyond is an error like any other of a template.
"""

import re
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import lru_cache, wraps
from itertools import islice
from types import BuiltinMethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer
from transformers.utils.chat_template_utils import _compile_jinja_template

MAX_STEPS = 200_000  # iterations of one rendering: a hundred times those of the longest conversations
CALL_STEPS = 5  # what a call counts for
MAX_SIZE = 10_000_000  # characters of a text, elements of a list
_MAX_BITS = 100_000  # of an integer
_PERCENT, _BRACES = re.compile(r"%[^%A-Za-z]*?(\d{7,})"), re.compile(r"\{[^{}]*:[^{}]*?(\d{7,})")
_STEPS, _COUNTED, _TAKEN, _MEASURED = "steps left", "counted", "taken", "measured"  # no names a template could set


class TemplateError(ValueError):
    """A template that cannot be compiled or rendered; the message says which, where and why."""


class _Steps:
    """What is left of `MAX_STEPS` in one rendering."""

    def __init__(self) -> None:
        self.left = MAX_STEPS

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps: a loop without end?")


def _steps(context: Context) -> _Steps:
    return context.parent.get(_STEPS) or _Steps()


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise SecurityError(f"it makes a text or list of {size} elements, more than {MAX_SIZE}")


def _sized(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict | range) else 0


@jinja2.pass_context
def _counted(context: Context, items: Any) -> Any:
    """What a loop goes over, its steps being taken."""
    if not isinstance(items, jinja2.Undefined | str | list | tuple | dict | range):
        items = list(islice(items, MAX_STEPS + 1))
    _steps(context).take(_sized(items))
    return items


@jinja2.pass_context
def _taken(context: Context, value: Any) -> Any:
    """What goes into a filter: a step for a text, and for every tenth element."""
    _steps(context).take(1 + (0 if isinstance(value, str) else _sized(value) // 10))
    return value


@jinja2.pass_context
def _measured(context: Context, value: Any) -> Any:
    """What a concatenation gives."""
    _check_size(_sized(value))
    return value


class _Guards(NodeTransformer):
    """Puts the counting filters into a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _through(_COUNTED, node.iter)
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        self.generic_visit(node)
        if node.node is not None:
            node.node = _through(_TAKEN, node.node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _through(_MEASURED, node)


def _through(name: str, node: Any) -> nodes.Filter:
    through = nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
    through.set_environment(node.environment)
    return through


class _Bounded(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with counted loops and calls, and with bounded sizes."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Guards().visit(super()._parse(source, name, filename))

    def call(self, context: Context, called: Any, *args: Any, **kwargs: Any) -> Any:
        _steps(context).take(CALL_STEPS)
        _check_counts([*args, *kwargs.values()])
        owner = called.__self__ if isinstance(called, BuiltinMethodType) else None
        if isinstance(owner, str) and called.__name__ == "join" and args:
            args = (_joinable(owner, args[0]),)
        elif isinstance(owner, str) and called.__name__ == "replace" and len(args) > 1:
            _check_size(owner.count(str(args[0])) * len(str(args[1])))
        return super().call(context, called, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_widths(_BRACES, value.__self__)
        return wrapped

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * abs(right))
        elif operator == "*" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
        elif operator == "*":
            size, times = (_sized(left), right) if isinstance(right, int) else (_sized(right), left)
            _check_size(size * times if isinstance(times, int) else 0)
        elif operator == "+":
            _check_size(_sized(left) + _sized(right))
        elif operator == "%" and isinstance(left, str):
            _check_widths(_PERCENT, left)
            _check_counts(right if isinstance(right, tuple) else (right,))
        return super().call_binop(context, operator, left, right)


def _check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise SecurityError(f"it makes a number of {bits} bits, more than {_MAX_BITS}")


def _check_counts(arguments: Iterable[Any]) -> None:
    """Widths and counts, which what is called makes room for."""
    for number in arguments:
        _check_size(number if isinstance(number, int) else 0)


def _check_widths(pattern: re.Pattern[str], text: str) -> None:
    """Widths within a text that is a format."""
    _check_size(max((int(match[1]) for match in pattern.finditer(text)), default=0))


def _joinable(separator: str, items: Any) -> Any:
    items = items if isinstance(items, str | list | tuple | dict) else list(islice(items, MAX_STEPS + 1))
    _check_size(sum(_sized(item) for item in items) + len(separator) * len(items))
    return items


def _with_checked_counts(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose counts are looked at before it is called."""

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_counts([*args, *kwargs.values()])
        return function(*args, **kwargs)

    return checked


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    _check_widths(_PERCENT, str(value))
    _check_counts([*args, *kwargs.values()])
    return jinja2.filters.do_format(value, *args, **kwargs)


@jinja2.pass_eval_context
def _join(eval_context: Any, value: Any, d: str = "", attribute: Any = None) -> str:
    if attribute is None and not isinstance(value, jinja2.Undefined):
        value = _joinable(str(d), value)
    return jinja2.filters.do_join(eval_context, value, d, attribute)


@jinja2.pass_eval_context
def _replace(eval_context: Any, s: str, old: str, new: str, count: int | None = None) -> str:
    _check_size(str(s).count(str(old)) * len(str(new)))
    return jinja2.filters.do_replace(eval_context, s, old, new, count)


_IMAGES_ALONE = (
    "{%- set images = content | selectattr('type', 'equalto', 'image') | list -%}\n"
    "{%- if images -%}{{ ((['<image>'] * (images | length)) + [text | trim]) | join('\\n') | trim }}"
)
_WITH_VIDEOS = (
    "{%- set seen = content | selectattr('type', 'in', ['image', 'video']) | map(attribute='type') | list -%}\n"
    "{%- if seen -%}{{ ('<' ~ (seen | join('>\\n<')) ~ '>\\n' ~ (text | trim)) | trim }}"
)

_ONE_IMAGE = "{{- '<image>' -}}"
_ALL_SEEN = (
    "{%- for part in turn['content'] if part['type'] in ['image', 'video'] -%}"
    "{{- '<' ~ part['type'] ~ '>' -}}{%- endfor -%}"
)


def reading_videos(template: str) -> str:
    """One of data/templates/ for a release that takes videos: `<video>` stands where its part does, as `<image>`."""
    return template.replace(_IMAGES_ALONE, _WITH_VIDEOS).replace(_ONE_IMAGE, _ALL_SEEN)


@lru_cache(maxsize=16)
def compiled(template: str) -> jinja2.Template:
    """A chat template, with the tags, filters and functions that transformers gives it.

    Raises:
        TemplateError: it is no jinja template.
    """
    usual = _compile_jinja_template("").environment
    environment = _Bounded(
        trim_blocks=True, lstrip_blocks=True, extensions=[type(extension) for extension in usual.extensions.values()]
    )
    environment.globals.update(usual.globals)
    environment.filters.update(usual.filters)
    for name in ("center", "indent", "batch", "slice", "wordwrap"):
        environment.filters[name] = _with_checked_counts(usual.filters[name])
    environment.filters.update({"join": _join, "replace": _replace, "format": _format})
    environment.filters.update({_COUNTED: _counted, _TAKEN: _taken, _MEASURED: _measured})
    environment.globals.pop("lipsum", None)
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"{named(template)} is no jinja template: {error.message} (line {error.lineno})"
        ) from error
    except (ArithmeticError, TypeError, ValueError, RecursionError) as error:
        raise TemplateError(f"{named(template)} cannot be compiled: {error}") from error


def render(
    template: str,
    messages: list[dict[str, Any]],
    special_tokens: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
    marks: bool,
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and, with `marks`, the character ranges of what `{% generation %}` encloses.

    Raises:
        TemplateError: whatever goes wrong, and a rendering that takes too many steps or grows too large.
    """
    program = compiled(template)
    environment: Any = program.environment
    blocks: list[str] = []
    spans: list[tuple[int, int]] = []
    size = 0
    variables = {
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        **special_tokens,
        _STEPS: _Steps(),
    }
    try:
        with environment.activate_tracker(blocks, spans) if marks else nullcontext():
            for block in program.generate(variables):
                blocks.append(block)
                size += len(block)
                _check_size(size)
    except Exception as error:  # a template can raise anything: it is a program
        raise TemplateError(_why(template, error)) from error
    return "".join(blocks), spans


def _why(template: str, error: Exception) -> str:
    if type(error) is jinja2.TemplateError:  # its own words, by raise_exception
        return f"{named(template)} refuses it: {error}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    where = f" in line {lines[-1]}" if lines else ""
    words = f"{named(template)} fails{where}: {type(error).__name__}: {str(error)[:300]}"
    if isinstance(error, SecurityError):
        return words
    return (
        f"{words}. The content of a message is a list of parts, {{'type': 'text', 'text': …}} and "
        "{'type': 'image'}: a template for texts alone fails at it"
    )


def named(template: str) -> str:
    """A template as messages call it: by how it begins."""
    begins = " ".join(template.split())
    return f"the chat template {begins[:60] + ('…' if len(begins) > 60 else '')!r}"
