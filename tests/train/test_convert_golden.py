"""A release in LLaVA's own layout gives what LLaVA's own code gives with it (goldens: their unmodified code)."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from originals import EXPECTED, GOLDEN, PRETRAIN, RELEASE, all_tensors, copy_of_release, edit_config
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from shortzip.reduction.reductions import Reductions
from shortzip.train.release.loading import load_release
from shortzip.train.release.opening import open_release
from shortzip.train.release.spec import ReleaseSpec

CASES = [(image, prompt) for image in range(3) for prompt in range(3)]


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "A_expected.safetensors")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("converted")


@pytest.fixture(scope="module")
def plain(cache: Path) -> tuple[Any, Any]:
    return load_release(open_release(str(RELEASE), cache_dir=cache))


@pytest.fixture(scope="module")
def reduced(cache: Path) -> tuple[Any, Any]:
    return load_release(open_release(str(RELEASE), cache_dir=cache), Reductions({"dominant": 12, "contextual": 4}))


def photograph(number: int) -> Image.Image:
    return Image.open(GOLDEN / "images" / EXPECTED["images"][number]["file"]).convert("RGB")


def expected_ids(prompt: int, budget: int, image_token: int) -> list[int]:
    ids: list[int] = []
    for token in EXPECTED["input_ids"][prompt]:
        ids += [image_token] * budget if token == -200 else [token]
    return ids


@pytest.mark.parametrize(("kind", "budget"), [("vanilla", 64), ("visionzip", 16)])
@pytest.mark.parametrize(("image", "prompt"), CASES)
def test_pixels_ids_logits_and_greedy_tokens(
    request: pytest.FixtureRequest, golden: dict[str, torch.Tensor], kind: str, budget: int, image: int, prompt: int
) -> None:
    model, processor = request.getfixturevalue("plain" if kind == "vanilla" else "reduced")
    inputs = processor(images=photograph(image), text=EXPECTED["prompt_texts"][prompt], return_tensors="pt")
    assert torch.equal(inputs["pixel_values"][0], golden["pixel_values"][image])
    assert inputs["input_ids"][0].tolist() == expected_ids(prompt, budget, model.config.image_token_id)
    case = f"i{image}_p{prompt}"
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    torch.testing.assert_close(logits[:1000], golden[f"{kind}_logits_last_{case}"], rtol=0, atol=1e-4)
    said = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert said.tolist() == golden[f"{kind}_generated_{case}"].tolist()


def test_more_positions_and_image_features(plain: tuple[Any, Any], golden: dict[str, torch.Tensor]) -> None:
    model, processor = plain
    inputs = processor(images=photograph(0), text=EXPECTED["prompt_texts"][0], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -40:, :1000]
        features = model.get_image_features(golden["pixel_values"]).pooler_output
    torch.testing.assert_close(logits, golden["vanilla_logits_tail40_i0_p0"], rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.stack(list(features)), golden["vanilla_projected_features"], rtol=0, atol=1e-4)


def test_visionzip_features_of_a_converted_release(reduced: tuple[Any, Any], golden: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        tokens = reduced[0].model.get_visual_tokens(golden["pixel_values"]).tokens
    torch.testing.assert_close(tokens, golden["visionzip_tower_features"], rtol=0, atol=5e-5)


def test_plain_transformers_loads_the_conversion(cache: Path, golden: dict[str, torch.Tensor]) -> None:
    folder = open_release(str(RELEASE), cache_dir=cache).folder
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=photograph(1), text=EXPECTED["prompt_texts"][2], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == expected_ids(2, 64, 1000)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1, :1000]
    torch.testing.assert_close(logits, golden["vanilla_logits_last_i1_p2"], rtol=0, atol=1e-4)


def test_new_ids_never_win(plain: tuple[Any, Any]) -> None:
    """The rows added for the placeholder repeat <unk>'s, so no new id scores above an id of the release."""
    head = plain[0].lm_head.weight
    assert head.shape[0] == 1024
    assert torch.equal(head[1000:], head[:1].expand(24, -1))


def test_the_chat_template_gives_the_prompt_the_release_was_trained_with(plain: tuple[Any, Any]) -> None:
    content = [{"type": "image"}, {"type": "text", "text": EXPECTED["prompts"][1]}]
    text = plain[1].apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == EXPECTED["prompt_texts"][1]


