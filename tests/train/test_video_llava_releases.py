"""Both releases of Video-LLaVA from their layouts to a tuned checkpoint: loading, training, caching, publishing."""

import json
import shutil
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
from safetensors.torch import load_file, save_file
from test_video_releases import mixed_batch
from tiny_video import (
    FRAMES,
    IMAGE_TOWER,
    PATCHES,
    SIDE,
    config_keys,
    original_tensors,
    temporal_video_llava,
    write_original_video_llava,
    write_shards,
    write_video_llava_hf,
)
from torch import Tensor
from transformers import VideoLlavaForConditionalGeneration, VideoLlavaImageProcessor

from shortzip.data.errors import UserError
from shortzip.data.supervision import Supervision
from shortzip.reduction.configuration_reduced_temporal_video_llava import ReducedTemporalVideoLlavaConfig
from shortzip.reduction.configuration_reduced_video_llava import ReducedVideoLlavaConfig
from shortzip.reduction.errors import ReductionError
from shortzip.reduction.families import family_of
from shortzip.reduction.flops import parameter_counts
from shortzip.reduction.modeling_reduced_temporal_video_llava import ReducedTemporalVideoLlavaForConditionalGeneration
from shortzip.reduction.modeling_reduced_video_llava import ReducedVideoLlavaForConditionalGeneration
from shortzip.reduction.reductions import Reductions
from shortzip.train.inputs.chat import Chat
from shortzip.train.inputs.feature_cache import features_identity
from shortzip.train.inputs.identity import release_identity
from shortzip.train.inputs.prompts import batch_prompts, encode_prompt
from shortzip.train.publish.model_card import read_run, write_card
from shortzip.train.release.layouts import layout_for
from shortzip.train.release.loading import load_release, load_viewer
from shortzip.train.release.opening import open_release
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.release.towers import leave_out_towers
from shortzip.train.release.writing import write_reduced_checkpoint
from shortzip.train.step.components import describe_components
from shortzip.train.step.objective import SupervisedLoss, train_only_projector

