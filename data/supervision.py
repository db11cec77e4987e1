"""Conversations to token ids and labels, supervised as the release was: the loss is on answers and their end token.

Reference: LLaVA's `preprocess_multimodal`, `preprocess_v1` and `tokenizer_image_token` (arXiv 2310.03744, released
code). The text between two images is tokenized on its own there, which with a sentencepiece tokenizer puts a `▁`
before each piece; so it is done here.
"""

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from shortzip.data.chat_template import TemplateError, compiled, reading_videos, render
from shortzip.data.drops import BadSample
from shortzip.data.encoded import IGNORE_INDEX as IGNORE_INDEX
from shortzip.data.encoded import Encoded as Encoded
from shortzip.data.encoded import token_range
from shortzip.data.errors import MissingFile, UserError
from shortzip.data.files import read_text
from shortzip.data.instructions import Conversation
from shortzip.data.pixels import cuts_lone_images_only
from shortzip.data.videos import Sampling

Processor = Any  # transformers' or a reduced one, of any family

_Span = tuple[int, int]
_SPACE = "\u2581"  # how sentencepiece writes a space
TEMPLATES = (
    "vicuna_v1",
    "chatml",
    "mistral_instruct",
    "plain",
    # Mini-Gemini's, by language model; its 7B and 13B have vicuna_v1.
    "mgm_gemma",
    "mgm_llama_3",
    "mgm_mistral_instruct",
    "mgm_chatml_direct",
)
# How a question about an image and its answer look in templates that releases come with. In llava-hf's, Mistral's end
# token is misspelt, and ChatML has spaces that no LLaVA was trained with.
_FAMILIES = {
    "vicuna_v1": r"USER: {image}\s+Q\s+ASSISTANT: A",
    "chatml": r"(<\|im_start\|>system\s.*?<\|im_end\|>\s*)?<\|im_start\|>user\s+{image}\s*Q<\|im_end\|>\s*"
    r"<\|im_start\|>assistant\s+A(<\|im_end\|>)?",
    "mistral_instruct": r"\[INST\]\s*{image}\s*Q\s*\[/INST\]\s*A\s*(<\\s>|</s>)?",
}


def load_template(name: str) -> str:
    """The text of one of `TEMPLATES`, or of a jinja file.

    Raises:
        FileNotFoundError: neither.
    """
    if name in TEMPLATES:
        return resources.files("shortzip.data").joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")
    if Path(name).is_file():
        return read_text(Path(name))
    raise MissingFile(
        f"chat_template {name!r} is no jinja file; give a path, 'auto', 'release', or one of {', '.join(TEMPLATES)}"
    )


def choose_template(processor: Processor, name: str = "auto") -> str:
    """The chat template to train with; set it as `processor.chat_template`, so that it is published too.

    "auto" takes `vicuna_v1` where the release has no template, or has transformers' rendering of the Vicuna prompt
    for LLaVA-1.5, which leaves out the system sentence that the release was trained with. Other releases keep their
    own, if it has the answer's end token learned and the answer begin where a prompt for generation ends; if not,
    `chatml` or `mistral_instruct` takes its place where it is one of these.

    Args:
        processor: the release's.
        name: "auto", "release" (its own, as it is), one of `TEMPLATES`, or the path of a jinja file.

    Raises:
        ValueError: "release", and it has none; "auto", and its own would not have the end token learned.
        FileNotFoundError: no such template.
    """
    chosen = _choose(processor, name)
    return reading_videos(chosen) if takes_videos(processor) else chosen


def takes_videos(processor: Processor) -> bool:
    """Whether a processor is that of a family that takes videos, which have a placeholder then."""
    return hasattr(processor, "video_token")


