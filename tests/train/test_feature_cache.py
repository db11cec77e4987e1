"""Cached features: the same training, no tower, and nothing half-written or mistaken for another's."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file

from shortzip.data.dataset import Collator, ConversationDataset
from shortzip.data.drops import BadSample
from shortzip.data.files import sweep
from shortzip.data.instructions import read_instructions
from shortzip.data.kept import identity_of
from shortzip.data.supervision import Supervision
from shortzip.reduction.errors import ReductionError
from shortzip.reduction.reductions import Reductions
from shortzip.reduction.selectors import METHODS, parameters_of
from shortzip.train.inputs.feature_cache import FeatureCache, features_identity, image_key
from shortzip.train.inputs.feature_filling import fill_cache
from shortzip.train.inputs.shards import DamagedShard
from shortzip.train.release.loading import load_release
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.run.processes import StopRequest
from shortzip.train.run.report import Reporter
from shortzip.train.run.session import Session
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.config import DataConfig, TuneConfig, VisionZipConfig
from shortzip.train.step.objective import SupervisedLoss, projector_parameters, train_only_projector

BUDGET, FROZEN = {"dominant": 5, "contextual": 3}, {"layers": [1, 2]}


@pytest.fixture
def loaded(tiny_release: Path) -> tuple[Any, Any]:
    model, processor = load_release(str(tiny_release), Reductions(BUDGET, FROZEN))
    train_only_projector(model, torch.float32)
    return model, processor


def dataset_of(instructions: Path, processor: Any) -> ConversationDataset:
    return ConversationDataset(read_instructions(instructions), Supervision(processor), instructions.parent)


def session() -> Session:
    return Session(Accelerator(cpu=True), Reporter(is_main=False), StopRequest())


def filled(root: Path, loaded: tuple[Any, Any], dataset: ConversationDataset, **options: Any) -> FeatureCache:
    model, processor = loaded
    cache = FeatureCache(root, features_identity(model, processor))
    fill_cache(cache, model, processor, [dataset], session(), **options)
    return cache


def gradient(model: Any, dataset: ConversationDataset, plain: bool) -> tuple[torch.Tensor, torch.Tensor]:
    batch = Collator.of(dataset.supervision)([dataset[index] for index in range(8)])
    model.zero_grad()
    loss = SupervisedLoss(model, plain=plain)(batch)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in projector_parameters(model).values()])


@pytest.mark.parametrize(
    "budget", [BUDGET, {"dominant": 6, "contextual": 0, "method": "pool"}], ids=["visionzip", "pool"]
)
def test_original_positions_are_kept_with_the_features(
    tmp_path: Path, tiny_release: Path, tiny_instructions: Path, budget: dict[str, Any]
) -> None:
    loaded = load_release(str(tiny_release), Reductions(budget, FROZEN, positions="original"))
    train_only_projector(loaded[0], torch.float32)
    dataset = dataset_of(tiny_instructions, loaded[1])
    expected = gradient(loaded[0], dataset, False)
    dataset.features = filled(tmp_path, loaded, dataset)
    loaded[0].model.vision_tower = torch.nn.Identity()
    torch.testing.assert_close(gradient(loaded[0], dataset, False), expected, rtol=1e-4, atol=1e-6)
    loaded[0].config.positions = "compact"
    assert abs(gradient(loaded[0], dataset, False)[0] - expected[0]) > 1e-3


@pytest.mark.parametrize("plain", [False, True])
def test_loss_and_gradient_equal_the_uncached_ones_without_a_tower(
    tmp_path: Path, loaded: tuple[Any, Any], tiny_instructions: Path, plain: bool
) -> None:
    model, processor = loaded
    dataset = dataset_of(tiny_instructions, processor)
    expected_loss, expected = gradient(model, dataset, plain)
    cache = filled(tmp_path, loaded, dataset, batch_size=5)
    model.model.vision_tower = torch.nn.Identity()
    dataset.features = cache
    assert "pixel_values" not in Collator.of(dataset.supervision)([dataset[0]]).inputs
    loss, found = gradient(model, dataset, plain)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    text = Collator.of(dataset.supervision)([dataset[4]])
    assert "visual_tokens" not in text.inputs
    SupervisedLoss(model, plain=plain)(text).backward()


def test_nothing_is_computed_twice_and_equal_bytes_are_one_image(
    tmp_path: Path, loaded: tuple[Any, Any], tiny_instructions: Path
) -> None:
    dataset = dataset_of(tiny_instructions, loaded[1])
    cache = filled(tmp_path, loaded, dataset)
    images = {source for conversation in dataset.conversations for source in conversation.images}
    assert len(cache) == len(images) > 20

    calls: list[int] = []
    handle = loaded[0].model.vision_tower.encoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    again = filled(tmp_path, loaded, dataset)
    assert len(again) == len(images)
    assert not calls
    same = tmp_path / "same bytes, other name.png"
    same.write_bytes((tiny_instructions.parent / sorted(images)[0]).read_bytes())
    assert again.find(str(same), None) is not None
    Image.new("RGB", (20, 20), "red").save(same)
    assert again.find(str(same), None) is None
    handle.remove()


def test_another_tower_budget_or_processor_has_its_own_features(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    folders = {FeatureCache(tmp_path, features_identity(model, processor)).folder}
    model.config.visionzip = {"dominant": 6, "contextual": 2}
    folders.add(FeatureCache(tmp_path, features_identity(model, processor)).folder)
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[0].mlp.fc1.bias[0] += 1
    folders.add(FeatureCache(tmp_path, features_identity(model, processor)).folder)
    other = copy.deepcopy(processor)
    other.image_processor.do_pad = False
    folders.add(FeatureCache(tmp_path, features_identity(model, other)).folder)
    folders.add(FeatureCache(tmp_path, features_identity(model.to(torch.bfloat16), other)).folder)
    assert len(folders) == 5
    model.model.multi_modal_projector.linear_1.weight.data += 1
    model.config.shortv = None
    FeatureCache(tmp_path, features_identity(model, other))
    assert len(list(tmp_path.iterdir())) == 5, "projector and frozen layers do not matter"
    assert json.loads((next(iter(folders)) / "identity.json").read_text())["processor"]["class"]
    model.config.positions = "original"
    FeatureCache(tmp_path, features_identity(model, other))
    assert len(list(tmp_path.iterdir())) == 6, "and what is kept for original positions is more"
    model.config.visionzip = None
    with pytest.raises(ValueError, match="Set visionzip"):
        features_identity(model, processor)


def test_a_torn_shard_counts_as_missing_and_is_computed_again(
    tmp_path: Path, loaded: tuple[Any, Any], tiny_instructions: Path
) -> None:
    dataset = dataset_of(tiny_instructions, loaded[1])
    cache = filled(tmp_path, loaded, dataset)
    (shard,) = cache.folder.glob("*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    assert len(FeatureCache(tmp_path, features_identity(*loaded))) == 0
    assert len(filled(tmp_path, loaded, dataset)) == len(cache)
    assert shard.read_bytes() == whole


def test_what_a_live_writer_writes_stays_however_old_it_looks(
    tmp_path: Path, loaded: tuple[Any, Any], tiny_instructions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine's clock may be ahead; what nobody on this one holds is of the dead."""
    dataset = dataset_of(tiny_instructions, loaded[1])
    cache = FeatureCache(tmp_path, features_identity(*loaded))
    foreign = cache.folder / ".partial-another_host-0.safetensors-abcd"
    foreign.write_bytes(b"half")
    os.utime(foreign, (0, 0))
    left: list[Path] = []

    def fill_meanwhile(tensors: Any, path: Path, metadata: Any) -> None:
        save_file(tensors, path, metadata)
        os.utime(path.parent, (0, 0))
        if not left:
            dead = path.parent.with_name(f"{path.parent.name}-dead")
            dead.mkdir()
            left.append(dead)
            filled(tmp_path, loaded, dataset)

    monkeypatch.setattr("shortzip.train.inputs.shards.save_file", fill_meanwhile)
    cache.write({"a": (torch.ones(1, 8, 24), torch.zeros(1, 5, dtype=torch.int64))})
    assert foreign.exists()
    assert not left[0].exists()
    cache.refresh()
    assert "a" in cache


