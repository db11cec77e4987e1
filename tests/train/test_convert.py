"""Converting LLaVA's own layout: nothing is lost, little memory is used, and what does not fit is refused."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import PRETRAIN, RELEASE, TOWER, all_tensors, copy_of_release, edit_config, edit_shard
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)

from shortzip.train.release.convert import convert_to_transformers, write_llava_projector
from shortzip.train.release.layouts import layout_for
from shortzip.train.release.opening import open_release
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.release.tensor_files import TensorSpec, folder_specs, read_specs, write_safetensors


@pytest.fixture
def release(tmp_path: Path) -> Path:
    return copy_of_release(tmp_path)


def converted_tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("model*.safetensors"):
        found.update(load_file(path))
    return found


def half_the_language_model(release: Path) -> None:
    """As the public releases: float16, but for the tower, which is float32 in a repository of its own."""
    for number in range(3):
        edit_shard(release, number, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))


def test_every_tensor_is_kept_bit_for_bit_in_its_own_dtype(release: Path, tmp_path: Path) -> None:
    half_the_language_model(release)
    convert_to_transformers(release, tmp_path / "out", tower=TOWER)
    found = converted_tensors(tmp_path / "out")
    for name, tensor in all_tensors(release).items():
        if "mm_projector" in name:
            key = name.split("mm_projector.")[1]
            layer = {"0": "linear_1", "2": "linear_2"}[key[0]]
            copy = found.pop(f"multi_modal_projector.{layer}.{key[2:]}")
        else:
            copy = found.pop(f"language_model.{name}")[: len(tensor)]
        assert copy.dtype == torch.float16
        assert torch.equal(copy, tensor), name
    tower = torch.load(TOWER / "pytorch_model.bin", weights_only=True)
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tower[name.removeprefix("vision_tower.")])
    assert len(found) == sum(name.startswith("vision_model.") for name in tower)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_safetensors_shards_give_the_same(release: Path, tmp_path: Path) -> None:
    convert_to_transformers(release, tmp_path / "from-bin", tower=TOWER)
    for path in release.glob("*.bin"):
        save_file(torch.load(path), release / f"{path.stem.replace('pytorch_model', 'model')}.safetensors")
    index = (release / "pytorch_model.bin.index.json").read_text()
    renamed = index.replace("pytorch_model-", "model-").replace(".bin", ".safetensors")
    (release / "model.safetensors.index.json").write_text(renamed)
    for path in release.glob("pytorch_model*"):
        path.unlink()
    convert_to_transformers(release, tmp_path / "from-safetensors", tower=TOWER)
    one, other = (converted_tensors(tmp_path / name) for name in ("from-bin", "from-safetensors"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_files_in_the_old_format_without_zip(release: Path, tmp_path: Path) -> None:
    convert_to_transformers(release, tmp_path / "new", tower=TOWER)
    for path in release.glob("*.bin"):
        torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    convert_to_transformers(release, tmp_path / "old", tower=TOWER)
    one, other = (converted_tensors(tmp_path / name) for name in ("new", "old"))
    assert all(torch.equal(one[name], other[name]) for name in one)


MEASURE = """
import re, sys
from pathlib import Path
from shortzip.train.release.convert import convert_to_transformers
from shortzip.train.release.spec import ReleaseSpec
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before = peak()
for release in sys.argv[2:]:
    convert_to_transformers(Path(release), Path(release + "-out"), tower=Path(sys.argv[1]))
    print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the kernel's own count of peak memory")
