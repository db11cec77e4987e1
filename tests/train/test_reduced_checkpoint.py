"""The three shapes of a reduced checkpoint: the same logits from each, anywhere, and over the right release only."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import RELEASE, copy_of_release
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration
from transformers.dynamic_module_utils import get_relative_import_files

from shortzip.reduction import ReducedLlavaForConditionalGeneration
from shortzip.reduction.base_release import describe_files, digest
from shortzip.reduction.reductions import Reductions
from shortzip.reduction.selectors import METHODS, SELECTORS
from shortzip.train.release.loading import load_release
from shortzip.train.release.opening import Release, open_release, read_projector, read_release_projector
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.release.writing import SHAPES, leave_out_extras, write_reduced_checkpoint

ROOT = Path(__file__).resolve().parents[2]
VISIONZIP = {"dominant": 12, "contextual": 4}
SHORTV = {"layers": [1, 2]}
ALIKE = [shape for shape in SHAPES if shape != "engine"]  # which leaves frozen layers out
PROMPT = "USER: <image>\nhi ASSISTANT:"


class Tuned:
    """A release in LLaVA's own layout (float16), tuned: its projector moved, and the logits that gives."""

    def __init__(self, root: Path) -> None:
        from test_convert import half_the_language_model

        self.root = root
        self.original = copy_of_release(root)
        half_the_language_model(self.original)
        self.release = open_release(str(self.original), cache_dir=root / "cache")
        model, self.processor = load_release(self.release, Reductions(VISIONZIP, SHORTV))
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.model.multi_modal_projector.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        self.projector = {name: p.detach() for name, p in model.model.multi_modal_projector.named_parameters()}
        self.image = Image.effect_noise((90, 60), 80).convert("RGB")
        self.logits = self.logits_of(model, self.processor)
        self.folders = {shape: root / f"llava-{shape}" for shape in SHAPES}
        for shape in SHAPES:
            self.write(self.folders[shape], shape=shape)

    def write(self, target: Path, **arguments: Any) -> None:
        reductions = Reductions(VISIONZIP, SHORTV)
        write_reduced_checkpoint(target, self.release, self.projector, self.processor, reductions, **arguments)

    def logits_of(self, model: Any, processor: Any) -> torch.Tensor:
        inputs = processor(images=self.image, text=PROMPT, return_tensors="pt")
        with torch.no_grad():
            return model(**inputs).logits

    def open(self, name: str | Path, dtype: torch.dtype = torch.float32) -> Release:
        return open_release(ReleaseSpec(str(name), dtype=dtype), cache_dir=self.root / "cache")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return Tuned(tmp_path_factory.mktemp("tuned"))


@pytest.mark.parametrize("shape", ALIKE)
def test_every_shape_gives_the_logits_of_what_was_tuned(tuned: Tuned, shape: str) -> None:
    model, processor = load_release(tuned.open(tuned.folders[shape]))
    assert (model.config.visionzip, model.config.shortv) == (VISIONZIP, SHORTV)
    assert processor.chat_template == tuned.processor.chat_template
    assert torch.equal(tuned.logits_of(model, processor), tuned.logits)


THREE_LINES = """
import json, sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
image, prompt, *names = sys.argv[1:]
grid = {"dominant": 16, "contextual": 0, "method": "grid"}
for refused in ({"shortv": None, "fastv": {"layer": 2, "keep": 0.5}}, {"visionzip": grid}):
    try:
        AutoModelForImageTextToText.from_pretrained(names[0], trust_remote_code=True, **refused)
    except ValueError as error:
        print(error)
for name in names:
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True, dtype=torch.float32)
    inputs = processor(images=Image.open(image), text=prompt, return_tensors="pt")

    with torch.no_grad():
        torch.save(model(**inputs).logits, name + "-logits.pt")
        torch.save(model.generate(**inputs, max_new_tokens=3, do_sample=False), name + "-answer.pt")
    model.save_pretrained(name + "-saved")
assert not {"reduction", "train", "data"} & set(sys.modules), "ShortZip itself was imported"
"""


