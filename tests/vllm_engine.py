"""The loopback engine of the benchmarks with eyes and faults, and servers in threads of their own."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from shortzip.scripts.benchmarks.loopback_engine import NAME, LoopbackEngine, read_messages


class VllmEngine(LoopbackEngine):
    """The application. `model` None: it looks at what it is sent, and says how many visual tokens it was.

    `faults`: what happens to the next requests instead: "drops" (the connection, after a first event), "stalls"
    (after one), "500", "400", "429", "hangs".
    """

    def __init__(self, model: Any, processor: Any, hidden_size: int) -> None:
        super().__init__(model, processor)
        self.hidden_size = hidden_size
        self.faults: list[str] = []
        self.shapes: list[tuple[int, ...]] = []
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.pause = 0.0  # seconds that an answer takes
        self.most_at_once = self.at_once = 0
        self._fault = ""

    async def complete(self, request: Request) -> Response:
        asked = await request.json()
        self.headers.append(dict(request.headers))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            fault = self.faults.pop(0) if self.faults else ""
            if fault.isdigit():
                return JSONResponse({"error": {"message": f"told to say {fault}"}}, int(fault))
            await asyncio.sleep(30 if fault == "hangs" else self.pause)
            self.seen.append(asked)
            assert asked["model"] == NAME
            _, images = read_messages(asked["messages"])
            for tensor in images:
                assert tensor.dim() == 2
                assert tensor.shape[1] == self.hidden_size
                assert tensor.untyped_storage().nbytes() == tensor.nbytes
                self.shapes.append(tuple(tensor.shape))
            tokens = [len(tensor) for tensor in images] if self.model is None else await self.tokens(asked)
        finally:
            self.at_once -= 1
        self._fault = fault
        return self.respond(tokens, bool(asked.get("stream")))

    async def events(self, tokens: list[int]) -> AsyncIterator[str]:
        async for event in super().events(tokens):
            yield event
            if self._fault == "drops":
                raise RuntimeError("told to break off")
            if self._fault == "stalls":
                await asyncio.sleep(30)

    def text(self, tokens: list[int]) -> str:
        return super().text(tokens) if self.model is not None else " ".join(map(str, tokens))


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
