"""What a run starts from: the drawn scenes, the conversations, the layers LC chooses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from runs import run_here, write_recipe

from shortzip.data import instructions
from shortzip.data.drops import TooManyBadSamples
from shortzip.data.subset import SubsetOptions, prepare_subset
from shortzip.data.supervision import Supervision
from shortzip.reduction.layer_contribution import measure_layer_contributions
from shortzip.reduction.reductions import Reductions
from shortzip.train.calibration.choosing import choose_layers, freeze_layers, load_sample
from shortzip.train.calibration.measuring import CalibrateConfig, calibration_set
from shortzip.train.inputs.samples import draw_demo_scenes, held_out_set, training_set
from shortzip.train.release.loading import load_release
from shortzip.train.release.opening import open_release
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.config import (
    DataConfig,
    DemoScenesConfig,
    ShortVConfig,
    TuneConfig,
    VisionZipConfig,
)


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(mixed_precision="no")


def test_demo_stands_for_scenes_that_are_drawn_once(tiny_release: Path, tmp_path: Path) -> None:
    scenes = DemoScenesConfig(folder=str(tmp_path / "scenes"), train_scenes=30, eval_scenes=4)
    config = DataConfig(instructions="demo", eval_instructions="demo", fraction=0.2, demo_scenes=scenes)
    draw_demo_scenes(config)
    written = sorted(path.relative_to(tmp_path) for path in (tmp_path / "scenes").rglob("instructions.json"))
    stamps = [(tmp_path / path).stat().st_mtime_ns for path in written]
    draw_demo_scenes(config)
    assert [(tmp_path / path).stat().st_mtime_ns for path in written] == stamps
    _, processor = load_release(str(tiny_release))
    train, held_out = training_set(config, processor, seed=0), held_out_set(config, processor)
    assert (len(train), len(held_out)) == (6, 4)
    assert not {c.images for c in train.conversations} & {c.images for c in held_out.conversations}
    assert train[0].pixels[0].shape == (3, 24, 24)  # type: ignore[union-attr]


def test_a_fraction_of_other_instructions_is_drawn_with_the_seed(tiny_release: Path, tiny_instructions: Path) -> None:
    _, processor = load_release(str(tiny_release))

    def ids(seed: int) -> list[str]:
        config = DataConfig(instructions=str(tiny_instructions), fraction=0.25)
        return [c.id for c in training_set(config, processor, seed).conversations]

    assert len(ids(0)) == 8  # of 32 rows with an image
    assert ids(0) == ids(0)
    assert ids(0) != ids(1)


def test_a_part_of_a_subset_is_refused(tiny_release: Path, tiny_instructions: Path, tmp_path: Path) -> None:
    """prepare_subset has taken its tenth, and a recipe would take a tenth of that."""
    _, processor = load_release(str(tiny_release))
    root = tiny_instructions.parent
    options = SubsetOptions(str(tiny_instructions), tmp_path / "subset", root, fraction=0.5)
    written = prepare_subset(options, lambda *_: None)["written"]
    subset = str(tmp_path / "subset" / "subset.json")
    whole = DataConfig(instructions=subset, image_root=str(root), fraction=1.0)
    assert len(training_set(whole, processor, seed=0)) == written > 0
    with pytest.raises(ValueError, match=r"is a subset already, 0.5 of .*: set data.fraction to 1.0"):
        training_set(replace(whole, fraction=0.1), processor, seed=0)


def test_lc_chooses_the_layers_that_matter_least(
    tiny_release: Path, tiny_instructions: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    config = TuneConfig(
        model=str(tiny_release),
        data=DataConfig(instructions=str(tiny_instructions)),
        visionzip=VisionZipConfig(5, 2),
        shortv=ShortVConfig(freeze="50%", calibration_samples=5),
        mixed_precision="no",
        output_dir=str(tmp_path),
    )
    release = open_release(str(tiny_release))
    chosen, loaded = choose_layers(config, release, accelerator)
    budget = Reductions({"dominant": 5, "contextual": 2})
    model, _ = load_release(release, budget)
    calibrate = CalibrateConfig(model=str(tiny_release), instructions=str(tiny_instructions), samples=5)
    asked = calibration_set(calibrate, budget)
    mean = measure_layer_contributions(model, [load_sample(item, asked.dataset) for item in asked.prompts]).mean()
    assert chosen == sorted(sorted(range(4), key=mean.__getitem__)[:2])
    found = json.loads((tmp_path / "layers.json").read_text())
    assert found["layers"] == chosen
    assert found["layer_contributions"] == pytest.approx(mean)

    assert loaded is not None
    measured, reductions = loaded[0], Reductions(budget.visionzip, {"layers": chosen})
    random = torch.get_rng_state()
    frozen, processor = freeze_layers(loaded, reductions, with_tower=True)
    assert torch.equal(torch.get_rng_state(), random), "an adapter is drawn afterwards"
    apart, its = load_release(release, reductions)
    assert processor.visionzip == its.visionzip
    inputs = its(images=Image.new("RGB", (30, 20), (9, 99, 199)), text="<image>\nhello", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(frozen(**inputs).logits, apart(**inputs).logits)
    assert {id(weight) for weight in frozen.parameters()} == {id(weight) for weight in measured.parameters()}
    towerless, _ = freeze_layers(loaded, reductions, with_tower=False)
    assert not list(towerless.model.vision_tower.parameters())
    assert list(measured.model.vision_tower.parameters())


def test_a_run_that_chooses_its_layers_reads_the_rows_once(
    tiny_release: Path, tiny_instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are parsed once; beside all of them for their lengths, only those that are looked at are tokenized."""
    parsed, encoded = [], []
    read, encode = instructions.iterate_json_rows, Supervision.encode
    monkeypatch.setattr(instructions, "iterate_json_rows", lambda path: parsed.append(Path(path)) or read(path))
    monkeypatch.setattr(
        Supervision, "encode", lambda self, row, *sizes: encoded.append(row.id) or encode(self, row, *sizes)
    )
    freeze = {"freeze": "50%", "calibration_samples": 2}
    recipe = write_recipe(
        tmp_path / "r.yaml", tiny_release, tiny_instructions, shortv=freeze, max_steps=1, warmup_ratio=0.0
    )
    folder = run_here(recipe, tmp_path / "run")
    assert len(json.loads((folder / "layers.json").read_text())["layers"]) == 2
    assert parsed == [tiny_instructions]
    rows = len(json.loads(tiny_instructions.read_text()))
    looked_at = len(encoded) - rows - 6  # the step's six are tokenized again by the loader
    assert looked_at <= 2 * 4, "two prompts, chosen and then loaded, with a text-only row or two before them"


