"""The endpoint: OpenAI's chat completions in front, an engine that takes image embeddings behind."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from torch import Tensor

from shortzip.data.drops import BadSample
from shortzip.data.images import BadImage
from shortzip.train.serving.batches import Batches
from shortzip.train.serving.chat import Chat, for_engine, read_chat
from shortzip.train.serving.encoder import ImageEncoder, Pixels
from shortzip.train.serving.engine import Engine
from shortzip.train.serving.metrics import Metrics
from shortzip.train.serving.refusal import Refused
from shortzip.train.serving.sources import ImageSources
from shortzip.train.settings.serving import ServeConfig

COME_AGAIN = 1  # seconds, to whom is refused because of others
LONGEST_TOKEN = 100  # characters
_LOG = logging.getLogger("uvicorn.error")


@dataclass
class _Asked:
    """What is known of a request when it ends."""

    model: str = "unknown"
    status: int = 500


class Server:
    """Requests from their bodies to their answers.

    Args:
        config: the limits.
        encoders: by the name that requests give.
        engine: that has the language model.
        sources: of images.
    """

    def __init__(
        self, config: ServeConfig, encoders: Mapping[str, ImageEncoder], engine: Engine, sources: ImageSources
    ) -> None:
        self.config, self.encoders, self.engine, self.sources = config, encoders, engine, sources
        self.metrics = Metrics()
        self.started = int(time.time())
        self._readers = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "images")  # each may hold 50 megapixels
        self._batches: Batches | None = None

    @property
    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/v1/chat/completions", _Completion(self), methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/health", self.health),
                Route("/metrics", self.show_metrics),
            ],
            exception_handlers={HTTPException: _not_there},
            lifespan=self.lifespan,
        )

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Encodes while the server runs."""
        self._batches = Batches(self.encoders, self.config.batch_size, self.metrics.batches.observe)
        working = asyncio.create_task(self._batches.run())
        try:
            yield
        finally:
            working.cancel()
            with suppress(asyncio.CancelledError):
                await working
            await self.engine.close()
            await self.sources.close()
            self._readers.shutdown(wait=False, cancel_futures=True)

    async def models(self, request: Request) -> Response:
        """What may be asked."""
        listed = [
            {"id": name, "object": "model", "created": self.started, "owned_by": "shortzip"} for name in self.encoders
        ]
        return JSONResponse({"object": "list", "data": listed})

    async def health(self, request: Request) -> Response:
        """200 where a request would be answered, 503 while the engine is not there."""
        is_up = await self.engine.is_up()
        return JSONResponse({"engine": "up" if is_up else "down"}, 200 if is_up else 503)

    async def show_metrics(self, request: Request) -> Response:
        """Prometheus' text."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def answer(self, request: Request, asked: _Asked, held: AsyncExitStack) -> Response:
        """The response to a request that has a place; `held` has what sending it needs. Raises `Refused`."""
        body = await self._body(request)
        chat = await asyncio.to_thread(read_chat, body, self.config.max_images)
        encoder = self.encoders.get(chat.model)
        if encoder is None:
            known = ", ".join(self.encoders)
            raise Refused(404, "model_not_found", f"there is no model {chat.model[:100]!r}: there is {known}")
        asked.model = chat.model
        embeddings = await self._embed(chat, encoder)
        asks = for_engine(chat, await self.engine.model(), embeddings)
        authorization = request.headers.get("authorization")
        if chat.streams:
            lines = await held.enter_async_context(self.engine.ask(asks, authorization))
            asked.status = 200
            return StreamingResponse(_events(lines, chat.model), media_type="text/event-stream")
        whole = await self.engine.whole(asks, authorization)
        asked.status = 200
        return JSONResponse({**whole, "model": chat.model})

    async def _body(self, request: Request) -> bytes:
        most, body = self.config.max_request_mb * 1e6, bytearray()
        try:
            async with asyncio.timeout(self.config.upload_seconds):
                async for piece in request.stream():
                    body += piece
                    if len(body) > most:
                        raise Refused(413, "request_too_large", f"a request has at most {most / 1e6:g} MB here")
        except TimeoutError as error:
            raise Refused(408, "upload_timeout", "the request's body did not come in time") from error
        return bytes(body)

    async def _embed(self, chat: Chat, encoder: ImageEncoder) -> list[Tensor]:
        """Each image's tokens, once the prompt is known to fit. Raises `Refused`."""
        start, loop = time.perf_counter(), asyncio.get_running_loop()
        long = sum(len(text) for _, text in chat.turns)
        if long > LONGEST_TOKEN * encoder.longest:  # before it is tokenized, which takes its time
            raise _too_long(f"{long} characters", encoder)

        async def read(url: str) -> Pixels:
            content = await self.sources.read(url)
            return await loop.run_in_executor(self._readers, encoder.read, content)

        try:
            images = [await read(url) for url in chat.images]
            sizes = [image.size for image in images]
            prompt = await loop.run_in_executor(self._readers, encoder.supervision.prompt, chat.conversation, sizes)
        except BadImage as error:
            raise Refused(400, "invalid_image", f"an image cannot be used: {error.detail}") from error
        except BadSample as error:
            raise Refused(400, "invalid_request", error.detail) from error
        if len(prompt) >= encoder.longest:
            raise _too_long(f"{len(prompt)} tokens", encoder)
        assert self._batches is not None
        tensors = await self._batches.encode(encoder.name, images)
        self.metrics.images.labels(encoder.name).inc(len(images))
        self.metrics.visual_tokens.labels(encoder.name).inc(sum(map(len, tensors)))
        self.metrics.saved_tokens.labels(encoder.name).inc(sum(map(encoder.saved_tokens, sizes)))
        self.metrics.encoding.observe(time.perf_counter() - start)
        return tensors


