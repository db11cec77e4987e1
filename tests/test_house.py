"""The house: imports point one way, and each room is worth a door."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("reduction", "data", "train", "scripts")
# Rooms of train/, each of which imports only those before it. What comes before a run's first step is as long as its
# loop, and asks every room: it has a file of its own between them and the run.
ORDER = (
    "settings", "run", "release", "step", "inputs", "rehearsal", "calibration", "evaluation", "publish", "serving",
    "preparation", "finish", "tune_projector",
)  # fmt: skip
MOST_LINES = 400
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """The dotted names of modules (or what is in them) that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def ours(path: Path) -> list[list[str]]:
    """Imports of ShortZip's own, as parts after the package's name."""
    return [name.split(".")[1:] for name in imported(path) if name.split(".")[0] == "shortzip"]


def test_packages_import_only_those_below_them() -> None:
    below = {"reduction": {"reduction"}, "data": {"data"}, "train": {"reduction", "data", "train"}}
    for path in FILES:
        package = path.relative_to(ROOT).parts[0]
        for parts in ours(path):
            assert package == "scripts" or parts[0] in below[package], f"{path} imports {'.'.join(parts)}"


def test_rooms_of_train_import_only_those_before_them() -> None:
    for path in FILES:
        place = path.relative_to(ROOT).with_suffix("").parts
        if place[0] != "train" or place[1] in ("__init__", "demo"):
            continue
        for _, room, *_ in (parts for parts in ours(path) if parts[0] == "train" and len(parts) > 1):
            assert room == place[1] or ORDER.index(room) < ORDER.index(place[1]), f"{path} imports {room}"


def test_what_travels_to_the_hub_imports_its_own_folder_alone() -> None:
    """custom_object_save copies a modeling file and what it imports relatively, flat."""
    waiting = ["modeling_reduced_llava", "modeling_reduced_llava_next", "processing_reduced_llava"]
    travelling: set[str] = set()
    while waiting:
        name = waiting.pop()
        travelling.add(name)
        for dotted in imported(ROOT / "reduction" / f"{name}.py"):
            assert not dotted.startswith("shortzip"), f"{name} imports {dotted}"
            if dotted.startswith("."):
                waiting += {dotted.split(".")[1]} - travelling
    assert travelling.isdisjoint({"reductions", "flops", "pictures", "auto", "layer_contribution", "parsing"})


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_of_imports(package: str) -> None:
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES}
    edges = {
        name: {".".join(parts[:n]) for parts in ours(path) for n in range(2, len(parts) + 1)} & set(names.values())
        for path, name in names.items()
    }
    seen: dict[str, bool] = {}  # False while its imports are followed

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert seen.get(name, True), f"a circle: {' -> '.join((*trail, name))}"
        if name not in seen:
            seen[name] = False
            for other in edges[name] - {name}:
                visit(other, (*trail, name))
            seen[name] = True

    for name in edges:
        if name.startswith(package):
            visit(name, ())


def test_no_file_is_too_long_and_no_folder_has_one_file() -> None:
    long = {str(path.relative_to(ROOT)): lines for path in FILES
            if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES}  # fmt: skip
    assert not long
    for folder in {path.parent for path in FILES}:
        assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) > 1, f"{folder} has one file"
