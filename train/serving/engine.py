"""The engine that has the language model, asked over OpenAI's interface; what goes wrong told in HTTP's words."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

from shortzip.train.serving.refusal import Refused

KEPT = 2.0  # seconds that a connection is kept for the next request: vLLM closes idle ones after 5
_BUSY = (429, 503)


class Engine:
    """An engine.

    Args:
        address: of its interface, with /v1.
        model: what it calls its model; None: the first that it lists.
        seconds: without a word after which a request is given up.
    """

    def __init__(self, address: str, model: str | None, seconds: float) -> None:
        self.address, self._model = address.rstrip("/"), model
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEPT)
        timeout = httpx.Timeout(seconds, connect=min(seconds, 10.0))
        # trust_env: no proxy of the environment stands between two servers of one machine.
        self._client = httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False)

    async def close(self) -> None:
        """Gives the connections back."""
        await self._client.aclose()

    async def model(self) -> str:
        """What the engine calls its model. Raises `Refused` (502) where it cannot be asked."""
        if self._model is None:
            async with self._told():
                response = await self._client.get(f"{self.address}/models")
                response.raise_for_status()
                self._model = str(response.json()["data"][0]["id"])
        return self._model

    async def is_up(self) -> bool:
        """Whether it answers."""
        try:
            response = await self._client.get(f"{self.address}/models", timeout=5.0)
        except httpx.HTTPError:
            return False
        return response.status_code == 200

    @asynccontextmanager
    async def ask(self, request: Mapping[str, Any], authorization: str | None) -> AsyncIterator[AsyncIterator[str]]:
        """The lines of its answer as they come. Raises `Refused`, with the engine's own words for a request that it
        does not take; also while lines are read."""
        headers = {} if authorization is None else {"Authorization": authorization}
        address = f"{self.address}/chat/completions"
        posted = self._client.build_request("POST", address, json=request, headers=headers)
        async with self._told():
            response = await self._sent(posted)
            try:
                if response.status_code != 200:
                    await response.aread()
                    raise _as_told(response)
                yield self._lines(response)
            finally:
                await response.aclose()

    async def _sent(self, posted: httpx.Request) -> httpx.Response:
        try:
            return await self._client.send(posted, stream=True)
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
            # A kept connection that the engine closed in this moment: nothing was answered yet, so it is asked anew.
            return await self._client.send(posted, stream=True)

    async def whole(self, request: Mapping[str, Any], authorization: str | None) -> dict[str, Any]:
        """Its answer to a request that does not stream. Raises as `ask`."""
        async with self.ask(request, authorization) as lines:
            text = "\n".join([line async for line in lines])
        async with self._told():
            return {**json.loads(text)}

    async def _lines(self, response: httpx.Response) -> AsyncIterator[str]:
        async with self._told():
            async for line in response.aiter_lines():
                yield line

    @asynccontextmanager
    async def _told(self) -> AsyncIterator[None]:
        try:
            yield
        except httpx.TimeoutException as error:
            raise Refused(504, "engine_timeout", "the engine did not answer in time", 5) from error
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            if isinstance(error, Refused):
                raise
            words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise Refused(
                502, "engine_unavailable", f"the engine cannot be reached, or broke off ({words})", 5
            ) from error


def _as_told(response: httpx.Response) -> Refused:
    try:
        told = response.json()
        error = told.get("error", told)
        words = str(error.get("message", error) if isinstance(error, dict) else error)
    except (json.JSONDecodeError, AttributeError, UnicodeDecodeError):
        words = response.text[:300]
    if response.status_code in _BUSY:
        return Refused(503, "engine_busy", f"the engine takes no more: {words[:500]}", 2)
    if 400 <= response.status_code < 500:
        return Refused(response.status_code, "engine_refused", f"the engine refuses it: {words[:500]}")
    return Refused(502, "engine_failed", f"the engine failed ({response.status_code}): {words[:500]}", 5)
