"""A Hub on the loopback interface: what huggingface_hub's own client asks of the real one, and faults on request.

Repositories, commits, LFS objects, tags, tokens with and without write rights. No Xet: clients run with
HF_HUB_DISABLE_XET=1 and HF_ENDPOINT set to `Hub.url`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WRITER, READER = "hf_TokenThatMayWrite0123456789", "hf_TokenThatMayOnlyRead012345"
_LFS_SUFFIXES = (".safetensors", ".bin", ".model", ".png", ".pt")


@dataclass(frozen=True)
class Blob:
    """A file in a commit; LFS files are known by the SHA-256 of their content."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    head: str = ""
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, Blob]) -> str:
        digest = hashlib.sha1(repr([len(self.commits), *sorted((n, b.oid) for n, b in files.items())]).encode())
        self.head = digest.hexdigest()
        self.commits[self.head] = files
        return self.head

    def at(self, revision: str) -> str | None:
        if revision == "main":
            return self.head
        return self.tags.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """What the next `times` requests that match get instead of an answer: a status, or a cut connection."""

    method: str
    path: str
    kind: int | str
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class Hub:
    """Use as a context manager. `requests` lists (method, path) of everything asked for."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.on_upload: Callable[[str, int], None] | None = None
        """Called with (oid, bytes so far) after each 64 KiB of an LFS upload."""
        self.lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Out of reach from now on."""
        self._server.shutdown()
        self._server.server_close()

    def clear(self) -> None:
        """Forgets everything, as a new Hub at the same address."""
        with self.lock:
            self.repositories.clear()
            self.objects.clear()
            self.requests.clear()
            self.faults.clear()
            self.on_upload = None

    def environment(self, home: Path, token: str | None = WRITER) -> dict[str, str]:
        """Variables (huggingface_hub's own) that point a process's client here, with its cache under `home`."""
        login = {"HF_TOKEN": token} if token else {}
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), **login}

    def add(self, name: str, folder: Path, private: bool = False) -> str:
        """Puts a folder's files into a repository, as if pushed; returns the commit."""
        repository = self.repositories.setdefault(name, Repository(private))
        files = {
            path.relative_to(folder).as_posix(): Blob(path.read_bytes(), path.suffix in _LFS_SUFFIXES)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        self.objects.update({blob.oid: blob.content for blob in files.values() if blob.lfs})
        return repository.commit(files)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return {path: blob.content for path, blob in repository.commits[repository.at(revision) or ""].items()}

    def fail(self, method: str, path: str, kind: int | str, times: int = 1, **headers: str) -> None:
        """The next `times` requests whose path matches the expression get status `kind`; "cut" drops the connection,
        "lost" drops it after the request was carried out."""
        self.faults.append(Fault(method, path, kind, times, {k.replace("_", "-"): v for k, v in headers.items()}))

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer("GET")

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_POST(self) -> None:
        self.answer("POST")

    def do_PUT(self) -> None:
        self.answer("PUT")

    def answer(self, method: str) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        with self.hub.lock:
            self.hub.requests.append((method, path))
        fault = self.hub.take_fault(method, path)
        if fault and fault.kind == "cut":
            if method == "PUT":
                self.rfile.read(min(1000, int(self.headers.get("Content-Length", 0))))
            self.cut()
            return
        try:
            body = self.body(path)
            if fault and isinstance(fault.kind, int):
                raise _Refused(fault.kind, f"injected {fault.kind}")
            result = self.route(method, path, parse_qs(parts.query), body)
        except _Refused as refused:
            extra = {"X-Error-Code": refused.code, "X-Error-Message": refused.message} if refused.code else {}
            self.send_json(refused.status, {"error": refused.message}, {**extra, **(fault.headers if fault else {})})
            return
        except (ConnectionError, TimeoutError):
            self.close_connection = True
            return
        if fault and fault.kind == "lost":
            self.cut()
        elif isinstance(result, tuple):
            self.send_blob(method, *result)
        else:
            self.send_json(200, result)

    def cut(self) -> None:
        linger = struct.pack("ii", 1, 0)  # a reset, not a polite end
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.connection.close()

    def body(self, path: str) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        pieces: list[bytes] = []
        received = 0
        while received < length:
            piece = self.rfile.read(min(1 << 16, length - received))
            if not piece:
                raise ConnectionError("the client went away")
            pieces.append(piece)
            received += len(piece)
            if self.hub.on_upload and path.startswith("/objects/"):
                self.hub.on_upload(path.rsplit("/", 1)[-1], received)
        return b"".join(pieces)

    def send_json(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        encoded = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "X-Request-Id": "1", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(encoded)

    def send_blob(self, method: str, blob: Blob, commit: str) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{blob.oid}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(blob.content)))
        self.end_headers()
        if method == "GET":
            self.wfile.write(blob.content)

    # ---- who asks

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def may_write(self, name: str) -> None:
        if self.token is None:
            raise _Refused(401, "Invalid username or password.")
        if self.token not in (WRITER, READER):
            raise _Refused(401, "Invalid user token.")
        if self.token != WRITER:
            raise _Refused(403, "Forbidden: you must use a write token to upload to a repository.")
        if name.split("/")[0] != "user":
            raise _Refused(403, f'You don\'t have the rights to create a model under the namespace "{name}"')

    def repository(self, name: str) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self.token not in (WRITER, READER)):
            raise _Refused(404 if self.token else 401, "Repository not found", "RepoNotFound")
        return found

    def files_at(self, name: str, revision: str) -> tuple[str, dict[str, Blob]]:
        repository = self.repository(name)
        commit = repository.at(revision)
        if commit is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, repository.commits[commit]

    # ---- what is asked for

    def route(self, method: str, path: str, query: dict[str, list[str]], body: bytes) -> Any:
        for verb, pattern, handler in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method in verb.split("|"):
                with self.hub.lock:
                    return handler(self, *found.groups(), body)
        raise _Refused(404, f"this Hub knows no {method} {path}")

    def whoami(self, _: bytes) -> Any:
        if self.token not in (WRITER, READER):
            raise _Refused(401, "Invalid user token.")
        role = "write" if self.token == WRITER else "read"
        return {"type": "user", "name": "user", "orgs": [], "auth": {"accessToken": {"role": role}}}

    def validate_yaml(self, body: bytes) -> Any:
        content = json.loads(body)["content"]
        if not content.startswith("---\n"):
            raise _Refused(400, "no metadata")
        return {"errors": [], "warnings": []}

    def create(self, body: bytes) -> Any:
        asked = json.loads(body)
        name = f"{asked['organization'] or 'user'}/{asked['name']}"
        self.may_write(name)
        if name in self.hub.repositories:
            raise _Refused(409, "You already created this model repo")
        self.hub.repositories[name] = Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
        self.hub.repositories[name].commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        return {"url": f"{self.hub.url}/{name}", "name": name, "id": "1"}

    def preupload(self, name: str, revision: str, body: bytes) -> Any:
        self.may_write(name)
        _, files = self.files_at(name, revision)
        asked = json.loads(body)["files"]
        answer = []
        for file in asked:
            lfs = file["path"].endswith(_LFS_SUFFIXES) or file["size"] > 10_000_000
            there = files.get(file["path"])
            entry = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            answer.append({**entry, **({"oid": there.oid} if there else {})})
        return {"files": answer}

    def lfs_batch(self, name: str, body: bytes) -> Any:
        self.may_write(name)
        self.repository(name)
        answer = []
        for asked in json.loads(body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/objects/{asked['oid']}"}}
            answer.append(entry)
        return {"transfer": "basic", "objects": answer}

    def put_object(self, oid: str, body: bytes) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "content does not match its oid")
        self.hub.objects[oid] = body
        return {}

    def commit(self, name: str, revision: str, body: bytes) -> Any:
        self.may_write(name)
        _, before = self.files_at(name, revision)
        files = dict(before)
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise _Refused(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], True)
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
        commit = self.hub.repositories[name].commit(files)
        return {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"}

    def tag(self, name: str, revision: str, body: bytes) -> Any:
        self.may_write(name)
        commit, _ = self.files_at(name, revision)
        wanted = json.loads(body)["tag"]
        tags = self.hub.repositories[name].tags
        if wanted in tags:
            raise _Refused(409, f"Tag {wanted} already exists")
        tags[wanted] = commit
        return {}

    def refs(self, name: str, _: bytes) -> Any:
        repository = self.repository(name)
        tags = [{"name": t, "ref": f"refs/tags/{t}", "targetCommit": c} for t, c in repository.tags.items()]
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.head}
        return {"branches": [branch], "converts": [], "tags": tags}

    def info(self, name: str, revision: str | None, _: bytes) -> Any:
        commit, files = self.files_at(name, revision or "main")
        card = self.card_data(files)
        siblings = [
            {"rfilename": path, "blobId": b.oid, "size": len(b.content), **_lfs(b)} for path, b in files.items()
        ]
        private = self.hub.repositories[name].private
        return {"id": name, "sha": commit, "private": private, "siblings": siblings, "tags": [], "cardData": card}

    @staticmethod
    def card_data(files: dict[str, Blob]) -> dict[str, Any]:
        import yaml

        text = files["README.md"].content.decode() if "README.md" in files else ""
        found = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        return yaml.safe_load(found[1]) if found else {}

    def tree(self, name: str, revision: str, _: bytes) -> Any:
        _, files = self.files_at(name, revision)
        return [
            {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.content), **_lfs(blob, "oid")}
            for path, blob in files.items()
        ]

    def resolve(self, name: str, revision: str, path: str, _: bytes) -> Any:
        commit, files = self.files_at(name, revision)
        if path not in files:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        return files[path], commit


def _lfs(blob: Blob, key: str = "sha256") -> dict[str, Any]:
    return {"lfs": {key: blob.oid, "size": len(blob.content), "pointerSize": 134}} if blob.lfs else {}


_NAME = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", rf"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/objects/([0-9a-f]{64})", _Handler.put_object),
    ("POST", rf"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
    ("POST", rf"/api/models/{_NAME}/tag/(.+)", _Handler.tag),
    ("GET", rf"/api/models/{_NAME}/refs", _Handler.refs),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    ("GET", rf"/api/models/{_NAME}/revision/(.+)", _Handler.info),
    ("GET", rf"/api/models/{_NAME}()", _Handler.info),
    ("GET|HEAD", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