def test_listed_layers_and_none_are_taken_as_they_are(tiny_release: Path, accelerator: Accelerator) -> None:
    base = TuneConfig(model=str(tiny_release), data=DataConfig(instructions="unused"))
    release = open_release(str(tiny_release))
    assert choose_layers(base, release, accelerator) == (None, None)
    listed = TuneConfig(model="m", data=base.data, shortv=ShortVConfig(layers=[3, 0]))
    assert choose_layers(listed, release, accelerator) == ([3, 0], None)
    with pytest.raises(ConfigError):
        ShortVConfig()


def test_bad_rows_of_the_whole_file_are_no_share_of_the_part_that_is_drawn(tmp_path: Path, tiny_release: Path) -> None:
    """Two of 300 rows are bad: 0.7 %, also where a tenth is drawn."""
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    rows = [{"id": str(n), "image": "image.png", "conversations": turns} for n in range(300)]
    rows[200]["conversations"] = rows[299]["conversations"] = "none"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    _, processor = load_release(str(tiny_release), Reductions({"dominant": 3, "contextual": 1}))
    config = DataConfig(str(tmp_path / "rows.json"), fraction=0.1, on_bad_sample="skip", max_bad_fraction=0.01)
    dataset = training_set(config, processor, 0)
    assert (len(dataset), dataset.drops.bad) == (30, 2)
    with pytest.raises(TooManyBadSamples, match=r"of 300 rows|of \d+ rows"):
        training_set(replace(config, max_bad_fraction=0.005), processor, 0)
