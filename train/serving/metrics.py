"""What a server counts, in Prometheus' words."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests by model and status of the answer", ["model", "status"])
        self.images = self._counter("images", "Images encoded", ["model"])
        self.visual_tokens = self._counter("visual_tokens", "Visual tokens that the engine was sent", ["model"])
        self.saved_tokens = self._counter(
            "saved_tokens", "Visual tokens that the release would make beyond", ["model"]
        )
        self.seconds = self._histogram("request_seconds", "Seconds to the end of the answer", _SECONDS, ["model"])
        self.encoding = self._histogram("image_seconds", "Seconds from a request to its images' tokens", _SECONDS)
        self.batches = self._histogram("batch_images", "Images encoded at once", (1, 2, 4, 8, 16, 32, 64, 128))
        self.in_flight = Gauge("shortzip_requests_in_flight", "Requests under way", registry=self.registry)

    def text(self) -> bytes:
        """Everything, as /metrics shows it."""
        return generate_latest(self.registry)

    def _counter(self, name: str, words: str, labels: list[str]) -> Counter:
        return Counter(f"shortzip_{name}", words, labels, registry=self.registry)

    def _histogram(
        self, name: str, words: str, buckets: tuple[float, ...], labels: list[str] | None = None
    ) -> Histogram:
        return Histogram(f"shortzip_{name}", words, labels or [], buckets=buckets, registry=self.registry)
