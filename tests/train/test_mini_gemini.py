"""Mini-Gemini as a family: tuned, cached, batched, published, converted back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mini_gemini_releases import RELEASE, copy_of_release, photograph
from PIL import Image
from runs import ROOT, run_here, write_recipe
from safetensors.torch import load_file
from tiny import write_instructions

from shortzip.data.errors import UserError
from shortzip.data.instructions import Conversation
from shortzip.data.supervision import Supervision, load_template
from shortzip.reduction.configuration_reduced_mini_gemini import ReducedMiniGeminiConfig
from shortzip.reduction.errors import ReductionError
from shortzip.reduction.families import family_of
from shortzip.reduction.flops import parameter_counts
from shortzip.reduction.reductions import Reductions
from shortzip.reduction.selectors import METHODS
from shortzip.train.release.loading import load_processor, load_release, load_viewer, share_weights
from shortzip.train.release.opening import open_release, release_projector
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.release.writing import Shape, write_reduced_checkpoint
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import load_config
from shortzip.train.step.objective import projector_parameters, train_only_projector

BUDGET = {"dominant": 12, "contextual": 4}
QUESTION = "USER: <image>\nWhat is this? ASSISTANT:"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden release in transformers' layout."""
    return open_release(str(RELEASE), cache_dir=tmp_path_factory.mktemp("converted")).folder


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_instructions(tmp_path_factory.mktemp("instructions"), 10)


@pytest.fixture(scope="module")
def loaded(converted: Path) -> tuple[Any, Any]:
    return load_release(str(converted), Reductions(BUDGET, {"layers": [1]}))


def tune(folder: Path, release: Path, instructions: Path, **keys: Any) -> Path:
    keys = {"visionzip": BUDGET, "shortv": {"layers": [1]}, "max_steps": 2, "pictures": 0, **keys}
    return run_here(write_recipe(folder / "recipe.yaml", release, instructions, **keys), folder / "run")


@pytest.fixture(scope="module")
def run(converted: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tune(tmp_path_factory.mktemp("plain"), converted, instructions)


def trained(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "step-000002" / "projector.safetensors")


def test_the_projector_alone_is_trained_and_what_is_mined_is_cached(
    run: Path, converted: Path, instructions: Path, tmp_path: Path
) -> None:
    assert {name.split(".")[2] for name in trained(run)} == {"linear_1", "linear_2"}
    cached = tune(tmp_path, converted, instructions, data={"cache_features": str(tmp_path / "features")})
    assert all(torch.equal(tensor, trained(cached)[name]) for name, tensor in trained(run).items())
    final, release = folder_tensors(run / "final"), folder_tensors(converted)
    assert sum(".mining." in name for name in final) == 12
    assert all(torch.equal(final[name], release[name]) for name in final if "linear_" not in name)


def folder_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_features_of_another_mining_are_others(converted: Path, instructions: Path, tmp_path: Path) -> None:
    from shortzip.train.inputs.feature_cache import features_identity

    model, processor = load_release(str(converted), Reductions(BUDGET))
    before = features_identity(model, processor, "a tower")
    with torch.no_grad():
        model.model.multi_modal_projector.mining.value[1].weight.add_(1)
    assert features_identity(model, processor, "a tower") != before


def test_the_mining_is_trained_too_where_that_is_asked_for(
    converted: Path, instructions: Path, tmp_path: Path
) -> None:
    run = tune(tmp_path, converted, instructions, tune="projector+mining")
    names, release = trained(run), folder_tensors(converted)
    assert sum(".mining." in name for name in names) == 12
    moved = {name for name in names if not torch.equal(names[name], release[name.removeprefix("model.")].float())}
    # What no attention depends on has a gradient of zeros.
    assert names.keys() - moved == {f"model.multi_modal_projector.mining.key.{part}.bias" for part in (0, 1)}
    final, _ = load_release(str(run))
    assert all(torch.equal(final.get_parameter(name), tensor) for name, tensor in trained(run).items())


def test_folded_mining_has_the_gradients_of_the_mining_as_it_is_written(loaded: tuple[Any, Any]) -> None:
    mining = loaded[0].model.multi_modal_projector.mining.requires_grad_(True)
    torch.manual_seed(0)
    patches, features = torch.randn(1, 64, 32), torch.randn(1, 40, 32, 32)

    def as_written() -> torch.Tensor:
        windows = features[0].view(40, 8, 4, 8, 4).permute(1, 3, 2, 4, 0).reshape(64, 16, 40)
        query, key, value = mining.query(patches[0]), mining.key(windows), mining.value(windows)
        attention = (torch.einsum("ph,pwh->pw", query, key) / 32**0.5).softmax(-1)
        return torch.einsum("pw,pwh->ph", attention, value)

    gradients = []
    for compute in (as_written, lambda: mining(patches, features)[0]):
        mining.zero_grad()
        (compute() * torch.linspace(-1, 1, 32)).sum().backward()
        gradients.append({name: weight.grad.clone() for name, weight in mining.named_parameters()})
    mining.requires_grad_(False)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-4, rtol=1e-4), name


