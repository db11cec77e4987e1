"""Overwriting: the run that was there is back if the new one comes to nothing, and what is not a run's stays."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from runs import run_here, write_recipe
from torch import Tensor

from shortzip.data.dataset import MicroBatch
from shortzip.data.errors import UserError
from shortzip.train.run.checkpoint import Checkpoint, CheckpointError, damage, list_checkpoints, save_checkpoint
from shortzip.train.run.earlier_run import EARLIER
from shortzip.train.run.run_folder import RunFolderError, read_status
from shortzip.train.run.run_start import RunFolder
from shortzip.train.settings.config import DataConfig, TuneConfig
from shortzip.train.step.objective import SupervisedLoss


@pytest.fixture
def config(tmp_path: Path) -> TuneConfig:
    return TuneConfig(
        model="m", data=DataConfig(instructions="i"), output_dir=str(tmp_path / "run"), overwrite_output_dir=True
    )


def folder_of(config: TuneConfig) -> RunFolder:
    return RunFolder(config, Accelerator(), print)


def write_run(config: TuneConfig) -> Path:
    """A run with two checkpoints, one of which is a link, and things that are nobody's."""
    folder, disk = Path(config.output_dir), Path(config.output_dir + ".disk")
    with folder_of(config) as run:
        run.accept()
    for name in ("step-000002", "final", "pictures", "control"):
        (folder / name).mkdir()
        (folder / name / "old").write_text(name)
    disk.mkdir()
    (disk / "old").write_text("on another disk")
    (folder / "step-000004").symlink_to(disk)
    (folder / "metrics.jsonl").write_text("old")
    (folder / "notes.txt").write_text("mine")
    (folder / "step-by-step").mkdir()
    (folder / "damaged-step-notes").write_text("mine")
    return folder


def fail(config: TuneConfig, error: BaseException, saved: bool = False) -> None:
    """A run that is accepted, measures, and fails; with or without a checkpoint."""
    with folder_of(config) as run:
        run.accept()
        (run.path / "metrics.jsonl").write_text("new")
        if saved:
            run.saved(1)
        run.failed(str(error))
        raise error


MINE = {".run.lock", "notes.txt", "step-by-step", "damaged-step-notes"}


def contents(folder: Path) -> dict[str, tuple[int, bytes | str]]:
    """Everything in a folder: time of change, and the bytes or what a link names."""
    found = {}
    for path in folder.rglob("*"):
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        found[str(path.relative_to(folder))] = (path.lstat().st_mtime_ns, content)
    return found


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_old_run_lies_aside_until_the_first_checkpoint_and_links_go_as_links(config: TuneConfig) -> None:
    folder = write_run(config)
    with folder_of(config) as run:
        assert "metrics.jsonl" in names(folder)
        run.accept()
        assert names(folder) == MINE | {"config.yaml", "status.json", EARLIER}
        assert not list_checkpoints(folder), "a new run never goes on from an old one's step"
        run.saved(1)
        assert names(folder) == MINE | {"config.yaml", "status.json"}
    assert Path(config.output_dir + ".disk", "old").read_text() == "on another disk"


def test_a_run_that_fails_before_its_first_checkpoint_gives_the_old_one_back(config: TuneConfig) -> None:
    folder = write_run(config)
    before = contents(folder)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            fail(replace(config, seed=3), error("no memory"))
        assert contents(folder) == before
    with pytest.raises(ValueError, match="later"):
        fail(config, ValueError("later"), saved=True)
    assert read_status(folder)["state"] == "failed"
    assert not (folder / "final").exists()


