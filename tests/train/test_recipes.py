"""Every recipe in configs/ runs, with its own keys, on a toy release of its family."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from runs import ROOT, run_here
from tiny import build_tokenizer
from tiny_onevision import write_onevision
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from shortzip.data.dataset import MicroBatch
from shortzip.reduction.reductions import Reductions
from shortzip.scripts.tiny import llava_next_video
from shortzip.train.release.loading import load_release
from shortzip.train.release.opening import open_release
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import load_config
from shortzip.train.step.objective import SupervisedLoss, train_only_projector

SIDE, PATCH = 40, 4  # 100 patches: the recipes' own budgets fit
RECIPES = sorted(path.name for path in (ROOT / "configs").glob("llava*.yaml"))
# As llava-hf's: with a space behind each role, and marks that leave out the end token.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>' }}{% elif m['role'] == 'assistant' %}{% generation %}"
    "{{ '\n' + c['text'] }}{% endgeneration %}{% else %}{{ '\n' + c['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_toy(folder: Path, recipe: str) -> Path:
    """A random release of the recipe's family, as many layers deep as the real one, and a few numbers wide."""
    tokenizer = build_tokenizer()
    if "qwen" in recipe:
        tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    side = 14 * PATCH if "elastic" in recipe else SIDE  # 196 patches: so do the largest of several
    layers = 40 if "13b" in recipe else 28 if "onevision" in recipe else 24 if "qwen" in recipe else 32
    width = 64 if "4bit" in recipe else 32  # NF4 goes by blocks of 64
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": width, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": side, "patch_size": PATCH,
    }  # fmt: skip
    common = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>")}
    arguments: dict[str, Any] = {"tokenizer": tokenizer, "patch_size": PATCH}
    size = {"height": side, "width": side}
    clip = {"size": {"shortest_edge": side}, "crop_size": size}
    torch.manual_seed(0)
    model: Any
    processor: Any
    if "onevision" in recipe:
        return write_onevision(folder, side=side, layers=layers)
    if "next-video" in recipe:
        return llava_next_video.write_release(folder, side=side, layers=layers)
    if "next" in recipe:
        pinpoints = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
        model = LlavaNextForConditionalGeneration(
            LlavaNextConfig(
                vision_config=CLIPVisionConfig(**vision),
                text_config=LlamaConfig(**text),
                image_grid_pinpoints=pinpoints,
                **common,
            )
        )
        images: Any = LlavaNextImageProcessorPil(**clip, image_grid_pinpoints=pinpoints)
        strategy = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        processor = LlavaNextProcessor(images, **arguments, **strategy)
    elif "qwen" in recipe:
        config = LlavaConfig(
            vision_config=SiglipVisionConfig(**vision, vision_use_head=False), text_config=Qwen2Config(**text),
            vision_feature_layer=-1, vision_feature_select_strategy="full", **common,
        )  # fmt: skip
        model = LlavaForConditionalGeneration(config)
        strategy = {"vision_feature_select_strategy": "full", "chat_template": CHATML}
        processor = LlavaProcessor(SiglipImageProcessorPil(size=size), **arguments, **strategy)
    else:
        config = LlavaConfig(vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**text), **common)
        model = LlavaForConditionalGeneration(config)
        strategy = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        processor = LlavaProcessor(LlavaImageProcessorPil(**clip), **arguments, **strategy)
    model.to(torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_the_recipes_that_must_be_there() -> None:
    assert RECIPES == [
        "llava-1.5-13b-3090-4bit.yaml",
        "llava-1.5-7b-3090.yaml",
        "llava-1.5-7b-distill.yaml",
        "llava-1.5-7b-elastic.yaml",
        "llava-1.5-7b.yaml",
        "llava-interleave-qwen-0.5b.yaml",
        "llava-next-7b.yaml",
        "llava-next-video-7b.yaml",
        "llava-onevision-qwen2-7b.yaml",
    ]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_begins_with_its_command_and_its_needs(recipe: str) -> None:
    text = (ROOT / "configs" / recipe).read_text(encoding="utf-8")
    header = text.split("\nmodel:")[0]
    assert f"--config configs/{recipe}" in header
    launch = header.split("--config_file ")[1].split()[0]
    assert (ROOT / launch).is_file()
    assert {"# Needs ", "# Time  "} <= {line[:8] for line in header.splitlines()}
    assert all(len(line) <= 119 for line in text.splitlines())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_at_toy_size(
    recipe: str, tiny_instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps with the recipe's own keys; only the release, the data and the length are replaced."""
    path = ROOT / "configs" / recipe
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    if keys.get("load_in_4bit"):
        pytest.importorskip("bitsandbytes", reason="pip install 'shortzip[4bit]'")
    release = write_toy(tmp_path / "toy", recipe)
    folder = run_here(
        path, tmp_path / "run", "--model", str(release), "--data.instructions", str(tiny_instructions),
        "--data.image_root", str(tiny_instructions.parent), "--data.num_workers", "0", "--data.fraction", "1",
        "--max_steps", "2", "--num_train_epochs", "null", "--global_batch_size", "8",
        *(["--shortv.calibration_samples", "4"] if "freeze" in keys["shortv"] else []),
        *(part for key in keys["data"] if key.startswith("cache_") for part in (f"--data.{key}", str(tmp_path / key))),
    )  # fmt: skip
    final = open_release(str(folder))
    assert final.saved_reductions.visionzip == keys["visionzip"]
    layers = final.saved_reductions.layers
    chosen = 17 if "onevision" in recipe else 19 if "video" in recipe else 14
    assert set(layers) == set(keys["shortv"]["layers"]) if "layers" in keys["shortv"] else len(layers) == chosen
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    kept = set(keys) - {"model", "data", "num_train_epochs", "global_batch_size", "output_dir", "shortv", "visionzip"}
    keys["learning_rate"] = float(keys["learning_rate"])  # YAML takes 2e-5 for a text
    assert {key: resolved[key] for key in kept} == {key: keys[key] for key in kept}


def test_four_bits_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(ConfigError, match=r"bitsandbytes is not installed: pip install 'shortzip\[4bit\]'"):
        load_config(["--config", str(ROOT / "configs" / "llava-1.5-13b-3090-4bit.yaml")])


def test_gradients_through_four_bit_layers(tmp_path: Path) -> None:
    """The projector's gradient is that of the same model with its 4-bit weights written out."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install 'shortzip[4bit]'")
    release = write_toy(tmp_path / "toy", "llava-1.5-13b-3090-4bit.yaml")
    reductions = Reductions.parse("6+2", "3+5")
    quantised, processor = load_release(ReleaseSpec(str(release), load_in_4bit=True), reductions)
    plain, _ = load_release(str(release), reductions)
    for (_, layer), (_, other) in zip(quantised.named_modules(), plain.named_modules(), strict=True):
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            values = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            other.weight.data = values.to(other.weight.dtype)
    inputs = processor(images=Image.new("RGB", (50, 40), (200, 40, 90)), text="<image>\nhello", return_tensors="pt")
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == plain.config.image_token_id, -100)
    gradients = []
    for model in (quantised, plain):
        train_only_projector(model, torch.float32)
        SupervisedLoss(model)(MicroBatch(dict(inputs), [])).backward()
        gradients.append(model.model.multi_modal_projector.linear_1.weight.grad)
    assert gradients[1].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2e-2, atol=1e-2 * float(gradients[1].abs().max()))