def _choose(processor: Processor, name: str) -> str:
    own = _own_template(processor)
    if name == "release":
        if not own:
            raise UserError("the release has no chat template; chat_template: vicuna_v1, or the path of a jinja file")
        return own
    if name != "auto":
        return load_template(name)
    if not own:
        return load_template("vicuna_v1")
    probe = Conversation("probe", ("x",), (("user", "<image>\nQ"), ("assistant", "A")))
    eos = processor.tokenizer.eos_token
    supervision = Supervision(processor, own, max_length=None)
    text, spans = supervision.render(probe)
    prompt, _ = supervision._jinja(probe, probe.messages()[:1], prompt=True)
    learns_end = bool(spans) and text[slice(*spans[-1])].rstrip().endswith(eos)
    bare, image = text.removeprefix(processor.tokenizer.bos_token or "").strip(), re.escape(processor.image_token)
    family = next((name for name, look in _FAMILIES.items() if re.fullmatch(look.format(image=image), bare)), None)
    if family == "vicuna_v1":
        return load_template(family)
    if learns_end and text.startswith(prompt) and spans[-1][0] == len(prompt):
        return own
    if family == "mistral_instruct" or (family == "chatml" and eos == "<|im_end|>"):
        return load_template(family)
    if not learns_end:
        raise UserError(
            f"the release's chat template renders {text!r}: the answer does not end with the end token {eos!r}, and "
            "the model would not learn to stop. Give chat_template: the path of a jinja file that says so, or "
            "'release' to take it as it is"
        )
    return own


def _own_template(processor: Processor) -> str | None:
    own = processor.chat_template
    # Processors may hold several by name; transformers takes the one called "default" too.
    return own.get("default") if isinstance(own, dict) else own


