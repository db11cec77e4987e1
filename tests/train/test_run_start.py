"""A run's start: refused without a trace or accepted, alone in its folder, and never in a folder of something else."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator

from shortzip.data.errors import Busy, CannotWrite
from shortzip.data.files import held_alone, written_whole
from shortzip.train.run.processes import StopRequested
from shortzip.train.run.run_folder import LOCK, RunFolderError, read_status, write_status
from shortzip.train.run.run_start import RunFolder
from shortzip.train.settings.command_line import load_config
from shortzip.train.settings.config import DataConfig, TuneConfig


@pytest.fixture
def config(tmp_path: Path) -> TuneConfig:
    return TuneConfig(model="m", data=DataConfig(instructions="i"), output_dir=str(tmp_path / "run"))


def folder_of(config: TuneConfig, say: Callable[[str], None] = print) -> RunFolder:
    return RunFolder(config, Accelerator(), say)


def write_run(config: TuneConfig) -> Path:
    """A finished run of no steps."""
    with folder_of(config) as run:
        run.accept()
    return run.path


def contents(folder: Path) -> dict[str, tuple[int, bytes | str]]:
    """Everything in a folder, and the folder: time of change, and the bytes or what a link names."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        found[str(path.relative_to(folder))] = (path.lstat().st_mtime_ns, content)
    return found


def test_an_accepted_run_writes_its_config_and_how_it_stands(config: TuneConfig) -> None:
    with folder_of(config) as run:
        run.write(run.path / "layers.json", "{}")
        assert [path.name for path in run.path.iterdir()] == [LOCK]
        run.accept(3)
        assert load_config(["--config", str(run.path / "config.yaml")]) == config
        assert (run.path / "layers.json").is_file()
        status = read_status(run.path)
        assert (status["state"], status["step"]) == ("running", 3)
    assert read_status(run.path)["state"] == "finished"


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "an old run's folder", "a run's folder"])
def test_a_run_that_is_not_accepted_leaves_no_trace(config: TuneConfig, tmp_path: Path, there: str) -> None:
    config = replace(config, output_dir=str(tmp_path / "runs" / "run"))
    folder = Path(config.output_dir)
    if there == "an empty folder":
        folder.mkdir(parents=True)
    elif there != "nothing":
        write_run(config)
        config = replace(config, resume_from_checkpoint="latest", seed=7)
        if there == "an old run's folder":  # from before there were locks and marks
            (folder / LOCK).unlink()
            text = (folder / "config.yaml").read_text()
            (folder / "config.yaml").write_text(text.split("\n", 1)[1])
    before = contents(tmp_path / "runs") if there != "nothing" else {}
    run = folder_of(config)
    with run:
        run.checkpoint()
        run.write(folder / "layers.json", "{}")
    run.failed("no such release")
    if there == "nothing":
        assert not (tmp_path / "runs").exists()
    else:
        assert contents(tmp_path / "runs") == before


def test_a_start_that_the_disk_refuses_leaves_no_trace(config: TuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object) -> None:
        raise CannotWrite(f"{path} cannot be written: No space left on device")

    monkeypatch.setattr("shortzip.train.run.run_start.write_status", refuse)
    with pytest.raises(CannotWrite, match="No space"), folder_of(config) as run:
        run.accept()
    assert not Path(config.output_dir).exists()


def test_how_a_run_ends_is_written_down(config: TuneConfig) -> None:
    def stop() -> None:
        with folder_of(config) as run:
            run.accept()
            run.saved(4)
            raise StopRequested("SIGTERM")

    with pytest.raises(StopRequested):
        stop()
    status = read_status(Path(config.output_dir))
    assert (status["state"], status["step"], status["reason"]) == ("stopped", 4, "SIGTERM")
    with folder_of(replace(config, resume_from_checkpoint="latest")) as run:
        run.accept()
        run.failed("process 1: no memory")
        run.failed("process 0: the others are gone")
        assert read_status(run.path)["reason"] == "process 1: no memory"


def test_another_run_is_not_touched(config: TuneConfig) -> None:
    folder = write_run(config)
    before = contents(folder)
    with (
        pytest.raises(RunFolderError, match=r"holds another run.*--resume_from_checkpoint latest"),
        folder_of(replace(config, seed=5)),
    ):
        pass
    assert contents(folder) == before


