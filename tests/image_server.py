"""A server on the loopback interface that serves images and ranges of archives, and misbehaves on request."""

from __future__ import annotations

import io
import threading
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


def jpeg(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (shade, 90, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """Serves `files`; what stands in `faults` for a path happens to its next requests, one after the other."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.asked: Counter[str] = Counter()
        self.sent = 0
        self.ranges_served = 0  # requests of a path that come before "no ranges"
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()
        self._thread.join()


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        faults = self.server.faults.get(self.path, [])
        fault = (faults.pop(0) if len(faults) > 1 or faults[0] != "always 500" else faults[0]) if faults else ""
        content = self.server.files.get(self.path)
        if fault.split()[-1:] and fault.split()[-1].isdigit():
            self.send_response(int(fault.split()[-1]))
            self.send_header("Retry-After", "soon" if fault.startswith("vague") else "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if content is None:
            self.send_error(404)
            return
        wanted = self.headers.get("Range")
        if wanted and (fault != "no ranges" or self.server.asked[self.path] <= self.server.ranges_served):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) if first else len(content) - int(last)
            start = max(0, start)
            end = int(last) if first and last else len(content) - 1
            part = content[start : end + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}")
        else:
            part = content
            self.send_response(200)
        if fault == "hangs":
            self.server.released.wait(10)
            self.close_connection = True
            return
        told = {"says more": len(part) + 50, "says less": len(part) // 2}.get(fault, len(part))
        self.send_header("Content-Length", str(told))
        self.end_headers()
        part = part[: len(part) // 2] if fault == "drops" else part[:told]
        self.wfile.write(part)
        self.server.sent += len(part)
        if fault in ("drops", "says more"):
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Silent."""


def archive(names: list[str], padding: int = 0) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for shade, name in enumerate(names):
            file.writestr(name, jpeg(shade))
        if padding:
            file.writestr(zipfile.ZipInfo("large"), bytes(padding))
    return buffer.getvalue()