def test_what_cannot_be_moved_aside_stops_the_start_with_everything_in_place(
    config: TuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(config)
    before, rename = contents(folder), Path.rename

    def busy(path: Path, target: Path) -> Path:
        if path == folder / "pictures":
            raise OSError(16, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(RunFolderError, match=r"pictures cannot be moved aside \(Device"), folder_of(config) as run:
        run.accept()
    assert contents(folder) == before


def killed(action: Callable[[], None]) -> None:
    """Runs `action` in a process that kills itself."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_killed_at_any_moment_of_being_moved_the_old_run_is_there_at_the_next_start(config: TuneConfig) -> None:
    folder = write_run(config)
    before = {name: content for name, (_, content) in contents(folder).items()}
    for moment in (0, 1, 6, 7, 8):

        def overwrite(moment: int = moment) -> None:
            calls, rename = iter(range(100)), Path.rename

            def dying(path: Path, target: Path) -> Path:
                if next(calls) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return rename(path, target)

            Path.rename = dying  # type: ignore[method-assign]
            with folder_of(config) as run:
                run.accept()
                os.kill(os.getpid(), signal.SIGKILL)

        killed(overwrite)
        with pytest.raises(ValueError, match="again"):
            fail(replace(config, seed=9), ValueError("again"))
        assert {name: content for name, (_, content) in contents(folder).items()} == before, moment


def test_a_new_run_that_was_killed_early_is_continued_and_not_the_old_one(config: TuneConfig) -> None:
    folder = write_run(config)

    def overwrite() -> None:
        with folder_of(config) as run:
            run.accept()
            os.kill(os.getpid(), signal.SIGKILL)

    killed(overwrite)
    with folder_of(replace(config, overwrite_output_dir=False, resume_from_checkpoint="latest")) as run:
        assert run.checkpoint() is None
        run.accept()
        run.saved(1)
    assert names(folder) == MINE | {"config.yaml", "status.json"}


@pytest.mark.parametrize(
    "key",
    ["model", "mm_projector", "vision_tower", "instructions", "image_root", "chat_template", "cache_dir", "demo"],
)
def test_a_run_never_overwrites_what_it_reads(config: TuneConfig, tmp_path: Path, key: str) -> None:
    folder = write_run(config)
    before = contents(folder)
    by_link = tmp_path / "by-link"
    by_link.mkdir()
    (by_link / "weights").symlink_to(folder / "final" / "old")
    for inside in (folder, folder / "final", folder / "step-000002" / "old", by_link):
        if key in ("model", "mm_projector", "vision_tower"):
            changed = replace(config, **{key: str(inside)})
        elif key == "demo":
            demo = replace(config.data.demo_scenes, folder=str(inside))
            changed = replace(config, data=replace(config.data, instructions="demo", demo_scenes=demo))
        else:
            changed = replace(config, data=replace(config.data, **{key: str(inside)}))
        with pytest.raises(RunFolderError, match=r"lies in output_dir .*choose another"), folder_of(changed):
            pass
    with pytest.raises(RunFolderError, match="the base of the model"), folder_of(config) as run:
        run.check_base({"name": str(folder / "final")})
    assert contents(folder) == before


# ---- the whole command


@pytest.fixture(scope="module")
def recipe(tiny_release: Path, tiny_instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    return write_recipe(path, tiny_release, tiny_instructions, max_steps=2, save_steps=1)


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_here(recipe, tmp_path_factory.mktemp("runs") / "run")


OVERWRITE, RESUME = ("--overwrite_output_dir", "true"), ("--resume_from_checkpoint", "latest")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        (*RESUME, "--learning_rate", "0.5"),
        (*RESUME, "--model", "no/such-release"),
        (*RESUME, "--data.max_length", "20"),
        (*RESUME, "--max_memory", "1MiB", "--per_device_train_batch_size", "null"),
        ("--resume_from_checkpoint", "RUN/step-000009"),
        (*OVERWRITE, "--model", "no/such-release"),
        (*OVERWRITE, "--data.instructions", "nowhere.json"),
        (*OVERWRITE, "--data.image_root", "/tmp"),
        (*OVERWRITE, "--shortv.layers", "[1, 40]"),
        (*OVERWRITE, "--visionzip.dominant", "4000"),
        (*OVERWRITE, "--push_to_hub", "true", "--hub_model_id", "me/run"),
        (*OVERWRITE, "--mm_projector", "RUN/step-000002/projector.safetensors"),
        (*OVERWRITE, "--model", "RUN"),
    ],
)
def test_a_refused_command_changes_nothing(
    recipe: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("shortzip.train.publish.push.get_token", lambda: None)
    before = contents(finished)
    with pytest.raises((UserError, ValueError, OSError)):
        run_here(recipe, finished, *(word.replace("RUN", str(finished)) for word in arguments))
    assert contents(finished) == before


def test_a_damaged_checkpoint_keeps_its_name_when_the_one_before_is_refused(
    recipe: Path, finished: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    save_checkpoint(run, Checkpoint({"a": torch.zeros(1)}, {}, {"step": 3}), keep=None)
    (run / "step-000003" / "state.json").write_text("{}")
    assert damage(run / "step-000003")
    before = contents(run)
    with pytest.raises(CheckpointError, match="belongs to a run with other settings"):
        run_here(recipe, run, *RESUME, "--seed", "4")
    assert contents(run) == before
    run_here(recipe, run, *RESUME)
    assert (run / "damaged-step-000003").is_dir()


def test_overwriting_gives_the_old_run_back_or_leaves_the_new_one_alone(
    recipe: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "step-000007").symlink_to(finished / "step-000002")
    before = contents(run)

    def poisoned(self: SupervisedLoss, batch: MicroBatch) -> Tensor:
        return real(self, batch) * float("nan")

    real = SupervisedLoss.forward
    with monkeypatch.context() as patched:
        patched.setattr(SupervisedLoss, "forward", poisoned)
        with pytest.raises(UserError, match="NaN"):
            run_here(recipe, run, *OVERWRITE, "--max_nonfinite_steps", "1", "--save_steps", "1")
    assert contents(run) == before
    run_here(recipe, run, *OVERWRITE, "--max_steps", "1", "--warmup_ratio", "0", "--save_steps", "1")
    assert [path.name for path in list_checkpoints(run)] == ["step-000001"]
    assert (finished / "step-000002" / "state.json").is_file()
    assert not [path for path in run.iterdir() if path.name.startswith(".") and path.name != ".run.lock"]


def test_a_run_goes_on_past_checkpoints_it_cannot_remove_and_damaged_records(
    recipe: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, disk = shutil.copytree(finished, tmp_path / "run"), tmp_path / "disk"
    shutil.rmtree(run / "step-000002")
    shutil.move(run / "step-000001", disk)
    (run / "step-000001").symlink_to(disk)
    (run / "step-000000").mkdir()
    (run / ".removing-step-000000").mkdir()
    (run / "status.json").write_text("")
    with (run / "metrics.jsonl").open("a") as file:
        file.write("garbage\n[1]\n")
    rmtree = shutil.rmtree

    def refuse(path: Path, **options: object) -> None:
        if "step-000000" in str(path):
            raise PermissionError(1, "Operation not permitted")
        rmtree(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("shortzip.train.run.checkpoint.shutil.rmtree", refuse)
    capsys.readouterr()
    run_here(recipe, run, *RESUME, "--save_total_limit", "1")
    said = capsys.readouterr().out
    assert said.count("cannot be removed (Operation not permitted)") == 2
    assert "2 of its lines cannot be read" in said
    assert [path.name for path in list_checkpoints(run)] == ["step-000002"]
    assert json.loads((disk / "state.json").read_text())["step"] == 1, "a link goes, what it names stays"
    assert read_status(run)["state"] == "finished"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
