"""A chat completion as OpenAI's clients ask for it: read and checked, and written for the engine.

The engine's parts for images are vLLM's `image_embeds` (docs/features/multimodal_inputs.md, "Image Embedding Inputs"):
base64 of a tensor that `torch.save` wrote, one part per image, [tokens, hidden size].
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shortzip.data.instructions import PLACEHOLDER, Conversation
from shortzip.train.serving.refusal import Refused

ROLES = ("system", "user", "assistant")
# What the engine is told beside messages. Its own settings of templates and processors are not for strangers.
OPTIONS = frozenset([
     "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "n", "stop", "seed",
     "presence_penalty", "frequency_penalty", "repetition_penalty", "logprobs", "top_logprobs", "logit_bias",
     "min_tokens", "ignore_eos", "stop_token_ids", "skip_special_tokens", "response_format", "return_token_ids",
     "stream", "stream_options", "user",
])  # fmt: skip


@dataclass(frozen=True)
class Chat:
    """One request.

    Attributes:
        model: as --model names it.
        turns: (role, text), with one `<image>` at the start of the text per image of the turn.
        images: their addresses, in order.
        options: what the engine is told beside messages, `stream` among it.
    """

    model: str
    turns: list[tuple[str, str]]
    images: list[str]
    options: dict[str, Any]

    @property
    def streams(self) -> bool:
        """Whether the answer is wanted as it comes."""
        return bool(self.options.get("stream"))

    @property
    def conversation(self) -> Conversation:
        """The same for the checkpoint's template."""
        return Conversation("request", ("",) * len(self.images), tuple(self.turns))


def read_chat(body: bytes, max_images: int) -> Chat:
    """The request of a body. Raises `Refused` (400) with the key, what is there and what is allowed."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _bad(f"the body is no JSON: {error}") from error
    if not isinstance(asked, dict):
        raise _bad(f"the body holds a {type(asked).__name__}, needed is an object")
    model, messages = asked.pop("model", None), asked.pop("messages", None)
    if not isinstance(model, str):
        raise _bad(f"model is {model!r:.100}: needed is a name, /v1/models lists them")
    if not isinstance(messages, list) or not messages:
        raise _bad("messages must be a list of at least one message")
    if unknown := sorted(asked.keys() - OPTIONS):
        raise _bad(
            f"{', '.join(unknown)[:200]}: not taken here; beside model and messages: {', '.join(sorted(OPTIONS))}"
        )
    turns: list[tuple[str, str]] = []
    images: list[str] = []
    for number, message in enumerate(messages):
        role, text, shown = _turn(message, f"messages[{number}]")
        turns.append((role, PLACEHOLDER * len(shown) + ("\n" if shown else "") + text))
        images += shown
    if turns[-1][0] != "user":
        raise _bad(f"the last message is of the {turns[-1][0]}: the user's is answered")
    if len(images) > max_images:
        raise _bad(f"{len(images)} images: {max_images} are allowed in a request")
    return Chat(model, turns, images, asked)


def _turn(message: Any, where: str) -> tuple[str, str, list[str]]:
    """Role, text and addresses of images."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise _bad(f"{where}: needed is an object with a role, one of {', '.join(ROLES)}")
    role, content = message["role"], message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise _bad(f"{where}.content: needed is a text, or a list of parts")
    texts: list[str] = []
    images: list[str] = []
    for number, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url" and role == "user":
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, dict) else url
            if not isinstance(url, str):
                raise _bad(f"{where}.content[{number}].image_url.url: needed is an address or a data: URI")
            images.append(url)
        else:
            raise _bad(f"{where}.content[{number}]: a part is a text, or in a user's message an image_url")
    text = "".join(texts)
    if PLACEHOLDER in text:
        raise _bad(f"{where}: {PLACEHOLDER} in a text: images are parts of their own")
    return role, text, images


def for_engine(chat: Chat, model: str, embeddings: Sequence[Tensor]) -> dict[str, Any]:
    """The request to the engine, whose `model` it is; `embeddings` [tokens, hidden size] of each image."""
    left = [{"type": "image_embeds", "image_embeds": encode_tensor(tensor)} for tensor in embeddings]
    messages: list[Mapping[str, Any]] = []
    for message in chat.conversation.messages():
        parts = [left.pop(0) if part["type"] == "image" else part for part in message["content"]]
        plain = len(parts) == 1 and parts[0]["type"] == "text"
        messages.append({"role": message["role"], "content": parts[0]["text"] if plain else parts})
    return {**chat.options, "model": model, "messages": messages}


def encode_tensor(tensor: Tensor) -> str:
    """Base64 of a tensor as `torch.save` writes it, alone: of a part of a batch, not the whole batch."""
    buffer = io.BytesIO()
    torch.save(tensor.detach().cpu().clone(memory_format=torch.contiguous_format), buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def _bad(message: str) -> Refused:
    return Refused(400, "invalid_request", message)
