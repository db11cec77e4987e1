"""The run that overwrite_output_dir replaces: moved aside, then deleted or put back, and never the new run's input.

It lies in `.earlier-run` in the run's folder, from the new one's start to its first checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from shortzip.train.run.checkpoint import discard, list_checkpoints
from shortzip.train.run.run_folder import CONFIG, FINAL, RunFolderError, own_files
from shortzip.train.settings.config import DEMO, TuneConfig

EARLIER = ".earlier-run"


def move_aside(folder: Path, say: Callable[[str], None]) -> None:
    """Moves the run in `folder` into `.earlier-run`: all of it, links as links, or, raising `RunFolderError`, nothing.

    Where one lies there already, and the run in `folder` has saved nothing since, that one stays and this is deleted.
    """
    earlier = folder / EARLIER
    if earlier.is_dir() and not (list_checkpoints(folder) or os.path.lexists(folder / FINAL)):
        for path in own_files(folder):
            discard(path, say)
        return
    discard(earlier, say)
    moved: list[Path] = []
    path = earlier
    try:
        earlier.mkdir()
        for path in own_files(folder):
            moved.append(path.rename(earlier / path.name))
    except OSError as error:
        for aside in reversed(moved):
            aside.rename(folder / aside.name)
        earlier.rmdir()
        raise RunFolderError(
            f"{path} cannot be moved aside ({error.strerror}), and nothing was overwritten: choose another output_dir"
        ) from error


def is_settled(folder: Path) -> bool:
    """Whether `folder` is as a run left it: not if one was killed while an earlier one was moved or put back.

    config.yaml is the last to be moved aside, and the first to be put back.
    """
    earlier = folder / EARLIER
    return not earlier.is_dir() or ((earlier / CONFIG).is_file() and (folder / CONFIG).is_file())


def put_back(folder: Path, say: Callable[[str], None]) -> None:
    """Puts the run in `.earlier-run` back, in place of the one that was to overwrite it. Raises OSError."""
    earlier = folder / EARLIER
    if (earlier / CONFIG).is_file():
        for path in own_files(folder):
            discard(path, say)
    for path in reversed(own_files(earlier)):
        path.rename(folder / path.name)
    with suppress(OSError):  # something else was put there
        earlier.rmdir()


def refuse_own_inputs(config: TuneConfig, folder: Path) -> None:
    """Raises `RunFolderError` if what a run reads lies in the folder that it is to overwrite."""
    data = config.data
    is_demo = DEMO in (data.instructions, data.eval_instructions)
    refuse_inputs_inside(
        folder,
        {
            "model": config.model,
            "mm_projector": config.mm_projector,
            "vision_tower": config.vision_tower,
            "data.instructions": data.instructions,
            "data.image_root": data.image_root,
            "data.eval_instructions": data.eval_instructions,
            "data.eval_image_root": data.eval_image_root,
            "data.chat_template": data.chat_template,
            "data.cache_dir": data.cache_dir,
            "data.cache_features": data.cache_features,
            "data.cache_teacher": data.cache_teacher,
            "data.demo_scenes.folder": data.demo_scenes.folder if is_demo else None,
        },
    )


def refuse_inputs_inside(folder: Path, inputs: Mapping[str, str | None]) -> None:
    """Raises `RunFolderError` for an input, or a link in it, that lies in the folder that is to be overwritten."""
    inside = Path(os.path.realpath(folder))
    for key, value in inputs.items():
        if value is None or not os.path.lexists(value):
            continue
        links = [path for path in Path(value).iterdir() if path.is_symlink()] if Path(value).is_dir() else []
        for path in (Path(value), *links):
            if Path(os.path.realpath(path)).is_relative_to(inside):
                raise RunFolderError(
                    f"{key} {path} lies in output_dir {folder}, which overwrite_output_dir would delete: "
                    "choose another output_dir"
                )