def test_peak_memory_is_that_of_one_shard(tmp_path: Path) -> None:
    """Four shards of 36 MiB, memory-mapped and in the old format that cannot be: what conversion adds to the process
    stays under 1.3 of them."""
    releases = [copy_of_release(tmp_path / kind) for kind in ("zipped", "old")]
    for release in releases:
        edit_config(release, intermediate_size=49152)
        index: dict[str, str] = {}
        others = all_tensors(release)
        for path in release.glob("pytorch_model*"):
            path.unlink()
        for layer in range(4):
            shard = {name: others.pop(name) for name in list(others) if name.startswith(f"model.layers.{layer}.")}
            for name, shape in (("gate_proj", (49152, 64)), ("up_proj", (49152, 64)), ("down_proj", (64, 49152))):
                shard[f"model.layers.{layer}.mlp.{name}.weight"] = torch.full(shape, 0.5)
            save_shard(release, f"pytorch_model-{layer}.bin", shard, index, release is releases[0])
        save_shard(release, "pytorch_model-rest.bin", others, index, release is releases[0])
        (release / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    largest = max(path.stat().st_size for path in releases[0].glob("*.bin")) / 2**20
    command = [sys.executable, "-c", MEASURE, str(TOWER), *map(str, releases)]
    # Freed tensors go back to the kernel at once: how much the allocator else holds on to varies from run to run.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    peaks = [float(line) for line in run.stdout.splitlines()]
    assert len(peaks) == 2
    assert max(peaks) < 1.3 * largest + 24, f"{peaks} MiB for shards of {largest} MiB"


def save_shard(
    release: Path, file: str, tensors: dict[str, torch.Tensor], index: dict[str, str], zipped: bool
) -> None:
    torch.save(tensors, release / file, _use_new_zipfile_serialization=zipped)
    index.update(dict.fromkeys(tensors, file))


def test_a_dtype_that_is_asked_for(release: Path, tmp_path: Path) -> None:
    convert_to_transformers(release, tmp_path / "out", tower=TOWER, dtype=torch.bfloat16)
    assert {spec.dtype for spec in folder_specs(tmp_path / "out").values()} == {torch.bfloat16}


def test_a_placeholder_row_that_is_there_already_needs_no_new_rows(release: Path, tmp_path: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in tensors:
                tensors[name] = torch.cat([tensors[name], torch.zeros(8, 64)])

    edit_shard(release, 0, widen)
    edit_shard(release, 2, widen)
    edit_config(release, vocab_size=1008)
    convert_to_transformers(release, tmp_path / "out", tower=TOWER)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["text_config"]["vocab_size"], config["image_token_index"]) == (1008, 1000)


def test_an_unfinished_conversion_leaves_nothing(release: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shortzip.train.release.layout_llava.LlavaLayout.processor", full_disk)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="No space left"):
        convert_to_transformers(release, tmp_path / "out", tower=TOWER)
    assert sorted(tmp_path.iterdir()) == before


def test_a_target_that_holds_something_is_left_alone(release: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match=r"out exists and is not empty: choose another folder"):
        convert_to_transformers(release, tmp_path / "out", tower=TOWER)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("/tmp/shortzip-bomb-went-off").touch, ())


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(release: Path, tmp_path: Path) -> None:
    bomb = Path("/tmp/shortzip-bomb-went-off")
    bomb.unlink(missing_ok=True)
    with (release / "pytorch_model-00002-of-00003.bin").open("wb") as file:
        pickle.dump({"model.norm.weight": Bomb()}, file)
    with pytest.raises(ValueError, match=r"00002-of-00003.bin is refused: it holds something other than tensors"):
        convert_to_transformers(release, tmp_path / "out", tower=TOWER)
    assert not bomb.exists()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"state_dict": {"a": torch.zeros(1)}, "epoch": 3}, "entry 'state_dict' is a dict"),
        ({"model.norm.weight": torch.zeros(64), "step": 3}, "entry 'step' is a int"),
        ([torch.zeros(1)], "it holds a list"),
    ],
)
def test_a_bin_with_anything_but_tensors_is_refused(release: Path, tmp_path: Path, content: Any, found: str) -> None:
    torch.save(content, release / "pytorch_model-00002-of-00003.bin")
    with pytest.raises(ValueError, match=rf"00002-of-00003.bin is refused: {found}"):
        convert_to_transformers(release, tmp_path / "out", tower=TOWER)


def cut(release: Path) -> None:
    path = release / "pytorch_model-00001-of-00003.bin"
    path.write_bytes(path.read_bytes()[:-1000])