def test_a_run_that_failed_before_its_first_step_is_no_hindrance(config: TuneConfig) -> None:
    folder = write_run(config)
    write_status(folder, "failed", 0, "no such release")
    (folder / "metrics.jsonl").touch()
    write_run(replace(config, seed=5))
    assert load_config(["--config", str(folder / "config.yaml")]).seed == 5
    write_status(folder, "failed", 0, "no such release")

    def fail_again() -> None:
        with folder_of(replace(config, overwrite_output_dir=True)) as run:
            run.accept()
            run.failed("no memory")
            raise MemoryError

    with pytest.raises(MemoryError):
        fail_again()
    assert read_status(folder)["reason"] == "no memory", "the newer word"
    for state, step, metrics in (("running", 0, ""), ("stopped", 0, ""), ("failed", 3, ""), ("failed", 0, "{}\n")):
        write_status(folder, state, step)  # type: ignore[arg-type]  # one of the Literal's
        (folder / "metrics.jsonl").write_text(metrics)
        with pytest.raises(RunFolderError, match="holds another run"), folder_of(config):
            pass


def test_resuming_needs_a_run(config: TuneConfig) -> None:
    resumed = replace(config, resume_from_checkpoint="latest")
    with pytest.raises(RunFolderError, match="holds no run"), folder_of(resumed):
        pass
    Path(config.output_dir).write_text("a file")
    with pytest.raises(RunFolderError, match="is a file"), folder_of(config):
        pass


# ---- a folder is a run's only by what a run writes


@pytest.mark.parametrize("how", ["plain", "overwrite", "resume"])
@pytest.mark.parametrize(
    "files",
    [
        {"thesis.tex": "x"},
        {"config.yaml": "optimizer: sgd", "final/model.bin": "w", "step-1000000/x": "y", "wandb/run": "z"},
        {"config.yaml": "model: m", "status.json": '{"state": "running", "epoch": 3}', ".writing-index": "half"},
        {"config.yaml": "model: m", "status.json": "", "pictures/holiday.png": "p", "answers/a": "b"},
        {"config.yaml": "# The settings of a ShortZip run\nmodel: m\ndata: {}\n", "notes": "copied from a run"},
    ],
)
def test_a_folder_of_other_things_is_never_used(config: TuneConfig, files: dict[str, str], how: str) -> None:
    folder = Path(config.output_dir)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    before = contents(folder)
    changes = {
        "plain": {},
        "overwrite": {"overwrite_output_dir": True},
        "resume": {"resume_from_checkpoint": "latest"},
    }
    with pytest.raises(RunFolderError, match="holds no run"), folder_of(replace(config, **changes[how])):
        pass
    assert contents(folder) == before


def test_a_new_disk_and_what_a_killed_start_leaves_count_as_empty(config: TuneConfig) -> None:
    folder = Path(config.output_dir)
    (folder / "lost+found").mkdir(parents=True)
    (folder / LOCK).touch()
    (folder / ".partial-elsewhere-config.yaml-1234").touch()
    write_run(config)
    assert (folder / "lost+found").is_dir()


def test_a_run_whose_status_is_damaged_is_continued_with_the_step_of_its_checkpoint(config: TuneConfig) -> None:
    folder = write_run(config)
    for text in ("", "{", '["finished"]', '{"state": "finished"}'):
        (folder / "status.json").write_text(text)
        with folder_of(replace(config, resume_from_checkpoint="latest")) as run:
            run.accept(5)
        status = read_status(folder)
        assert (status["state"], status["step"]) == ("finished", 5)
    (folder / "step-000040").mkdir()
    (folder / "status.json").write_text("half")
    write_status(folder, "failed", reason="x")
    assert read_status(folder)["step"] == 40


# ---- one writer


