"""Both releases of Video-LLaVA on the way to a tuned checkpoint: training, caching, publishing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from finished_runs import finish
from PIL import Image
from runs import ROOT, run_here, write_recipe
from test_video_releases import mixed_batch
from tiny_video import FRAMES, SIDE
from transformers import VideoLlavaForConditionalGeneration
from video_llava_releases import (
    PICTURE,
    PROMPT,
    REDUCTIONS,
    VIDEO,
    folder_tensors,
    inputs_of,
    write_both,
)

from shortzip.data.errors import UserError
from shortzip.data.supervision import Supervision
from shortzip.reduction.reductions import Reductions
from shortzip.train.inputs.chat import Chat
from shortzip.train.inputs.feature_cache import features_identity
from shortzip.train.publish.model_card import read_run, write_card
from shortzip.train.release.loading import load_release, load_viewer
from shortzip.train.release.opening import open_release
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.release.towers import leave_out_towers, load_tower, tower_digest, whole_tower
from shortzip.train.release.writing import write_reduced_checkpoint
from shortzip.train.step.objective import SupervisedLoss, train_only_projector

kinds = pytest.mark.parametrize("kind", ["hf", "temporal"])


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    return write_both(tmp_path_factory.mktemp("video-llava"))


@pytest.fixture(scope="module")
def originals(both: tuple[Path, dict[str, Path]]) -> Path:
    """The original release, in its authors' layout."""
    return both[0]


@pytest.fixture(scope="module")
def releases(both: tuple[Path, dict[str, Path]]) -> dict[str, Path]:
    """Both releases in transformers' layout."""
    return both[1]


@kinds
def test_both_towers_are_left_out_together(kind: str, releases: dict[str, Path]) -> None:
    without, _ = load_release(open_release(str(releases[kind])), REDUCTIONS, with_tower=False)
    model, _ = load_release(str(releases[kind]), REDUCTIONS)
    leave_out_towers(model)
    for each in (without, model):
        assert {type(each.model.image_tower), type(each.model.video_tower)} == {torch.nn.Identity}
        assert each.model.vision_tower is each.model.image_tower
    assert all(torch.equal(tensor, without.state_dict()[name]) for name, tensor in model.state_dict().items())


@kinds
def test_a_viewer_has_the_image_tower_and_cached_features_know_both(kind: str, releases: dict[str, Path]) -> None:
    release = open_release(str(releases[kind]))
    viewer, processor = load_viewer(release, REDUCTIONS)
    model, _ = load_release(str(releases[kind]), REDUCTIONS)
    pixels = processor.image_processor(PICTURE, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        chosen, expected = (each.model.get_visual_tokens(pixels) for each in (viewer, model))
    assert torch.equal(chosen.tokens, expected.tokens)
    assert viewer.device == torch.device("cpu"), "that of the one tower it has"
    for name in ("image_tower", "video_tower"):  # images' and videos' are kept in one folder
        before = features_identity(model, processor)
        with torch.no_grad():
            getattr(model.model, name).encoder.layers[0].self_attn.q_proj.weight.add_(1)
        assert features_identity(model, processor) != before, name


@kinds
def test_each_tower_is_loaded_alone(kind: str, releases: dict[str, Path]) -> None:
    """As where cached features lack an image or a video: without the rest, and recognised by the same digest."""
    model, _ = load_release(str(releases[kind]), REDUCTIONS)
    without, _ = load_release(open_release(str(releases[kind])), REDUCTIONS, with_tower=False)
    for name in ("image_tower", "video_tower"):
        setattr(without.model, name, load_tower(releases[kind], model.config, torch.float32, name))
    assert tower_digest(whole_tower(without)) == tower_digest(whole_tower(model))
    videos = torch.randn(1, FRAMES, 3, SIDE, SIDE)
    with torch.no_grad():
        found, expected = (each.model.get_frame_tokens(videos).tokens for each in (without, model))
    assert torch.equal(found, expected)


@kinds
@pytest.mark.parametrize("reductions", [REDUCTIONS, Reductions()], ids=["reduced", "every token"])
def test_the_packed_walk_gives_the_gradient_of_a_plain_pass(
    kind: str, reductions: Reductions, releases: dict[str, Path], tmp_path: Path
) -> None:
    model, processor = load_release(str(releases[kind]), reductions)
    train_only_projector(model, torch.float32)
    batch = mixed_batch(processor, tmp_path)
    gradients = []
    for plain in (False, True):
        model.zero_grad()
        loss = SupervisedLoss(model, plain=plain)(batch)
        loss.backward()
        gradients.append((loss.item(), model.model.multi_modal_projector.linear_1.weight.grad.clone()))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    assert float(gradients[1][1].abs().max()) > 0
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-4, atol=1e-5)


