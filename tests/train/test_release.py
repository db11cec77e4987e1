"""Whatever a user may name as the model: found, fetched, checked and loaded; or refused with the cure."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks
from hub_server import WRITER, Hub
from originals import GOLDEN, RELEASE
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from shortzip.data.supervision import load_template
from shortzip.reduction.reductions import Reductions
from shortzip.train.release.loading import load_release, load_viewer, share_weights
from shortzip.train.release.opening import open_release, read_projector, release_projector
from shortzip.train.release.original_layout import read_vocabulary, split_after_images
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.release.writing import write_reduced_checkpoint

VISIONZIP = {"dominant": 4, "contextual": 2}


def test_a_viewer_chooses_the_tokens_of_the_whole_model_and_holds_its_tower_alone(tiny_release: Path) -> None:
    budget = {"dominant": 5, "contextual": 3}
    viewer, processor = load_viewer(open_release(str(tiny_release)), Reductions(budget))
    model, _ = load_release(str(tiny_release), Reductions(budget))
    side = model.config.vision_config.image_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = model.model.get_visual_tokens(pixels), viewer.model.get_visual_tokens(pixels)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.kept, expected.kept)
    held = {name for name, weight in viewer.named_parameters() if not weight.is_meta}
    assert held
    assert all("vision_tower" in name for name in held)
    assert processor.visionzip == viewer.config.visionzip


REDUCED = [
    Reductions(),
    Reductions(VISIONZIP, {"layers": [1, 2]}),
    Reductions({"dominant": 6, "contextual": 0, "method": "grid"}, fastv={"layer": 2, "keep": 0.5}),
]


@pytest.mark.parametrize("first", REDUCED)
@pytest.mark.parametrize("second", REDUCED)
def test_models_that_share_weights_are_those_loaded_apart(
    tiny_release: Path, first: Reductions, second: Reductions
) -> None:
    model, _ = load_release(str(tiny_release), first)
    apart, processor = load_release(str(tiny_release), second)
    projector = apart.model.multi_modal_projector
    with torch.no_grad():
        projector.linear_2.bias += 1.0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shared = share_weights(model, second, projector.state_dict())
    inputs = processor(images=Image.new("RGB", (30, 20), (9, 99, 199)), text="<image>\nhello", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(shared(**inputs).logits, apart(**inputs).logits)
    own, theirs = dict(shared.named_parameters()), dict(model.named_parameters())
    assert own.keys() == theirs.keys() == dict(apart.named_parameters()).keys()
    copied = {name for name in own if own[name] is not theirs[name]}
    assert copied == {name for name in own if "multi_modal_projector" in name}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert (model.config.visionzip, model.config.fastv) == (first.visionzip, first.fastv)
    with pytest.raises(ValueError, match="layers \\[9\\] do not exist"):
        share_weights(model, Reductions(shortv={"layers": [9]}))


@pytest.fixture
def release(tiny_release: Path, tmp_path: Path) -> Path:
    """A writable copy."""
    return shutil.copytree(tiny_release, tmp_path / "tiny")


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_release_unreduced_equals_transformers_own(tiny_release: Path) -> None:
    model, processor = load_release(str(tiny_release))
    assert (model.config.visionzip, model.config.shortv) == (None, None)
    plain = LlavaForConditionalGeneration.from_pretrained(tiny_release)
    inputs = processor(images=Image.new("RGB", (30, 20), (9, 99, 199)), text="<image>\nhello", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


def test_the_processor_writes_the_budget_and_carries_the_template(tiny_release: Path) -> None:
    model, processor = load_release(str(tiny_release), Reductions(VISIONZIP, {"layers": [1]}))
    inputs = processor(images=Image.new("RGB", (30, 20)), text="<image>\nhello", return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 6
    assert "A chat between a curious user" in processor.chat_template
    assert type(processor.image_processor).__name__ == "LlavaImageProcessorPil"


def test_the_projector_is_float32_and_exact_whatever_the_rest_is_in(tiny_release: Path) -> None:
    model, _ = load_release(ReleaseSpec(str(tiny_release), dtype=torch.bfloat16))
    assert model.lm_head.weight.dtype == torch.bfloat16
    stored = load_file(tiny_release / "model.safetensors")
    name = next(name for name in stored if name.endswith("multi_modal_projector.linear_1.weight"))
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight, stored[name])


def test_a_reduced_checkpoint_keeps_the_template_that_it_was_tuned_with(tiny_release: Path, tmp_path: Path) -> None:
    """Even one of pretraining, which teaches no end token and would be refused in a release."""
    release = open_release(ReleaseSpec(str(tiny_release), chat_template="plain"))
    _, processor = load_release(release)
    folder = tmp_path / "tuned"
    write_reduced_checkpoint(folder, release, release_projector(release), processor, Reductions.parse("5+3"))
    _, loaded = load_release(str(folder))
    assert loaded.chat_template == processor.chat_template == load_template("plain")


def test_clip_image_processors_are_replaced_by_one_that_pads(release: Path) -> None:
    """transformers' LLaVA-1.5 releases ship a CLIPImageProcessor, which crops and ignores do_pad in silence."""
    processor = LlavaProcessor.from_pretrained(release)
    size = {"height": 24, "width": 24}
    processor.image_processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=size)
    processor.save_pretrained(release)
    _, loaded = load_release(str(release))
    image = Image.new("RGB", (40, 10), (255, 255, 255))
    pixels = loaded(images=image, text="<image>", return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == (3, 24, 24)
    mean = torch.tensor(loaded.image_processor.image_mean)
    background = torch.tensor([int(value * 255) / 255 for value in mean]) - mean
    assert torch.allclose(pixels[:, 0, 0], background / torch.tensor(loaded.image_processor.image_std), atol=1e-5)


@pytest.mark.parametrize(
    "missing",
    [
        ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"),
        ("num_additional_image_tokens",),  # releases of the years between: one placeholder less, without a word
    ],
)
def test_settings_that_an_old_processor_lacks_come_from_the_config(release: Path, missing: tuple[str, ...]) -> None:
    path = release / "processor_config.json"
    settings = json.loads(path.read_text())
    for key in missing:
        del settings[key]
    path.write_text(json.dumps(settings))
    _, processor = load_release(str(release))
    assert processor._get_num_multimodal_tokens(image_sizes=[[24, 24]])["num_image_tokens"] == [36]


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As transformers' fast Llama tokenizers: a leading space for the first text only."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", "<image>"]
    tokenizer.train_from_iterator(["what is it? A\n"], trainers.BpeTrainer(vocab_size=60, special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    "text", ["<image>\nwhat", "is <image>\nit", "<image><image>\nwhat", "it <image>", "<image>what</s>is", "A</s>it"]
)
def test_the_text_after_an_image_is_tokenized_as_llava_does(text: str) -> None:
    plain = sentencepiece_like()
    mended = split_after_images(plain, "<image>")
    wanted: list[int] = []
    for number, piece in enumerate(text.split("<image>")):
        wanted += ([3] if number else []) + (plain.encode(piece, add_special_tokens=False) if piece else [])
    assert mended.encode(text, add_special_tokens=False) == wanted
    assert split_after_images(mended, "<image>") is mended


def test_text_after_a_video_begins_as_after_an_image() -> None:
    """The video's placeholder comes first among the ids, as in transformers' LLaVA-NeXT-Video."""
    vocabulary = read_vocabulary(RELEASE, 1000, ("<video>", "<image>"))
    tokenizer: Any = vocabulary.tokenizer
    video, image = tokenizer.convert_tokens_to_ids(["<video>", "<image>"])
    assert (video, image, vocabulary.image_token_id, vocabulary.rows) == (1000, 1001, 1001, 1024)
    bos, alone = tokenizer.bos_token_id, tokenizer.encode("\nA", add_special_tokens=False)
    assert tokenizer.encode("<image>\nA") == [bos, image, *alone]
    assert tokenizer.encode("<video><image>\nA<video>\nA") == [bos, video, image, *alone, video, *alone]


def test_a_runs_folder(tiny_release: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("model: x")
    with pytest.raises(FileNotFoundError, match=r"run that has not finished \(no final/\): continue it"):
        open_release(str(run))
    shutil.copytree(tiny_release, run / "final")
    assert open_release(str(run)).folder == run / "final"


def text_only(release: Path) -> None:
    shutil.rmtree(release)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(release)


def cut(release: Path) -> None:
    path = release / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def rename(old: str, new: str) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return lambda release: edit_weights(release, change)


def drop(part: str) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return lambda release: edit_weights(release, change)


def half(part: str) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(part)]:
            tensors[name] = tensors[name].half()

    return lambda release: edit_weights(release, change)


def narrow(release: Path) -> None:
    edit_weights(release, lambda t: t.update({n: v[:, :8].clone() for n, v in t.items() if "linear_1.weight" in n}))


BAD: list[tuple[str, Callable[[Path], Any], str]] = [
    ("text-only LLaMA", text_only,
     r"text-only language model \(model_type 'llama'\): needed is a LLaVA .*mm_projector"),
    ("cut short", cut, r"model.safetensors was cut short or damaged \(\d+ bytes; .*\): download or convert it again"),
    ("another architecture", lambda r: edit_config(r, lambda c: c.update(model_type="idefics3")),
     "model_type is 'idefics3', known are llava"),
    ("no weights", lambda r: (r / "model.safetensors").unlink(), "holds no weights .*download the release again"),
    ("no config", lambda r: (r / "config.json").unlink(), "config.json is missing: is .* the folder of a release"),
    ("no projector", drop("multi_modal_projector"), "needed is LLaVA's two-layer projector .*found is none"),
    ("linear projector", drop("linear_2"), "found is one with linear_1.bias, linear_1.weight"),
    ("resampler", rename("linear_", "resampler."), r"found is one with resampler.1.bias, resampler.1.weight"),
    ("projector of another width", narrow,
     r"linear_1.weight is \(32, 8\), needed is \(32, 24\) \(vision tower 24 wide, language model 32 wide\)"),
    ("mixed dtypes", half("lm_head.weight"),
     r"language model's tensors have mixed dtypes: .*1 in float16 \(such as .*lm_head.weight\).*--dtype float16"),
    ("missing tensors", drop("layers.3.mlp.up_proj"), "does not fill ReducedLlava.*1 missing keys"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_releases_are_refused(release: Path, change: Callable[[Path], Any], message: str) -> None:
    change(release)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_release(str(release))


def test_a_projector_in_another_dtype_than_the_rest_is_none_of_these(release: Path) -> None:
    half("projector.linear_1.weight")(release)
    with pytest.raises(ValueError, match="projector's tensors have mixed dtypes"):
        load_release(str(release))
    for name in ("projector.linear_1.bias", "projector.linear_2.weight", "projector.linear_2.bias"):
        half(name)(release)
    load_release(str(release))


def test_projector_files_over_a_transformers_release(release: Path, tmp_path: Path) -> None:
    tensors = {
        "multi_modal_projector." + name: t + 1 for name, t in release_projector(open_release(str(release))).items()
    }
    save_file(tensors, tmp_path / "projector.safetensors")
    model, _ = load_release(ReleaseSpec(str(release), mm_projector=str(tmp_path)))
    laid = model.model.multi_modal_projector.state_dict()
    assert all(torch.equal(laid[name], tensors["multi_modal_projector." + name]) for name in laid)
    tensors["multi_modal_projector.linear_1.weight"] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / "projector.safetensors")
    with pytest.raises(
        ValueError, match=r"projector.safetensors: the projector's linear_1.weight is \(3, 3\), needed"
    ):
        open_release(ReleaseSpec(str(release), mm_projector=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match=r"mm_projector .*nothing: no such file"):
        open_release(ReleaseSpec(str(release), mm_projector=str(tmp_path / "nothing")))
    torch.save({"model.embed_tokens.weight": torch.zeros(2)}, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=r"x.bin holds no projector"):
        read_projector(tmp_path / "x.bin")


def test_a_conversion_is_kept_and_made_anew_when_the_release_changes(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "openai", tmp_path / "openai")
    shutil.copytree(RELEASE, tmp_path / "llava")
    first = open_release(str(tmp_path / "llava"), cache_dir=tmp_path / "cache").folder
    stamp = (first / "config.json").stat().st_mtime_ns
    assert open_release(str(tmp_path / "llava"), cache_dir=tmp_path / "cache").folder == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    os.utime(tmp_path / "llava" / "pytorch_model-00002-of-00003.bin")
    assert open_release(str(tmp_path / "llava"), cache_dir=tmp_path / "cache").folder == first, "the content decides"
    config = tmp_path / "llava" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 99}))
    assert open_release(str(tmp_path / "llava"), cache_dir=tmp_path / "cache").folder != first


@pytest.mark.parametrize("name", ["nowhere/at/all", "./nowhere", "/nowhere", "nowhere"])
def test_a_name_that_is_nothing(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"does not exist: needed is a folder, or a Hub id"):
        open_release(name)


def test_a_revision_of_a_folder(tiny_release: Path) -> None:
    with pytest.raises(ValueError, match=r"revision 'v1' is for Hub ids, but .* is a folder"):
        open_release(ReleaseSpec(str(tiny_release), "v1"))


def test_four_bits_without_bitsandbytes(tiny_release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'shortzip\[4bit\]'"):
        load_release(ReleaseSpec(str(tiny_release), load_in_4bit=True))


FETCH = """
import sys
from shortzip.train.release.hub import fetch
from shortzip.train.release.spec import ReleaseSpec
for name in sys.argv[1:]:
    name, _, revision = name.partition("@")
    try:
        folder, commit = fetch(name, revision or None)
        print(commit, *sorted(path.name for path in folder.iterdir()))
    except (FileNotFoundError, ValueError) as error:
        print(type(error).__name__, error)
"""


def test_from_the_hub_and_its_cache(tiny_release: Path, tmp_path: Path) -> None:
    """A branch, a commit, a private repository; what is not there; and the Hub out of reach afterwards."""
    script = tmp_path / "fetch.py"
    script.write_text(FETCH)
    extra = shutil.copytree(tiny_release, tmp_path / "with-extra")
    (extra / "pytorch_model.bin").write_bytes(b"never fetched beside safetensors")
    (extra / "training_args.bin").write_bytes(b"nor this")
    with Hub() as hub:
        old = hub.add("maker/llava", tiny_release)
        new = hub.add("maker/llava", extra)
        hub.add("maker/secret", tiny_release, private=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        with Forks({**kept, **hub.environment(tmp_path / "home", None), "OMP_NUM_THREADS": "1"}) as forks:
            names = ["maker/llava", f"maker/llava@{old}", "maker/llava@v9", "maker/none", "maker/secret"]
            main, pinned, no_revision, nothing, secret = forks.run(str(script), *names).stdout.splitlines()
            assert main.startswith(new)
            assert "model.safetensors" in main
            assert "pytorch_model.bin" not in main
            assert "training_args.bin" not in main
            assert pinned.startswith(old)
            assert "MissingFile maker/llava has no revision 'v9': give a branch, tag or commit" in no_revision
            assert "MissingFile maker/none is neither a folder nor a repository" in nothing
            assert "MissingFile maker/secret is neither a folder nor a repository" in secret
            assert forks.run(str(script), "maker/secret", HF_TOKEN=WRITER).stdout.count("model.safetensors") == 1
            hub.close()
            again, never = forks.run(str(script), "maker/llava", "maker/other").stdout.splitlines()
            assert again == main
            assert "MissingFile there is no folder maker/other in " in never
            assert "maker/other is not in the Hub's cache, and the Hub cannot be reached: connect this" in never
