"""Serves reduced checkpoints over OpenAI's interface: images here, the language model in an engine (vLLM).

    pip install 'shortzip[serve]'
    vllm serve llava-hf/llava-1.5-7b-hf --enable-mm-embeds --chat-template checkpoints/RUN/final/chat_template.jinja
    python scripts/serve.py --model checkpoints/RUN --engine http://127.0.0.1:8000/v1

Only the projector is tuned, so the engine runs the unchanged release, and one server serves every budget, method and
projector over it: each request names one (`model`). Listens on 127.0.0.1 unless --host says otherwise.
"""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shortzip.data.errors import MissingExtra, UserError
from shortzip.train.serving.device import place
from shortzip.train.settings.command_line import parse_config, run_command, say
from shortzip.train.settings.serving import ServeConfig

LOCAL = "127.0.0.1"
KEPT = 75  # seconds that an idle connection stays: longer than clients keep theirs, lest both use and close it at once
NEEDED = ("starlette", "uvicorn", "httpx", "prometheus_client")


def main(argv: Sequence[str]) -> None:
    run(parse_config(ServeConfig, argv, program="serve.py"))


def run(config: ServeConfig) -> None:
    """Serves, until it is interrupted. Raises what `build` raises."""
    server, listening = build(config), listen(config)
    host, port = listening.getsockname()[:2]
    say(f"listening on http://{host}:{port}/v1, for the engine at {config.engine}", flush=True)
    if config.host != LOCAL:
        say(f"listening on {config.host}: whoever reaches this machine can ask", flush=True)
    server.run(sockets=[listening])


def listen(config: ServeConfig) -> socket.socket:
    """The socket that requests come to. Raises UserError for an address that cannot be had."""
    try:
        return socket.create_server((config.host, config.port), family=_family(config), backlog=1024)
    except OSError as error:
        raise UserError(f"host {config.host}, port {config.port}: {error.strerror or error}") from error


def _family(config: ServeConfig) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in config.host else socket.AF_INET


def build(config: ServeConfig) -> Any:
    """The server, its checkpoints loaded: uvicorn's, which `run()` starts.

    Raises `MissingExtra` naming the extra, and what `load_encoders` raises.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(f"serving needs {', '.join(missing)}: pip install 'shortzip[serve]'")
    import uvicorn

    from shortzip.train.serving.app import Server
    from shortzip.train.serving.encoder import load_encoders
    from shortzip.train.serving.engine import Engine
    from shortzip.train.serving.sources import ImageSources

    device, dtype = place(config.device, config.dtype)
    encoders = load_encoders(config.listed, device, dtype)
    for name, encoder in encoders.items():
        say(f"{name}: {encoder.reductions.before_an_engine.describe()} of {encoder.release.name}")
        for lost in encoder.reductions.lost_in_an_engine:
            say(f"{name}: served without its {lost}")
    sources = ImageSources(
        None if config.images is None else Path(config.images),
        allow_http=config.allow_http,
        largest=int(config.max_image_mb * 1e6),
        seconds=config.upload_seconds,
    )
    engine = Engine(config.engine, config.engine_model, config.engine_seconds)
    app = Server(config, encoders, engine, sources).app
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_keep_alive=KEPT))


if __name__ == "__main__":
    run_command(main)
