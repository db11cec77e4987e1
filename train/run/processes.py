"""Several processes as one: started, agreed with each other, stopped on request, and their failures written down."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import active_children
from pathlib import Path
from threading import Event, Timer
from types import FrameType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from shortzip.data.errors import ToldElsewhere
from shortzip.train.run.launcher import check_engine, deepspeed_wanted
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.config import TuneConfig

Result = TypeVar("Result")
PATIENCE = timedelta(hours=1)  # of processes for each other: writing a large model keeps the others waiting
POLL_S = 0.2
CONSENT_S = 60  # torchrun gives the processes that it started 30 seconds
GRACE = 5.0  # seconds after a DataLoader's own timeout, which says more
# What schedulers, terminals and shells announce the end with. The optional ones stay ignored where they are (nohup).
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
OPTIONAL_STOP_SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
FEW_THREADS = 8  # are harmless on any machine, so that a recipe may go from one to another


def start_accelerator(config: TuneConfig) -> Accelerator:
    """Joins the processes that the launcher started.

    Raises `ConfigError` if the launcher started more processes than found each other, if fewer samples than processes
    make a global batch, or for settings that the launcher's engine cannot do.
    """
    check_engine(config)
    if config.cpu_threads is not None:
        most = max(os.cpu_count() or 1, FEW_THREADS)
        if config.cpu_threads > most:
            raise ConfigError(
                f"cpu_threads is {config.cpu_threads}, and this machine has {os.cpu_count()} cores: 1 to {most} are "
                "allowed here"
            )
        torch.set_num_threads(config.cpu_threads)
    with_deepspeed = deepspeed_wanted()
    # Without a GPU Accelerate names no backend for DeepSpeed, and every process would believe to be alone.
    backend = {"backend": "gloo"} if with_deepspeed and not torch.cuda.is_available() else {}
    accelerator = Accelerator(
        # DeepSpeed casts weights by it. Elsewhere the model's are cast: autocast would undo the projector's float32.
        mixed_precision=config.mixed_precision if with_deepspeed else "no",
        log_with=list(config.report_to) or None,
        project_config=ProjectConfiguration(
            project_dir=config.output_dir, logging_dir=str(Path(config.output_dir) / "tensorboard")
        ),
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),  # constants, and held-out batches may be uneven
            InitProcessGroupKwargs(timeout=PATIENCE, **backend),
        ],
    )
    if with_deepspeed:
        unset_hf_deepspeed_config()  # with it transformers would spread weights while it loads them, also to evaluate
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ConfigError(
            f"the launcher started {started} processes, but this one is in a group of {accelerator.num_processes}: "
            "each would train alone on the same samples. Without a GPU, start several processes with "
            f"`ACCELERATE_USE_CPU=true torchrun --nproc_per_node {started} train/tune_projector.py`"
        )
    if config.global_batch_size < accelerator.num_processes:
        raise ConfigError(
            f"global_batch_size is {config.global_batch_size}, fewer than the {accelerator.num_processes} processes: "
            "some would never get a sample"
        )
    return accelerator


def on_main_process(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """Runs `action` on the main process while the others wait, and gives its result to all.

    If it raises, every process raises: none is left waiting for a main process that is gone. The others raise
    `ToldElsewhere`, for the main process tells the user.
    """
    outcome: list[Any] = [None, None]
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except Exception as raised:
            error, outcome[1] = raised, f"{type(raised).__name__}: {raised}"
    outcome = broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise ToldElsewhere(f"the main process failed: {outcome[1]}")
    return outcome[0]


class StopRequest:
    """Notes what asks a run to end: the step at hand is finished and saved. A second SIGINT interrupts at once.

    That is SIGTERM and SIGINT; and SIGHUP (the terminal is gone), SIGUSR1, SIGUSR2 and SIGXCPU (what schedulers send
    before the time is over) unless they are ignored on entry, as nohup has SIGHUP ignored.

    As a context manager it listens from entry to exit, and leaves the handlers as it found them: processes forked
    later would inherit a SIGTERM that ends nothing, which hangs whoever waits for them (multiprocessing.Pool does).
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        ignored = [number for number in OPTIONAL_STOP_SIGNALS if signal.getsignal(number) in (signal.SIG_IGN, None)]
        listened = [number for number in (*STOP_SIGNALS, *OPTIONAL_STOP_SIGNALS) if number not in ignored]
        self._before = {number: signal.signal(number, self._note) for number in listened}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class StopRequested(Exception):
    """The run ends early because it was asked to; what it had is saved."""


def run_until_stopped(command: Sequence[str], log: Path, stop: StopRequest) -> int:
    """Runs a command, with all that it prints in `log`, and returns its exit status.

    Whatever ends the wait, the command and all that it started have ended afterwards: asked to first, which may take
    CONSENT_S, and then without being asked. Raises `StopRequested` when `stop` was signalled.
    """
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while process.poll() is None and stop.signal is None:
                time.sleep(POLL_S)
        finally:
            _end(process)
    if stop.signal is not None:
        raise StopRequested(stop.signal)
    return process.returncode


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process, if it runs, and all that it started in its session."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(CONSENT_S)
    except subprocess.TimeoutExpired:
        pass  # what follows needs no consent
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def failures_recorded(record: Callable[[str], None], accelerator: Accelerator) -> Iterator[None]:
    """Hands the reason to `record` if the block raises.

    Launchers turn every exit code into 1, and only the first process to fail knows the cause.
    """
    try:
        yield
    except ToldElsewhere:  # and written down there
        kill_workers()
        raise
    except Exception as error:
        try:
            ignore_worker_deaths()
        except RuntimeError:  # raised on entering it; a DataLoader's dead workers are told of once
            ignore_worker_deaths()
        with suppress(OSError, ValueError):  # the disk may be what failed, and the error itself is on its way up
            record(f"process {accelerator.process_index}: {type(error).__name__}: {error}")
        kill_workers()  # one that hangs does not follow the SIGTERM that Python sends before it waits for its end
        raise


def ignore_worker_deaths() -> None:
    """From here on the death of a data worker raises nothing in this process.

    torch raises from its SIGCHLD handler wherever the main thread is: also where an error is being written down, and
    while the handler is being taken away.
    """
    while True:
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        except RuntimeError:
            continue
        return


def kill_workers() -> None:
    """Ends this process's data workers."""
    for worker in active_children():
        worker.kill()


def watched(batches: Iterator[Result], seconds: float) -> Iterator[Result]:
    """`batches`; when one takes longer than `seconds` (and a moment), the data workers are killed, which is an error.

    A DataLoader's own timeout covers the wait for a worker's message. A worker that hangs after it, before it has
    handed over the tensors' memory, is waited for without end.
    """
    while True:
        late = Event()

        def end_the_wait(late: Event = late) -> None:
            late.set()
            kill_workers()

        watchdog = Timer(seconds + GRACE, end_the_wait)
        watchdog.daemon = True
        watchdog.start()
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            try:  # a worker's death is seen as a broken connection first, its signal follows
                ignore_worker_deaths()
            except RuntimeError:
                ignore_worker_deaths()
            if late.is_set():
                raise RuntimeError(
                    f"data workers handed over no micro-batch for {seconds:g} s (data.worker_timeout) and were killed"
                ) from error
            raise
        finally:
            watchdog.cancel()
        yield batch
