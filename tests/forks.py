"""Commands in processes of their own without the seconds that importing torch takes: forked from one that has it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_SERVER = """
import json, os, runpy, sys, traceback
import torch
torch.set_num_threads(1)
import shortzip.train.publish.push, shortzip.train.tune_projector
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setsid()
        for number, path in ((1, asked["out"]), (2, asked["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.update({name: value for name, value in asked["env"].items() if value is not None})
        for name in [name for name, value in asked["env"].items() if value is None]:
            os.environ.pop(name, None)
        sys.argv = asked["argv"]
        code = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Result:
    """How a command ended; a negative code is the signal that killed it."""

    returncode: int
    stdout: str
    stderr: str


class Forks:
    """Use as a context manager: every `run` is a fresh fork of a process that has imported the project."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._read() == "ready"

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.close()
        try:
            self._server.wait(60)
        except subprocess.TimeoutExpired:  # a test failed and left a command under way
            self._server.kill()
            self._server.wait()
        self._server.stdout.close()

    def _read(self) -> str:
        assert self._server.stdout
        return self._server.stdout.readline().strip()

    def start(self, *argv: str, **variables: str | None) -> Running:
        """Begins a script with its arguments; `variables` are set for it, None takes one out."""
        assert self._server.stdin
        folder = Path(tempfile.mkdtemp())
        out, err = folder / "out", folder / "err"
        asked = {"argv": list(argv), "env": variables, "out": str(out), "err": str(err)}
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        return Running(self, int(self._read()), out, err)

    def run(self, *argv: str, **variables: str | None) -> Result:
        return self.start(*argv, **variables).wait()


@dataclass(frozen=True)
class Running:
    """A command under way. One at a time."""

    forks: Forks
    pid: int
    out: Path
    err: Path

    def wait(self) -> Result:
        code = int(self.forks._read())
        return Result(code, self.out.read_text(errors="replace"), self.err.read_text(errors="replace"))
