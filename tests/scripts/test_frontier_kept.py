"""What a frontier and a table of the papers keep: measured anew whenever something that it depends on has changed."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shortzip.reduction.reductions import Reductions
from shortzip.scripts import evaluate_papers, frontier, tune_points
from shortzip.train.evaluation.frontier_points import FrontierConfig, Point
from shortzip.train.release.opening import open_release
from shortzip.train.run.processes import StopRequest
from shortzip.train.run.run_folder import CONFIG, write_status
from shortzip.train.settings.command_line import dump_config, load_config
from shortzip.train.settings.comparing import PapersConfig, Task
from shortzip.train.settings.config import TuneConfig

POINT = Point("VisionZip", Reductions({"dominant": 6, "contextual": 3}))


@dataclass
class Found:
    exact_match: float
    prefill_ms: float = 1.0


@pytest.fixture
def recipe(tmp_path: Path, tiny_release: Path, tiny_held_out: Path) -> TuneConfig:
    shutil.copytree(tiny_release, tmp_path / "model")
    shutil.copytree(tiny_held_out.parent, tmp_path / "data")
    held_out = str(tmp_path / "data" / "instructions.json")
    written = {
        "model": str(tmp_path / "model"), "mixed_precision": "no", "output_dir": str(tmp_path / "run"),
        "data": {"instructions": held_out, "eval_instructions": held_out, "eval_samples": 4, "num_workers": 0},
        "shortv": {"freeze": 2, "calibration_samples": 4},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(written))
    return load_config(["--config", str(tmp_path / "recipe.yaml")])


@pytest.fixture
def asked(tmp_path: Path) -> FrontierConfig:
    return FrontierConfig(
        recipe=str(tmp_path / "recipe.yaml"), output=str(tmp_path / "out"), budgets=["6+3"], freeze=["2"], methods=[],
        fastv=[], rankings=[], seeds=[0],
    )  # fmt: skip


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for whatever is measured; nothing is computed."""
    calls: list[str] = []

    def compare(*_: Any, **__: Any) -> tuple[list[Found], list[list[Any]]]:
        calls.append("point")
        return [Found(float(len(calls)))], [[]]

    def choose(*_: Any) -> tuple[list[int], None]:
        calls.append("layers")
        return [1, len(calls)], None

    def prefill(candidates: Any, *_: Any, **__: Any) -> list[float]:
        calls.append("prefill")
        return [2.0] * len(candidates)

    monkeypatch.setattr(tune_points, "compare", compare)
    monkeypatch.setattr(frontier, "choose_layers", choose)
    monkeypatch.setattr(frontier, "prefill_times", prefill)
    return calls


def all_of_it(asked: FrontierConfig, recipe: TuneConfig) -> Any:
    Path(asked.output).mkdir(exist_ok=True)
    layers = frontier.layers_to_freeze(asked, recipe)
    accelerator = Accelerator(cpu=True)
    entry = tune_points.evaluate_point(POINT, recipe.model, asked, recipe, accelerator)
    frontier.time_prefill([POINT], [entry], asked, recipe)
    return layers, entry


def same_size_and_time(path: Path, change: Callable[[], Any]) -> None:
    times = path.stat()
    change()
    assert path.stat().st_size == times.st_size
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def alter_weights(root: Path) -> None:
    path = root / "model" / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[next(name for name in tensors if "layers.2.mlp.up_proj" in name)] += 1
    same_size_and_time(path, lambda: save_file(tensors, path, metadata))


def alter_text(root: Path) -> None:
    path = root / "data" / "instructions.json"
    changed = path.read_text().replace("name the colour", "name the number")
    same_size_and_time(path, lambda: path.write_text(changed.replace("it is red", "it is rod")))


def alter_images(root: Path) -> None:
    for path in (root / "data" / "images").iterdir():
        Image.new("RGB", Image.open(path).size, "yellow").save(path)


def alter_json(name: str, key: str) -> Callable[[Path], None]:
    def alter(root: Path) -> None:
        path = root / "model" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), key: 77}))

    return alter