def test_config_and_tokenizer_files_of_the_2023_release(tmp_path: Path, golden: dict[str, torch.Tensor]) -> None:
    """model_type `llava`, no rope_theta, the pad token in special_tokens_map.json alone."""
    release = copy_of_release(tmp_path)
    for file in (RELEASE / "release_style").iterdir():
        shutil.copyfile(file, release / file.name)
    model, processor = load_release(open_release(str(release), cache_dir=tmp_path))
    assert processor.tokenizer.pad_token == "<unk>"
    inputs = processor(images=photograph(2), text=EXPECTED["prompt_texts"][1], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == expected_ids(1, 64, 1000)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1, :1000]
    torch.testing.assert_close(logits, golden["vanilla_logits_last_i2_p1"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("given", [PRETRAIN, PRETRAIN / "mm_projector.bin"])
@pytest.mark.parametrize("base", ["original", "converted"])
def test_mm_projector_over_a_base(cache: Path, golden: dict[str, torch.Tensor], given: Path, base: str) -> None:
    name = str(RELEASE if base == "original" else open_release(str(RELEASE), cache_dir=cache).folder)
    model, processor = load_release(open_release(ReleaseSpec(name, mm_projector=str(given)), cache_dir=cache))
    inputs = processor(images=photograph(0), text=EXPECTED["prompt_texts"][0], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1, :1000]
        features = torch.stack(list(model.get_image_features(golden["pixel_values"]).pooler_output))
    torch.testing.assert_close(logits, golden["pretrain_logits_last_i0_p0"], rtol=0, atol=1e-4)
    torch.testing.assert_close(features, golden["pretrain_projected_features"], rtol=0, atol=1e-4)


def test_mm_projector_over_the_vicuna_it_was_pretrained_on(tmp_path: Path, golden: dict[str, torch.Tensor]) -> None:
    """The base has no mm_* keys: they come from beside the projector."""
    release = copy_of_release(tmp_path)
    config = json.loads((release / "config.json").read_text())
    kept = {key: value for key, value in config.items() if not key.startswith(("mm_", "image_", "tune_", "use_mm"))}
    (release / "config.json").write_text(json.dumps({**kept, "model_type": "llama"}))
    with pytest.raises(ValueError, match=r"text-only language model.*mm_projector"):
        open_release(str(release), cache_dir=tmp_path)
    model, _ = load_release(open_release(ReleaseSpec(str(release), mm_projector=str(PRETRAIN)), cache_dir=tmp_path))
    with torch.no_grad():
        features = torch.stack(list(model.get_image_features(golden["pixel_values"]).pooler_output))
    torch.testing.assert_close(features, golden["pretrain_projected_features"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("unfreeze", "key"), [(None, "default"), (True, "unfreeze_mm_vision_tower_true")])
def test_what_llavas_own_fine_tuning_saves(
    tmp_path: Path, golden: dict[str, torch.Tensor], unfreeze: bool | None, key: str
) -> None:
    """The tower is inside, with fp16 values; the original loader uses it only if unfreeze_mm_vision_tower is true.

    The golden training began with the pretrained projector and took no step.
    """
    release = copy_of_release(tmp_path)
    tower = torch.load(tmp_path / "openai" / "clip-vit-tiny-patch14-112" / "pytorch_model.bin", weights_only=True)
    inside = {
        f"model.vision_tower.vision_tower.{name}": tensor.half().float()
        for name, tensor in tower.items()
        if name.startswith("vision_model.")
    }
    projector = torch.load(PRETRAIN / "mm_projector.bin", weights_only=True)
    everything = {**all_tensors(release), **projector, **inside}
    for path in release.glob("pytorch_model*"):
        path.unlink()
    save_file(everything, release / "model.safetensors")
    edit_config(release, unfreeze_mm_vision_tower=unfreeze)
    model, _ = load_release(open_release(str(release), cache_dir=tmp_path))
    with torch.no_grad():
        features = torch.stack(list(model.get_image_features(golden["pixel_values"]).pooler_output))
    wanted = golden[f"trainout_projected_features_{key}"]
    torch.testing.assert_close(features, wanted, rtol=0, atol=1e-5)
    other = {"default", "unfreeze_mm_vision_tower_true"} - {key}
    assert (features - golden[f"trainout_projected_features_{other.pop()}"]).abs().max() > 1e-4


def test_ids_of_whole_conversations(cache: Path) -> None:
    """A prompt tokenized in one piece gives the ids that LLaVA gets piece by piece, over several turns."""
    tokenizer = AutoTokenizer.from_pretrained(open_release(str(RELEASE), cache_dir=cache).folder)
    golden = json.loads((GOLDEN.parent / "labels" / "labels_shared.json").read_text(encoding="utf-8"))
    assert len(golden["conversations"]) == 16
    for conversation in golden["conversations"]:
        row = conversation["v1"]
        text = row["input_raw_text"].removeprefix("<s> ").replace("<image> ", "<image>")
        wanted = [1000 if token == -200 else token for token in row["input_ids"]]
        assert tokenizer(text).input_ids == wanted, conversation["id"]


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40))
def test_the_fast_tokenizer_equals_sentencepiece(text: str) -> None:
    """Ids of any text are those of the release's own sentencepiece model."""
    if text.startswith((" ", "▁")) or any(mark in text for mark in ("<unk>", "<s>", "</s>", "<image>")):
        return
    assert fast().encode(text) == [1, *slow().encode(text)]
    assert fast().encode(f"<image>{text}") == [1, 1000, *slow().encode(text)]


_tokenizers: dict[str, Any] = {}


def fast() -> Any:
    if "fast" not in _tokenizers:
        from shortzip.train.release.original_layout import read_vocabulary

        _tokenizers["fast"] = read_vocabulary(RELEASE, 1000).tokenizer
    return _tokenizers["fast"]


def slow() -> Any:
    if "slow" not in _tokenizers:
        _tokenizers["slow"] = sentencepiece.SentencePieceProcessor(model_file=str(RELEASE / "tokenizer.model"))
    return _tokenizers["slow"]
