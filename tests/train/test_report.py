"""What a run shows: one live display with its warnings on a terminal, a line now and then elsewhere."""

import importlib.util
import io
import logging
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from shortzip.data.errors import UserError
from shortzip.scripts.__main__ import VERBS
from shortzip.train.finish import next_commands
from shortzip.train.run.foreign_words import UNWANTED, keep_back
from shortzip.train.run.report import LEFT_OUT, LINE_EVERY, Reporter, Speed
from shortzip.train.run.screen import RunScreen, clock, sparkline
from shortzip.train.settings.config import DataConfig, TuneConfig

GIB = 2**30
SHOW_CURSOR = "\x1b[?25h"


def speed() -> Speed:
    """Of 8 samples a second with an MFU of a quarter, a tenth of the time without data."""
    measured = Speed(peak=100.0)
    for _ in range(LEFT_OUT + 1):
        measured.add(samples=16, tokens=160, seconds=2.0, waited=0.2, flops=50.0)
    return measured


def on_terminal(width: int = 100) -> tuple[Reporter, io.StringIO]:
    report, shown = Reporter(is_main=True), io.StringIO()
    report.console = Console(
        file=shown, force_terminal=True, force_interactive=True, width=width, height=40, color_system=None
    )
    return report, shown


def last_screen(shown: io.StringIO) -> str:
    """The frame that was drawn last, and what stands below it."""
    text = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]|\r", "", shown.getvalue())
    return text[text.rindex("╭─ tuning") :]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal is redrawn at every change."""
    monkeypatch.setattr("shortzip.train.run.report.REDRAWN_EVERY", 0.0)


def test_a_curve_is_as_wide_as_asked_and_spans_its_values() -> None:
    assert sparkline([1.0, 2.0, 3.0, 8.0], 10) == "▁▂▃█"
    assert sparkline([1.0, 3.0, 10.0, 12.0], 2) == "▁█", "each bar is the mean of its share"
    assert len(sparkline(range(1000), 37)) == 37
    assert sparkline([2.0, 2.0], 5) == "▁▁"
    assert sparkline([], 5) == ""
    assert (clock(59.6), clock(3723)) == ("0:01:00", "1:02:03")


def test_the_screen_says_where_a_run_stands(at_once: None) -> None:
    report, shown = on_terminal()
    report.held_out(0, 3.5)
    for step in range(1, 4):
        report.step(step, 10, 4.0 - step, speed(), 3 * GIB)
    report.held_out(3, 1.25)
    report.step(4, 10, float("nan"), speed(), 3 * GIB)
    report.end_progress()
    said = last_screen(shown)
    for words in ("4 of 10", "█▅▁ 2.0000", "1.2500 after step 3", "8.0 samples/s, MFU 25%, waiting for data 10%",
                  "3.00 GiB", "0:00:12"):  # fmt: skip
        assert words in said
    assert "nan" not in said
    assert shown.getvalue().count("step 3: held-out loss 1.2500") == 1, "what is said stands above the screen once"


def test_warnings_stay_in_the_screen_those_of_one_topic_as_one(at_once: None) -> None:
    report, shown = on_terminal()
    report.warn("this file system knows no locks")
    for step in (1, 2, 3):
        report.warn(f"step {step}: the update is skipped", topic="skipped updates")
        report.step(step, 10, 1.0, speed(), GIB)
    report.end_progress()
    said = last_screen(shown)
    assert "! this file system knows no locks" in said
    assert "! step 3: the update is skipped (3 times)" in said
    assert "step 2" not in said
    report.step(1, 5, 1.0, speed(), GIB)  # the next run of the same command
    report.end_progress()
    assert "! this file system knows no locks" in last_screen(shown)
    assert "after step" not in last_screen(shown)


def test_many_warnings_are_counted_and_the_latest_shown() -> None:
    screen = RunScreen({f"warning {number}": [f"warning {number}"] for number in range(8)})
    console = Console(file=io.StringIO(), width=90, record=True)
    console.print(screen)
    said = console.export_text()
    assert "! warning 7" in said
    assert "! and 3 before these" in said
    assert "! warning 2" not in said


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_the_screen_fits_the_terminal(width: int) -> None:
    screen = RunScreen({"a": ["a warning of many words, " * 10]}, step=123, total_steps=4567, memory=GIB)
    screen.losses.extend(range(500))
    screen.rates, screen.seconds_left = speed().averages(), 99.0
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(screen)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert all(line[0] in "╭│╰" for line in lines), "no line is cut in two"


def test_there_is_one_display_at_a_time(at_once: None) -> None:
    report, shown = on_terminal()
    report.progress("features", 1, 4)
    report.step(1, 3, 1.0, speed(), GIB)
    report.progress("evaluating all tokens", 0, 2)
    report.progress("evaluating reduced", 0, 3)
    assert "2/2" in shown.getvalue(), "a bar is told of what is begun: the first has come to its end"
    report.end_progress()
    assert "3/3" in last_screen(shown)
    assert shown.getvalue().count(SHOW_CURSOR) == 3


def test_an_error_gives_the_terminal_back() -> None:
    report, shown = on_terminal()
    report.step(1, 3, 1.0, speed(), GIB)
    assert SHOW_CURSOR not in shown.getvalue()
    with pytest.raises(UserError), report:
        raise UserError("the data end here")
    assert SHOW_CURSOR in shown.getvalue()


@pytest.mark.parametrize("terminal", ["none", "dumb"])
def test_elsewhere_there_is_a_line_every_few_seconds(
    terminal: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Reporter(is_main=True)
    if terminal == "dumb":  # one that knows no movements of its cursor
        monkeypatch.setenv("TERM", "dumb")
        report.console = Console(force_terminal=True, width=200)
    now = 1000.0
    monkeypatch.setattr("shortzip.train.run.report.time.monotonic", lambda: now)
    for step in range(1, 21):
        report.step(step, 20, 1 / step, speed(), GIB)
        now += 1.0
    report.warn("out of memory", topic="out of memory")
    lines = capsys.readouterr().out.splitlines()
    steps = [int(re.match(r"tuning: (\d+)/20 loss 0|tuning: (\d+)", line)[0].split()[1].split("/")[0])
             for line in lines[:-1]]  # fmt: skip
    assert steps == [*range(1, 20, round(LINE_EVERY)), 20]
    assert lines[-2] == (
        "tuning: 20/20 loss 0.0500 8.0 samples/s 80 tokens/s MFU 25% waiting for data 10%, 0:00:00 left"
    )
    assert lines[-1] == "warning: out of memory"


def test_a_terminal_that_goes_away_ends_the_display_not_the_run(
    at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as output:
        report = Reporter(is_main=True)
        report.console.file = output
        with report:
            report.step(1, 3, 1.0, speed(), GIB)
            assert b"tuning" in os.read(master, 10_000)
            os.close(master)
            report.step(2, 3, 1.0, speed(), GIB)
            report.warn("nobody reads this")
            report.end_progress()
            report.step(1, 3, 1.0, speed(), GIB)
        assert report.console.quiet


def test_what_comes_next_can_be_pasted(tmp_path: Path) -> None:
    folder = tmp_path / "a run's folder; $HOME"
    config = TuneConfig(model=str(tmp_path / "my release"), data=DataConfig("i", eval_instructions="e"))
    commands = {what: shlex.split(command) for what, command in next_commands(config, folder).items()}
    assert all(command[0] == "shortzip" and command[1] in VERBS for command in commands.values())
    assert commands["evaluate"][2:] == ["--model", str(folder)]
    assert commands["ask"][2:] == ["--model", config.model, "--tuned", str(folder)]
    assert commands["publish"][2] == str(folder)


def record(logger: str, message: str) -> logging.LogRecord:
    return logging.LogRecord(logger, logging.WARNING, "", 0, message, None, None)


def filters_of(logger: str) -> list[Callable[..., object]]:
    return [one for one in logging.getLogger(logger).filters if one.__module__.startswith("shortzip")]


def test_only_what_nobody_can_act_on_is_kept_back() -> None:
    keep_back()
    keep_back()
    for logger, beginning in UNWANTED.items():
        assert not logging.getLogger(logger).filter(record(logger, f"{beginning} and so on"))
        assert logging.getLogger(logger).filter(record(logger, "CUDA Setup failed"))
        assert len(filters_of(logger)) == 1


@pytest.mark.parametrize(
    ("library", "file", "words"),
    [
        ("deepspeed", "accelerator/real_accelerator.py", UNWANTED["DeepSpeed"]),
        ("bitsandbytes", "backends/cpu/ops.py", UNWANTED["bitsandbytes.backends.cpu.ops"]),
    ],
)
def test_libraries_still_say_it_in_these_words(library: str, file: str, words: str) -> None:
    found = importlib.util.find_spec(library)  # which imports nothing
    assert found is not None
    assert found.origin is not None
    assert words in (Path(found.origin).parent / file).read_text()
