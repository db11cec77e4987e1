"""Tiny releases of every family, in either layout: they open, are tuned and answer."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from runs import run_here, write_recipe

from shortzip.data.dataset import Collator, ConversationDataset
from shortzip.data.errors import UserError
from shortzip.data.instructions import read_instructions
from shortzip.data.supervision import Supervision
from shortzip.reduction.families import FAMILIES, family_of
from shortzip.reduction.reductions import Reductions
from shortzip.scripts.make_tiny_release import main, write_tiny_release
from shortzip.train.inputs.prompts import batch_prompts, encode_prompt
from shortzip.train.release.loading import load_release
from shortzip.train.release.opening import open_release
from shortzip.train.step.objective import SupervisedLoss, projector_parameters, train_only_projector

REDUCTIONS = Reductions({"dominant": 4, "contextual": 2}, {"layers": [1, 3]})
LAYOUTS = ("transformers", "original")
written = pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("llava_interleave", "transformers"),
        *(each for each in itertools.product(FAMILIES, LAYOUTS) if each != ("video_llava", "original")),
    ],
)


def answer(model: Any, processor: Any) -> int:
    """How many tokens are said of a picture."""
    supervision = Supervision(processor, max_length=None)
    turns = [("user", "<image>\nname the colour")]
    prompt = encode_prompt(supervision, turns, [Image.new("RGB", (50, 30), (200, 40, 90))])
    inputs = batch_prompts(supervision, [prompt], model.device)
    said = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    return int(said.shape[1] - inputs["input_ids"].shape[1])


@written
def test_what_is_written_opens_takes_a_step_and_answers(
    family: str, layout: str, tiny_held_out: Path, tmp_path: Path
) -> None:
    main(["--family", family, "--layout", layout, "--output", str(tmp_path / "tiny")])
    release = open_release(str(tmp_path / "tiny"), cache_dir=tmp_path / "cache")
    assert release.converted == (layout == "original")
    model, processor = load_release(release, REDUCTIONS)
    assert answer(model, processor) == 3
    train_only_projector(model, torch.float32)
    supervision = Supervision(processor, max_length=None)
    dataset = ConversationDataset(read_instructions(tiny_held_out)[:4], supervision, tiny_held_out.parent)
    loss = SupervisedLoss(model)(Collator.of(supervision)([dataset.load(row) for row in dataset.conversations]))
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert all(float(weight.grad.abs().max()) > 0 for weight in projector_parameters(model).values())
    family_of_model = family_of(model.config.model_type)
    if "video" in family_of_model.inputs:
        count = 2 if family_of_model.any_frames else model.config.video_frames
        frames = np.random.default_rng(0).integers(0, 256, (count, 30, 44, 3), dtype=np.uint8)
        inputs = processor(text="<video>\nname the colour", videos=[frames], return_tensors="pt")
        assert (
            model.generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
        )


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "video_llava"])
def test_both_layouts_are_one_release_and_a_seed_is_one_of_its_own(family: str, tmp_path: Path) -> None:
    paths = [write_tiny_release(tmp_path / layout, family, layout, seed=3) for layout in LAYOUTS]
    first, second = (
        load_release(open_release(str(path), cache_dir=tmp_path / "cache"))[0].state_dict() for path in paths
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    other = load_release(str(write_tiny_release(tmp_path / "other", family)))[0].state_dict()
    assert not torch.equal(other["lm_head.weight"], first["lm_head.weight"])


def test_a_family_without_a_layout_of_its_authors_says_so_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no other layout: .*family temporal_video_llava"):
        write_tiny_release(tmp_path / "tiny", "video_llava", "original")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@written
def test_a_run_over_what_is_written(
    family: str, layout: str, tiny_instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = write_tiny_release(tmp_path / "tiny", family, layout)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))  # where what is converted is kept
    recipe = write_recipe(
        tmp_path / "recipe.yaml", release, tiny_instructions, max_steps=1, warmup_ratio=0, final_evaluation=False
    )
    final = open_release(str(run_here(recipe, tmp_path / "run")))
    assert final.saved_reductions == REDUCTIONS
    assert answer(*load_release(final)) == 3
