"""W&B's run belongs to a folder: moved, it keeps it; copied, it has one of its own."""

import json
import shutil
from pathlib import Path

import pytest

from shortzip.train.run.tracking import wandb_run_id


def test_a_moved_run_keeps_its_id_and_a_copy_has_its_own(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    said: list[str] = []
    first = wandb_run_id(run, said.append)
    assert wandb_run_id(run, said.append) == first
    moved = run.rename(tmp_path / "moved")
    assert wandb_run_id(moved, said.append) == first
    assert not said
    copy = shutil.copytree(moved, tmp_path / "copy")
    second = wandb_run_id(copy, said.append)
    assert second != first
    assert ["is a copy of" in words and first in words for words in said] == [True]
    assert (wandb_run_id(copy, said.append), wandb_run_id(moved, said.append)) == (second, first)
    assert len(said) == 1
    shutil.rmtree(moved)
    shutil.copytree(copy, moved)  # brought back from elsewhere
    (moved / "wandb-run.json").write_text(json.dumps({"id": first, "folder": str(moved), "inode": -1}))
    assert wandb_run_id(moved, said.append) == first


def test_an_id_from_before_is_kept(tmp_path: Path) -> None:
    (tmp_path / "wandb-run.json").write_text('{"id": "0123456789ab"}')
    assert wandb_run_id(tmp_path) == "0123456789ab"
    assert json.loads((tmp_path / "wandb-run.json").read_text())["folder"] == str(tmp_path.resolve())


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"id": null}', "{}"])
def test_a_damaged_record_costs_the_id_and_not_the_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "wandb-run.json").write_text(text)
    made = wandb_run_id(tmp_path)
    assert len(made) == 12
    assert wandb_run_id(tmp_path) == made
