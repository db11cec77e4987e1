"""Measures what reduced tokens are worth to whoever asks: `shortzip serve` before an engine, against all tokens.

    python scripts/benchmarks/serving.py --model checkpoints/demo-llava --budget 12+4

Both sides go through the same server and engine, each in a process of its own, and answer the same drawn scenes with
the same number of tokens; they take turns, round by round. `plain` is sent every visual token. Times are of the clock:
what else runs on the machine is in them, and less so in their ratios.
"""

from __future__ import annotations

import asyncio
import base64
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from shortzip.data.errors import UserError
from shortzip.data.files import refuse_to_replace
from shortzip.reduction.parsing import parse_budget
from shortzip.scripts.benchmarks.timing import write_figures
from shortzip.train.inputs.samples import demo_folder, draw_demo_scenes
from shortzip.train.settings.command_line import parse_config, run_command
from shortzip.train.settings.config import DataConfig

PLAIN, REDUCED = "plain", "reduced"


@dataclass
class ServingConfig:
    """What `scripts/benchmarks/serving.py` takes."""

    model: str = "checkpoints/demo-llava"
    """A release in transformers' layout, neither reduced nor tuned."""
    budget: str = "12+4"
    """Visual tokens of the reduced side, dominant+contextual."""
    concurrent: list[int] = field(default_factory=lambda: [1, 8, 64])
    """Requests at a time."""
    requests: int = 64
    """Of a side and a round."""
    rounds: int = 3
    """That count; one goes before them."""
    max_tokens: int = 16
    """Of each answer."""
    output: Path | None = None
    """A JSON file to write the figures to."""
    overwrite: bool = False
    """Replace the file that is there already."""

    def __post_init__(self) -> None:
        parse_budget(self.budget)


@contextmanager
def started(script: str, *arguments: str) -> Iterator[str]:
    """The address that a server, one of the scripts in a process of its own, says it listens on."""
    command = [sys.executable, "-m", f"shortzip.scripts.{script}", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "listening on" in line:
                yield line.split("listening on ")[1].split()[0].rstrip(",")
                return
        raise UserError(f"{script} ended before it listened")
    finally:
        process.kill()
        process.wait()


def requests_of(config: ServingConfig) -> list[dict[str, Any]]:
    """Questions about drawn scenes, without the model's name."""
    data = DataConfig("", eval_instructions="demo")
    draw_demo_scenes(data)
    images = sorted((demo_folder(data.demo_scenes, held_out=True) / "images").glob("*.png"))
    asked = []
    for number in range(config.requests):
        content = base64.b64encode(images[number % len(images)].read_bytes()).decode()
        parts = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}},
            {"type": "text", "text": "What is in the image?"},
        ]
        asked.append({"messages": [{"role": "user", "content": parts}], "max_tokens": config.max_tokens})
    return asked


async def measure(url: str, name: str, asked: Sequence[dict[str, Any]], concurrent: int) -> tuple[float, list[float]]:
    """Seconds of all requests, and of each."""
    places, seconds = asyncio.Semaphore(concurrent), []
    async with httpx.AsyncClient(timeout=600, trust_env=False) as client:

        async def ask(request: dict[str, Any]) -> None:
            async with places:
                start = time.perf_counter()
                response = await client.post(f"{url}/chat/completions", json={**request, "model": name})
                response.raise_for_status()
                seconds.append(time.perf_counter() - start)

        start = time.perf_counter()
        await asyncio.gather(*map(ask, asked))
        return time.perf_counter() - start, seconds


def benchmark(config: ServingConfig) -> list[dict[str, Any]]:
    """A row per number of requests at a time: requests per second and seconds of each side, and their ratios."""
    rows, asked = [], requests_of(config)
    with ExitStack() as servers:
        engine = servers.enter_context(
            started("benchmarks.loopback_engine", "--model", config.model, "--template", config.model)
        )
        models = ("--model", f"{PLAIN}={config.model}", "--model", f"{REDUCED}={config.model}@{config.budget}")
        url = servers.enter_context(started("serve", "--engine", engine, "--port", "0", *models))
        for concurrent in config.concurrent:
            some = asked[: max(concurrent, min(len(asked), 8 * concurrent))]
            wholes: dict[str, list[float]] = {PLAIN: [], REDUCED: []}
            singles: dict[str, list[float]] = {PLAIN: [], REDUCED: []}
            for turn in range(config.rounds + 1):
                for name in (PLAIN, REDUCED):
                    whole, each = asyncio.run(measure(url, name, some, concurrent))
                    if turn:
                        wholes[name].append(whole)
                        singles[name] += each
            rows.append(_row(concurrent, len(some), wholes, singles))
    return rows


def _row(
    concurrent: int, count: int, wholes: dict[str, list[float]], singles: dict[str, list[float]]
) -> dict[str, Any]:
    per_second = {name: count / statistics.median(seconds) for name, seconds in wholes.items()}
    median = {name: statistics.median(seconds) for name, seconds in singles.items()}
    late = {name: statistics.quantiles(seconds, n=20)[-1] for name, seconds in singles.items()}
    return {
        "concurrent": concurrent,
        "requests_per_second": per_second,
        "median_seconds": median,
        "95_percent_seconds": late,
        "throughput_ratio": per_second[REDUCED] / per_second[PLAIN],
        "median_ratio": median[REDUCED] / median[PLAIN],
        "95_percent_ratio": late[REDUCED] / late[PLAIN],
    }


def main(argv: Sequence[str]) -> None:
    """Prints the table, and writes it to `output` when given."""
    config = parse_config(ServingConfig, argv, program="serving.py")
    if config.output is not None:
        refuse_to_replace(config.output, overwrite=config.overwrite)
    rows = benchmark(config)
    table = Table(title=f"{config.budget} visual tokens against all of {config.model}, {config.max_tokens} new tokens")
    for heading in ("at a time", "requests/s", "against plain", "median", "against plain", "95 %", "against plain"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row["concurrent"]),
            f"{row['requests_per_second'][REDUCED]:.1f}",
            f"{row['throughput_ratio']:.2f}x",
            f"{1000 * row['median_seconds'][REDUCED]:.0f} ms",
            f"{row['median_ratio']:.2f}x",
            f"{1000 * row['95_percent_seconds'][REDUCED]:.0f} ms",
            f"{row['95_percent_ratio']:.2f}x",
        )
    Console(width=110).print(table)
    if config.output is not None:
        write_figures(config.output, {"settings": asdict(config), "rows": rows})


if __name__ == "__main__":
    run_command(main)
