"""An engine for this machine alone that speaks vLLM's interface for image embeddings and runs transformers' own LLaVA.

    python scripts/benchmarks/loopback_engine.py --model llava-hf/llava-1.5-7b-hf --template checkpoints/RUN/final

For tests and measurements where no engine is: what waits is answered together, and nothing is faster than `generate`.
As vLLM's chat API: parts `image_embeds` are read with `torch.load(weights_only=True)`, each [tokens, hidden size]
(vllm/multimodal/media/image.py, vllm/entrypoints/chat_utils.py); the chat template writes one placeholder per image,
which becomes as many as the embedding has rows (vllm/model_executor/models/llava.py).
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoProcessor, LlavaForConditionalGeneration

from shortzip.train.settings.command_line import parse_config, run_command, say

NAME = "the-plain-release"


@dataclass
class EngineConfig:
    """What `scripts/benchmarks/loopback_engine.py` takes."""

    model: str
    """A plain release."""
    template: str
    """The checkpoint whose processor and chat template are used."""
    batch_size: int = 64
    """Requests answered at once."""
    port: int = 0
    """Port to listen on; 0: any."""


@dataclass(frozen=True, eq=False)
class _Prompt:
    """[L, hidden size] embeddings, the most new tokens, and where the answer's ids go."""

    embeds: Tensor
    limit: int
    done: asyncio.Future[list[int]]


class LoopbackEngine:
    """The application.

    Args:
        model: transformers' LLaVA.
        processor: whose chat template and tokenizer are used.
        batch_size: requests answered at once.
    """

    def __init__(self, model: Any, processor: Any, batch_size: int = 64) -> None:
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self._waiting: list[_Prompt] = []
        self._thread = ThreadPoolExecutor(1)
        self._working: asyncio.Task[None] | None = None

    @property
    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.complete, methods=["POST"]),
            ]
        )

    async def models(self, request: Request) -> Response:
        """Its one model."""
        return JSONResponse({"object": "list", "data": [{"id": NAME, "object": "model"}]})

    async def complete(self, request: Request) -> Response:
        """A chat completion, greedy, with the ids of its tokens."""
        asked = await request.json()
        return self.respond(await self.tokens(asked), bool(asked.get("stream")))

    def respond(self, tokens: list[int], streams: bool) -> Response:
        """The answer, whole or as events of a token each."""
        if streams:
            return StreamingResponse(self.events(tokens), media_type="text/event-stream")
        message = {"role": "assistant", "content": self.text(tokens)}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "token_ids": tokens}
        return JSONResponse({"id": "x", "object": "chat.completion", "created": 0, "model": NAME, "choices": [choice]})

    async def events(self, tokens: list[int]) -> AsyncIterator[str]:
        """The answer token by token."""
        for token in tokens:
            choice = {"index": 0, "delta": {"content": self.text([token])}, "token_ids": [token]}
            event = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": NAME, "choices": [choice]}
            yield f"data: {json.dumps(event)}\n\n"
        yield "data: [DONE]\n\n"

    def text(self, tokens: list[int]) -> str:
        """What the ids say."""
        return str(self.processor.tokenizer.decode(tokens, skip_special_tokens=True))

    async def tokens(self, asked: dict[str, Any]) -> list[int]:
        """The answer's ids."""
        messages, images = read_messages(asked["messages"])
        limit = asked.get("max_tokens") or asked.get("max_completion_tokens") or 16
        prompt = _Prompt(self._embeds(messages, images), limit, asyncio.get_running_loop().create_future())
        self._waiting.append(prompt)
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return await prompt.done

    async def _work(self) -> None:
        while self._waiting:
            limit = self._waiting[0].limit
            batch = [prompt for prompt in self._waiting if prompt.limit == limit][: self.batch_size]
            self._waiting = [prompt for prompt in self._waiting if prompt not in batch]
            loop = asyncio.get_running_loop()
            try:
                rows = await loop.run_in_executor(self._thread, self._generate, [p.embeds for p in batch], limit)
            except Exception as error:
                for prompt in batch:
                    prompt.done.set_exception(error)
                continue
            for prompt, row in zip(batch, rows, strict=True):
                if not prompt.done.done():
                    prompt.done.set_result(row)

    @torch.inference_mode()
    def _embeds(self, messages: list[dict[str, Any]], images: Sequence[Tensor]) -> Tensor:
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        left, ids = list(images), []
        for token in self.processor.tokenizer(text).input_ids:
            ids += [token] * (len(left.pop(0)) if token == self.processor.image_token_id else 1)
        if left:
            raise ValueError(f"{len(left)} images without a placeholder")
        input_ids = torch.tensor(ids)
        embeds: Tensor = self.model.get_input_embeddings()(input_ids)
        if images:
            embeds[input_ids == self.processor.image_token_id] = torch.cat(list(images)).to(embeds.dtype)
        return embeds

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[Tensor], limit: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        mask = torch.stack([pad(torch.ones(len(p), dtype=torch.long), (longest - len(p), 0)) for p in prompts])
        embeds = torch.stack([pad(prompt, (0, 0, longest - len(prompt), 0)) for prompt in prompts])
        end = self.processor.tokenizer.eos_token_id
        rows = self.model.generate(
            inputs_embeds=embeds, attention_mask=mask, do_sample=False, max_new_tokens=limit, eos_token_id=end
        ).tolist()
        return [row[: row.index(end) + 1] if end in row else row for row in rows]


def read_messages(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """Messages for a chat template, with a part {"type": "image"} for each embedding, and the embeddings."""
    rendered: list[dict[str, Any]] = []
    images: list[Tensor] = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            if part["type"] == "image_embeds":
                data = base64.b64decode(part["image_embeds"], validate=True)
                images.append(torch.load(io.BytesIO(data), weights_only=True))
            elif part["type"] != "text":
                raise ValueError(f"a part is {part['type']}")
        shown = [{"type": "image"} if part["type"] == "image_embeds" else part for part in parts]
        rendered.append({**message, "content": shown})
    return rendered, images


def main(argv: Sequence[str]) -> None:
    """Serves until it is stopped; the first line that it prints ends in its address."""
    config = parse_config(EngineConfig, argv, program="loopback_engine.py")
    model = LlavaForConditionalGeneration.from_pretrained(config.model).eval()
    engine = LoopbackEngine(model, AutoProcessor.from_pretrained(config.template), config.batch_size)
    listening = socket.create_server(("127.0.0.1", config.port), backlog=1024)
    say(f"listening on http://127.0.0.1:{listening.getsockname()[1]}/v1", flush=True)
    uvicorn.Server(uvicorn.Config(engine.app, log_level="warning")).run(sockets=[listening])


if __name__ == "__main__":
    run_command(main)