@pytest.mark.parametrize(
    ("keys", "said"),
    [(["--data.cache_features", "x"], "data.cache_features"), (["--tuning", "lora"], "tuning lora")],
)
def test_trained_mining_is_refused_beside_what_is_for_the_projector(keys: list[str], said: str) -> None:
    pytest.importorskip("peft")
    arguments = ["--config", str(ROOT / "configs" / "mgm-7b.yaml"), "--tune", "projector+mining", *keys]
    with pytest.raises(ConfigError, match=rf"tune is 'projector\+mining' and does not go with {said}"):
        load_config(arguments)


def test_mining_is_refused_where_there_is_none(tiny_release: Path) -> None:
    model, _ = load_release(str(tiny_release))
    with pytest.raises(UserError, match=r"tune is 'projector\+mining'; of a LLaVA-1\.5 there is projector"):
        train_only_projector(model, torch.float32, "projector+mining")


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_batch_gives_what_its_rows_give(loaded: tuple[Any, Any], side: str) -> None:
    model, processor = loaded
    pictures = [photograph(), Image.new("RGB", (30, 80), (20, 90, 200)), Image.new("RGB", (9, 9), (200, 1, 1))]
    texts = [QUESTION, "USER: <image>\nand <image>\nwhat differs? ASSISTANT:", "USER: hello ASSISTANT:"]
    processor.tokenizer.padding_side = side
    batch = processor(images=[pictures[:1], pictures[1:], []], text=texts, padding=True, return_tensors="pt")
    logits = model(**batch).logits
    for row, (text, images) in enumerate(zip(texts, (pictures[:1], pictures[1:], None), strict=True)):
        alone = processor(images=images, text=text, return_tensors="pt")
        mask = batch["attention_mask"][row].bool()
        assert torch.allclose(model(**alone).logits[0], logits[row, mask], atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("downsample", "visionzip")])
def test_other_methods_choose_by_clip_and_keep_the_sums(loaded: tuple[Any, Any], method: str) -> None:
    model, processor = loaded
    pixels = processor.image_processor(photograph(), return_tensors="pt")["pixel_values"]
    merges = method == "duet"
    reductions = Reductions({"dominant": 12, "contextual": 4 if merges else 4 - 4, "method": method})
    visual = share_weights(model, reductions).model.get_visual_tokens(pixels)
    sums = share_weights(model, Reductions()).model.get_image_features(pixels).last_hidden_state
    tokens = visual.tokens[0, 1:12] if merges else visual.tokens[0]
    assert visual.tokens.shape == (1, 16 if merges else 12, 32)
    if method not in ("prumerge+", "pool"):  # which change what they keep
        assert torch.allclose(tokens, sums[0, visual.kept[0]], atol=1e-4)


