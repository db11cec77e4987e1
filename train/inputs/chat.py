"""A conversation about images whose earlier turns are not computed again.

    model, processor = load_release("checkpoints/RUN/final")
    chat = Chat(model, Supervision(processor, max_length=None))
    chat.ask("What is in the image?", [image])
    chat.ask("And what colour is it?")          # no tower, and only the tokens that are new

The answer is that to the whole conversation asked anew: its text is encoded as a whole each time, and of the cache as
much is kept as begins with the same tokens. (The tokens that an answer was given in need not be those of its text.)
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from shortzip.data.dataset import Collator
from shortzip.data.errors import UserError
from shortzip.data.instructions import PLACEHOLDER, Conversation
from shortzip.data.supervision import Supervision
from shortzip.train.inputs.prompts import Prompt, batch_prompts, pixels_of

Turns = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: without special tokens.
        ids: its tokens, the end token among them.
        visual: visual tokens of the whole conversation.
        computed: tokens of the prompt that were not in the cache.
        began: when the model was given them, before the tower, by time.perf_counter().
    """

    text: str
    ids: list[int]
    visual: int
    computed: int
    began: float = field(compare=False)


@dataclass
class CachedTurns:
    """What a cache holds: one row of keys and values, the tokens they are of, and digests of the images in them."""

    cache: DynamicCache
    ids: list[int]
    images: list[str]


class Chat:
    """A conversation with a reduced model (all of its reductions may be off), answered greedily. For one thread.

    What is kept is the KV cache of one conversation. With `config.fastv` it is begun anew by every question: the last
    one ranks all visual tokens.

    Attributes:
        turns: (role, text) so far, of `ask`; the last is an answer.
        images: those of `ask`, in the order of their placeholders.
    """

    def __init__(self, model: Any, supervision: Supervision) -> None:
        self.model, self.supervision = model, supervision
        self.turns: list[tuple[str, str]] = []
        self.images: list[Image.Image] = []
        self._cached: CachedTurns | None = None

    def ask(self, question: str, images: Sequence[Image.Image] = (), max_new_tokens: int = 128) -> str:
        """The answer to the next question, which `images` (RGB) are shown with, before its text.

        Raises:
            UserError: the conversation has become too long for the model; the question is not part of it then.
            BadSample: the template does not fit.
        """
        turns = [*self.turns, ("user", "".join(f"{PLACEHOLDER}\n" for _ in images) + question)]
        shown = [*self.images, *images]
        reply = self.reply(turns, shown, max_new_tokens)
        self.turns, self.images = [*turns, ("assistant", reply.text)], shown
        return reply.text

    def forget(self) -> None:
        """Drops the cache; what comes next is computed whole."""
        self._cached = None

    @torch.inference_mode()
    def reply(
        self,
        turns: Turns,
        images: Sequence[Image.Image],
        max_new_tokens: int = 128,
        *,
        keep: bool = True,
        streamer: BaseStreamer | None = None,
        max_time: float | None = None,
    ) -> Reply:
        """The answer to a conversation that ends with a question, whatever was asked before.

        Args:
            turns: (role, text), with one `<image>` per image.
            images: RGB, in the order of their placeholders.
            max_new_tokens: of the answer.
            keep: whether what is computed now is kept; False leaves the chat as it was.
            streamer: given the tokens as they come.
            max_time: seconds after which the answer is cut.

        Raises:
            UserError, BadSample: as `ask`.
        """
        sizes = self.supervision.sizes_in_row([(image.height, image.width) for image in images])
        ids = self.supervision.prompt(Conversation("chat", ("",) * len(images), tuple(turns)), sizes)
        self._refuse_longer(len(ids) + max_new_tokens)
        kept = self._reusable(ids, [_digest(image) for image in images], keep)
        done, cached = len(kept.images), len(kept.ids)
        new = Prompt(ids, pixels_of(self.supervision, images[done:], several=len(images) > 1), sizes[done:])
        inputs = batch_prompts(self.supervision, [new], self.model.device)
        began = time.perf_counter()
        sequence = self.model.generate(
            **inputs,
            past_key_values=kept.cache,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.supervision.tokenizer.eos_token_id,
            pad_token_id=Collator.of(self.supervision).pad_token_id,
            streamer=streamer,
            max_time=max_time,
        )[0].tolist()
        if keep:  # the last token has not been through the model
            whole = [*kept.images, *(_digest(image) for image in images[done:])]
            self._cached = CachedTurns(kept.cache, sequence[: kept.cache.get_seq_length()], whole)
        answer = sequence[len(ids) :]
        text: Any = self.supervision.tokenizer.decode(answer, skip_special_tokens=True)
        visual = ids.count(self.model.config.image_token_id)
        return Reply(str(text).strip(), answer, visual, len(ids) - cached, began)

    def _reusable(self, ids: list[int], images: list[str], keep: bool) -> CachedTurns:
        """As much of what is kept as `ids` begin with, if all of its images are among that; else an empty cache.

        A part of the images would not do: how far they move what follows is known of all of them (positions).
        """
        kept, empty = self._cached, CachedTurns(DynamicCache(config=self.model.config.text_config), [], [])
        if keep:
            self._cached = None  # a pass that fails leaves the cache half filled
        if kept is None or self.model.config.fastv is not None or images[: len(kept.images)] != kept.images:
            return empty
        pairs = enumerate(zip(kept.ids, ids[:-1], strict=False))
        common = next((place for place, (mine, theirs) in pairs if mine != theirs), min(len(kept.ids), len(ids) - 1))
        placeholder = self.model.config.image_token_id
        if placeholder in kept.ids[common:]:
            return empty
        cache = kept.cache if keep else copy.deepcopy(kept.cache)
        if common < len(kept.ids):
            try:
                cache.crop(common - len(kept.ids))
            except RuntimeError:  # a sliding window has left behind what would come back
                return empty
        return CachedTurns(cache, ids[:common], kept.images)

    def _refuse_longer(self, tokens: int) -> None:
        text = self.model.config.text_config
        if tokens > text.max_position_embeddings:
            raise UserError(
                f"the conversation is longer than the {text.max_position_embeddings} tokens of this model: "
                "begin a new one"
            )


def _digest(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()
