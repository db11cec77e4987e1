"""Images of concurrent requests, encoded together: while one batch is in the tower, the next one gathers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shortzip.train.serving.encoder import ImageEncoder, Pixels


@dataclass(frozen=True, eq=False)
class _Job:
    model: str
    image: Pixels
    done: asyncio.Future[Tensor]


class Batches:
    """Encodes images for whoever waits, in one thread.

    Args:
        encoders: by name.
        size: images at once, all of one model.
        seen: told the number of images of each batch.
    """

    def __init__(
        self, encoders: Mapping[str, ImageEncoder], size: int, seen: Callable[[int], Any] = lambda count: None
    ) -> None:
        self.encoders, self.size, self.seen = encoders, size, seen
        self._waiting: deque[_Job] = deque()
        self._more = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "encoder")

    async def encode(self, model: str, images: Sequence[Pixels]) -> list[Tensor]:
        """The tokens of each image. Raises what encoding raises."""
        loop = asyncio.get_running_loop()
        jobs = [_Job(model, image, loop.create_future()) for image in images]
        self._waiting.extend(jobs)
        self._more.set()
        return list(await asyncio.gather(*(job.done for job in jobs)))

    async def run(self) -> None:
        """Works until it is cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._more.wait()
                jobs = self._next()
                if not jobs:
                    self._more.clear()
                    continue
                images = [job.image for job in jobs]
                try:
                    tensors = await loop.run_in_executor(self._thread, self.encoders[jobs[0].model].encode, images)
                except Exception as error:
                    for job in jobs:
                        if not job.done.done():
                            job.done.set_exception(error)
                    continue
                self.seen(len(jobs))
                for job, tensor in zip(jobs, tensors, strict=True):
                    if not job.done.done():  # whoever asked may have gone
                        job.done.set_result(tensor)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _next(self) -> list[_Job]:
        """The first that is still waited for, and others of its model; the rest stays in order."""
        jobs: list[_Job] = []
        others: deque[_Job] = deque()
        while self._waiting and len(jobs) < self.size:
            job = self._waiting.popleft()
            if job.done.done():
                continue
            (jobs if not jobs or job.model == jobs[0].model else others).append(job)
        self._waiting.extendleft(reversed(others))
        return jobs
