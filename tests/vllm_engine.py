"""An engine on the loopback interface that speaks vLLM's interface for image embeddings and runs transformers' LLaVA.

As vLLM's chat API: parts `image_embeds` are read with `torch.load(weights_only=True)`, each of shape [tokens, hidden
size] (vllm/multimodal/media/image.py, vllm/entrypoints/chat_utils.py); the template of --chat-template writes one
placeholder per image; it becomes as many as the embedding has rows (vllm/model_executor/models/llava.py).
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

NAME = "the-plain-release"


class VllmEngine:
    """The application. `model` None: it looks at what it is sent, and says how many visual tokens it was.

    `faults`: what happens to the next requests instead: "drops" (the connection, after a first event), "500", "400",
    "429", "hangs".
    """

    def __init__(self, model: Any, processor: Any, hidden_size: int) -> None:
        self.model, self.processor, self.hidden_size = model, processor, hidden_size
        self.faults: list[str] = []
        self.shapes: list[tuple[int, ...]] = []
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.pause = 0.0  # seconds that an answer takes
        self.most_at_once = self.at_once = 0
        self._thread = ThreadPoolExecutor(1)

    @property
    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.complete, methods=["POST"]),
            ]
        )

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": NAME, "object": "model"}]})

    async def complete(self, request: Request) -> Response:
        asked = await request.json()
        self.headers.append(dict(request.headers))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            fault = self.faults.pop(0) if self.faults else ""
            if fault.isdigit():
                return JSONResponse({"error": {"message": f"told to say {fault}"}}, int(fault))
            if fault == "hangs":
                await asyncio.sleep(30)
            await asyncio.sleep(self.pause)
            self.seen.append(asked)
            assert asked["model"] == NAME
            messages, embeds = self._read(asked["messages"])
            if self.model is None:
                tokens = [len(tensor) for tensor in embeds]
            else:
                loop = asyncio.get_running_loop()
                tokens = await loop.run_in_executor(self._thread, self._generate, messages, embeds, asked)
        finally:
            self.at_once -= 1
        if asked.get("stream"):
            return StreamingResponse(self._events(tokens, fault), media_type="text/event-stream")
        message = {"role": "assistant", "content": self._text(tokens)}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "token_ids": tokens}
        return JSONResponse({"id": "x", "object": "chat.completion", "created": 0, "model": NAME, "choices": [choice]})

    def _read(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
        rendered, embeds = [], []
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for part in parts:
                assert part["type"] in ("text", "image_embeds"), part
                if part["type"] == "image_embeds":
                    data = base64.b64decode(part["image_embeds"], validate=True)
                    tensor = torch.load(io.BytesIO(data), weights_only=True)
                    assert tensor.dim() == 2
                    assert tensor.shape[1] == self.hidden_size
                    assert tensor.untyped_storage().nbytes() == tensor.nbytes
                    self.shapes.append(tuple(tensor.shape))
                    embeds.append(tensor)
            kinds = {"image_embeds": {"type": "image"}}
            rendered.append({**message, "content": [kinds.get(part["type"], part) for part in parts]})
        return rendered, embeds

    @torch.inference_mode()
    def _generate(self, messages: list[Any], embeds: list[torch.Tensor], asked: dict[str, Any]) -> list[int]:
        tokenizer = self.processor.tokenizer
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids: list[int] = []
        left = list(embeds)
        for token in tokenizer(text).input_ids:
            ids += [token] * (len(left.pop(0)) if token == self.processor.image_token_id else 1)
        assert not left
        input_ids = torch.tensor([ids])
        merged = self.model.get_input_embeddings()(input_ids)
        if embeds:
            merged[input_ids == self.processor.image_token_id] = torch.cat(embeds).to(merged.dtype)
        output = self.model.generate(
            inputs_embeds=merged,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            max_new_tokens=asked.get("max_tokens") or asked.get("max_completion_tokens") or 16,
        )
        return output[0].tolist()

    async def _events(self, tokens: list[int], fault: str) -> AsyncIterator[str]:
        for number, token in enumerate(tokens):
            if fault == "drops" and number:
                raise RuntimeError("told to break off")
            choice = {"index": 0, "delta": {"content": self._text([token])}, "token_ids": [token]}
            event = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": NAME, "choices": [choice]}
            yield f"data: {json.dumps(event)}\n\n"
        yield "data: [DONE]\n\n"

    def _text(self, tokens: list[int]) -> str:
        if self.model is None:
            return " ".join(map(str, tokens))
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True)


class Running:
    """A server in a thread of its own, while the block runs."""

    def __init__(self, server: uvicorn.Server) -> None:
        self.server = server
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        self._thread = threading.Thread(target=server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    @classmethod
    def of(cls, app: Any) -> Running:
        return cls(uvicorn.Server(uvicorn.Config(app, log_level="critical")))

    def __enter__(self) -> Running:
        self._thread.start()
        while not self.server.started:
            assert self._thread.is_alive()
            self._thread.join(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = self.server.force_exit = True
        self._thread.join(20)
        self.socket.close()