def damage(shard: Path) -> None:
    """Half of the tensors' bytes become 0, at the same size and time."""
    times, content = shard.stat(), shard.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    half = start + (len(content) - start) // 2
    shard.write_bytes(content[:start] + bytes(half - start) + content[half:])
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_is_computed_anew_and_that_is_said(
    tmp_path: Path,
    loaded: tuple[Any, Any],
    tiny_instructions: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    monkeypatch.setattr("shortzip.train.inputs.shards.SHARD_ENTRIES", 9)
    dataset = dataset_of(tiny_instructions, loaded[1])
    cache = filled(tmp_path, loaded, dataset, batch_size=3, num_workers=workers)
    expected = {key: cache.get(key)["visual_tokens"].clone() for key in cache._places}
    shards = sorted(cache.folder.glob("*.safetensors"))
    assert len(shards) > 2
    damage(shards[0])
    reader = FeatureCache(tmp_path, features_identity(*loaded))
    with pytest.raises(DamagedShard, match="start the run again"):
        reader.get(next(key for key, place in reader._places.items() if place[0] == shards[0].name))
    again = FeatureCache(tmp_path, features_identity(*loaded))
    model, processor = loaded
    computed = fill_cache(again, model, processor, [dataset], session())
    assert 0 < computed <= 12, "those of the damaged one alone"
    assert "1 of the shards" in caplog.text
    assert again._places.keys() == expected.keys()
    for key, tokens in expected.items():
        torch.testing.assert_close(again.get(key)["visual_tokens"], tokens)
    caplog.clear()
    filled(tmp_path, loaded, dataset)
    assert not caplog.text


def test_what_is_no_shard_is_left_alone(tmp_path: Path, loaded: tuple[Any, Any], tiny_instructions: Path) -> None:
    dataset = dataset_of(tiny_instructions, loaded[1])
    cache = filled(tmp_path, loaded, dataset)
    (shard,) = cache.folder.glob("*.safetensors")
    (cache.folder / "a.safetensors").mkdir()
    save_file({"x": torch.ones(2)}, cache.folder / "b.safetensors")
    shutil.copy(shard, cache.folder / "c.safetensors")
    (cache.folder / "d.safetensors").write_bytes(b"")
    (cache.folder / "e.safetensors").symlink_to(tmp_path / "nowhere")
    save_file({"x": torch.ones(2)}, cache.folder / "f.safetensors", {"shard": '{"images": ["a"]}'})
    again = filled(tmp_path, loaded, dataset)
    assert again._places == cache._places
    assert len(list(cache.folder.iterdir())) == 8


OTHER_VALUES = {("random", "seed"): 4, ("divprune", "space"): "projected", ("vispruner", "important"): 0.25,
                ("scope", "alpha"): 0.5, ("duet", "window"): 3}  # fmt: skip
UNCACHEABLE = {("divprune", "space")}


def test_every_input_of_the_features_is_part_of_their_identity(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    identities = [features_identity(model, processor)]

    def note() -> None:
        identities.append(features_identity(model, processor))

    model.config.vision_feature_layer = -3
    note()
    budget = {"dominant": 8, "contextual": 0}
    for method in METHODS:
        model.config.visionzip = {**budget, "method": method}
        note()
        for name in parameters_of(method):
            model.config.visionzip = {**budget, "method": method, name: OTHER_VALUES[method, name]}
            if (method, name) not in UNCACHEABLE:
                note()
    model.config.vision_config.hidden_act = "gelu"
    note()
    model.config.vision_config.layer_norm_eps = 0.5
    note()
    for key, value in (("image_mean", [0.1, 0.2, 0.3]), ("resample", 0), ("size", {"shortest_edge": 12})):
        setattr(processor.image_processor, key, value)
        note()
    model.to(torch.bfloat16)
    note()
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[-1].self_attn.q_proj.weight[-1, -1] += 1
    note()
    assert len({identity_of(identity) for identity in identities}) == len(identities)
    assert [identity_of(features_identity(model, processor))] == [identity_of(identities[-1])]


def test_files_are_hashed_once_and_again_when_they_have_changed(
    tmp_path: Path, loaded: tuple[Any, Any], tiny_instructions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = dataset_of(tiny_instructions, loaded[1])
    for workers in (0, 1):
        dataset.features = filled(tmp_path / str(workers), loaded, dataset, num_workers=workers)
        with monkeypatch.context() as patched:
            patched.setattr("shortzip.train.inputs.feature_cache.image_bytes", None)
            for index in range(len(dataset)):
                dataset.load(dataset.conversations[index])
    file = tmp_path / "a.bmp"
    Image.new("RGB", (8, 8), "red").save(file)
    cache = FeatureCache(tmp_path, features_identity(*loaded))
    key, times = cache.key_of("a.bmp", tmp_path), file.stat()
    Image.new("RGB", (8, 8), "blue").save(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert cache.key_of("a.bmp", tmp_path) != key
    assert cache.key_of("a.bmp", tmp_path) == image_key("a.bmp", tmp_path)


def test_two_processes_fill_one_cache(tmp_path: Path, loaded: tuple[Any, Any], tiny_instructions: Path) -> None:
    """Two runs at once, each of all images, as two jobs of a sweep that start together."""
    dataset = dataset_of(tiny_instructions, loaded[1])
    children = []
    for first in (0, 20):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                conversations = dataset.conversations
                dataset.conversations = [*conversations[first:], *conversations[:first]]
                filled(tmp_path, loaded, dataset, batch_size=4)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    cache = FeatureCache(tmp_path, features_identity(*loaded))
    alone = filled(tmp_path / "alone", loaded, dataset)
    assert cache._places.keys() == alone._places.keys()
    for key in alone._places:
        torch.testing.assert_close(cache.get(key)["visual_tokens"], alone.get(key)["visual_tokens"])
    assert not cache.damaged()


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from shortzip.train.inputs.feature_cache import FeatureCache
import shortzip.train.inputs.shards as module
cache = FeatureCache(sys.argv[1], {"of": "a test"})
cache.write({"a": (torch.ones(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64))})
def die(tensors, path, metadata):
    Path(path).write_bytes(b"half a shard")
    os.kill(os.getpid(), signal.SIGKILL)
module.save_file = die
cache.write({"b": (torch.ones(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64))})
"""


def test_a_kill_while_writing_leaves_what_was_written_before(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(__file__).parents[2], check=False)
    assert killed.returncode == -9
    cache = FeatureCache(tmp_path, {"of": "a test"})
    assert "a" in cache
    assert "b" not in cache
    assert len(list(cache.folder.glob(".partial-*"))) == 1
    sweep(cache.folder)
    assert not list(cache.folder.glob(".partial-*"))


def test_images_of_several_tiles_and_another_process(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, {"of": "a test"})
    made = {
        key: (torch.randn(tiles, 2, 3), torch.arange(tiles * 2).view(tiles, 2)) for key, tiles in (("x", 3), ("a", 1))
    }
    cache.write(made)
    cache.refresh()
    cache.get("x")
    sent = pickle.loads(pickle.dumps(cache))
    for key, (tokens, kept) in made.items():
        assert torch.equal(sent.get(key)["visual_tokens"], tokens)
        assert torch.equal(sent.get(key)["visual_kept"], kept)


def test_an_unreadable_image_is_refused_with_its_row_and_a_changed_one_too(
    tmp_path: Path, loaded: tuple[Any, Any], tiny_instructions: Path
) -> None:
    dataset = dataset_of(tiny_instructions, loaded[1])
    conversation = dataset.conversations[0]
    dataset.image_root = tmp_path
    (tmp_path / "images").mkdir()
    for other in dataset.conversations:
        for source in other.images:
            (tmp_path / str(source)).write_bytes((tiny_instructions.parent / str(source)).read_bytes())
    bad = tmp_path / str(conversation.images[0])
    bad.write_bytes(b"no image")
    dataset.features = filled(tmp_path / "cache", loaded, dataset)
    with pytest.raises(BadSample, match="no image that Pillow knows"):
        dataset.load(conversation)
    Image.new("RGB", (20, 20), "red").save(bad)
    assert image_key(str(bad), None) not in dataset.features  # type: ignore[operator]
    with pytest.raises(BadSample, match="has changed since its features were stored"):
        dataset.load(conversation)


def test_the_config_refuses_a_cache_without_a_budget() -> None:
    with pytest.raises(ConfigError, match="set visionzip"):
        TuneConfig(model="m", data=DataConfig(instructions="i", cache_features="c"))


@pytest.mark.parametrize(("method", "name"), sorted(UNCACHEABLE))
def test_what_moves_with_the_projector_is_not_cached(loaded: tuple[Any, Any], method: str, name: str) -> None:
    visionzip = {"dominant": 8, "contextual": 0, "method": method, name: OTHER_VALUES[method, name]}
    message = (
        f"method {method}, {name} {visionzip[name]}, chooses by the projector, which is tuned, .*cache_features: null"
    )
    loaded[0].config.visionzip = visionzip
    with pytest.raises(ReductionError, match=message):
        features_identity(*loaded)
    data = DataConfig(instructions="i", cache_features="c")
    with pytest.raises(ConfigError, match=message):
        TuneConfig(model="m", data=data, visionzip=VisionZipConfig.of(visionzip))


@pytest.mark.parametrize("method", ["scope", "duet", "prumerge+"])
def test_any_method_trains_alike_from_the_cache(
    tmp_path: Path, tiny_release: Path, tiny_instructions: Path, method: str
) -> None:
    budget = {"dominant": 5, "contextual": 3 if method == "duet" else 0, "method": method}
    model, processor = load_release(str(tiny_release), Reductions(budget, FROZEN))
    train_only_projector(model, torch.float32)
    dataset = dataset_of(tiny_instructions, processor)
    expected_loss, expected = gradient(model, dataset, plain=False)
    dataset.features = filled(tmp_path, (model, processor), dataset)
    model.model.vision_tower = torch.nn.Identity()
    loss, found = gradient(model, dataset, plain=False)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_random_patches_are_the_same_cached_and_not_in_bfloat16(
    tmp_path: Path, tiny_release: Path, tiny_instructions: Path
) -> None:
    model, processor = load_release(
        ReleaseSpec(str(tiny_release), dtype=torch.bfloat16),
        Reductions({"dominant": 8, "contextual": 0, "method": "random"}),
    )
    dataset = dataset_of(tiny_instructions, processor)
    dataset.features = filled(tmp_path, (model, processor), dataset)
    cached = Collator.of(dataset.supervision)([dataset[0]]).inputs
    dataset.features = None
    pixels = Collator.of(dataset.supervision)([dataset[0]]).inputs["pixel_values"]
    assert torch.equal(cached["visual_kept"], model.model.get_visual_tokens(pixels).kept)
