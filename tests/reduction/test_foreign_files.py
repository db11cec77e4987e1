"""What strangers may put into the files of a release: refused by the file's name, and none of their code is run."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shortzip.reduction import (
    ReducedLlavaConfig,
    ReducedLlavaForConditionalGeneration,
    ReducedLlavaNextConfig,
    ReducedLlavaProcessor,
)
from shortzip.reduction.base_release import describe_files, digest, fetch_base
from shortzip.reduction.weight_files import is_inside

DEEP = '{"a":' * 5000 + "1" + "}" * 5000
RAN = "from pathlib import Path\nPath({path!r}).touch()\n\n\nclass Stranger:\n    pass\n"


@pytest.fixture
def release(tiny_release: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_release, tmp_path / "release"))


def edit(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; `a__b` is b within a."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    for key, value in changes.items():
        *outer, last = key.split("__")
        place = content
        for name in outer:
            place = place.setdefault(name, {})
        place[last] = value
    path.write_text(json.dumps(content))


def with_header(path: Path, header: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def as_shards(folder: Path, index: Any) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    text = index if isinstance(index, str) else json.dumps(index)
    (folder / "model.safetensors.index.json").write_text(text)


def as_compressed_bin(folder: Path) -> None:
    """A .bin of a few kilobytes whose data.pkl unpacks to 9 MB."""
    whole = io.BytesIO()
    torch.save(load_file(folder / "model.safetensors"), whole)
    (folder / "model.safetensors").unlink()
    with (
        zipfile.ZipFile(whole) as given,
        zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in given.namelist():
            data = given.read(name)
            target.writestr(name, data + bytes(9_000_000) if name.endswith("data.pkl") else data)


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "deep config": (lambda f: (f / "config.json").write_text(DEEP), r"config\.json is nested too deeply"),
    "a list as config": (lambda f: (f / "config.json").write_text("[]"), r"config\.json holds a list"),
    "text as config": (lambda f: (f / "config.json").write_text("hello"), r"config\.json is not readable as JSON"),
    "deep generation config": (
        lambda f: (f / "generation_config.json").write_text(DEEP),
        r"generation_config\.json is nested too deeply",
    ),
    "deep index": (lambda f: as_shards(f, DEEP), r"model\.safetensors\.index\.json is nested too deeply"),
    "text as index": (lambda f: as_shards(f, "<html>"), r"model\.safetensors\.index\.json is not readable as JSON"),
    "no weight_map": (lambda f: as_shards(f, {"metadata": {}}), r"index\.json has no weight_map"),
    "a list as weight_map": (lambda f: as_shards(f, {"weight_map": ["a"]}), r"index\.json has no weight_map"),
    "a shard above": (
        lambda f: as_shards(f, {"weight_map": {"x": "../other/weights.safetensors"}}),
        r"index\.json: weight_map says that x is in '\.\./other/weights\.safetensors'",
    ),
    "an absolute shard": (
        lambda f: as_shards(f, {"weight_map": {"x": str(f / "weights.safetensors")}}),
        r"weight_map says that x is in '/",
    ),
    "a number as shard": (lambda f: as_shards(f, {"weight_map": {"x": 3}}), r"weight_map says that x is in 3"),
    "deep header": (
        lambda f: with_header(f / "model.safetensors", DEEP.encode()),
        r"model\.safetensors is no safetensors file.*nested too deeply",
    ),
    "a list as header": (lambda f: with_header(f / "model.safetensors", b"[1]     "), "is no safetensors file"),
    "no offsets": (
        lambda f: with_header(f / "model.safetensors", b'{"x": {"dtype": "F32", "shape": [1]}}'),
        "is no safetensors file",
    ),
    "offsets backwards": (
        lambda f: with_header(f / "model.safetensors", b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[8,4]}}'),
        r"model\.safetensors: the header gives x a shape or a place that cannot be",
    ),
    "a compressed bin": (as_compressed_bin, r"pytorch_model\.bin is refused: its \d+ bytes unpack to 9\d{6}"),
    "patches of no size": (
        lambda f: edit(f / "config.json", vision_config__patch_size=0),
        r"vision_config\.patch_size in config\.json is 0, needed is at least 1",
    ),
    "no heads": (
        lambda f: edit(f / "config.json", text_config__num_key_value_heads=0),
        r"text_config\.num_key_value_heads in config\.json is 0",
    ),
    "no part": (lambda f: edit(f / "config.json", text_config=None), r"text_config in config\.json is None"),
    "a stranger's model": (
        lambda f: edit(
            f / "config.json", text_config__model_type="own", text_config__auto_map={"AutoModel": "own.Own"}
        ),
        r"text_config\.model_type in config\.json is 'own'.*code of a release is never run",
    ),
}


@pytest.mark.parametrize(("change", "message"), list(DAMAGED.values()), ids=list(DAMAGED))
def test_damaged_releases_are_refused_by_the_files_name(
    release: Path, change: Callable[[Path], Any], message: str
) -> None:
    change(release)
    with pytest.raises(ValueError, match=message):
        ReducedLlavaForConditionalGeneration.from_pretrained(release)


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    ("text", "said"), [(DEEP, "nested too deeply"), ("{'", "not readable as JSON"), ("3", "holds a int")]
)
def test_damaged_processors_are_refused_by_the_files_name(release: Path, name: str, text: str, said: str) -> None:
    (release / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} .*{said}"):
        ReducedLlavaProcessor.from_pretrained(release)


@pytest.mark.parametrize("config_class", [ReducedLlavaConfig, ReducedLlavaNextConfig])
@pytest.mark.parametrize(("key", "value"), [("patch_size", 0), ("image_size", 0), ("patch_size", -4)])
def test_sizes_of_a_config_made_by_hand(config_class: Any, key: str, value: int) -> None:
    tower = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4, key: value}
    with pytest.raises(ValueError, match=f"the tower's {key} is {value}; it must be a whole number from 1"):
        config_class(vision_config=tower, visionzip={"dominant": 2, "contextual": 1})


def test_a_processor_of_patches_of_no_size(release: Path) -> None:
    edit(release / "processor_config.json", patch_size=0)
    with pytest.raises(ValueError, match="processor: patch_size is 0; it must be a whole number from 1"):
        ReducedLlavaProcessor.from_pretrained(release)


def strange_image_processor(folder: Path) -> None:
    """Apart, as releases of some years have it."""
    settings = json.loads((folder / "processor_config.json").read_text()).pop("image_processor")
    edit(folder / "processor_config.json", image_processor=None)
    edit(folder / "preprocessor_config.json", **settings)
    edit(
        folder / "preprocessor_config.json",
        image_processor_type="StrangerImageProcessor",
        auto_map={"AutoImageProcessor": "stranger.Stranger"},
    )
    content = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


STRANGE: dict[str, Callable[[Path], Any]] = {
    "image processor": strange_image_processor,
    "image processor within": lambda f: edit(
        f / "processor_config.json",
        image_processor__image_processor_type="StrangerImageProcessor",
        image_processor__auto_map={"AutoImageProcessor": "stranger.Stranger"},
    ),
    "named in config.json": lambda f: (
        strange_image_processor(f),
        edit(f / "config.json", auto_map={"AutoImageProcessor": "stranger.Stranger"}),
    ),
}


@pytest.fixture
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: Any) -> str:
        raise AssertionError("somebody was asked whether to run code")

    monkeypatch.setattr("builtins.input", ask)


@pytest.mark.usefixtures("nobody_is_asked")
@pytest.mark.parametrize("change", list(STRANGE.values()), ids=list(STRANGE))
def test_code_of_a_release_is_never_run(release: Path, tmp_path: Path, change: Callable[[Path], Any]) -> None:
    ran = tmp_path / "ran"
    (release / "stranger.py").write_text(RAN.format(path=str(ran)))
    change(release)
    with pytest.raises(ValueError, match=r"none of transformers' own, and code .* is never run") as caught:
        ReducedLlavaProcessor.from_pretrained(release)
    assert "trust_remote_code" not in str(caught.value)
    assert not ran.exists()


@pytest.mark.usefixtures("nobody_is_asked")
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_code_beside_a_known_class_is_left_alone(release: Path, tmp_path: Path, name: str) -> None:
    ran = tmp_path / "ran"
    (release / "stranger.py").write_text(RAN.format(path=str(ran)))
    classes = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")
    auto_map = dict.fromkeys(classes, "stranger.Stranger") | {"AutoTokenizer": ["stranger.Stranger", None]}
    edit(release / name, auto_map=auto_map)
    if name == "config.json":
        edit(release / name, text_config__auto_map=auto_map, vision_config__auto_map=auto_map)
    ReducedLlavaProcessor.from_pretrained(release)
    ReducedLlavaForConditionalGeneration.from_pretrained(release)
    assert not ran.exists()


NAMES = ["config.json", "model.safetensors"]


def test_a_base_is_known_by_its_weights(release: Path) -> None:
    base = {"name": str(release), "revision": None, "files": describe_files(release, NAMES)}
    assert fetch_base(base, "checkpoint") == release

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            fetch_base({**base, **changes}, "checkpoint")

    config, weights = base["files"]
    refused(r"checkpoint: base_release lists no weights", files=[config])
    refused(r"base_release lists no weights", files=[])
    refused(r"must list files as", files="config.json")
    refused(r"must list files as", files=[config, {"file": "model.safetensors"}])
    refused(r"must list files as", files=[config, {**weights, "size": "9"}])
    for name in ("../model.safetensors", "/etc/passwd", "a/../../b", "..\\b", "C:\\b", "a/model.safetensors", ""):
        refused(r"base_release lists the file .*release's own folder", files=[config, {**weights, "file": name}])
    refused(r"must name a Hub id or a folder", name=None)
    refused(r"must name a Hub id or a folder", revision=3)


def test_weights_that_were_not_compared_are_not_loaded(release: Path) -> None:
    """An index that is listed, shards that are not; and one file that transformers takes before any index."""
    as_shards(release, {"weight_map": {"x": "weights.safetensors"}})
    index = "model.safetensors.index.json"
    base = {"name": str(release), "revision": None, "files": describe_files(release, ["config.json", index])}
    with pytest.raises(ValueError, match=r"base_release does not list weights\.safetensors"):
        fetch_base(base, "checkpoint")
    base["files"] = describe_files(release, ["config.json", index, "weights.safetensors"])
    fetch_base(base, "checkpoint")
    shutil.copy(release / "weights.safetensors", release / "model.safetensors")
    with pytest.raises(ValueError, match=r"base_release does not list model\.safetensors"):
        fetch_base(base, "checkpoint")


@pytest.mark.parametrize("header", [DEEP.encode(), b"[]", b'{"x": 3}', b'{"x":{"dtype":"F32","shape":[1]}}'])
def test_the_digest_of_a_damaged_header(tmp_path: Path, header: bytes) -> None:
    with_header(tmp_path / "model.safetensors", header)
    with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file"):
        digest(tmp_path / "model.safetensors")


def test_names_that_stay_inside() -> None:
    assert all(is_inside(name) for name in ("model.safetensors", "a/b.bin", "..a", "a..b", "model..safetensors"))
    assert not any(
        is_inside(name) for name in ("", "..", "../a", "a/..", "/a", "\\a", "C:a", "a\\..\\b", "a\0", 3, None)
    )
