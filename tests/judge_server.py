"""A judge on the loopback interface: OpenAI's chat completions, as lmms-eval asks them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Judge:
    """Answers with what `verdict` says of the text that it is asked; `asked` are the requests, `keys` their keys."""

    def __init__(self, verdict: Callable[[str], str]) -> None:
        self.verdict = verdict
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                judge.asked.append(request)
                judge.keys.append(self.headers["Authorization"])
                said = judge.verdict(request["messages"][-1]["content"])
                message = {"role": "assistant", "content": said}
                body = json.dumps({"model": request["model"], "choices": [{"index": 0, "message": message}]}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Says nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """The whole address, as OPENAI_API_URL names it."""
        return f"http://127.0.0.1:{self.server.server_port}/v1/chat/completions"

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
