"""What asks a run to end, who is left to read what it says, and which of several processes says it."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from types import SimpleNamespace
from typing import Any

import pytest
from runs import run_here, write_recipe
from torch import Tensor

from shortzip.data.dataset import MicroBatch
from shortzip.data.errors import ToldElsewhere, UserError
from shortzip.train.run.processes import (
    OPTIONAL_STOP_SIGNALS,
    STOP_SIGNALS,
    StopRequest,
    StopRequested,
    failures_recorded,
    on_main_process,
    run_until_stopped,
)
from shortzip.train.run.report import Reporter
from shortzip.train.run.run_folder import read_status
from shortzip.train.settings.command_line import run_command
from shortzip.train.step.objective import SupervisedLoss


@pytest.mark.parametrize("number", [*STOP_SIGNALS, *OPTIONAL_STOP_SIGNALS])
def test_what_asks_to_stop_is_noted_and_the_handlers_are_given_back(number: signal.Signals) -> None:
    before = {other: signal.getsignal(other) for other in (*STOP_SIGNALS, *OPTIONAL_STOP_SIGNALS)}
    with StopRequest() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.signal == number.name
    assert {other: signal.getsignal(other) for other in before} == before


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_what_is_ignored_on_entry_stays_ignored_as_under_nohup(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), number)
            assert stop.signal is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal == "SIGTERM"
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_run_whose_terminal_is_gone_saves_and_says_stopped(
    tiny_release: Path,
    tiny_instructions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = iter(range(1_000))
    forward = SupervisedLoss.forward

    def hung_up(self: SupervisedLoss, batch: MicroBatch) -> Tensor:
        if next(calls) == 4:  # two calls a step
            os.kill(os.getpid(), signal.SIGHUP)
        return forward(self, batch)

    monkeypatch.setattr(SupervisedLoss, "forward", hung_up)
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_release, tiny_instructions, save_steps=1000)
    with pytest.raises(SystemExit, match="1"):
        run_here(recipe, tmp_path / "run")
    assert "stopped by SIGHUP; continue by the same command" in capsys.readouterr().err
    status = read_status(tmp_path / "run")
    assert (status["state"], status["reason"], status["step"]) == ("stopped", "SIGHUP", 3)
    assert [path.name for path in (tmp_path / "run").glob("step-*")] == ["step-000003"]


def test_commands_that_start_others_stop_them_when_the_terminal_is_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-S", "-c", "import time; print('begun', flush=True); time.sleep(600)"]
    sender = Timer(0.2, os.kill, (os.getpid(), signal.SIGHUP))
    with StopRequest() as stop:
        sender.start()
        with pytest.raises(StopRequested, match="SIGHUP"):
            run_until_stopped(command, tmp_path / "log.txt", stop)


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed_terminal() -> int:
    master, slave = os.openpty()
    os.close(master)
    return slave


@pytest.mark.parametrize("gone", [closed_pipe, closed_terminal])
def test_a_run_goes_on_though_nobody_can_read_what_it_says(gone: Callable[[], int]) -> None:
    with os.fdopen(gone(), "w") as output:
        report = Reporter(is_main=True)
        report.console.file = output
        report.say("one")
        report.heading("two")
        report.progress("tuning", 1, 1)
        report.end_progress()
        assert report.console.quiet


def fail(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize("error", [UserError("no such image"), ZeroDivisionError("a fault")])
def test_only_the_main_process_says_why_it_failed(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(
        "shortzip.train.run.processes.broadcast_object_list", lambda outcome: sent.append(outcome) or outcome
    )
    main: Any = SimpleNamespace(is_main_process=True, process_index=0)
    other: Any = SimpleNamespace(is_main_process=False, process_index=1)
    with pytest.raises(type(error), match=str(error)):
        on_main_process(main, lambda: fail(error))

    monkeypatch.setattr("shortzip.train.run.processes.broadcast_object_list", lambda outcome: sent[0])
    with pytest.raises(ToldElsewhere, match=f"the main process failed: {type(error).__name__}: {error}"):
        on_main_process(other, lambda: fail(AssertionError("only the main process does it")))

    written: list[str] = []
    with pytest.raises(ToldElsewhere), failures_recorded(written.append, other):
        on_main_process(other, lambda: None)
    assert not written, "the main process writes the reason down"

    with pytest.raises(SystemExit) as ended:
        run_command(lambda _: on_main_process(other, lambda: None), [])
    assert ended.value.code == 1
    assert capsys.readouterr() == ("", "")