def test_three_lines_of_transformers_where_shortzip_is_not_installed(tuned: Tuned, tmp_path: Path) -> None:
    tuned.image.save(tmp_path / "image.png")
    compared = {
        "fastv": Reductions(VISIONZIP, None, {"layer": 2, "keep": 0.5}),
        "sparsevlm": Reductions(VISIONZIP, None, {"method": "sparsevlm", "layers": [0, 2], "keep": [5, 3]}),
        "baselines": Reductions({"dominant": 16, "contextual": 0, "method": "pool"}, SHORTV, None, "original"),
        "duet": Reductions({**VISIONZIP, "method": "duet", "window": 2}, SHORTV),
    }
    optional = {
        "fastv",
        "sparsevlm",
        "pyramiddrop",
        "baselines",
        *(file for method, (file, _) in SELECTORS.items() if method != "visionzip"),
    }
    logits = dict.fromkeys(("full", "projector"), tuned.logits)
    for name, reductions in compared.items():
        write_reduced_checkpoint(tmp_path / name, tuned.release, tuned.projector, tuned.processor, reductions)
        logits[name] = tuned.logits_of(load_release(tuned.open(tmp_path / name))[0], tuned.processor)
    names = {shape: str(tuned.folders.get(shape, tmp_path / shape)) for shape in logits}
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", THREE_LINES, str(tmp_path / "image.png"), PROMPT, *names.values()]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "fastv: this checkpoint was published for other reductions, without the code of this one" in run.stdout
    assert "visionzip: method grid: this checkpoint was published for other reductions" in run.stdout
    for shape, name in names.items():
        assert torch.equal(torch.load(f"{name}-logits.pt", weights_only=True), logits[shape]), shape
        assert torch.load(f"{name}-answer.pt", weights_only=True).shape[1] > tuned.logits.shape[1], shape
        for folder in (name, f"{name}-saved"):
            files = {path.stem for path in Path(folder).glob("*.py")}
            assert files & optional == {shape} & set(compared), "code travels where it is used"
            assert ("pruning" in files) == ("pruned_caches" in files) == (shape in ("fastv", "sparsevlm"))
        # What that process saved is whole: it names no base any more, and loads on its own.
        assert json.loads(Path(f"{name}-saved/config.json").read_text()).get("base_release") is None
        saved = ReducedLlavaForConditionalGeneration.from_pretrained(f"{name}-saved", dtype=torch.float32)
        assert torch.equal(tuned.logits_of(saved, tuned.processor), logits[shape]), shape


@pytest.mark.parametrize("method", METHODS)
def test_of_the_methods_code_what_is_used_travels(method: str, tmp_path: Path) -> None:
    """extras.py names each method's file: otherwise transformers would copy it neither on saving nor on loading."""
    shutil.copytree(ROOT / "reduction", tmp_path / "code", ignore=shutil.ignore_patterns("__pycache__"))
    leave_out_extras(tmp_path / "code", Reductions({"dominant": 9, "contextual": 0, "method": method}))
    wanted = SELECTORS[method][0] if method in SELECTORS else "baselines"
    optional = {"fastv", "sparsevlm", "pyramiddrop", "baselines", *(file for file, _ in SELECTORS.values())} - {
        "visionzip"
    }
    files = {path.stem for path in (tmp_path / "code").glob("*.py")}
    assert files & optional == {wanted} - {"visionzip"}
    for entry in ("configuration_reduced_llava", "modeling_reduced_llava", "processing_reduced_llava"):
        reached = {Path(file).stem for file in get_relative_import_files(tmp_path / "code" / f"{entry}.py")}
        assert wanted in reached
        assert reached <= files


def test_full_keeps_the_release_bit_for_bit_and_the_projector_in_float32(tuned: Tuned) -> None:
    release = tuned.open(tuned.original)
    before = {n: t for path in release.folder.glob("model*.safetensors") for n, t in load_file(path).items()}
    after = {n: t for path in tuned.folders["full"].glob("model*.safetensors") for n, t in load_file(path).items()}
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if "multi_modal_projector" in name:
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, tuned.projector[name.split("multi_modal_projector.")[1]])
        else:
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])


