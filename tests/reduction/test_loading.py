"""From a release to a reduced model, to a folder, and from there to anywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from reduced_models import REDUCTIONS, build, make_row
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaProcessor,
)

from shortzip.reduction import (
    ReducedLlavaForConditionalGeneration,
    ReducedLlavaNextForConditionalGeneration,
    ReducedLlavaProcessor,
)

PHOTOGRAPH = Path(__file__).parents[1] / "golden" / "llava_next" / "tall_140x380.jpg"
BUDGET = {"dominant": 5, "contextual": 3}
FROZEN = {"layers": [1, 3]}
CLASSES = {
    "llava": (ReducedLlavaForConditionalGeneration, LlavaForConditionalGeneration),
    "llava_next": (ReducedLlavaNextForConditionalGeneration, LlavaNextForConditionalGeneration),
}
families = pytest.mark.parametrize("family", list(CLASSES))


def same_weights(model, other):
    assert list(model.state_dict()) == list(other.state_dict())
    return all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )


def weight_names(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sorted(file.keys())


@families
@pytest.mark.parametrize("reduction", list(REDUCTIONS))
@pytest.mark.parametrize("decoder", ["llama", "mistral", "qwen2"])
def test_a_release_loads_and_a_reduced_checkpoint_loads_back(tmp_path, family, reduction, decoder):
    reduced_class, plain_class = CLASSES[family]
    plain = build(decoder, next_=family == "llava_next", plain=True)
    plain.save_pretrained(tmp_path / "release")
    model = reduced_class.from_pretrained(tmp_path / "release", **REDUCTIONS[reduction])
    assert same_weights(model, plain)
    model.save_pretrained(tmp_path / "reduced")
    assert weight_names(tmp_path / "reduced") == weight_names(tmp_path / "release")
    again, info = reduced_class.from_pretrained(tmp_path / "reduced", output_loading_info=True)
    assert same_weights(again, plain)
    assert not info["missing_keys"]
    assert (again.config.visionzip, again.config.shortv) == tuple(REDUCTIONS[reduction].values())
    assert same_weights(plain_class.from_pretrained(tmp_path / "reduced"), plain)
    bare = reduced_class.from_pretrained(tmp_path / "reduced", visionzip=None, shortv=None)
    assert (bare.config.visionzip, bare.config.shortv) == (None, None)


@families
def test_weights_under_the_names_of_old_and_new_releases_load(tmp_path, family):
    """Old: language_model.model.layers…, vision_tower.vision_model…; new: as in the model's own state_dict."""
    reduced_class, _ = CLASSES[family]
    plain = build(next_=family == "llava_next", plain=True)
    plain.save_pretrained(tmp_path)
    old = {}
    for name, weight in plain.state_dict().items():
        name = name.replace("model.language_model.", "language_model.model.").replace(
            "lm_head", "language_model.lm_head"
        )
        name = name.replace("model.vision_tower.", "vision_tower.vision_model.")
        old[name.removeprefix("model.")] = weight.contiguous()
    assert "language_model.model.layers.0.mlp.up_proj.weight" in old
    for weights in (old, plain.state_dict()):
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        assert same_weights(reduced_class.from_pretrained(tmp_path, **REDUCTIONS["both"]), plain)


