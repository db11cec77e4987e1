"""A projector tuned in float32 over a release in half precision is loaded, and saved again, as it was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import IMAGE_SIZE, write_release
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from shortzip.reduction import ReducedLlavaForConditionalGeneration, ReducedLlavaNextForConditionalGeneration
from shortzip.reduction.reductions import Reductions
from shortzip.train.release.loading import lay_projector
from shortzip.train.release.opening import open_release, release_projector
from shortzip.train.release.writing import write_reduced_checkpoint

VISIONZIP = {"dominant": 5, "contextual": 3}
IMAGE = 3
FAMILIES: dict[str, Any] = {
    "llava": (ReducedLlavaForConditionalGeneration, LlavaForConditionalGeneration),
    "llava_next": (ReducedLlavaNextForConditionalGeneration, LlavaNextForConditionalGeneration),
}


class NoProcessor:
    def save_pretrained(self, folder: Path) -> None:
        pass


def make_release(folder: Path, family: str, dtype: torch.dtype) -> Path:
    if family == "llava":
        return write_release(folder, dtype=dtype)
    torch.manual_seed(0)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=IMAGE_SIZE,
            patch_size=4, initializer_range=0.3,
        ),
        text_config=LlamaConfig(
            vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            initializer_range=0.2,
        ),
        image_token_index=IMAGE, image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]],
    )  # fmt: skip
    LlavaNextForConditionalGeneration(config).to(dtype).save_pretrained(folder)
    return folder


def inputs_for(family: str, each: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    if family == "llava":
        ids = torch.tensor([[1, 20, *[IMAGE] * each, 30, 31]])
        return {"input_ids": ids, "pixel_values": torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)}
    ids = torch.tensor([[1, 20, *[IMAGE] * each * 3, 30, 31]])
    pixels = torch.randn(1, 3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return {"input_ids": ids, "pixel_values": pixels, "image_sizes": torch.tensor([[24, 48]])}


@torch.no_grad()
def logits_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return model.eval()(**{**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype)}).logits


def projector_in(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name.split("projector.")[1]: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if "projector." in name
    }


@pytest.mark.parametrize(
    ("family", "shape", "dtype", "tuned"),
    [
        ("llava", "full", torch.bfloat16, True),
        ("llava", "projector", torch.float16, True),
        ("llava_next", "full", torch.float16, True),
        ("llava_next", "projector", torch.bfloat16, True),
        ("llava", "full", torch.bfloat16, False),
    ],
    ids=str,
)
def test_what_was_measured_is_what_loads(
    tmp_path: Path, family: str, shape: Any, dtype: torch.dtype, tuned: bool
) -> None:
    folder = make_release(tmp_path / "release", family, dtype)
    release = open_release(str(folder))
    projector = {name: tensor.float() for name, tensor in release_projector(release).items()}
    if tuned:
        projector = {name: tensor + torch.randn_like(tensor) * 0.01 for name, tensor in projector.items()}
    measured = FAMILIES[family][0].from_pretrained(folder, dtype=dtype, visionzip=VISIONZIP)
    lay_projector(measured, projector)  # as a run has it, and evaluation
    inputs = inputs_for(family, 8)
    expected = logits_of(measured, inputs)
    write_reduced_checkpoint(tmp_path / "tuned", release, projector, NoProcessor(), Reductions(VISIONZIP), shape=shape)
    for given in ({}, {"dtype": "auto"}, {"dtype": dtype}):
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "tuned", **given)
        assert model.dtype == model.lm_head.weight.dtype == dtype
        assert torch.equal(logits_of(model, inputs), expected)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    kept = projector_in(tmp_path / "again")
    assert all(
        torch.equal(kept[name], tensor) and kept[name].dtype == torch.float32 for name, tensor in projector.items()
    )
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(again, inputs), expected)


@pytest.mark.parametrize(
    ("family", "held", "dtype"),
    [
        ("llava", torch.bfloat16, None),
        ("llava", torch.float32, torch.bfloat16),
        ("llava_next", torch.bfloat16, "auto"),
        ("llava_next", torch.float32, torch.float16),
    ],
    ids=str,
)
def test_a_plain_release_loads_as_plain_llava(tmp_path: Path, family: str, held: torch.dtype, dtype: Any) -> None:
    folder = make_release(tmp_path, family, held)
    reduced_class, plain_class = FAMILIES[family]
    given = {} if dtype is None else {"dtype": dtype}
    reduced, plain = reduced_class.from_pretrained(folder, **given), plain_class.from_pretrained(folder, **given)
    for name, parameter in plain.named_parameters():
        ours = reduced.get_parameter(name)
        assert ours.dtype == parameter.dtype
        assert torch.equal(ours, parameter)
    # As many as the image gives: another number for LLaVA-NeXT, whose newlines and padding differ.
    inputs = inputs_for(family, 36)
    if family == "llava_next":
        count = len(
            plain.model.get_image_features(
                inputs["pixel_values"].to(plain.dtype), inputs["image_sizes"]
            ).pooler_output[0]
        )
        inputs["input_ids"] = torch.tensor([[1, 20, *[IMAGE] * count, 30, 31]])
    assert torch.equal(logits_of(reduced, inputs), logits_of(plain, inputs))


def test_an_untuned_model_saved_in_half_precision_loads_as_it_was(tmp_path: Path) -> None:
    write_release(tmp_path / "release", dtype=torch.bfloat16)
    model = ReducedLlavaForConditionalGeneration.from_pretrained(tmp_path / "release", visionzip=VISIONZIP)
    model.save_pretrained(tmp_path / "reduced")
    inputs = inputs_for("llava", 8)
    again = ReducedLlavaForConditionalGeneration.from_pretrained(tmp_path / "reduced")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert torch.equal(logits_of(again, inputs), logits_of(model, inputs))
    wide = ReducedLlavaForConditionalGeneration.from_pretrained(tmp_path / "reduced", dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}


def test_a_projector_of_a_float32_checkpoint_stays_so_beside_a_model_in_half_precision(tmp_path: Path) -> None:
    write_release(tmp_path / "release")
    release = open_release(str(tmp_path / "release"))
    projector = {name: tensor + 1e-4 for name, tensor in release_projector(release).items()}
    write_reduced_checkpoint(tmp_path / "tuned", release, projector, NoProcessor(), Reductions(VISIONZIP))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "tuned", dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight, projector["linear_1.weight"])