class Supervision:
    """Turns conversations into token ids and labels.

    Args:
        processor: a LLaVA processor: its tokenizer (a fast one), its number of placeholders per image.
        chat_template: jinja source; None: `processor.chat_template`. Answers are found by its generation marks, or,
            where it has none, by rendering the conversation up to and including each answer.
        max_length: longest row in tokens, visual tokens included; None: no limit.
        sampling: which frames of videos are seen; None where no video is read from files.

    Raises:
        ValueError: no template, a tokenizer without offsets, or a `max_length` below 2.
    """

    def __init__(
        self,
        processor: Processor,
        chat_template: str | None = None,
        max_length: int | None = 2048,
        sampling: Sampling | None = None,
    ) -> None:
        template = chat_template or _own_template(processor)
        if not template:
            raise UserError(
                "the processor has no chat template; set processor.chat_template = choose_template(processor)"
            )
        if not processor.tokenizer.is_fast:
            raise UserError(
                f"{type(processor.tokenizer).__name__} gives no character offsets, which the answers' places in the "
                "tokens are found by; load the release's tokenizer with AutoTokenizer (a tokenizers-backed one)"
            )
        if max_length is not None and max_length < 2:
            raise UserError(f"max_length is {max_length}; at least 2 tokens, or null for no limit")
        try:
            compiled(template)
        except TemplateError as error:
            raise UserError(f"{error}. Mend it, or give another as data.chat_template") from error
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.template = template
        self.max_length = max_length
        self.sampling = sampling
        self._has_marks = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        opening = self.tokenizer("x").input_ids[:1]
        self._bos = opening if opening == [self.tokenizer.bos_token_id] else []
        # transformers' Llama tokenizer takes a leading space for the one that sentencepiece puts before every text.
        bare, spaced = (self.tokenizer(text, add_special_tokens=False).input_ids for text in ("x", " x"))
        self._takes_space = bare == spaced and self.tokenizer.convert_ids_to_tokens(bare)[0].startswith(_SPACE)
        # Where images are cut into the tiles of a grid, which one depends on their size.
        self.needs_image_sizes = hasattr(processor.image_processor, "image_grid_pinpoints")
        self.takes_videos = takes_videos(processor)
        self._placeholders: dict[tuple[tuple[int, int], int | None], int] = {}

    def placeholders(self, size: tuple[int, int], budget: int | None = None) -> int:
        """Placeholders for an image of (height, width) pixels. `budget`: its own, where each image has one."""
        if not self.needs_image_sizes:
            size = (336, 336)
        if (size, budget) not in self._placeholders:
            own = {} if budget is None else {"budgets": [budget]}
            counted = self.processor._get_num_multimodal_tokens(image_sizes=[list(size)], **own)
            self._placeholders[size, budget] = int(counted["num_image_tokens"][0])
        return self._placeholders[size, budget]

    def video_placeholders(self, frames: int) -> int:
        """Placeholders for a video of which so many frames are seen."""
        return int(self.processor.video_tokens(frames))

    def sizes_in_row(self, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Sizes of all images of one row as `placeholders` and the model take them: (0, 0) for one that is not cut
        into tiles because it is one of several."""
        uncut = len(sizes) > 1 and cuts_lone_images_only(self.processor.image_processor)
        return [(0, 0)] * len(sizes) if uncut else list(sizes)

    def render(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The prompt text with one `<image>` per image, and the character ranges of the answers.

        Raises:
            BadSample: the template refuses the conversation, loses an image, or cannot be rendered turn by turn.
        """
        messages = conversation.messages()
        answers = [number for number, (role, _) in enumerate(conversation.turns) if role == "assistant"]
        if self._has_marks:
            text, spans = self._jinja(conversation, messages, marks=True)
            # Marks around the answer alone: its end token is to be learned too.
            eos = self.tokenizer.eos_token
            spans = [(start, end + len(eos) if text.startswith(eos, end) else end) for start, end in spans]
            if len(spans) == len(answers):
                # Templates that mark an empty answer too would have the model learn to say nothing.
                spans = [span for span, number in zip(spans, answers, strict=True) if conversation.turns[number][1]]
            return text, [(start, end) for start, end in spans if end > start]
        text, _ = self._jinja(conversation, messages)
        spans = []
        for number in answers:
            before, _ = self._jinja(conversation, messages[:number], prompt=True)
            after, _ = self._jinja(conversation, messages[: number + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise BadSample(
                    "template",
                    conversation.id,
                    f"the chat template renders turn {number} differently once the conversation goes on, and has "
                    "no {% generation %} marks to find it by; add the marks around the answer and its end token",
                )
            if conversation.turns[number][1]:
                spans.append((len(before), len(after)))
        return text, spans

    def encode(
        self,
        conversation: Conversation,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        budgets: Sequence[int] | None = None,
        frames: Sequence[int] = (),
    ) -> Encoded:
        """Token ids and the answers' places.

        A row over `max_length` loses its last turns, question and answer together, until it fits. If the first
        question fits but not its answer, the answer is cut at `max_length`, as LLaVA does. Visual tokens are never
        cut.

        Args:
            conversation: what to encode.
            image_sizes: (height, width) of each image in pixels; needed where `needs_image_sizes`.
            budgets: of each image, where it has its own.
            frames: how many frames of each video are seen.

        Raises:
            BadSample: "video" where the family takes none, "no_answer" without a single answer, "too_long" when not
                even the first question fits, or the template does not fit the conversation.
        """
        if conversation.videos and not self.takes_videos:
            raise BadSample(
                "video",
                conversation.id,
                f"{len(conversation.videos)} videos, and this release takes none (reduction/README.md, 'Families')",
            )
        text, spans = self.render(conversation)
        if not spans:
            raise BadSample("no_answer", conversation.id, "every answer is empty: nothing to learn from")
        ids, characters, images, videos = self._tokenize(conversation, text, image_sizes, budgets, frames)
        visual = images + videos
        answers = [tokens for tokens in (token_range(characters, span) for span in spans) if tokens[0] < tokens[1]]
        length, cut = len(ids), None
        if self.max_length is not None and length > self.max_length:
            length, cut = self._fit(conversation, answers, visual)
            answers = [(start, min(end, length)) for start, end in answers if start < length]
        labels = [IGNORE_INDEX] * length
        for start, end in answers:
            labels[start:end] = ids[start:end]
        for start, end in visual:
            # An image inside an answer is nothing that the language model could say.
            if end <= length:
                labels[start:end] = [IGNORE_INDEX] * (end - start)
        left, shown = (sum(end <= length for _, end in places) for places in (images, videos))
        return Encoded(ids[:length], labels, answers, left, cut, shown)

    def prompt(
        self,
        conversation: Conversation,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        frames: Sequence[int] = (),
    ) -> list[int]:
        """[L] ids of a conversation that ends with the user's turn, up to where the answer is generated.

        Raises:
            BadSample: the template does not fit the conversation.
        """
        text, _ = self._jinja(conversation, conversation.messages(), prompt=True)
        return self._tokenize(conversation, text, image_sizes, frames=frames)[0]

    def _jinja(
        self, conversation: Conversation, messages: list[dict[str, Any]], marks: bool = False, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            special = self.tokenizer.special_tokens_map
            return render(self.template, messages, special, add_generation_prompt=prompt, marks=marks)
        except TemplateError as error:
            raise BadSample("template", conversation.id, str(error)) from error

    def _tokenize(
        self,
        conversation: Conversation,
        text: str,
        image_sizes: Sequence[tuple[int, int]] | None,
        budgets: Sequence[int] | None = None,
        frames: Sequence[int] = (),
    ) -> tuple[list[int], list[_Span], list[_Span], list[_Span]]:
        """Ids, the character range of each in `text`, and the token ranges of images and of videos."""
        expected = len(conversation.images)
        if image_sizes is None:
            if expected and self.needs_image_sizes:
                raise UserError("this processor's placeholders depend on the image: image_sizes are needed")
            image_sizes = [(0, 0)] * expected
        image_sizes, budgets = self.sizes_in_row(image_sizes), budgets or [None] * expected  # type: ignore[list-item]
        if len(image_sizes) != expected or len(frames) != len(conversation.videos):
            raise UserError(
                f"row {conversation.id!r}: {len(image_sizes)} sizes for {expected} images, {len(frames)} numbers of "
                f"frames for {len(conversation.videos)} videos"
            )
        processor: Any = self.processor
        counts = {processor.image_token: [*map(self.placeholders, image_sizes, budgets)]}
        numbers, found = {processor.image_token: processor.image_token_id}, {processor.image_token: list[_Span]()}
        if self.takes_videos:
            counts[processor.video_token] = [*map(self.video_placeholders, frames)]
            numbers[processor.video_token], found[processor.video_token] = processor.video_token_id, []
        self._check_marks(conversation, text, {mark: len(held) for mark, held in counts.items()})
        with_bos = self._bos and not text.startswith(self.tokenizer.bos_token)
        ids: list[int] = list(self._bos) if with_bos else []
        characters: list[_Span] = [(0, 0)] * len(ids)
        at = 0
        for piece in re.split(f"({'|'.join(map(re.escape, counts))})", text):
            if piece in counts:
                count = counts[piece][len(found[piece])]
                found[piece].append((len(ids), len(ids) + count))
                ids += [numbers[piece]] * count
                characters += [(at, at + len(piece))] * count
            else:
                extra = self._takes_space and piece.startswith((" ", _SPACE))
                text_of = " " * extra + piece
                tokens = self.tokenizer(text_of, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
                ids += tokens["input_ids"]
                first = at - extra
                characters += [(max(first + start, at), first + end) for start, end in tokens["offset_mapping"]]
            at += len(piece)
        videos = found[processor.video_token] if self.takes_videos else []
        return ids, characters, found[processor.image_token], videos

    def _check_marks(self, conversation: Conversation, text: str, expected: Mapping[str, int]) -> None:
        """Raises BadSample where a rendered text has not one mark for each image and video."""
        for mark, count in expected.items():
            what, rendered = "image" if mark == self.processor.image_token else "video", text.count(mark)
            if rendered != count:
                raise BadSample(
                    "placeholder_count",
                    conversation.id,
                    f"{count} {what}s but the chat template renders {rendered} {mark} placeholders; each {what} needs "
                    "one",
                )

    def _fit(
        self, conversation: Conversation, answers: list[tuple[int, int]], images: list[tuple[int, int]]
    ) -> tuple[int, str]:
        """Where a row that is too long is cut off, and what by."""
        assert self.max_length is not None
        whole = [end for _, end in answers if end <= self.max_length]
        if whole:
            return whole[-1], "turn"
        limit = self.max_length
        if not answers or answers[0][0] >= limit or any(start < limit < end for start, end in images):
            raise BadSample(
                "too_long",
                conversation.id,
                f"{answers[0][0] if answers else 'all'} tokens stand before the first answer, visual tokens included; "
                f"max_length is {limit}",
            )
        return limit, "answer"
