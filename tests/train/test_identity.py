"""What a run depends on: each part changes the identity, by name, and a run with any of it changed does not go on."""

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps
from runs import copy_until, run_here, write_recipe
from safetensors.torch import load_file, save_file
from tiny import write_release

from shortzip.data.batching import permutation
from shortzip.data.dataset import ConversationDataset
from shortzip.data.drops import BadSample
from shortzip.data.files import sha256
from shortzip.data.instructions import read_instructions
from shortzip.data.supervision import Supervision
from shortzip.reduction.base_release import describe_files
from shortzip.train.inputs.identity import IMAGES, changed_versions, check_same_origin, data_identity, release_identity
from shortzip.train.release.loading import load_release
from shortzip.train.release.opening import open_release
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.release.tensor_files import write_index
from shortzip.train.run.checkpoint import CHECKSUMS, FILES, CheckpointError

LLM, TOWER, PROJECTOR = "the language model's weights", "the vision tower's weights", "the projector to begin with"


def differing(found: dict[str, str], other: dict[str, str]) -> set[str]:
    assert found.keys() == other.keys()
    return {part for part in found if found[part] != other[part]}


@pytest.fixture(scope="module")
def release_parts(tiny_release: Path) -> dict[str, str]:
    return release_identity(open_release(str(tiny_release)))


