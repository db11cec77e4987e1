"""Nothing that is read runs code, and no token is written down.

Beside what tests/train/test_convert.py (pickles in releases), tests/data/test_images.py (paths out of the image root),
tests/train/test_publish.py (tokens in files) and tests/reduction/test_loading.py (our own remote code) hold.
"""

import json
import pickle
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT, run_here, write_recipe

from shortzip.data.files import sha256
from shortzip.data.instructions import read_instructions
from shortzip.reduction.reductions import Reductions
from shortzip.train.release.loading import load_release
from shortzip.train.run.checkpoint import CHECKSUMS, FILES, damage, find_checkpoint, load_checkpoint

TOKEN = "hf_" + "ThisIsASecret" * 3
CODE = "from pathlib import Path\nPath({path!r}).touch()\n"


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (self.path.touch, ())


@pytest.fixture(scope="module")
def finished(tiny_release: Path, tiny_instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, and what the run printed beside it; every token that tools look for was set."""
    folder = tmp_path_factory.mktemp("run")
    recipe = write_recipe(folder / "recipe.yaml", tiny_release, tiny_instructions, max_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
            patch.setenv(name, TOKEN)
        return run_here(recipe, folder / "run")


def test_code_beside_a_release_is_not_run(tiny_release: Path, tmp_path: Path) -> None:
    release, went_off = tmp_path / "release", tmp_path / "went-off"
    shutil.copytree(tiny_release, release)
    for name in ("modeling_evil.py", "processing_evil.py", "__init__.py"):
        (release / name).write_text(CODE.format(path=str(went_off)))
    for name, classes in (
        ("config.json", {"AutoConfig": "modeling_evil.C", "AutoModelForImageTextToText": "modeling_evil.M"}),
        ("processor_config.json", {"AutoProcessor": "processing_evil.P"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["processing_evil.T", "processing_evil.T"]}),
    ):
        path = release / name
        content = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**content, "auto_map": classes}))
    load_release(str(release), Reductions())
    assert not went_off.exists()


def test_a_pickle_in_a_checkpoint_is_refused_and_does_not_run(finished: Path, tmp_path: Path) -> None:
    """Also with the right checksum: whoever can write a checkpoint can write its checksums."""
    went_off = tmp_path / "went-off"
    for name in FILES:
        run = tmp_path / name
        shutil.copytree(finished, run)
        step = run / "step-000002"
        (step / name).write_bytes(pickle.dumps(Bomb(went_off)))
        (step / CHECKSUMS).write_text("".join(f"{sha256(step / file)}  {file}\n" for file in FILES))
        assert damage(step) is None
        path, _ = find_checkpoint(run, "latest")
        assert path == step
        with pytest.raises(Exception):  # noqa: B017, PT011 - safetensors' own error, or JSON's
            load_checkpoint(step)
        assert not went_off.exists()


def test_a_pickle_for_a_dataset_is_refused_and_does_not_run(tmp_path: Path) -> None:
    went_off = tmp_path / "went-off"
    for name in ("rows.json", "rows.jsonl", "rows.parquet", "rows.arrow", "rows.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(went_off)))
        with pytest.raises(Exception):  # noqa: B017, PT011 - each format's reader has an error of its own
            read_instructions(tmp_path / name)
        assert not went_off.exists()
    pickle.loads((tmp_path / "rows.pkl").read_bytes())
    assert went_off.exists(), "the bomb does nothing, and this test finds nothing"


def test_code_in_a_dataset_s_folder_is_not_run(tmp_path: Path) -> None:
    folder, went_off = tmp_path / "rows", tmp_path / "went-off"
    folder.mkdir()
    (folder / "rows.py").write_text(CODE.format(path=str(went_off)))
    with pytest.raises(Exception):  # noqa: B017, PT011
        read_instructions(folder)
    assert not went_off.exists()


def test_no_token_is_written_into_a_run_s_folder(finished: Path) -> None:
    files = [path for path in finished.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


def test_dependencies_are_bounded_and_what_make_installs_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        re.sub(r"[-_.]+", "-", line.split("==")[0]).lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    extras = project["optional-dependencies"]
    made = [*project["dependencies"], *extras["dev"]]
    made += [wanted for name in re.findall(r"\[(.*)\]", extras["dev"][0])[0].split(",") for wanted in extras[name]]
    for wanted in [*project["dependencies"], *(wanted for extra in extras.values() for wanted in extra)]:
        assert ">=" in wanted or wanted.startswith(("shortzip[", "types-", "opencv")), wanted
    for wanted in made:
        name = re.sub(r"[-_.]+", "-", re.split(r"[\[<>=]", wanted)[0]).lower()
        assert name in pinned or name == "shortzip", f"{wanted} is not in constraints.txt"