REDUCTIONS = Reductions({"dominant": 4, "contextual": 2}, {"layers": [1, 3]})
PICTURE = Image.new("RGB", (58, 50), (200, 40, 90))
VIDEO = np.random.default_rng(0).integers(0, 256, (FRAMES, 30, 44, 3), dtype=np.uint8)
PROMPT = "USER: <image>\nname the colour of <video>\nnow ASSISTANT:"
kinds = pytest.mark.parametrize("kind", ["hf", "temporal"])


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original release, in its authors' layout."""
    return write_original_video_llava(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def releases(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both releases in transformers' layout."""
    cache = tmp_path_factory.mktemp("converted")
    return {
        "hf": write_video_llava_hf(tmp_path_factory.mktemp("hf") / "tiny-hf"),
        "temporal": open_release(str(originals), cache_dir=cache).folder,
    }


def inputs_of(processor: Any) -> dict[str, Tensor]:
    return dict(processor(images=PICTURE, videos=[VIDEO], text=PROMPT, return_tensors="pt"))


def folder_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_the_authors_layout_becomes_one_with_every_tensor_of_it(originals: Path, releases: dict[str, Path]) -> None:
    model, processor = load_release(str(releases["temporal"]), Reductions())
    theirs = original_tensors(temporal_video_llava(**config_keys(1000, 1000, 1001, bos_token_id=1, eos_token_id=2)))
    held = original_tensors(model)
    assert held.keys() == theirs.keys()
    assert sum(".temporal_" in name for name in held) == 3 * 11
    for name, tensor in theirs.items():
        assert torch.equal(held[name][: len(tensor)], tensor), name
    ids = processor.tokenizer.get_vocab()
    assert (
        (ids["<image>"], ids["<video>"]) == (1000, 1001) == (model.config.image_token_id, model.config.video_token_id)
    )
    assert model.config.text_config.vocab_size == 1024
    assert model.config.video_frames == processor.video_frames == FRAMES
    back = layout_for("temporal_video_llava").to_original(model.config, IMAGE_TOWER, "tiny")
    assert back == json.loads((originals / "config.json").read_text())
    assert "mm_vision_tower" not in back


def test_text_after_an_image_or_a_video_is_tokenized_as_a_text_of_its_own(releases: dict[str, Path]) -> None:
    """As the authors do, who tokenize the pieces between placeholders one by one; between 8 of them there is none."""
    for release in releases.values():
        _, processor = load_release(str(release), Reductions())
        tokenizer = processor.tokenizer
        alone = tokenizer.encode("\nname", add_special_tokens=False)
        for mark in ("<image>", "<video>", "<image><video>", "<video><image>", "<image><image>"):
            found = tokenizer.encode(f"{mark}\nname", add_special_tokens=False)
            assert found[mark.count(">") :] == alone, mark


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mm_video_tower": None}, "mm_video_tower in config.json is None; needed is a Video-LLaVA with a tower for"),
        ({"mm_image_tower": None}, "mm_image_tower in config.json is None"),
        ({"mm_projector_type": "linear"}, "the projector is 'linear'"),
        ({"num_hidden_layers": None}, "config.json lacks num_hidden_layers; sizes are never guessed"),
    ],
)
def test_releases_of_its_layout_that_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    original = write_original_video_llava(tmp_path, **changes)
    with pytest.raises(UserError, match=said):
        open_release(str(original), cache_dir=tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*/config.json"))


@pytest.mark.parametrize(
    ("tower", "changes", "said"),
    [
        ("Video_merge", {"add_time_attn": False}, "add_time_attn is False and num_frames 4; needed is Video-LLaVA's"),
        ("Video_merge", {"num_frames": 8}, r"temporal_embedding is \(1, 4, 24\), needed by its config.json"),
        ("Video_merge", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu', in .* it is 'gelu'"),
        ("Image", {"num_attention_heads": None}, "lacks num_attention_heads"),
        ("Image", {"patch_size": 0}, "patch_size is 0, needed is a whole number from 1"),
    ],
)
def test_towers_that_do_not_belong_to_a_release(
    tmp_path: Path, tower: str, changes: dict[str, Any], said: str
) -> None:
    original = write_original_video_llava(tmp_path)
    path = original / "LanguageBind" / f"LanguageBind_{tower}" / "config.json"
    held = json.loads(path.read_text())
    path.write_text(json.dumps({**held, "vision_config": {**held["vision_config"], **changes}}))
    with pytest.raises(UserError, match=said):
        open_release(str(original), cache_dir=tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*/config.json"))


def test_tensors_of_a_tower_are_never_left_out(originals: Path, tmp_path: Path) -> None:
    """Neither those for attention over time, which a conversion could drop, nor unknown ones."""
    for number, change in enumerate((lambda name: "temporal_attn" not in name, lambda name: True)):
        target = write_original_video_llava(tmp_path / str(number))
        model = temporal_video_llava(**config_keys(1000, 1000, 1001, bos_token_id=1, eos_token_id=2))
        tensors = {name: tensor for name, tensor in original_tensors(model).items() if change(name)}
        said = "the video tower lacks 24 tensors, such as encoder.layers.0.temporal_attn.k_proj.bias"
        if number:
            tensors["model.image_tower.image_tower.encoder.layers.0.temporal_mlp.fc1.weight"] = torch.zeros(2, 2)
            said = (
                "the image tower has 1 tensors that .* knows no place for, such as encoder.layers.0.temporal_mlp.fc1"
            )
        write_shards(target, tensors)
        with pytest.raises(UserError, match=said):
            open_release(str(target), cache_dir=tmp_path / "cache")


def test_neither_release_is_taken_for_the_other(releases: dict[str, Path], tmp_path: Path) -> None:
    hf, temporal = (releases[kind] for kind in ("hf", "temporal"))
    with pytest.raises(ReductionError, match="holds a model of type 'reduced_temporal_video_llava'; this class loads"):
        ReducedVideoLlavaForConditionalGeneration.from_pretrained(temporal)
    with pytest.raises(ReductionError, match="holds a model of type 'video_llava'; this class loads 'temporal_video"):
        ReducedTemporalVideoLlavaForConditionalGeneration.from_pretrained(hf)
    # The original's weights under the other's config, as for a conversion that drops what it does not know.
    folder = tmp_path / "as-hf"
    shutil.copytree(hf, folder)
    tensors = folder_tensors(hf) | {
        name: tensor for name, tensor in folder_tensors(temporal).items() if ".temporal_" in name
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = r"33 weights are for attention over time \(video_tower.vision_model.encoder.layers.0.temporal_attn.k_proj"
    with pytest.raises(UserError, match=said):
        open_release(str(folder))
    with pytest.raises(ReductionError, match="33 unexpected keys"):
        ReducedVideoLlavaForConditionalGeneration.from_pretrained(folder)
    # And the other way round.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "temporal_video_llava"}))
    save_file(folder_tensors(hf), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"none of .* weights is for attention over time"):
        open_release(str(folder))
    titles = {kind: family_of(kind).title for kind in ("video_llava", "temporal_video_llava")}
    assert titles == {"video_llava": "Video-LLaVA-hf", "temporal_video_llava": "Video-LLaVA"}


@kinds
def test_the_processor_writes_as_many_placeholders_as_the_model_fills(kind: str, releases: dict[str, Path]) -> None:
    for reductions, image, frame in ((Reductions(), PATCHES, PATCHES + 1), (REDUCTIONS, 6, 6)):
        model, processor = load_release(str(releases[kind]), reductions)
        inputs = inputs_of(processor)
        ids = inputs["input_ids"]
        assert int((ids == model.config.image_token_id).sum()) == image
        assert int((ids == model.config.video_token_id).sum()) == FRAMES * frame == processor.video_tokens(FRAMES)
        assert inputs["pixel_values_videos"].shape == (1, FRAMES, 3, SIDE, SIDE)
        counts = processor._get_num_multimodal_tokens(image_sizes=[[50, 58]], video_sizes=[[FRAMES, 30, 44]])
        assert (counts.num_image_tokens, counts.num_video_tokens) == ([image], [FRAMES * frame])
        with torch.no_grad():
            assert model(**inputs).logits.shape[1] == ids.shape[1]
        supervision = Supervision(processor, max_length=None)
        rows = [("user", "<image><image>\nname the colour")]
        ours = batch_prompts(supervision, [encode_prompt(supervision, rows, [PICTURE, PICTURE])], model.device)
        assert int((ours["input_ids"] == model.config.image_token_id).sum()) == 2 * image


def test_pixels_of_the_hf_release_are_transformers(releases: dict[str, Path]) -> None:
    _, processor = load_release(str(releases["hf"]), Reductions())
    plain = VideoLlavaImageProcessor.from_pretrained(releases["hf"])
    inputs = inputs_of(processor)
    theirs = plain(PICTURE, return_tensors="pt", return_legacy_image_output=False)["pixel_values"]
    assert torch.equal(inputs["pixel_values"], theirs.to(inputs["pixel_values"].dtype))
    frames = [Image.fromarray(frame) for frame in VIDEO]
    theirs = plain(frames, return_tensors="pt", return_legacy_image_output=False)["pixel_values"]
    assert torch.equal(inputs["pixel_values_videos"][0], theirs.to(inputs["pixel_values"].dtype))


def test_pixels_of_the_original_are_padded_images_and_frames_cut_out_of_normalised_ones(
    releases: dict[str, Path],
) -> None:
    _, processor = load_release(str(releases["temporal"]), Reductions())
    inputs = inputs_of(processor)
    edge = inputs["pixel_values"][0, :, 0, SIDE // 2]
    assert torch.allclose(edge, torch.zeros(3), atol=0.1), "the mean colour, normalised"
    assert inputs["pixel_values"][0, 0].max() > 1, "the picture between"
    mean, std = (
        torch.tensor(getattr(processor.image_processor, key)).view(3, 1, 1) for key in ("image_mean", "image_std")
    )
    for frame, found in zip(torch.from_numpy(VIDEO), inputs["pixel_values_videos"][0], strict=True):
        whole = (frame.permute(2, 0, 1) / 255 - mean) / std
        small = torch.nn.functional.interpolate(whole[None], (SIDE, 29), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(found, small[:, :, 4 : 4 + SIDE], rtol=0, atol=1e-6)
    tall = processor.video_processor([VIDEO.transpose(0, 2, 1, 3)])
    torch.testing.assert_close(tall[0].transpose(-1, -2), inputs["pixel_values_videos"][0], rtol=0, atol=1e-6)


def test_videos_that_cannot_be_read_are_refused(releases: dict[str, Path], tiny_release: Path) -> None:
    _, temporal = load_release(str(releases["temporal"]), REDUCTIONS)
    with pytest.raises(ReductionError, match=f"a video has {FRAMES - 1} frames, and this model reads {FRAMES}"):
        temporal(videos=[VIDEO[1:]], text="<video>", return_tensors="pt")
    _, hf = load_release(str(releases["hf"]), REDUCTIONS)
    assert hf(videos=[VIDEO[1:]], text="<video>", return_tensors="pt")["pixel_values_videos"].shape[1] == FRAMES - 1
    with pytest.raises(ReductionError, match="those of one batch must have the same number"):
        hf(videos=[VIDEO, VIDEO[1:]], text=["<video>", "<video>"], return_tensors="pt")
    model, images_only = load_release(str(tiny_release), REDUCTIONS)
    with pytest.raises(ReductionError, match="ReducedLlavaProcessor is of a model that reads images, and no videos"):
        images_only(images=PICTURE, videos=[VIDEO], text="<image>", return_tensors="pt")
    inputs = images_only(images=PICTURE, text="<image>", return_tensors="pt")
    with pytest.raises(ReductionError, match="a ReducedLlavaModel reads images, and no videos"):
        model(**inputs, pixel_values_videos=torch.zeros(1, FRAMES, 3, 24, 24))


@kinds
def test_parameters_are_counted_and_both_towers_reported(kind: str, releases: dict[str, Path]) -> None:
    model, _ = load_release(str(releases[kind]), REDUCTIONS)
    counts = parameter_counts(model.config)
    assert counts.total == sum(weight.numel() for weight in model.parameters())
    towers = [model.model.image_tower, model.model.video_tower]
    assert counts.vision_tower == sum(weight.numel() for tower in towers for weight in tower.parameters())
    names = [name for name, _, _, _ in describe_components(model)]
    assert names[:2] == ["image tower", "video tower"]


@kinds
def test_both_towers_are_left_out_together(kind: str, releases: dict[str, Path]) -> None:
    without, _ = load_release(open_release(str(releases[kind])), REDUCTIONS, with_tower=False)
    model, _ = load_release(str(releases[kind]), REDUCTIONS)
    leave_out_towers(model)
    for each in (without, model):
        assert {type(each.model.image_tower), type(each.model.video_tower)} == {torch.nn.Identity}
        assert each.model.vision_tower is each.model.image_tower
    assert all(torch.equal(tensor, without.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_release_is_recognised_by_both_its_towers(releases: dict[str, Path], tmp_path: Path) -> None:
    before = release_identity(open_release(str(releases["hf"])))
    for name in ("image_tower", "video_tower"):
        folder = tmp_path / name
        shutil.copytree(releases["hf"], folder)
        tensors = folder_tensors(folder)
        changed = next(key for key in tensors if f"{name}." in key and "q_proj.weight" in key)
        tensors[changed] = tensors[changed] + 1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        after = release_identity(open_release(str(folder)))
        assert {key for key in before if before[key] != after[key]} == {"the vision tower's weights"}


@kinds
def test_a_viewer_and_cached_features_know_the_image_tower(kind: str, releases: dict[str, Path]) -> None:
    release = open_release(str(releases[kind]))
    viewer, processor = load_viewer(release, REDUCTIONS)
    model, _ = load_release(str(releases[kind]), REDUCTIONS)
    pixels = processor.image_processor(PICTURE, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        chosen, expected = (each.model.get_visual_tokens(pixels) for each in (viewer, model))
    assert torch.equal(chosen.tokens, expected.tokens)
    assert viewer.device == torch.device("cpu"), "that of the one tower it has"
    before = features_identity(model, processor)
    with torch.no_grad():
        model.model.video_tower.encoder.layers[0].self_attn.q_proj.weight.add_(1)
    assert features_identity(model, processor) == before, "no image passes through it"
    with torch.no_grad():
        model.model.image_tower.encoder.layers[0].self_attn.q_proj.weight.add_(1)
    assert features_identity(model, processor) != before


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
    """Rows of one image, of several and of none; with cached features the run is the same, without both towers."""
    made = []
    for cache in (None, str(tmp_path / "cache")):
        recipe = write_recipe(
            tmp_path / "recipe.yaml", releases[kind], tiny_instructions, max_steps=2, global_batch_size=8,
            per_device_train_batch_size=4, data={"fraction": 0.5, "cache_features": cache}, final_evaluation=False,
        )  # fmt: skip
        name = "plain" if cache is None else "cached"
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


def test_configs_of_the_two_are_two() -> None:
    assert ReducedTemporalVideoLlavaConfig().video_frames == 8
    assert ReducedVideoLlavaConfig.model_type != ReducedTemporalVideoLlavaConfig.model_type
    keys = config_keys(92, 90, 91)
    with torch.device("meta"):
        hf = ReducedVideoLlavaForConditionalGeneration(ReducedVideoLlavaConfig(**keys))
        temporal = ReducedTemporalVideoLlavaForConditionalGeneration(ReducedTemporalVideoLlavaConfig(**keys))
    names = set(temporal.state_dict()) - set(hf.state_dict())
    assert {name.split(".")[5] for name in names} == {"temporal_embedding", "temporal_attn", "temporal_layer_norm1"}