def test_full_loads_as_plain_llava(tuned: Tuned) -> None:
    """The weights' names are those of transformers' LLaVA; all visual tokens are used there."""
    folder = tuned.root / "plain"
    shutil.copytree(tuned.folders["full"], folder)
    config = json.loads((folder / "config.json").read_text())
    for key in ("auto_map", "visionzip", "shortv", "base_release"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
    plain = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    ours, processor = load_release(tuned.open(tuned.folders["full"]), Reductions())
    assert torch.equal(tuned.logits_of(plain, processor), tuned.logits_of(ours, processor))


def test_the_projector_shape_is_small_and_names_its_release(tuned: Tuned) -> None:
    sizes = {shape: sum(f.stat().st_size for f in folder.iterdir()) for shape, folder in tuned.folders.items()}
    weights = sum(tensor.numel() * 4 for tensor in tuned.projector.values())
    assert (tuned.folders["projector"] / "projector.safetensors").stat().st_size < weights + 1000
    assert sizes["projector"] < sizes["full"] / 5
    base = json.loads((tuned.folders["projector"] / "config.json").read_text())["base_release"]
    assert base["name"] == str(tuned.release.folder)
    assert {"config.json", "model.safetensors.index.json"} < {file["file"] for file in base["files"]}
    assert [file["size"] for file in base["files"]] == sorted(file["size"] for file in base["files"])


def another_release(tuned: Tuned, folder: Path, name: str) -> Path:
    """A copy of the base whose tensor `name` was trained on: one value, and the file's size is the same."""
    shutil.copytree(tuned.release.folder, folder)
    for path in folder.glob("model*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name].view(-1)[0] += 1
            save_file(tensors, path)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.3.mlp.down_proj.weight",
        "language_model.lm_head.weight",
        "vision_tower.vision_model.encoder.layers.2.layer_norm1.bias",
        "multi_modal_projector.linear_1.bias",
    ],
)
def test_another_release_is_refused_without_reading_it_whole(tuned: Tuned, tmp_path: Path, name: str) -> None:
    other = another_release(tuned, tmp_path / "base", name)
    folder = tmp_path / "checkpoint"
    shutil.copytree(tuned.folders["projector"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["base_release"]["name"] = str(other)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is a projector for another release than the .*base found here: model-0000"):
        ReducedLlavaForConditionalGeneration.from_pretrained(folder)


def test_a_digest_reads_a_few_kilobytes_per_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({f"w{i}": torch.randn(1 << 18) for i in range(8)}, tmp_path / "model.safetensors")
    read = 0
    true_open = Path.open

    def counting(path: Path, *arguments: Any, **named: Any) -> Any:
        file = true_open(path, *arguments, **named)
        true_read = file.read

        class Counted:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: Any) -> None:
                file.close()

            def seek(self, position: int) -> None:
                file.seek(position)

            def read(self, size: int = -1) -> bytes:
                nonlocal read
                content = true_read(size)
                read += len(content)
                return content

        return Counted()

    monkeypatch.setattr(Path, "open", counting)
    digest(tmp_path / "model.safetensors")
    assert 8 * 4096 <= read < 8 * 4096 + 2000


def test_a_base_that_is_gone_says_so(tuned: Tuned, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(tuned.folders["projector"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["base_release"]["name"] = str(tmp_path / "gone")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match=r"is a projector for .*gone, whose .* could not be had.*load a full checkpoint"):
        ReducedLlavaForConditionalGeneration.from_pretrained(folder)
    config["base_release"] = {"name": "x"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="base_release must hold name, revision and files"):
        ReducedLlavaForConditionalGeneration.from_pretrained(folder)


def test_a_projector_that_does_not_fit_its_release(tuned: Tuned, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(tuned.folders["projector"], folder)
    save_file({"multi_modal_projector.linear_1.weight": torch.zeros(3, 3)}, folder / "projector.safetensors")
    with pytest.raises(ValueError, match=r"projector.safetensors does not fit the release's projector"):
        ReducedLlavaForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("shape", ["full", "projector"])
def test_a_reduced_checkpoint_is_a_release_for_another_round(tuned: Tuned, tmp_path: Path, shape: str) -> None:
    """Another budget, other layers, tuned again, and written in every shape."""
    start = tuned.open(tuned.folders[shape])
    budget = {"dominant": 6, "contextual": 2}
    model, processor = load_release(start, Reductions(budget))
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight, tuned.projector["linear_1.weight"])
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.bias += 1
    wanted = tuned.logits_of(model, processor)
    assert wanted.shape[1] == tuned.logits.shape[1] - 8
    for number, target_shape in enumerate(SHAPES):
        target = tmp_path / f"llava-round-two-{number}"
        projector = model.model.multi_modal_projector.state_dict()
        write_reduced_checkpoint(target, start, projector, processor, Reductions(budget), shape=target_shape)
        again, its_processor = load_release(tuned.open(target))
        assert (again.config.visionzip, again.config.shortv) == (budget, None)
        assert torch.equal(tuned.logits_of(again, its_processor), wanted), target_shape


def test_dtypes_of_a_reduced_checkpoint(tuned: Tuned) -> None:
    """In bf16 the projector stays float32, and from whichever shape the logits are the same."""
    found = []
    for shape in ALIKE:
        model, processor = load_release(tuned.open(tuned.folders[shape], torch.bfloat16))
        assert model.lm_head.weight.dtype == torch.bfloat16
        assert model.model.multi_modal_projector.linear_1.weight.dtype == torch.float32
        found.append(tuned.logits_of(model, processor))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_refusals_of_the_writer(tuned: Tuned, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shape is 'whole', known are full, projector, llava, engine"):
        tuned.write(tmp_path / "a", shape="whole")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").touch()
    with pytest.raises(FileExistsError, match="b exists and is not empty"):
        tuned.write(tmp_path / "b")
    narrow = {**tuned.projector, "linear_1.weight": torch.zeros(64, 8)}
    with pytest.raises(ValueError, match=r"the projector's linear_1.weight is \(64, 8\), needed by .* is \(64, 48\)"):
        write_reduced_checkpoint(tmp_path / "c", tuned.release, narrow, tuned.processor, Reductions())
    with pytest.raises(ValueError, match=r"has no place for the projector's linear_3.weight"):
        write_reduced_checkpoint(
            tmp_path / "c", tuned.release, {**tuned.projector, "linear_3.weight": torch.zeros(1)}, tuned.processor,
            Reductions(),
        )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]


def test_reading_projectors(tuned: Tuned) -> None:
    for path in (
        tuned.folders["projector"] / "projector.safetensors",
        tuned.folders["llava"] / "mm_projector.bin",
    ):
        found = read_projector(path)
        assert all(torch.equal(found[name], tuned.projector[name]) for name in tuned.projector)
    assert read_release_projector(tuned.folders["full"]).keys() == tuned.projector.keys()


def test_the_digest_of_a_file_that_is_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00not json")
    with pytest.raises(ValueError, match=r"model.safetensors is no safetensors file"):
        describe_files(tmp_path, ["model.safetensors"])
    assert RELEASE.is_dir()