def change_weight(name: str) -> Callable[[Path], None]:
    """Another value in the middle of one tensor: size, header and the tensor's beginning stay."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        names = [found for found in tensors if name in found]
        flat = tensors[names[0]].flatten()
        flat[len(flat) // 2] += 1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def change_json(file: str, key: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        section, *rest = key.split(".")
        if rest:
            content[section][rest[0]] = change(content[section].get(rest[0]))
        else:
            content[section] = change(content.get(section))
        (folder / file).write_text(json.dumps(content))

    return apply


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (change_weight("layers.2.mlp.up_proj"), {LLM}),
        (change_weight("lm_head"), {LLM}),
        (change_weight("encoder.layers.1.mlp.fc1.weight"), {TOWER}),
        (change_weight("embeddings.position_embedding"), {TOWER}),
        (change_weight("multi_modal_projector.linear_2.weight"), {PROJECTOR}),
        (change_json("config.json", "text_config.rms_norm_eps", lambda _: 1e-3), {"the language model's config"}),
        (change_json("config.json", "vision_config.layer_norm_eps", lambda _: 1e-3), {"the vision tower's config"}),
        (change_json("config.json", "vision_feature_layer", lambda _: -1), {"the feature layer"}),
        (change_json("config.json", "vision_feature_select_strategy", lambda _: "full"), {"the feature layer"}),
        (change_json("config.json", "projector_hidden_act", lambda _: "relu"), {"the rest of the release's config"}),
        (change_json("processor_config.json", "image_processor.image_mean", lambda _: [0.1] * 3),
         {"the image processor"}),
        (change_json("tokenizer.json", "added_tokens", lambda tokens: tokens[:-1]), {"the tokenizer"}),
        (change_json("tokenizer_config.json", "eos_token", lambda _: "<unk>"), {"the tokenizer"}),
        (change_json("generation_config.json", "eos_token_id", lambda _: 7), {"the generation config"}),
        (change_json("config.json", "transformers_version", lambda _: "9.9"), set()),
    ],
)  # fmt: skip
def test_each_part_of_a_release_is_recognised_by_its_content(
    change: Callable[[Path], None],
    parts: set[str],
    tiny_release: Path,
    release_parts: dict[str, str],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "release"
    shutil.copytree(tiny_release, folder)
    change(folder)
    assert differing(release_parts, release_identity(open_release(str(folder)))) == parts


def test_the_same_release_in_other_files_is_the_same(
    tiny_release: Path, release_parts: dict[str, str], tmp_path: Path
) -> None:
    """In two shards, with its own projector laid over it, and named by a checkpoint that is only a projector."""
    sharded = tmp_path / "sharded"
    shutil.copytree(tiny_release, sharded)
    tensors = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, sharded / file, metadata={"format": "pt"})
    write_index(sharded, {name: file for file, held in shards.items() for name in held}, 0)
    assert not differing(release_parts, release_identity(open_release(str(sharded))))

    alone = tmp_path / "projector.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if "multi_modal_projector" in name}, alone)
    assert not differing(
        release_parts, release_identity(open_release(ReleaseSpec(str(tiny_release), mm_projector=str(alone))))
    )

    small = tmp_path / "small"
    shutil.copytree(tiny_release, small)
    (small / "model.safetensors").unlink()
    shutil.copy(alone, small)
    files = describe_files(tiny_release, ["config.json", "model.safetensors"])
    base = {"name": str(tiny_release), "revision": None, "files": files}
    change_json("config.json", "base_release", lambda _: base)(small)
    assert not differing(release_parts, release_identity(open_release(str(small))))


def test_another_projector_laid_over_is_another_beginning(
    tiny_release: Path, release_parts: dict[str, str], tmp_path: Path
) -> None:
    other = write_release(tmp_path / "other", seed=1)
    tensors = load_file(other / "model.safetensors")
    path = tmp_path / "projector.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if "multi_modal_projector" in name}, path)
    release = open_release(ReleaseSpec(str(tiny_release), mm_projector=str(path)))
    assert differing(release_parts, release_identity(release)) == {PROJECTOR}


@pytest.fixture(scope="module")
def processor(tiny_release: Path) -> Any:
    return load_release(str(tiny_release))[1]


@pytest.fixture
def rows(tiny_instructions: Path, tmp_path: Path) -> Path:
    """The instructions in a folder of their own."""
    shutil.copytree(tiny_instructions.parent, tmp_path / "rows")
    return tmp_path / "rows"


def dataset_of(folder: Path, processor: Any, template: str | None = None) -> ConversationDataset:
    supervision = Supervision(processor)
    if template is not None:
        supervision.template = template
    return ConversationDataset(read_instructions(folder / "instructions.json"), supervision, folder)


def change_answer(folder: Path) -> None:
    path = folder / "instructions.json"
    path.write_text(path.read_text().replace("it is red", "it is green", 1))


def rename_an_image(folder: Path) -> None:
    (folder / "images" / "0-0-0.png").rename(folder / "images" / "renamed.png")
    path = folder / "instructions.json"
    path.write_text(path.read_text().replace("0-0-0.png", "renamed.png"))


def mirror_an_image(folder: Path) -> None:
    path = folder / "images" / "0-0-0.png"
    ImageOps.mirror(Image.open(path)).save(path)


def exchange_two_images(folder: Path) -> None:
    first, second = (folder / "images" / f"0-{number}-0.png" for number in (0, 1))
    first.rename(folder / "between.png")
    second.rename(first)
    (folder / "between.png").rename(second)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (change_answer, {"the turns of the conversations"}),
        (rename_an_image, {"the names of the images"}),
        (mirror_an_image, {IMAGES}),
        (exchange_two_images, {IMAGES}),
        (lambda folder: None, set()),
    ],
)
def test_turns_and_images_are_recognised_by_their_content(
    change: Callable[[Path], None], parts: set[str], processor: Any, tiny_instructions: Path, rows: Path
) -> None:
    change(rows)
    before = data_identity(dataset_of(tiny_instructions.parent, processor))
    assert differing(before, data_identity(dataset_of(rows, processor))) == parts


def test_another_template_is_another_run(processor: Any, rows: Path) -> None:
    other = f"{Supervision(processor).template} "
    identities = [data_identity(dataset_of(rows, processor, template)) for template in (None, other)]
    assert differing(*identities) == {"the chat template"}


def test_embedded_images_are_recognised_by_their_bytes(processor: Any, rows: Path) -> None:
    dataset = dataset_of(rows, processor)
    before = data_identity(dataset)
    file = io.BytesIO()
    Image.new("RGB", (28, 20), "red").save(file, "PNG")
    place = next(number for number, row in enumerate(dataset.conversations) if len(row.images) == 1)
    for content in (file.getvalue(), file.getvalue()[:-1] + b"!"):
        dataset.conversations[place] = replace(dataset.conversations[place], images=(content,))
        after = data_identity(dataset)
        assert IMAGES in differing(before, after)
        before = after


@pytest.fixture(scope="module")
def stopped(
    tiny_release: Path, tiny_instructions: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A recipe with inputs of its own, and a run of it that came to step 2 of 3."""
    root = tmp_path_factory.mktemp("stopped")
    shutil.copytree(tiny_release, root / "release")
    shutil.copytree(tiny_instructions.parent, root / "rows")
    recipe = write_recipe(
        root / "recipe.yaml", root / "release", root / "rows" / "instructions.json", max_steps=3, save_steps=1
    )
    return recipe, copy_until(run_here(recipe, root / "run"), root / "stopped", 2)