CHANGES: dict[str, Callable[[Path], Any]] = {
    "weights": alter_weights,
    "conversations": alter_text,
    "images": alter_images,
    "config": alter_json("config.json", "vision_feature_layer_of_old"),
    "generation config": alter_json("generation_config.json", "max_length"),
    "tokenizer": alter_json("tokenizer_config.json", "model_max_length"),
    "image processor": alter_json("processor_config.json", "patch_size_of_old"),
    "template": lambda root: (root / "model" / "chat_template.jinja").write_text(
        "{% for message in messages %}{% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
        "{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_layers_points_and_times_are_measured_anew_when_something_has_changed(
    what: str, recipe: TuneConfig, asked: FrontierConfig, measured: list[str], tmp_path: Path
) -> None:
    first = all_of_it(asked, recipe)
    measured.clear()
    assert all_of_it(asked, recipe) == first
    assert not measured
    CHANGES[what](tmp_path)
    all_of_it(asked, recipe)
    assert measured == ["layers", "layers", "point", "prefill"]


def test_other_settings_measure_anew_what_depends_on_them(
    recipe: TuneConfig, asked: FrontierConfig, measured: list[str]
) -> None:
    all_of_it(asked, recipe)
    for changed in (
        replace(recipe, mixed_precision="bf16"),
        replace(recipe, data=replace(recipe.data, eval_samples=2)),
        replace(recipe, shortv=replace(recipe.shortv, calibration_samples=3)),  # type: ignore[type-var]
        replace(recipe, max_new_tokens=3),
        replace(recipe, eval_batch_size=2),
    ):
        measured.clear()
        all_of_it(asked, changed)
        assert measured
        all_of_it(asked, recipe)
    measured.clear()
    all_of_it(replace(asked, prefill_rounds=asked.prefill_rounds + 1), recipe)
    assert measured == ["prefill"]


@pytest.mark.parametrize("content", ["", "[]", "{}", "{", '{"result": {}}', "null", "\x00\x00", "other values"])
def test_what_is_damaged_is_measured_anew(
    content: str, recipe: TuneConfig, asked: FrontierConfig, measured: list[str]
) -> None:
    all_of_it(asked, recipe)
    files = sorted(Path(asked.output).rglob("*.json"))
    assert [file.name for file in files] == ["frozen-layers.json", f"{POINT.name}.json", "prefill.json"]
    for file in files:
        text = file.read_text()
        start = text.index('"result"')
        file.write_text(text[:start] + text[start:].replace("2", "1") if content == "other values" else content)
    measured.clear()
    all_of_it(asked, recipe)
    assert measured == ["layers", "layers", "point", "prefill"]


def test_a_tuned_run_of_other_content_is_tuned_anew(
    recipe: TuneConfig, asked: FrontierConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point, ways = replace(POINT, seed=0, tuned=True), []

    def tune(run: TuneConfig) -> None:
        ways.append(run.overwrite_output_dir)
        folder = Path(run.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(dump_config(run))
        write_status(folder, "finished", 7)

    monkeypatch.setattr(tune_points, "tune", tune)
    for change in (lambda root: None, lambda root: None, alter_weights, alter_text, alter_images):
        change(tmp_path)
        tune_points.tune_point(point, asked, recipe, tune_points.tuned_on(point, recipe))
    assert ways == [True] * 4


# ------------------------------------------------------------------------------------------------ the papers' tables


@pytest.mark.parametrize("what", [name for name in CHANGES if name not in ("conversations", "images")])
def test_results_of_lmms_eval_belong_to_the_content_of_the_model(
    what: str, recipe: TuneConfig, tmp_path: Path
) -> None:
    config = PapersConfig(recipe.model, [Task("t", "t", ["m"])], "out", device="cpu")
    row = evaluate_papers.rows_of(config)[0]
    first = evaluate_papers.depends_on(row, open_release(recipe.model), "asked", config)
    assert evaluate_papers.depends_on(row, open_release(recipe.model), "asked", config) == first
    CHANGES[what](tmp_path)
    assert evaluate_papers.depends_on(row, open_release(recipe.model), "asked", config) != first


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"results": 3}', '{"results": {"t": 1}}', "\x00"])
def test_damaged_results_of_lmms_eval_are_measured_anew(
    content: str, tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PapersConfig(str(tiny_release), [Task("t", "t", ["m"], scale=1)], str(tmp_path), device="cpu")
    rows, ran = evaluate_papers.check_rows(config), []

    def run(command: Any, task: Task, folder: Path, stop: StopRequest) -> dict[str, Any]:
        ran.append(folder)
        return {"t": {"m": 5.0}}

    monkeypatch.setattr(evaluate_papers, "_run", run)
    expected: Any = ({row: {"t": 5} for row in rows}, [])
    for _ in range(2):
        assert evaluate_papers.run_all(config, rows, lambda _: None, StopRequest()) == expected
    assert len(ran) == 1
    (kept,) = (tmp_path / "results").glob("*.json")
    kept.write_text(content)
    assert evaluate_papers.run_all(config, rows, lambda _: None, StopRequest()) == expected
    assert len(ran) == 2
