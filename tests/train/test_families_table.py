"""The table of families in reduction/README.md: what a cell says is tried, and what is left blank is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ROOT, checkpoint_tensors, run_here, write_recipe
from test_lmms_eval import answer, run_lmms_eval, samples
from test_video_releases import single_image_rows

from shortzip.data.dataset import Collator, ConversationDataset
from shortzip.data.instructions import Conversation, read_instructions
from shortzip.data.supervision import Supervision
from shortzip.reduction.families import all_families, family_of
from shortzip.reduction.reductions import Reductions
from shortzip.scripts.make_tiny_release import write_tiny_release
from shortzip.train.evaluation.lmms_plugin import write_task
from shortzip.train.inputs.prompts import batch_prompts, encode_prompt
from shortzip.train.inputs.videos import sampling_of
from shortzip.train.release.loading import load_processor, load_release
from shortzip.train.release.opening import open_release, read_projector, release_projector
from shortzip.train.release.writing import write_reduced_checkpoint
from shortzip.train.step.objective import SupervisedLoss, projector_parameters, train_only_projector

REDUCTIONS = Reductions({"dominant": 4, "contextual": 2}, {"layers": [1, 3]})
INTERLEAVE = "LLaVA-interleave-Qwen"  # of LLaVA-1.5's family, with parts of its own
NAMES = {family.title: family.name for family in all_families()} | {INTERLEAVE: "llava_interleave"}
PICTURES = [Image.new("RGB", (50, 30), (200, 40, 90)), Image.new("RGB", (30, 44), (9, 200, 60))]
LISTED = ("published as", "evaluated by")  # whose cells name several things
HEAVY = ("cached features", "full", "projector", "engine", "llava", "`evaluate`", "lmms-eval")


def table() -> dict[str, dict[str, str]]:
    """The rows by their family, each by its columns."""
    text = (ROOT / "reduction" / "README.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", text, flags=re.M)
    (families,) = (part for part in section if part.startswith("Families\n"))
    head, _, *rows = (line for line in families.splitlines() if line.startswith("|"))
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    cells = [[cell.strip() for cell in row.removeprefix("|").removesuffix("|").split("|")] for row in rows]
    return {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in cells}


@dataclass
class Tried:
    """A family's tiny release, and what a check needs beside it."""

    family: str
    release: Path
    said: str
    """What the cell says."""
    rows: Path
    folder: Path
    loaded: dict[str, tuple[Any, Any]]
    """Of every family, its reduced model and processor, once they are read."""

    def load(self) -> tuple[Any, Any]:
        if self.family not in self.loaded:
            self.loaded[self.family] = load_release(str(self.release), REDUCTIONS)
        return self.loaded[self.family]


def asked(tried: Tried, pictures: list[Image.Image]) -> None:
    model, processor = tried.load()
    supervision = Supervision(processor, max_length=None)
    prompt = encode_prompt(supervision, [("user", "<image>" * len(pictures) + "\nname the colour")], pictures)
    inputs = batch_prompts(supervision, [prompt], model.device)
    said = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert said.shape[1] == inputs["input_ids"].shape[1] + 3


def images(tried: Tried) -> None:
    asked(tried, PICTURES[:1])


def several(tried: Tried) -> None:
    asked(tried, PICTURES)


def video(tried: Tried) -> None:
    model, processor = tried.load()
    family = family_of(model.config.model_type)
    count = 3 if family.any_frames else model.config.video_frames
    frames = np.random.default_rng(0).integers(0, 256, (count, 30, 44, 3), dtype=np.uint8)
    if not tried.said:
        with pytest.raises(ValueError, match="reads images, and no videos"):
            processor(text="<video>\nname the colour", videos=[frames], return_tensors="pt")
        return
    inputs = processor(text="<video>\nname the colour", videos=[frames], return_tensors="pt")
    said = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert said.shape[1] == inputs["input_ids"].shape[1] + 3


def training(tried: Tried) -> None:
    model, processor = tried.load()
    sampling = sampling_of(processor)
    assert tried.said == ("images" if sampling is None else "images, videos")
    train_only_projector(model, torch.float32)
    model.zero_grad()
    supervision = Supervision(processor, max_length=None, sampling=sampling)
    conversations = read_instructions(tried.rows)[:5]
    if sampling is not None:
        frames = tuple(str(image) for row in conversations for image in row.images)
        turns = (("user", "<video>\nname the colour"), ("assistant", "it is red"))
        conversations.append(Conversation("video", (), turns, videos=(frames,)))
    dataset = ConversationDataset(conversations, supervision, tried.rows.parent)
    assert dataset.has_videos is (sampling is not None)
    loss = SupervisedLoss(model)(Collator.of(supervision)([dataset.load(row) for row in conversations]))
    loss.backward()
    assert all(float(weight.grad.abs().max()) > 0 for weight in projector_parameters(model).values())