def in_another_process(action: Callable[[], object]) -> int:
    """Forks, runs `action` and ends with 0, or 7 if that raises `Busy`; returns the process's id."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except Busy:
            os._exit(7)
        except BaseException:
            os._exit(1)
    return child


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for(path: Path) -> None:
    latest = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < latest
        time.sleep(0.01)


def test_while_a_process_writes_in_a_folder_no_other_does_and_a_dead_one_holds_nothing(config: TuneConfig) -> None:
    folder, ready = Path(config.output_dir), Path(config.output_dir + ".ready")

    def run_for_long() -> None:
        with folder_of(config) as run:
            run.accept()
            (run.path / ".writing-step-000004").mkdir()  # a checkpoint, half written
            ready.touch()
            time.sleep(60)

    child = in_another_process(run_for_long)
    wait_for(ready)
    before = contents(folder)
    for changes in ({"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}):
        with (
            pytest.raises(Busy, match=rf"output_dir {folder} \(process {child}\) is in use"),
            folder_of(replace(config, **changes)),
        ):
            pass
    with pytest.raises(RunFolderError, match="holds another run"), folder_of(config):
        pass
    assert contents(folder) == before
    os.kill(child, signal.SIGKILL)
    assert status_of(child) == -signal.SIGKILL
    with folder_of(replace(config, resume_from_checkpoint="latest")) as run:
        run.accept()
    assert not (folder / ".writing-step-000004").exists()
    assert read_status(folder)["state"] == "finished"


def test_of_simultaneous_starts_in_an_empty_folder_one_is_refused(config: TuneConfig) -> None:
    gate, held = os.pipe(), Path(config.output_dir + ".held")

    def start() -> None:
        os.close(gate[1])
        os.read(gate[0], 1)  # until all are let go
        with folder_of(config) as run:
            held.touch()
            time.sleep(60)
            run.accept()

    children = [in_another_process(start) for _ in range(3)]
    os.close(gate[0])
    os.close(gate[1])
    wait_for(held)
    ended: dict[int, int] = {}
    latest = time.monotonic() + 60
    while len(ended) < 2 and time.monotonic() < latest:
        for child in children:
            if child not in ended and (found := os.waitpid(child, os.WNOHANG))[0]:
                ended[child] = os.waitstatus_to_exitcode(found[1])
        time.sleep(0.01)
    assert list(ended.values()) == [7, 7]
    winner = next(child for child in children if child not in ended)
    assert [path.name for path in Path(config.output_dir).iterdir()] == [LOCK]
    os.kill(winner, signal.SIGKILL)
    status_of(winner)


def test_where_there_are_no_locks_it_is_said_once(config: TuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("shortzip.data.files.fcntl.lockf", unsupported)
    said: list[str] = []
    with folder_of(config, said.append) as run:
        run.accept()
    assert ["knows no locks" in words for words in said] == [True]


def test_a_lock_that_its_holder_removes_is_made_anew(tmp_path: Path) -> None:
    with held_alone(tmp_path / "lock", "it") as certain:
        assert certain
    text = (tmp_path / "lock").read_text()
    assert text.startswith(f"process {os.getpid()} on ")
    with held_alone(tmp_path / "lock", "it", signed=False):
        (tmp_path / "lock").unlink()
        child = in_another_process(lambda: held_alone(tmp_path / "lock", "it").__enter__())
        assert status_of(child) == 0


def test_what_killed_writers_left_is_swept_and_what_lives_or_is_another_s_stays(config: TuneConfig) -> None:
    folder = write_run(config)

    def write_final(then: Callable[[], object]) -> None:
        with written_whole(folder / "final") as partial:
            (partial / "model").write_text("half")
            then()

    child = in_another_process(lambda: write_final(lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert status_of(child) == -signal.SIGKILL
    (left,) = folder.glob(".partial-*-final-*")
    for name in (".writing-step-000003", ".removing-step-000001", ".writing-index", ".partial-elsewhere-final-1"):
        (folder / name).mkdir()
    with (
        written_whole(folder / "evaluation") as alive,
        folder_of(replace(config, resume_from_checkpoint="latest")) as run,
    ):
        run.accept()
        assert alive.is_dir()
        assert not left.exists()
        hidden = {path.name for path in folder.iterdir() if path.name.startswith(".") and path != alive}
        assert hidden == {LOCK, ".writing-index", ".partial-elsewhere-final-1"}


# ---- what could not be written at the end is refused at the beginning


def test_a_final_folder_that_could_not_be_written_is_refused_before_any_work(
    config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(config)
    resumed = replace(config, resume_from_checkpoint="latest")
    full, empty = tmp_path / "full", tmp_path / "empty"
    full.mkdir()
    empty.mkdir()
    (full / "precious").write_text("x")
    for target, refused in ((full, True), (full / "precious", True), (empty, False), (tmp_path / "new", False)):
        (folder / "final").symlink_to(target)
        if refused:
            with pytest.raises(RunFolderError, match=r"final is a (link to|file)"), folder_of(resumed):
                pass
        else:
            with folder_of(resumed):
                pass
        (folder / "final").unlink()
    assert (full / "precious").read_text() == "x"
    (folder / "final").mkdir()
    monkeypatch.setattr("shortzip.train.run.run_start.os.path.ismount", lambda path: Path(path).name == "final")
    for changes in ({"resume_from_checkpoint": "latest"}, {"overwrite_output_dir": True}):
        with pytest.raises(RunFolderError, match="final is a mount point"), folder_of(replace(config, **changes)):
            pass


def test_an_output_folder_that_is_a_link_is_used_where_it_leads(config: TuneConfig, tmp_path: Path) -> None:
    Path(config.output_dir).symlink_to(tmp_path / "large-disk" / "run")
    with pytest.raises(ValueError, match="no such release"), folder_of(config):
        raise ValueError("no such release")
    assert not (tmp_path / "large-disk").exists()
    write_run(config)
    assert json.loads((tmp_path / "large-disk" / "run" / "status.json").read_text())["state"] == "finished"
    shutil.rmtree(tmp_path / "large-disk")
