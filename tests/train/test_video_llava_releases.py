"""Both releases of Video-LLaVA and their layouts: what is converted, read, refused and counted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
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
)
from transformers import VideoLlavaImageProcessor
from video_llava_releases import (
    PICTURE,
    REDUCTIONS,
    VIDEO,
    folder_tensors,
    inputs_of,
    write_both,
)

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
from shortzip.train.inputs.identity import release_identity
from shortzip.train.inputs.prompts import batch_prompts, encode_prompt
from shortzip.train.release.layouts import layout_for
from shortzip.train.release.loading import load_release
from shortzip.train.release.opening import open_release
from shortzip.train.step.components import describe_components

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
        ("Video_merge", {"add_time_attn": False}, "add_time_attn is False and num_frames 8; needed is Video-LLaVA's"),
        ("Video_merge", {"num_frames": 4}, r"temporal_embedding is \(1, 8, 24\), needed by its config.json"),
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


def test_configs_of_the_two_are_two() -> None:
    assert ReducedTemporalVideoLlavaConfig().video_frames == 8
    assert ReducedVideoLlavaConfig.model_type != ReducedTemporalVideoLlavaConfig.model_type
    keys = config_keys(92, 90, 91)
    with torch.device("meta"):
        hf = ReducedVideoLlavaForConditionalGeneration(ReducedVideoLlavaConfig(**keys))
        temporal = ReducedTemporalVideoLlavaForConditionalGeneration(ReducedTemporalVideoLlavaConfig(**keys))
    names = set(temporal.state_dict()) - set(hf.state_dict())
    assert {name.split(".")[5] for name in names} == {"temporal_embedding", "temporal_attn", "temporal_layer_norm1"}