def cached_features(tried: Tried) -> None:
    rows = tried.rows if tried.said == "✓" else single_image_rows(tried.rows, tried.folder)
    keys = {"max_steps": 2, "final_evaluation": False, "pictures": 0}
    made = []
    for cache in (None, str(tried.folder / "cache")):
        data = {"fraction": 1.0, "cache_features": cache, "image_root": str(tried.rows.parent)}
        recipe = write_recipe(tried.folder / "recipe.yaml", tried.release, rows, data=data, **keys)
        made.append(checkpoint_tensors(run_here(recipe, tried.folder / f"run-{len(made)}"), 2))
    for name, tensor in made[0].items():
        torch.testing.assert_close(made[1][name], tensor, rtol=0, atol=1e-6)
    if tried.said != "✓":
        assert tried.said == "rows of one image"
        data = {"fraction": 1.0, "cache_features": str(tried.folder / "other")}
        recipe = write_recipe(tried.folder / "recipe.yaml", tried.release, tried.rows, data=data, **keys)
        with pytest.raises(ValueError, match="reads an image otherwise where it is one of several"):
            run_here(recipe, tried.folder / "refused")


def layout_in(tried: Tried) -> None:
    if not tried.said:
        with pytest.raises(ValueError, match="only transformers' is read"):
            write_tiny_release(tried.folder / "original", tried.family, "original")
        return
    original = write_tiny_release(tried.folder / "original", tried.family, "original")
    release = open_release(str(original), cache_dir=tried.folder / "cache")
    assert release.converted
    found, expected = load_release(release)[0].state_dict(), load_release(str(tried.release))[0].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def written(tried: Tried, shape: Any) -> Path:
    release = open_release(str(tried.release))
    projector = {name: tensor + 0.05 for name, tensor in release_projector(release).items()}
    processor = load_processor(release, REDUCTIONS)
    target = tried.folder / shape
    write_reduced_checkpoint(target, release, projector, processor, REDUCTIONS, shape=shape, vision_tower="a-tower")
    return target


def llava(tried: Tried) -> None:
    target = written(tried, "llava")
    assert (target / "config.json").is_file()
    found, before = read_projector(target / "mm_projector.bin"), release_projector(open_release(str(tried.release)))
    assert found.keys() == before.keys()
    assert all(torch.equal(tensor, before[name] + 0.05) for name, tensor in found.items())


def layout_out(tried: Tried) -> None:
    if tried.said:
        llava(tried)
        return
    with pytest.raises(ValueError, match=r"LLaVA's own layout knows a CLIP tower and a Llama|LLaVA's own code builds"):
        llava(tried)


def published(tried: Tried) -> None:
    target = written(tried, tried.said)
    model, processor = load_release(str(target))
    expected = REDUCTIONS if tried.said != "engine" else REDUCTIONS.before_an_engine
    assert open_release(str(target)).saved_reductions == expected
    assert processor.visionzip == REDUCTIONS.visionzip
    before = release_projector(open_release(str(tried.release)))
    for name, tensor in before.items():
        assert torch.equal(model.model.multi_modal_projector.get_parameter(name), tensor.float() + 0.05), name


def evaluate(tried: Tried) -> None:
    accuracy, said = answer(tried.release, tried.rows)
    assert 0 <= accuracy <= 1
    assert len(said) > 10


def lmms_eval(tried: Tried) -> None:
    _, said = answer(tried.release, tried.rows)
    write_task(tried.folder, "tiny", read_instructions(tried.rows), str(tried.rows.parent))
    run_lmms_eval(tried.folder, tried.release, "--tasks", "tiny", "--gen_kwargs", "max_new_tokens=8")
    theirs = sorted(samples(tried.folder, "tiny"), key=lambda entry: entry["doc_id"])
    assert [entry["filtered_resps"] for entry in theirs] == [entry["answer"] for entry in said]


CHECKS: dict[str, Callable[[Tried], None]] = {
    "images": images, "several": several, "video": video, "training": training, "cached features": cached_features,
    "original layout in": layout_in, "out": layout_out, "full": published, "projector": published, "engine": published,
    "llava": llava, "`evaluate`": evaluate, "lmms-eval": lmms_eval,
}  # fmt: skip


def cells() -> Iterator[Any]:
    """A case for each thing that a cell says, or leaves blank."""
    for title, row in table().items():
        for column, said in row.items():
            for thing in said.split(", ") if column in LISTED else [column]:
                marks = [pytest.mark.slow] if thing in HEAVY else []
                cell = thing if column in LISTED else said
                yield pytest.param(title, thing, cell, marks=marks, id=f"{title}: {thing}")


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {name: write_tiny_release(folder / name, name) for name in NAMES.values()}


@pytest.fixture(scope="module")
def loaded() -> dict[str, tuple[Any, Any]]:
    return {}


def test_every_family_has_a_row_and_every_column_a_check() -> None:
    rows = table()
    assert rows.keys() == NAMES.keys()
    assert all(rows[family.title]["video"] == "✓" * ("video" in family.inputs) for family in all_families())
    assert {case.values[1] for case in cells()} <= CHECKS.keys()


@pytest.mark.parametrize(("title", "thing", "said"), cells())
def test_what_a_cell_says(
    title: str,
    thing: str,
    said: str,
    releases: dict[str, Path],
    loaded: dict[str, tuple[Any, Any]],
    tiny_held_out: Path,
    tmp_path: Path,
) -> None:
    family = NAMES[title]
    CHECKS[thing](Tried(family, releases[family], said, tiny_held_out, tmp_path, loaded))
