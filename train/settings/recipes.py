"""Where what travels with the package lies: in a clone its top folders, in a wheel the same folders under
shortzip/."""

from __future__ import annotations

import difflib
from pathlib import Path

from shortzip.data.errors import MissingFile

HOME = Path(__file__).resolve().parents[2]
CONFIGS = HOME / "configs"
DEMO_MODEL = HOME / "checkpoints" / "demo-llava"
DEMO_NAMES = ("demo-llava", "checkpoints/demo-llava")  # what it is called where it is not in the working directory


def find_recipe(name: str, *, compares: bool = False) -> str:
    """The path of a YAML file: `name` itself, or the recipe of that name among configs/ and configs/eval/.

    `compares`: of the name that both folders have (demo), the one in configs/eval/ is meant.
    Raises `MissingFile`, naming the nearest recipe.
    """
    if Path(name).is_file() or Path(name).suffix in (".yaml", ".yml"):
        return name
    folders = (CONFIGS, CONFIGS / "eval") if compares else (CONFIGS / "eval", CONFIGS)  # the last one wins
    recipes = {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}
    if name in recipes:
        return str(recipes[name])
    near = difflib.get_close_matches(name, recipes, n=1, cutoff=0.5)
    raise MissingFile(
        f"--config {name}: there is no such file and no such recipe"
        + (f"; did you mean {near[0]}?" if near else f"; recipes are {', '.join(sorted(recipes))}")
    )