RESUME = ("--resume_from_checkpoint", "latest")


def test_a_run_does_not_go_on_over_something_else(stopped: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run = stopped
    copy = tmp_path / "inputs"
    shutil.copytree(recipe.parent, copy)
    change_weight("vision_tower")(copy / "release")
    mirror_an_image(copy / "rows")
    arguments = ("--model", str(copy / "release"), "--data.instructions", str(copy / "rows" / "instructions.json"))
    said = r"Changed since: the vision tower's weights, the images \(1 of \d+, such as images/0-0-0.png\)\. Put back"
    with pytest.raises(CheckpointError, match=said):
        run_here(recipe, run, *RESUME, *arguments)


def test_an_image_that_a_run_failed_over_may_be_mended(
    tiny_release: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless a step has seen it; and in a run that failed over nothing of the kind, none may change."""
    instructions = rows / "instructions.json"
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_release, instructions, max_steps=3, save_steps=1)
    order = permutation(40, 0, 0).tolist()
    conversations = read_instructions(instructions)
    last, first = (
        rows / str(next(conversations[row].images[0] for row in part if conversations[row].images))
        for part in (order[12:18], order[:6])
    )
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadSample, match=last.name):
        run_here(recipe, tmp_path / "run")
    last.write_bytes(whole)
    mended, changed = tmp_path / "mended", tmp_path / "changed"
    shutil.copytree(tmp_path / "run", mended)
    shutil.copytree(tmp_path / "run", changed)
    run_here(recipe, mended, *RESUME)
    assert f"1 images that no step has seen were mended since the run failed, such as images/{last.name}" in (
        capsys.readouterr().out
    )
    status = json.loads((changed / "status.json").read_text())
    (changed / "status.json").write_text(json.dumps({**status, "reason": "SIGTERM"}))
    with pytest.raises(CheckpointError, match=rf"the images \(1 of \d+, such as images/{last.name}\)"):
        run_here(recipe, changed, *RESUME)
    (changed / "status.json").write_text(json.dumps(status))
    ImageOps.mirror(Image.open(first)).save(first)
    with pytest.raises(CheckpointError, match=r"the images \(2 of \d+"):
        run_here(recipe, changed, *RESUME)


def test_a_checkpoint_of_an_older_version_goes_on_and_says_what_is_not_known(
    stopped: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = stopped
    older = tmp_path / "run"
    shutil.copytree(run, older)
    path = older / "step-000002" / FILES[-1]
    state = json.loads(path.read_text())
    del state["identity"], state["versions"]["tokenizers"]
    state["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(state))
    sums = older / "step-000002" / CHECKSUMS
    sums.write_text(re.sub(rf"\w+  {FILES[-1]}", f"{sha256(path)}  {FILES[-1]}", sums.read_text()))
    run_here(recipe, older, *RESUME)
    said = capsys.readouterr().out
    assert "begun by an older ShortZip: whether these have changed cannot be checked" in said
    assert "the vision tower's weights" in said
    assert f"torch was 1.0 and is {version('torch')}" in said
    assert "tokenizers" not in said.split("other library versions")[1].splitlines()[0]
    assert json.loads((older / "step-000003" / FILES[-1]).read_text())["identity"]


def test_a_part_that_is_noted_since_is_not_checked_but_said(processor: Any, rows: Path) -> None:
    dataset = dataset_of(rows, processor)
    found = data_identity(dataset)
    said: list[str] = []
    state: dict[str, Any] = {"identity": found, "versions": {}}
    check_same_origin(state, found, dataset, rows, said.append)
    assert not said
    state["identity"] = {part: digest for part, digest in found.items() if part != IMAGES}
    check_same_origin(state, found, dataset, rows, said.append)
    assert said[0].endswith("cannot be checked: the images")
    state["identity"]["the chat template"] = "0"
    with pytest.raises(CheckpointError, match="Changed since: the chat template"):
        check_same_origin(state, found, dataset, rows, said.append)


def test_only_versions_that_differ_are_told() -> None:
    assert changed_versions({"torch": "2", "old": "1"}, {"torch": "2", "new": "3"}) is None
    assert "torch was 2 and is 3." in str(changed_versions({"torch": "2"}, {"torch": "3"}))