@kinds
def test_a_conversation_about_images_goes_on_in_its_cache(kind: str, releases: dict[str, Path]) -> None:
    supervision = Supervision(load_release(str(releases[kind]), REDUCTIONS)[1], max_length=None)
    model, _ = load_release(str(releases[kind]), REDUCTIONS)
    chat, fresh = Chat(model, supervision), Chat(model, supervision)
    for images in ([PICTURE], [], [Image.new("RGB", (30, 30), (9, 200, 60))]):
        answer = chat.ask("name the colour", images, max_new_tokens=3)
        assert fresh.reply(chat.turns[:-1], chat.images, 3, keep=False).text == answer


@pytest.mark.slow
@kinds
def test_a_run_on_images_and_what_it_leaves(
    kind: str, releases: dict[str, Path], tiny_instructions: Path, tmp_path: Path
) -> None:
    """Rows of one image, of several and of none; with cached features the run is the same, without both towers; one
    over more rows loads them for what the cache lacks."""
    made = []
    features = str(tmp_path / "cache")
    for name, cache, fraction in (("plain", None, 0.5), ("cached", features, 0.5), ("more", features, 1.0)):
        recipe = write_recipe(
            tmp_path / "recipe.yaml", releases[kind], tiny_instructions, max_steps=2, global_batch_size=8,
            per_device_train_batch_size=4, final_evaluation=False,
            data={"fraction": fraction, "cache_features": cache},
        )  # fmt: skip
        folder = run_here(recipe, tmp_path / name, "--data.image_root", str(tiny_instructions.parent))
        made.append(folder_tensors(folder / "final"))
    before = folder_tensors(releases[kind])
    moved = {name for name in before if not torch.equal(made[0][name].to(before[name].dtype), before[name])}
    assert {name.split("multi_modal_projector.")[1].split(".")[0] for name in moved} == {"linear_1", "linear_2"}
    assert all(torch.equal(tensor, made[1][name]) for name, tensor in made[0].items())
    if kind == "hf":
        plain, info = VideoLlavaForConditionalGeneration.from_pretrained(
            tmp_path / "plain" / "final", output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert torch.equal(
            plain.model.multi_modal_projector.linear_1.weight, made[0]["multi_modal_projector.linear_1.weight"]
        )
    tuned, processor = load_release(str(tmp_path / "plain"))
    with torch.no_grad():
        assert tuned(**inputs_of(processor)).logits.isfinite().all()


@pytest.mark.slow
def test_the_recipe_runs_at_toy_size(
    releases: dict[str, Path], tiny_instructions: Path, tiny_held_out: Path, tmp_path: Path
) -> None:
    """Two steps with its own keys, and the table at its end; only the release, the data and the length are others."""
    path = ROOT / "configs" / "video-llava-7b.yaml"
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert 8 * sum(keys["visionzip"].values()) == 136
    folder = run_here(
        path, tmp_path / "run", "--model", str(releases["temporal"]), "--data.instructions",
        str(tiny_instructions), "--data.image_root", str(tiny_instructions.parent), "--data.num_workers", "0",
        "--data.fraction", "1", "--max_steps", "2", "--num_train_epochs", "null", "--global_batch_size", "8",
        "--data.eval_instructions", str(tiny_held_out), "--data.eval_image_root", str(tiny_held_out.parent),
    )  # fmt: skip
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert open_release(str(folder)).saved_reductions.visionzip == keys["visionzip"]
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    kept = set(keys) - {"model", "data", "num_train_epochs", "global_batch_size", "output_dir", "visionzip"}
    keys["learning_rate"] = float(keys["learning_rate"])  # YAML takes 2e-5 for a text
    assert {key: resolved[key] for key in kept} == {key: keys[key] for key in kept}
    header = path.read_text(encoding="utf-8").split("\nmodel:")[0]
    assert {"# Needs ", "# Time  "} <= {line[:8] for line in header.splitlines()}


_LOAD = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
sys.path = [path for path in sys.path if "__editable__" not in path]
import importlib.util
assert not importlib.util.find_spec("shortzip")
import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
folder, text, frames, out = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
picture = Image.new("RGB", (58, 50), (200, 40, 90))
inputs = processor(images=picture, videos=[np.load(frames)], text=text, return_tensors="pt")
with torch.no_grad():
    torch.save(model(**inputs).logits, out)
"""


@kinds
@pytest.mark.slow
@pytest.mark.parametrize("shape", ["full", "projector"])
def test_what_is_published_loads_without_shortzip(
    kind: str, shape: Any, releases: dict[str, Path], tmp_path: Path
) -> None:
    opened = open_release(str(releases[kind]))
    model, processor = load_release(opened, REDUCTIONS)
    projector = model.model.multi_modal_projector.state_dict()
    folder = tmp_path / f"published-{kind}-{shape}"  # a name of its own: transformers' cache of code goes by it
    write_reduced_checkpoint(folder, opened, projector, processor, REDUCTIONS, shape=shape)
    code = {path.name for path in folder.glob("*.py")}
    assert {"modeling_reduced_video_llava.py", "modeling_videos.py", "processing_videos.py", "media.py"} <= code
    assert ("temporal_tower.py" in code) == (kind == "temporal")
    assert not {name for name in code if name.startswith(("family", "families", "fastv")) or "onevision" in name}
    np.save(tmp_path / "frames.npy", VIDEO)
    arguments = [str(folder), PROMPT, str(tmp_path / "frames.npy"), str(tmp_path / "logits.pt")]
    run = subprocess.run(
        [sys.executable, "-P", "-c", _LOAD, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    with torch.no_grad():
        expected = model(**inputs_of(processor)).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-5)


def test_a_llava_carries_no_code_of_this_family(tiny_release: Path, tmp_path: Path) -> None:
    run = finish(tmp_path / "run", tiny_release, REDUCTIONS)
    assert not [path.name for path in (run / "final").glob("*.py") if "video" in path.name or "temporal" in path.name]


def test_what_is_written_for_its_authors_code_and_read_again(
    originals: Path, releases: dict[str, Path], tmp_path: Path
) -> None:
    release = open_release(str(releases["temporal"]))
    model, processor = load_release(release, REDUCTIONS)
    projector = {name: tensor + 0.5 for name, tensor in model.model.multi_modal_projector.state_dict().items()}
    target = tmp_path / "videollava-tuned"
    write_reduced_checkpoint(target, release, projector, processor, REDUCTIONS, shape="llava", base=str(originals))
    config = json.loads((target / "config.json").read_text())
    assert config["mm_video_tower"].endswith("LanguageBind_Video_merge")
    assert Reductions.from_config(config) == REDUCTIONS
    written = torch.load(target / "mm_projector.bin", weights_only=True)
    assert set(written) == {f"model.mm_projector.{part}" for part in ("0.weight", "0.bias", "2.weight", "2.bias")}
    again, _ = load_release(open_release(str(target), cache_dir=tmp_path / "cache"))
    assert torch.equal(again.model.multi_modal_projector.linear_2.bias, projector["linear_2.bias"])
    assert again.config.model_type == "reduced_temporal_video_llava"
    laid, _ = load_release(open_release(ReleaseSpec(str(releases["temporal"]), mm_projector=str(target))))
    assert torch.equal(laid.model.multi_modal_projector.linear_2.bias, projector["linear_2.bias"])


@pytest.mark.parametrize("shape", ["full", "llava"])
def test_the_card_says_frames_and_the_command_of_its_authors_code(
    shape: Any, releases: dict[str, Path], tmp_path: Path
) -> None:
    run = read_run(finish(tmp_path / "run", releases["temporal"], REDUCTIONS))
    body = write_card(run, repo_id="you/videollava-6", shape=shape, size=1000, picture=False)
    assert "6 of 25 visual tokens per image, and per frame of a video (4 dominant, CLS counted among them, and" in body
    assert ("python -m videollava.serve.cli --model-path videollava-6" in body) == (shape == "llava")


def test_an_hf_release_is_not_written_for_the_authors_code(releases: dict[str, Path], tmp_path: Path) -> None:
    release = open_release(str(releases["hf"]))
    model, processor = load_release(release, REDUCTIONS)
    projector = model.model.multi_modal_projector.state_dict()
    with pytest.raises(UserError, match=r"no weights for attention over time \(temporal_embedding, temporal_attn"):
        write_reduced_checkpoint(tmp_path / "llava", release, projector, processor, REDUCTIONS, shape="llava")
    assert not (tmp_path / "llava").exists()