def test_what_mini_gemini_has_no_such_thing_of_is_refused(converted: Path) -> None:
    with pytest.raises(ReductionError, match="lose their windows"):
        load_release(str(converted), Reductions({"dominant": 16, "contextual": 0, "method": "downsample"}))
    with pytest.raises(ReductionError, match=r"image_size_aux is 760; .* a multiple of 96 is needed"):
        ReducedMiniGeminiConfig(image_size_aux=760)
    model, _ = load_release(str(converted))
    with pytest.raises(ReductionError, match=r"needed is \[images, 3, 256, 256\]: the high-resolution pixels"):
        model.model.get_image_features(torch.zeros(1, 3, 112, 112))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["MGMGemmaForCausalLM"]}, "that of MGMGemmaForCausalLM, known are .* 2B is a Gemma"),
        ({"architectures": ["MGMMixtralForCausalLM"]}, "that of MGMMixtralForCausalLM, known are .* 8x7B a Mixtral"),
        ({"mm_vision_select_feature": "cls_patch"}, "CLS has no window to mine in"),
        ({"image_size_aux": None}, "lacks image_size_aux"),
    ],
)
def test_releases_that_cannot_be_converted(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        open_release(str(copy_of_release(tmp_path, **changes)), cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("mgm-tiny*/config.json"))


_LOAD = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
sys.path = [path for path in sys.path if "__editable__" not in path]
import importlib.util
assert not [name for name in ("shortzip", "reduction") if importlib.util.find_spec(name)]
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, image, text, out = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=Image.open(image).convert("RGB"), text=text, return_tensors="pt")
with torch.no_grad():
    torch.save(model(**inputs).logits, out)
"""


@torch.no_grad()
@pytest.mark.parametrize("shape", ["full", pytest.param("projector", marks=pytest.mark.slow)])
def test_a_checkpoint_loads_without_shortzip(run: Path, tmp_path: Path, shape: Shape) -> None:
    folder, final = run / "final", open_release(str(run))
    model, processor = load_release(final)
    if shape == "projector":
        folder = tmp_path / "projector"
        release = open_release(yaml.safe_load((run / "config.yaml").read_text())["model"])
        write_reduced_checkpoint(
            folder, release, release_projector(final), load_processor(final), final.saved_reductions, shape=shape
        )
    names = {path.name for path in folder.glob("*.py")}
    assert {"mini_gemini.py", "modeling_reduced_mini_gemini.py", "configuration_reduced_mini_gemini.py"} <= names
    assert names.isdisjoint({"families.py", "modeling_reduced_llava_next.py", "fastv.py", "scope.py", "flops.py"})
    image, out = tmp_path / "image.png", tmp_path / "logits.pt"
    photograph().save(image)
    command = [sys.executable, "-P", "-c", _LOAD, str(folder), str(image), QUESTION, str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    inputs = processor(images=photograph(), text=QUESTION, return_tensors="pt")
    assert torch.allclose(torch.load(out, weights_only=True), model(**inputs).logits, atol=1e-5)


def test_code_of_mini_gemini_travels_with_no_other_family(tiny_release: Path, tmp_path: Path) -> None:
    release = open_release(str(tiny_release))
    folder = tmp_path / "reduced"
    reductions = Reductions({"dominant": 5, "contextual": 3})
    write_reduced_checkpoint(folder, release, release_projector(release), load_processor(release), reductions)
    assert not list(folder.glob("*gemini*"))


def test_back_to_a_file_that_mgm_loads_and_from_there_again(run: Path, converted: Path, tmp_path: Path) -> None:
    final, release = open_release(str(run)), open_release(str(converted))
    folder = tmp_path / "mgm-tuned"
    arguments = (folder, release, release_projector(final), load_processor(final), final.saved_reductions)
    write_reduced_checkpoint(*arguments, shape="llava", base="mgm-tiny")
    tensors = torch.load(folder / "mm_projector.bin", weights_only=True)
    original = {name for path in RELEASE.glob("*.safetensors") for name in load_file(path)}
    assert {name for name in original if "mm_projector" in name or "vlm_uni" in name} == set(tensors)
    laid = load_release(ReleaseSpec(str(converted), mm_projector=str(folder)), Reductions(BUDGET, {"layers": [1]}))[0]
    tuned = load_release(final)[0]
    for name, weight in laid.model.multi_modal_projector.named_parameters():
        assert torch.equal(weight, tuned.model.multi_modal_projector.get_parameter(name)), name
    # And over the original release, while it is converted.
    laid = load_release(open_release(ReleaseSpec(str(RELEASE), mm_projector=str(folder)), cache_dir=tmp_path / "c"))[0]
    assert torch.equal(
        laid.model.multi_modal_projector.linear_1.weight, tuned.model.multi_modal_projector.linear_1.weight
    )


def test_pictures_are_chosen_by_a_viewer_as_by_the_model(run: Path) -> None:
    viewer, processor = load_viewer(open_release(str(run)))
    model, _ = load_release(str(run))
    pixels = processor.image_processor(photograph(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        chosen, expected = (each.model.get_visual_tokens(pixels) for each in (viewer, model))
    assert torch.equal(chosen.kept, expected.kept)
    assert torch.allclose(chosen.tokens, expected.tokens, atol=1e-4)


def test_what_the_towers_and_the_mining_cost() -> None:
    """The facts' 404 GMAC of a ConvNeXt-L at 768 pixels, and about 4 of folded mining; parameters as they are."""
    config = ReducedMiniGeminiConfig()
    family = family_of(config.model_type)
    assert family.more_tower_flops(config, 1) / 2e9 == pytest.approx(404 + 4, rel=0.02)
    from shortzip.reduction.modeling_reduced_mini_gemini import ReducedMiniGeminiForConditionalGeneration

    config.text_config.num_hidden_layers = 1
    with torch.device("meta"):
        model = ReducedMiniGeminiForConditionalGeneration(config)
    assert parameter_counts(config).total == sum(weight.numel() for weight in model.parameters())
    hd = ReducedMiniGeminiConfig(image_size_aux=1536, image_grid=2, image_global=True)
    assert family.tiles(hd) == 5
    assert family.more_tower_flops(hd, 5) / family.more_tower_flops(config, 1) == pytest.approx(4, rel=0.02)