class _Completion:
    """A chat completion. It counts as under way until it is sent, given up, or nobody listens any more."""

    def __init__(self, server: Server) -> None:
        self.server, self.under_way = server, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server, asked, start = self.server, _Asked(), time.perf_counter()
        if self.under_way >= server.config.max_requests:
            server.metrics.requests.labels(asked.model, "429").inc()
            busy = Refused(429, "too_many_requests", "too many requests are under way", COME_AGAIN)
            return await _refusal(busy)(scope, receive, send)
        self.under_way += 1
        server.metrics.in_flight.inc()
        try:
            await self._answered(asked, Request(scope, receive), send)
        finally:
            self.under_way -= 1
            server.metrics.in_flight.dec()
            server.metrics.requests.labels(asked.model, str(asked.status)).inc()
            server.metrics.seconds.labels(asked.model).observe(time.perf_counter() - start)

    async def _answered(self, asked: _Asked, request: Request, send: Send) -> None:
        begun = False

        async def sending(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            async with asyncio.timeout(self.server.config.seconds), AsyncExitStack() as held:
                response = await self._response(request, asked, held)
                await response(request.scope, request.receive, sending)
        except ClientDisconnect:
            asked.status = 499
        except TimeoutError:
            asked.status = 504
            if not begun:  # else a client that does not read: its connection ends with what it has
                late = Refused(504, "timeout", "it took too long", COME_AGAIN)
                await _refusal(late)(request.scope, request.receive, send)

    async def _response(self, request: Request, asked: _Asked, held: AsyncExitStack) -> Response:
        try:
            return await self.server.answer(request, asked, held)
        except Refused as refused:
            asked.status = refused.status
            return _refusal(refused)
        except ClientDisconnect:
            raise
        except Exception:
            _LOG.exception("a request failed")
            return _refusal(Refused(500, "internal_error", "this server failed at it; its log says why"))


async def _events(lines: AsyncIterator[str], model: str) -> AsyncIterator[str]:
    """The engine's events under the name that was asked for. One that breaks off ends with an error, as vLLM's do."""
    try:
        async for line in lines:
            if line.startswith("data:"):
                yield f"data: {_named(line[5:].strip(), model)}\n\n"
    except Refused as refused:
        yield f"data: {json.dumps(refused.body)}\n\n"


def _named(data: str, model: str) -> str:
    """An event under the name that was asked for; what is no object ([DONE]) as it is."""
    try:
        event = json.loads(data)
    except ValueError:
        return data
    return json.dumps({**event, "model": model}, ensure_ascii=False) if isinstance(event, dict) else data


def _too_long(prompt: str, encoder: ImageEncoder) -> Refused:
    return Refused(400, "context_length_exceeded", f"{prompt}, and the model has {encoder.longest} positions")


def _refusal(refused: Refused) -> Response:
    headers = {} if refused.retry_after is None else {"Retry-After": str(refused.retry_after)}
    return JSONResponse(refused.body, refused.status, headers)


async def _not_there(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    return _refusal(Refused(status, "not_found", f"{request.method} {request.url.path[:100]} is not served here"))
