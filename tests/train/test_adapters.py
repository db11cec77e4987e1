"""LoRA and its kin on the projector: standard adapters, exact merges, gradients nowhere else."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from runs import run_here, write_recipe
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from shortzip.reduction.reductions import Reductions
from shortzip.train.release.loading import lay_projector, load_release
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.step.adapters import TUNINGS, ProjectorAdapter, adapter_config, merged_projector

VISIONZIP = {"dominant": 6, "contextual": 2}
SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 8.0}


def logits_of(model: Any, processor: Any) -> torch.Tensor:
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    inputs = processor(images=image, text="USER: <image>\nname the colour ASSISTANT:", return_tensors="pt")
    inputs["labels"] = inputs["input_ids"]
    return model(**inputs).logits


def trained_adapter(model: Any, processor: Any, tuning: Any) -> ProjectorAdapter:
    """An adapter after two steps, so that it is no identity."""
    adapter = ProjectorAdapter(model, adapter_config(tuning, **SETTINGS))
    optimizer = torch.optim.AdamW(adapter.parameters.values(), lr=0.05)
    for _ in range(2):
        logits_of(model, processor).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapter


@pytest.mark.parametrize("tuning", TUNINGS[1:])
def test_trains_merges_and_loads_with_peft(tiny_release: Path, tmp_path: Path, tuning: Any) -> None:
    model, processor = load_release(str(tiny_release), Reductions(VISIONZIP))
    torch.manual_seed(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapter = trained_adapter(model, processor, tuning)
    state = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    assert all(torch.equal(before[name], state[name]) for name in before), "the release itself was changed"
    assert all("multi_modal_projector.linear_" in name for name in adapter.parameters)

    inputs = processor(images=Image.new("RGB", (40, 30), (200, 40, 90)), text="<image>\nhello", return_tensors="pt")
    with torch.no_grad():
        wanted = model(**inputs).logits
    merged = adapter.merged()
    fresh, _ = load_release(str(tiny_release), Reductions(VISIONZIP))
    with torch.no_grad():
        untuned = fresh(**inputs).logits
    assert (untuned - wanted).abs().max() > 1e-3
    lay_projector(fresh, merged)
    with torch.no_grad():
        torch.testing.assert_close(fresh(**inputs).logits, wanted, rtol=0, atol=2e-5)

    adapter.save(tmp_path / "adapter", "some/release")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again, _ = load_release(str(tiny_release), Reductions(VISIONZIP))
    peft_model = PeftModel.from_pretrained(again, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(peft_model(**inputs).logits, wanted, rtol=0, atol=1e-6)
    for name, tensor in merged_projector(again.model.multi_modal_projector).items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-6)


def test_the_adapter_loads_on_plain_transformers_llava(tiny_release: Path, tmp_path: Path) -> None:
    model, processor = load_release(str(tiny_release), Reductions())
    adapter = trained_adapter(model, processor, "lora")
    adapter.save(tmp_path, "x")
    plain = LlavaForConditionalGeneration.from_pretrained(tiny_release)
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    inputs = processor(images=Image.new("RGB", (40, 30), (200, 40, 90)), text="<image>\nhello", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)


def test_merging_is_in_float32_under_a_bf16_model(tiny_release: Path) -> None:
    model, processor = load_release(ReleaseSpec(str(tiny_release), dtype=torch.bfloat16), Reductions(VISIONZIP))
    adapter = trained_adapter(model, processor, "lora")
    layer = model.model.multi_modal_projector.linear_1
    wanted = layer.base_layer.weight + layer.get_delta_weight("default")
    found = adapter.merged()["linear_1.weight"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=1e-7)
    assert not torch.equal(found, found.bfloat16().float())


def test_a_projector_without_an_adapter_merges_to_itself(tiny_release: Path) -> None:
    model, _ = load_release(str(tiny_release))
    projector = model.model.multi_modal_projector
    found = merged_projector(projector)
    assert found.keys() == projector.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in projector.state_dict().items())


@pytest.mark.parametrize("tuning", ["lora", "dora"])
def test_a_run_saves_the_adapter_and_publishes_it_merged(
    tiny_release: Path, tiny_instructions: Path, tmp_path: Path, tuning: str
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_release, tiny_instructions, tuning=tuning, lora_r=2)
    folder = run_here(recipe, tmp_path / "whole", "--max_steps", "4")
    final = folder / "final"
    tuned, processor = load_release(str(folder))
    inputs = processor(images=Image.new("RGB", (40, 30), (200, 40, 90)), text="<image>\nhello", return_tensors="pt")
    with torch.no_grad():
        wanted = tuned(**inputs).logits
    untuned, _ = load_release(str(tiny_release), Reductions(tuned.config.visionzip, tuned.config.shortv))
    with torch.no_grad():
        assert (untuned(**inputs).logits - wanted).abs().max() > 1e-4
        adapted = PeftModel.from_pretrained(untuned, final / "adapter")
        torch.testing.assert_close(adapted(**inputs).logits, wanted, rtol=0, atol=1e-5)
    checkpoint = load_file(folder / "step-000004" / "projector.safetensors")
    assert all("lora_" in name for name in checkpoint)

    continued = tmp_path / "continued"
    shutil.copytree(folder, continued, ignore=shutil.ignore_patterns("final", "step-000004"))
    run_here(recipe, continued, "--max_steps", "4", "--resume_from_checkpoint", "latest")
    weights = [load_file(path / "final" / "model.safetensors") for path in (folder, continued)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("tuning", ["full", "prefix"])
def test_unknown_tunings(tuning: Any) -> None:
    with pytest.raises(ValueError, match=rf"tuning is '{tuning}', through PEFT there are lora, rslora, dora"):
        adapter_config(tuning, **SETTINGS)


@pytest.mark.parametrize("change", [{"r": 0}, {"lora_alpha": 0.0}])
def test_values_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"lora_r is .* and lora_alpha .*: needed are at least 1, and more than 0"):
        adapter_config("lora", **{**SETTINGS, **change})


def test_a_projector_in_half_precision_is_refused(tiny_release: Path) -> None:
    model, _ = load_release(str(tiny_release))
    with pytest.raises(ValueError, match=r"the projector is in \{torch.bfloat16\}, needed is float32"):
        ProjectorAdapter(model.bfloat16(), adapter_config("lora", **SETTINGS))


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'shortzip\[peft\]'"):
        adapter_config("lora", **SETTINGS)