def test_what_is_trained_is_counted(loaded: tuple[Any, Any]) -> None:
    model = share_weights(loaded[0], Reductions(BUDGET), release_projector_of(loaded[0]))
    train_only_projector(model, torch.bfloat16)
    assert len(projector_parameters(model)) == 4
    assert model.model.multi_modal_projector.mining.query[1].weight.dtype == torch.float32
    train_only_projector(model, torch.bfloat16, "projector+mining")
    assert len(projector_parameters(model)) == 16


def release_projector_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in model.model.multi_modal_projector.named_parameters()}


TEXTS = {  # as MGM's get_prompt gives them for two turns, with the placeholder at the start of its own
    "mgm_llama_3": "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, and assist the user with a variety of "
    "tasks using natural language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\nQ<|eot_id|>"
    "<|start_header_id|>system<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nR<|eot_id|>"
    "<|start_header_id|>system<|end_header_id|>\n\nB<|eot_id|>",
    "mgm_chatml_direct": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nQ<|im_end|>"
    "<|im_start|>assistant\nA<|im_end|><|im_start|>user\nR<|im_end|><|im_start|>assistant\nB<|im_end|>",
    "mgm_gemma": "<start_of_turn>user\n<image>\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n</s>"
    "<start_of_turn>user\nR<end_of_turn>\n<start_of_turn>model\nB<end_of_turn>\n</s>",
    "mgm_mistral_instruct": "[INST] <image>\nQ [/INST] A </s><s>[INST] R [/INST] B </s>",
}


@pytest.mark.parametrize("name", TEXTS)
def test_prompts_of_its_other_language_models(loaded: tuple[Any, Any], name: str) -> None:
    turns = (("user", "Q\n<image>"), ("assistant", "A"), ("user", "R"), ("assistant", "B"))
    row = Conversation("row", ("x.jpg",), turns)
    supervision = Supervision(loaded[1], load_template(name), max_length=None)
    text, spans = supervision.render(row)
    assert text == TEXTS[name]
    assert [text[start:end].strip()[0] for start, end in spans] == ["A", "B"]
    prompt, _ = supervision._jinja(row, row.messages()[:1], prompt=True)
    assert text.startswith(prompt)
    assert spans[0][0] == len(prompt)


@pytest.mark.slow
def test_the_recipe_runs_at_toy_size(converted: Path, instructions: Path, tmp_path: Path) -> None:
    path = ROOT / "configs" / "mgm-7b.yaml"
    folder = run_here(
        path, tmp_path / "run", "--model", str(converted), "--data.instructions", str(instructions),
        "--data.image_root", str(instructions.parent), "--data.num_workers", "0", "--data.fraction", "1",
        "--max_steps", "2", "--num_train_epochs", "null", "--global_batch_size", "4",
    )  # fmt: skip
    assert open_release(str(folder)).saved_reductions.visionzip == {"dominant": 54, "contextual": 10}
