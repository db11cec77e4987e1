"""Fixtures that several packages' tests share."""

import signal
from collections.abc import Iterator
from pathlib import Path

import matrix
import pytest
import torch
from hypothesis import settings
from tiny import write_instructions, write_release


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    for line in matrix.lines([report for report in reports if report.when == "call"]):
        terminalreporter.write_line(line)


torch.set_num_threads(1)  # bit-for-bit comparisons, and room for the processes that tests start


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Also after a test whose run has asked for more (cpu_threads): what follows is compared bit for bit."""
    yield
    torch.set_num_threads(1)


settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")  # what fails in one run of the suite fails in the next


@pytest.fixture(autouse=True)
def _signal_handlers_left_as_they_were() -> Iterator[None]:
    """A handler that outlives its test is inherited by the processes of later ones, which then hang now and then."""
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    before = {number: signal.getsignal(number) for number in (getattr(signal, name) for name in names)}
    of_data_workers = signal.getsignal(signal.SIGCHLD)
    yield
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL:  # as a run that failed leaves it; torch sets its own once
        signal.signal(signal.SIGCHLD, of_data_workers)
    after = {number: signal.getsignal(number) for number in before}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before


@pytest.fixture(scope="session")
def tiny_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random LLaVA with 36 patches and 4 LLM layers; read only."""
    return write_release(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="session")
def tiny_instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 conversations in LLaVA's JSON with their images beside it; read only."""
    return write_instructions(tmp_path_factory.mktemp("instructions"), 40)


@pytest.fixture(scope="session")
def tiny_held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 held-out conversations in LLaVA's JSON; read only."""
    return write_instructions(tmp_path_factory.mktemp("held-out"), 12, seed=1)