def rename_projector(mapping: dict[str, str]) -> Callable[[Path], None]:
    def change(release: Path) -> None:
        def rename(tensors: dict[str, torch.Tensor]) -> None:
            for name in [name for name in tensors if "mm_projector" in name]:
                key = name.split("mm_projector.")[1]
                tensor = tensors.pop(name)
                if key in mapping:
                    tensors[f"model.mm_projector.{mapping[key]}"] = tensor

        edit_shard(release, 1, rename)

    return change


def narrow_projector(release: Path) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.mm_projector.0.weight"] = torch.zeros(64, 32)

    edit_shard(release, 1, narrow)


def mixed(release: Path) -> None:
    def half(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].half()

    edit_shard(release, 1, half)


def without(name: str) -> Callable[[Path], None]:
    return lambda release: edit_shard(release, 1, lambda tensors: tensors.pop(name))


def with_other(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda release: edit_shard(release, 1, lambda tensors: tensors.update({name: tensor}))


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda release: edit_config(release, **changes)


BAD: list[tuple[str, Callable[[Path], Any], str]] = [
    ("cut short", cut, r"00001-of-00003.bin cannot be read, it was probably cut short .* download it again"),
    ("shard missing", lambda r: (r / "pytorch_model-00003-of-00003.bin").unlink(),
     r"lacks pytorch_model-00003-of-00003.bin, which pytorch_model.bin.index.json names"),
    ("no weights", lambda r: [p.unlink() for p in r.glob("pytorch_model*")], "holds no weights"),
    ("linear", rename_projector({"0.weight": "weight", "0.bias": "bias"}),
     r"the projector is a linear one, \(64, 48\); needed is .*two-layer MLP.*use LLaVA 1.5"),
    ("linear by config", config(mm_projector_type="linear"), r"the projector is 'linear' \(mm_projector_type\)"),
    ("linear by LLaVA's default", config(mm_projector_type=None), "the projector is 'linear'"),
    ("deeper", rename_projector({"0.weight": "0.weight", "0.bias": "0.bias", "2.weight": "4.weight"}),
     "the projector is an MLP of 2 layers"),
    ("resampler", rename_projector({"0.weight": "query", "2.weight": "attn.in_proj_weight"}),
     "the projector is a resampler or another module with attn.in_proj_weight, query"),
    ("resampler by config", config(mm_resampler_type="perceiver"), "the projector is a resampler .*perceiver"),
    ("no projector", rename_projector({}), r"holds no projector \(no tensor named mm_projector\)"),
    ("another width", narrow_projector,
     r"linear_1.weight is \(64, 32\), needed is \(64, 48\) \(vision tower 48 wide, language model 64 wide\)"),
    ("mixed dtypes", mixed,
     r"language model's tensors have mixed dtypes: .* in float32 .*1 in float16 \(such as model.norm.weight\).*"
     r"--dtype float16"),
    ("missing tensor", without("model.norm.weight"), r"language model lacks 1 tensors, such as model.norm.weight"),
    ("stray tensor", with_other("model.layers.9.self_attn.q_proj.weight", torch.zeros(64, 64)),
     "tensors that no Llama has, such as model.layers.9"),
    ("wrong shape", with_other("model.norm.weight", torch.zeros(65)),
     r"model.norm.weight is \(65,\), needed by its config.json is \(64,\)"),
    ("another language model", config(model_type="llava_mistral"),
     r"model_type is 'llava_mistral'.*llava-hf/llava-v1.6-mistral-7b-hf"),
    ("no sizes", config(rms_norm_eps=None), "config.json lacks rms_norm_eps; sizes are never guessed"),
    ("LLaVA 1.0", config(mm_use_im_start_end=True), "mm_use_im_start_end is on"),
    ("patch tokens by default", config(mm_use_im_patch_token=None), "mm_use_im_patch_token is on"),
    ("image_aspect_ratio", config(image_aspect_ratio="highres"), "image_aspect_ratio is 'highres', known are"),
    ("select feature", config(mm_vision_select_feature="cls"), "mm_vision_select_feature is 'cls', known are"),
    ("s2", config(s2=True), "s2 .* is on, needed is off"),
    ("anyres without pinpoints", config(image_aspect_ratio="anyres"), "image_grid_pinpoints is missing"),
    ("no tokenizer", lambda r: (r / "tokenizer.model").unlink(), r"holds no tokenizer \(tokenizer.model\)"),
    ("broken config", lambda r: (r / "config.json").write_text("{"), "config.json is not readable as JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_releases_are_refused(release: Path, tmp_path: Path, change: Callable[[Path], Any], message: str) -> None:
    change(release)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert_to_transformers(release, tmp_path / "out", tower=TOWER)
    assert not (tmp_path / "out").exists()


def test_mixed_dtypes_convert_when_one_is_chosen(release: Path, tmp_path: Path) -> None:
    mixed(release)
    convert_to_transformers(release, tmp_path / "out", tower=TOWER, dtype=torch.float16)
    assert {spec.dtype for spec in folder_specs(tmp_path / "out").values()} == {torch.float16}


def test_a_tower_that_is_no_clip(release: Path, tmp_path: Path) -> None:
    tower = tmp_path / "openai" / TOWER.name
    (tower / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model"}))
    with pytest.raises(ValueError, match="the vision tower is a 'siglip_vision_model'"):
        convert_to_transformers(release, tmp_path / "out", tower=tower)


def test_a_projector_file_of_another_width(release: Path, tmp_path: Path) -> None:
    tensors = torch.load(PRETRAIN / "mm_projector.bin", weights_only=True)
    tensors["model.mm_projector.2.weight"] = torch.zeros(32, 64)
    torch.save(tensors, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match=r"mm_projector.bin: the projector's linear_2.weight is \(32, 64\), needed"):
        convert_to_transformers(release, tmp_path / "out", tower=TOWER, projector=tmp_path / "mm_projector.bin")


def test_a_missing_tower_says_how_to_give_it(tmp_path: Path) -> None:
    shutil.copytree(RELEASE, tmp_path / RELEASE.name)
    edit_config(tmp_path / RELEASE.name, mm_vision_tower=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"the vision tower .*nowhere' .* was not found.*vision_tower"):
        open_release(str(tmp_path / RELEASE.name), cache_dir=tmp_path)
    found = open_release(ReleaseSpec(str(tmp_path / RELEASE.name), vision_tower=str(TOWER)), cache_dir=tmp_path)
    assert (found.folder / "config.json").is_file()


def test_llava_next_there_and_back(release: Path, tmp_path: Path) -> None:
    """A release in the layout of LLaVA 1.6 (anyres, image_newline, tower inside) gives LLaVA-NeXT's logits."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig.from_dict(json.loads((TOWER / "config.json").read_text())["vision_config"])
    text = LlamaConfig(
        vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        rms_norm_eps=1e-5, pad_token_id=0,
    )  # fmt: skip
    pinpoints = [[112, 224], [224, 112], [224, 224]]
    wanted = LlavaNextForConditionalGeneration(
        LlavaNextConfig(vision_config=vision, text_config=text, image_token_index=1000, image_grid_pinpoints=pinpoints)
    ).eval()
    with torch.no_grad():
        wanted.model.image_newline.normal_()
        for head in (wanted.lm_head.weight, wanted.model.language_model.embed_tokens.weight):
            head[1000:] = head[0]
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in wanted.state_dict().items():
        name = name.removeprefix("model.").replace("language_model.", "model.")
        if name.startswith("vision_tower."):
            name = f"model.vision_tower.vision_tower.vision_model.{name.removeprefix('vision_tower.')}"
        elif name.startswith("multi_modal_projector."):
            layer, kind = name.split(".")[1:]
            name = f"model.mm_projector.{ {'linear_1': 0, 'linear_2': 2}[layer] }.{kind}"
        elif name == "image_newline":
            name = "model.image_newline"
        rows = 1000 if name in ("lm_head.weight", "model.embed_tokens.weight") else None
        tensors[name] = tensor[:rows].clone()
    for path in release.glob("pytorch_model*"):
        path.unlink()
    torch.save(tensors, release / "pytorch_model.bin")
    keys = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": str(pinpoints), "unfreeze_mm_vision_tower": True}
    edit_config(release, mm_patch_merge_type="spatial_unpad", **keys)
    convert_to_transformers(release, tmp_path / "out", tower=TOWER)

    found = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    processor = LlavaNextProcessor.from_pretrained(tmp_path / "out")
    from PIL import Image

    image = Image.effect_noise((300, 130), 90).convert("RGB")
    inputs = processor(images=image, text="USER: <image>\nhi ASSISTANT:", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(found(**inputs).logits, wanted(**inputs).logits, rtol=0, atol=1e-6)
    del tensors["model.image_newline"]
    torch.save(tensors, release / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"image_aspect_ratio is anyres, but model.image_newline is missing"):
        convert_to_transformers(release, tmp_path / "again", tower=TOWER)


def test_to_llava_writes_what_llavas_own_loader_reads(tmp_path: Path) -> None:
    """Their loader splits every name at `mm_projector.` and loads the rest strictly into its Sequential."""
    source = open_release(str(RELEASE), cache_dir=tmp_path)
    names = {"linear_1.weight": (64, 48), "linear_1.bias": (64,), "linear_2.weight": (64, 64), "linear_2.bias": (64,)}
    projector = {name: torch.randn(shape) for name, shape in names.items()}
    assert source.original_config is not None
    target = tmp_path / "llava-tuned"
    write_llava_projector(target, projector, source.original_config, base=str(RELEASE))
    loaded = torch.load(target / "mm_projector.bin", weights_only=True)
    theirs = torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
    theirs.load_state_dict({name.split("mm_projector.")[1]: tensor for name, tensor in loaded.items()})
    assert torch.equal(theirs[2].weight, projector["linear_2.weight"])
    config = json.loads((target / "config.json").read_text())
    original = json.loads((RELEASE / "config.json").read_text())
    changed = {key for key in original if config.get(key) != original[key]}
    assert changed == {"_name_or_path", "tune_mm_mlp_adapter"}
    assert config["_name_or_path"] == str(RELEASE)
    with pytest.raises(ValueError, match="let it contain 'llava'"):
        write_llava_projector(tmp_path / "tuned", projector, source.original_config, base="x")


def test_the_original_config_of_a_release_that_is_transformers_only(tmp_path: Path) -> None:
    from shortzip.reduction import ReducedLlavaConfig

    source = open_release(str(RELEASE), cache_dir=tmp_path)
    made = layout_for("llava").to_original(
        ReducedLlavaConfig.from_pretrained(source.folder), "openai/clip-vit-tiny", "x"
    )
    original = json.loads((RELEASE / "config.json").read_text())
    differing = {key: (made[key], original[key]) for key in made if key in original and made[key] != original[key]}
    assert differing == {"mm_vision_tower": ("openai/clip-vit-tiny", original["mm_vision_tower"])}
    needed = {"hidden_size", "num_hidden_layers", "vocab_size", "mm_hidden_size", "mm_vision_select_layer"}
    assert needed <= made.keys()
    with pytest.raises(ValueError, match="the name of its vision tower is not known: give it with --vision_tower"):
        layout_for("llava").to_original(ReducedLlavaConfig.from_pretrained(source.folder), None, "x")


def test_the_streaming_writer_writes_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(2, 2).bfloat16(),
        "wide": torch.randn(4, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "strided": torch.randn(4, 6).t(),
    }
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "a.safetensors", specs, tensors.__getitem__)
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert read_specs(tmp_path / "a.safetensors") == specs
    with pytest.raises(ValueError, match="odd: 3 bytes where 4 were announced"):
        write_safetensors(tmp_path / "b.safetensors", {**specs, "odd": TensorSpec((4,), torch.uint8)}, tensors.get)  # type: ignore[arg-type]


@pytest.mark.parametrize("cut_by", [1, 40, 200, -1])
def test_a_safetensors_file_cut_short(tmp_path: Path, cut_by: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(8, 4)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut_by] if cut_by > 0 else whole + b"x")
    with pytest.raises(ValueError, match=r"model.safetensors .*cut short.*download or convert it again"):
        read_specs(path)