@families
def test_missing_unexpected_and_misshapen_weights_are_refused_by_name(tmp_path, family):
    reduced_class, _ = CLASSES[family]
    build(next_=family == "llava_next", plain=True).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)

    def load(changed):
        save_file(changed, path, metadata={"format": "pt"})
        reduced_class.from_pretrained(tmp_path)

    head = "language_model.lm_head.weight"
    with pytest.raises(ValueError, match=r"1 missing keys \(lm_head\.weight"):
        load({name: weight for name, weight in weights.items() if name != head})
    with pytest.raises(ValueError, match=r"1 unexpected keys \(stray"):
        load({**weights, "stray": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"1 mismatched keys \(\('lm_head\.weight'"):
        load({**weights, head: weights[head][:5].clone()})


def test_the_wrong_family_and_the_original_layout_are_refused(tmp_path):
    build(next_=True, plain=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'llava_next'; this class loads 'llava' and 'reduced_llava'"):
        ReducedLlavaForConditionalGeneration.from_pretrained(tmp_path)
    config = {"model_type": "llava", "hidden_size": 32, "mm_vision_tower": "openai/clip"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="original LLaVA release"):
        ReducedLlavaForConditionalGeneration.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def reduced_checkpoint(tiny_release, tmp_path_factory):
    """Model and processor saved side by side, and the logits and answer they gave before."""
    folder = tmp_path_factory.mktemp("reduced")
    model = ReducedLlavaForConditionalGeneration.from_pretrained(tiny_release, visionzip=BUDGET, shortv=FROZEN)
    processor = ReducedLlavaProcessor.from_pretrained(tiny_release, visionzip=BUDGET)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    inputs = processor(images=Image.open(PHOTOGRAPH), text="USER: <image>\nhello ASSISTANT:", return_tensors="pt")
    with torch.no_grad():
        save_file({"logits": model(**inputs).logits}, folder / "expected.safetensors")
    return folder


ELSEWHERE = """
import sys


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("shortzip", "reduction", "data", "train"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NotInstalled())
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

torch.set_num_threads(1)
folder, photograph = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert type(processor).__module__.startswith("transformers_modules."), type(processor)
assert type(model.model.language_model.layers[1]).__name__ == "FrozenLlamaDecoderLayer"
image = Image.open(photograph)
prompt = "USER: <image>\\nhello ASSISTANT:"
inputs = processor(images=image, text=prompt, return_tensors="pt")
assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 8
with torch.no_grad():
    logits = model(**inputs).logits
assert torch.equal(logits, load_file(folder + "/expected.safetensors")["logits"])
answer = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
text = answer(images=image, text=prompt, max_new_tokens=5, return_full_text=False)[0]["generated_text"]
expected = model.generate(**inputs, max_new_tokens=5)[:, inputs["input_ids"].shape[1]:]
assert text == processor.batch_decode(expected, skip_special_tokens=True)[0], text
model.save_pretrained(folder + "/again")
processor.save_pretrained(folder + "/again")
again = AutoModelForImageTextToText.from_pretrained(folder + "/again", trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(again(**inputs).logits, logits)
print("works elsewhere")
"""


def test_a_saved_folder_works_where_shortzip_is_not_installed(reduced_checkpoint, tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    result = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, str(reduced_checkpoint), str(PHOTOGRAPH)],
        cwd=tmp_path,
        env={**environment, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "works elsewhere" in result.stdout


def test_the_code_that_travels_imports_torch_transformers_and_its_own_folder_only(reduced_checkpoint):
    code = {path.name: path.read_text() for path in reduced_checkpoint.glob("*.py")}
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    for name, text in code.items():
        for line in text.splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                package, _, module = words[1].partition(".")
                assert package in allowed or (package == "" and f"{module}.py" in code), (name, line)
    assert {"modeling_reduced_llava.py", "shortv.py", "visionzip.py"} < code.keys()


def test_where_shortzip_is_installed_the_auto_classes_need_no_trust(reduced_checkpoint):
    model = AutoModelForImageTextToText.from_pretrained(reduced_checkpoint)
    assert type(model) is ReducedLlavaForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(reduced_checkpoint)) is ReducedLlavaProcessor
    assert AutoConfig.from_pretrained(reduced_checkpoint).visionzip == BUDGET


def test_loaded_as_plain_llava_transformers_own_mismatch_error_appears(reduced_checkpoint):
    model = LlavaForConditionalGeneration.from_pretrained(reduced_checkpoint)
    processor = ReducedLlavaProcessor.from_pretrained(reduced_checkpoint)
    inputs = processor(images=Image.open(PHOTOGRAPH), text="<image>", return_tensors="pt")
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**inputs)


def test_a_plain_processor_meets_our_message(reduced_checkpoint, tiny_release):
    model = ReducedLlavaForConditionalGeneration.from_pretrained(reduced_checkpoint)
    inputs = LlavaProcessor.from_pretrained(tiny_release)(
        images=Image.open(PHOTOGRAPH), text="<image>", return_tensors="pt"
    )
    with pytest.raises(ValueError, match=r"hold 36 image placeholders, the images give 8 visual tokens.*processor"):
        model(**inputs)


def test_a_checkpoint_in_half_precision_keeps_its_dtype(tmp_path):
    build(dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = ReducedLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert ReducedLlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_weights_on_the_cpu_leave_for_the_device_layer_by_layer():
    """accelerate's offloading: a module's weights are there only while it runs, the score's too."""
    from accelerate import cpu_offload

    model = build()
    row = make_row(model, "ttItt")
    with torch.no_grad():
        expected = model(**row).logits
        cpu_offload(model, execution_device="cpu")
        torch.testing.assert_close(model(**row).logits, expected, rtol=0, atol=1e-5)
