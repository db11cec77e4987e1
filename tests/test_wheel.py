"""What `pip install` of a wheel gives: one name, one command, in a folder whose files bear the names of our
folders."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shortzip.scripts.__main__ import GROUPS, VERBS

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = """
import pkgutil, importlib, sys
import shortzip.data, shortzip.reduction, shortzip.train, shortzip.scripts
for package in (shortzip.data, shortzip.reduction, shortzip.train):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if "lmms" not in module.name:  # lmms-eval is an extra
            importlib.import_module(module.name)
        assert sys.modules[package.__name__].__file__.startswith(sys.prefix), package.__file__
from importlib.resources import files
assert (files("shortzip.data") / "templates" / "vicuna_v1.jinja").is_file()
assert (files("shortzip.train.publish") / "model_card.jinja").is_file()
print("imported", len([name for name in sys.modules if name.startswith("shortzip.")]))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel, and this one's packages without the clone."""
    folder = tmp_path_factory.mktemp("wheel")
    clone = folder / "clone"  # setuptools builds in place, and would take in what an earlier build left there
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests"))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    build = ("wheel", "--no-deps", "--wheel-dir", folder, clone)
    subprocess.run([*pip, *build], check=True, timeout=500)
    (wheel,) = folder.glob("shortzip-*.whl")
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=100)
    python = environment / "bin" / "python"
    packages = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True, timeout=100
    ).strip()
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True, timeout=500)
    # The .pth files in these, the clone's among them, are not read.
    Path(packages, "packages.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return environment


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder of the user's, with files that bear the names of ours."""
    for folder in ("data", "train", "reduction", "scripts", "configs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("raise ImportError('the user has a package of this name')\n")
    for name in ("evaluate.py", "config.py", "publish.py", "frontier.py"):
        (tmp_path / name).write_text("raise ImportError('the user has a module of this name')\n")
    return tmp_path


def run(environment: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    given = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        command, cwd=folder, env={**given, "PATH": path}, text=True, capture_output=True, check=False, timeout=500
    )


def test_every_module_is_imported_among_files_of_the_same_names(environment: Path, elsewhere: Path) -> None:
    done = run(environment, elsewhere, str(environment / "bin" / "python"), "-c", IMPORTS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("imported")


def test_the_command_lists_its_verbs(environment: Path, elsewhere: Path) -> None:
    done = run(environment, elsewhere, "shortzip")
    assert done.returncode == 0, done.stderr
    places = [done.stdout.index(f"\n  {verb} ") for verb in VERBS]
    assert places == sorted(places)
    assert all(title in done.stdout for title in GROUPS)


def test_a_mistyped_verb_names_the_nearest(environment: Path, elsewhere: Path) -> None:
    done = run(environment, elsewhere, "shortzip", "pubish", "x")
    assert (done.returncode, done.stderr) == (1, "error: there is no verb 'pubish'; did you mean 'publish'?\n")


@pytest.mark.parametrize(
    "verb", [pytest.param(verb, marks=() if verb == "tune" else pytest.mark.slow) for verb in VERBS]
)
def test_every_verb_has_its_help(environment: Path, elsewhere: Path, verb: str) -> None:
    done = run(environment, elsewhere, "shortzip", verb, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout.lower()


def test_recipes_are_found_by_name_and_printed_whole(environment: Path, elsewhere: Path) -> None:
    done = run(environment, elsewhere, "shortzip", "tune", "--config", "llava-1.5-7b-3090", "--print_config")
    assert done.returncode == 0, done.stderr
    assert "llava-hf/llava-1.5-7b-hf" in done.stdout
    assert "learning_rate: 2.0e-05" in done.stdout, "what the recipe leaves to the default stands there too"
    assert not (elsewhere / "checkpoints").exists()


def test_a_recipe_that_is_not_there_names_the_nearest(environment: Path, elsewhere: Path) -> None:
    done = run(environment, elsewhere, "shortzip", "tune", "--config", "lava-1.5-7b-3090")
    assert done.returncode == 1
    assert "llava-1.5-7b-3090" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel(environment: Path, elsewhere: Path) -> None:
    few = (
        "--max_steps", "2", "--warmup_ratio", "0", "--control", "false", "--data.eval_samples", "16",
        "--data.demo_scenes.train_scenes", "400", "--data.demo_scenes.eval_scenes", "8",
        "--shortv.calibration_samples", "4", "--global_batch_size", "8", "--pictures", "0",
    )  # fmt: skip
    done = run(environment, elsewhere, "shortzip", "demo", *few)
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "checkpoints" / "demo" / "final" / "config.json").is_file()
    assert "reduced + tuned" in done.stdout
