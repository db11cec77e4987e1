"""A section of the proof: what it checks and measures, in a process of its own, within its time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

Outcome = Literal["passed", "failed", "skipped"]
# Forked, so that torch and transformers are imported once. What forks has never asked for a GPU: a CUDA context does
# not survive a fork.
FORK = multiprocessing.get_context("fork")


class Skipped(Exception):
    """Why a section proves nothing here: a package or memory is missing."""


@dataclass(frozen=True)
class Settings:
    """What all sections share."""

    device: str
    """cpu or cuda."""
    tiny: bool
    """Small shapes in place of 7B and 13B."""
    memory_limit: int
    """Bytes of the smaller card that the step's recipe is also run for."""
    folder: Path
    """For files that a section writes; one of its own."""


@dataclass(frozen=True)
class Check:
    """Something that holds, or does not."""

    name: str
    holds: bool
    detail: str


@dataclass(frozen=True)
class Table:
    """Figures, as they are shown."""

    title: str
    headings: list[str]
    rows: list[list[str]]


@dataclass
class Result:
    """What came of a section."""

    name: str
    title: str
    outcome: Outcome = "passed"
    seconds: float = 0.0
    reason: str = ""
    """Why it was skipped, or did not end."""
    checks: list[Check] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    """What was measured, by name, in SI units and bytes."""
    trouble: str = ""
    """The tracebacks of what failed."""


class Proof:
    """Takes what a section finds, as it finds it: what it has found stays when its time is over.

    Attributes:
        settings: those of the whole proof.
    """

    def __init__(self, settings: Settings, send: Callable[[tuple[str, Any]], None], seconds: float) -> None:
        self.settings, self._send = settings, send
        self._end = time.monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def check(self, name: str, holds: bool, detail: str = "") -> None:
        """Something that is to hold; the section goes on either way."""
        self._send(("check", Check(name, bool(holds), detail)))

    def table(self, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._send(("table", Table(title, list(headings), [list(row) for row in rows])))

    def figures(self, **values: Any) -> None:
        self._send(("figures", values))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the section, which goes on if it raises: that is a check that does not hold."""
        try:
            yield
        except Exception as error:
            self.check(name, False, _in_a_line(error))
            self._send(("trouble", f"{name}\n{traceback.format_exc()}"))


@dataclass(frozen=True)
class Section:
    """A section and how long it may take, in seconds."""

    name: str
    title: str
    seconds: float
    run: Callable[[Proof], None]


def run_section(
    section: Section, settings: Settings, seconds: float, told: Callable[[Check], None] = lambda check: None
) -> Result:
    """Runs a section in a process of its own for at most `seconds`; `told`: each check when it is known."""
    result, started = Result(section.name, section.title), time.monotonic()
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_in_child, args=(section, settings, seconds, there))
    process.start()
    there.close()
    ended = False
    with suppress(EOFError):
        while not ended and here.poll(max(0.0, started + seconds - time.monotonic())):
            kind, value = here.recv()
            ended = kind == "end"
            _take(result, kind, value)
            if kind == "check":
                told(value)
    _end(process, patience=5.0 if ended else 0.0)
    if not ended and result.outcome == "passed":
        late = time.monotonic() - started >= seconds
        result.outcome = "failed"
        result.reason = f"not done after {seconds:.3g} s" if late else f"died with status {process.exitcode}"
    if result.outcome == "passed" and not all(check.holds for check in result.checks):
        result.outcome = "failed"
    result.seconds = time.monotonic() - started
    return result


def _take(result: Result, kind: str, value: Any) -> None:
    if kind == "check":
        result.checks.append(value)
    elif kind == "table":
        result.tables.append(value)
    elif kind == "figures":
        result.figures.update(value)
    elif kind == "trouble":
        result.trouble += value
    elif kind in ("skipped", "failed"):
        result.outcome, result.reason = kind, value  # type: ignore[assignment]


def _in_child(section: Section, settings: Settings, seconds: float, connection: Connection) -> None:
    os.setsid()  # so that all that it starts can be ended with it
    proof = Proof(settings, connection.send, seconds)
    try:
        section.run(proof)
    except Skipped as reason:
        connection.send(("skipped", str(reason)))
    except Exception as error:
        connection.send(("trouble", traceback.format_exc()))
        connection.send(("failed", _in_a_line(error)))
    connection.send(("end", None))


def _in_a_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _end(process: Any, patience: float) -> None:
    """Ends a section's process and all that it started."""
    process.join(patience)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def apart(work: Callable[[], Any], log: Path | None = None) -> Any:
    """What `work` gives in a process of its own, which has its own CUDA context and Accelerate state.

    What it prints goes to `log`. Raises RuntimeError with its traceback where it raises, or with the log's end where
    it dies. To be called before this process asks for a GPU.
    """
    process, connection = start_apart(work, log)
    try:
        done, value = connection.recv()
    except EOFError:
        process.join()
        said = log.read_text(errors="replace")[-2000:] if log is not None else ""
        raise RuntimeError(f"a process died with status {process.exitcode}\n{said}") from None
    process.join()
    if not done:
        raise RuntimeError(value)
    return value


def start_apart(work: Callable[[], Any], log: Path | None = None) -> tuple[Any, Connection]:
    """A process that does `work`, and where it will send (whether it was done, what it gave or its traceback)."""
    here, there = FORK.Pipe(duplex=False)

    def run() -> None:
        if log is not None:
            with log.open("a") as output:
                sys.stdout.flush()
                sys.stderr.flush()
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
        try:
            there.send((True, work()))
        except BaseException as error:
            there.send((False, f"{_in_a_line(error)}\n{traceback.format_exc()}"))

    process = FORK.Process(target=run)
    process.start()
    there.close()
    return process, here
