"""Video-LLaVA and Video-LLaVA-hf: images, videos and batches of both, against transformers' model and row by row."""

from functools import cache
from typing import Any

import pytest
import torch
from reduced_models import PAD, REDUCTIONS, rows_of
from tiny_video import FRAMES, PATCHES, SIDE, config_keys, plain_video_llava, temporal_video_llava
from torch import Tensor
from transformers import CLIPVisionModel

from shortzip.reduction.configuration_reduced_temporal_video_llava import ReducedTemporalVideoLlavaConfig
from shortzip.reduction.configuration_reduced_video_llava import ReducedVideoLlavaConfig
from shortzip.reduction.errors import ReductionError
from shortzip.reduction.modeling_reduced_temporal_video_llava import ReducedTemporalVideoLlavaForConditionalGeneration
from shortzip.reduction.modeling_reduced_video_llava import ReducedVideoLlavaForConditionalGeneration
from shortzip.reduction.selectors import METHODS, merges

IMAGE, VIDEO = 90, 91
KEYS = config_keys(92, IMAGE, VIDEO, pad_token_id=PAD, bos_token_id=1, eos_token_id=2)
LAYOUTS = {
    "one image": ["ttItt"],
    "several images": ["tIttIt"],
    "a video": ["tVtt"],
    "an image and a video": ["tItVttt", "tVtIt"],
    "a mixed batch": ["ttItttt", "tIIVtt", "ttttt", "tVVt"],
}
ORIGINAL = {"visionzip": {"dominant": 4, "contextual": 2}, "positions": "original"}
kinds = pytest.mark.parametrize("kind", ["hf", "temporal"])


@cache
def base_of(kind: str) -> Any:
    base = (plain_video_llava if kind == "hf" else temporal_video_llava)(**KEYS)
    with torch.no_grad():
        base.lm_head.weight[IMAGE:] = 0  # it would write placeholders
    return base


def build(kind: str, reduction: str = "none", plain: bool = False, **keys: Any) -> Any:
    base = base_of(kind)
    if plain:
        return base
    config: Any = ReducedVideoLlavaConfig if kind == "hf" else ReducedTemporalVideoLlavaConfig
    classes = (ReducedVideoLlavaForConditionalGeneration, ReducedTemporalVideoLlavaForConditionalGeneration)
    own = {"video_frames": FRAMES} if kind == "temporal" else {}
    model = classes[kind == "temporal"](config(**{**KEYS, **own, **REDUCTIONS[reduction], **keys})).eval()
    model.load_state_dict(base.state_dict())
    return model


def row_of(model: Any, layout: str, seed: int) -> dict[str, Any]:
    """One row as ids, and its images and videos, in their order."""
    generator = torch.Generator().manual_seed(seed)
    budget = model.config.visionzip
    each = None if budget is None else budget["dominant"] + budget["contextual"]
    ids: list[int] = []
    images, videos = [], []
    for part in layout:
        if part == "I":
            ids += [IMAGE] * (each or PATCHES)
            images.append(torch.randn(3, SIDE, SIDE, generator=generator))
        elif part == "V":
            ids += [VIDEO] * FRAMES * (each or PATCHES + 1)
            videos.append(torch.randn(FRAMES, 3, SIDE, SIDE, generator=generator))
        else:
            ids.append(int(torch.randint(3, IMAGE, (1,), generator=generator)))
    return {"ids": ids, "images": images, "videos": videos}


def batch_of(rows: list[dict[str, Any]], side: str = "right") -> dict[str, Tensor]:
    length = max(len(row["ids"]) for row in rows)
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(0, len(row["ids"])) if side == "right" else slice(length - len(row["ids"]), length)
        ids[number, place] = torch.tensor(row["ids"])
        mask[number, place] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    for key, kind in (("pixel_values", "images"), ("pixel_values_videos", "videos")):
        if held := [item for row in rows for item in row[kind]]:
            batch[key] = torch.stack(held)
    return batch


def logits(model: Any, batch: dict[str, Tensor], **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch, **more).logits


def mixed(model: Any) -> list[dict[str, Any]]:
    return [row_of(model, layout, seed) for seed, layout in enumerate(LAYOUTS["a mixed batch"])]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_hf_release_without_reductions_is_transformers_model(name: str) -> None:
    ours, plain = build("hf"), build("hf", plain=True)
    batch = batch_of([row_of(ours, layout, seed) for seed, layout in enumerate(LAYOUTS[name])])
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(logits(ours, batch)[mask], logits(plain, batch)[mask], rtol=0, atol=1e-5)


def test_the_original_without_its_steps_over_time_is_the_hf_release_and_with_them_is_not() -> None:
    temporal, hf = build("temporal"), build("hf")
    weights = {name: tensor for name, tensor in temporal.state_dict().items() if ".temporal_" not in name}
    hf.load_state_dict(weights)
    batch = batch_of([row_of(hf, "tItVttt", 0)])
    assert float((logits(temporal, batch) - logits(hf, batch)).abs().max()) > 0.1
    with torch.no_grad():
        for layer in temporal.model.video_tower.encoder.layers:
            layer.temporal_embedding.zero_()
            layer.temporal_attn.out_proj.weight.zero_()
            layer.temporal_attn.out_proj.bias.zero_()
    torch.testing.assert_close(logits(temporal, batch), logits(hf, batch), rtol=0, atol=1e-5)


def test_every_frame_sees_the_others_of_its_video_and_of_no_other() -> None:
    model = build("temporal", "visionzip")
    videos = torch.randn(2, FRAMES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    changed = videos.clone()
    changed[0, FRAMES - 1] += 1
    with torch.no_grad():
        before, after = (model.model.get_video_features(each).pooler_output for each in (videos, changed))
    assert not torch.allclose(before[0][:6], after[0][:6]), "the first frame of the same video"
    torch.testing.assert_close(before[1], after[1], rtol=0, atol=1e-6)


@kinds
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_in_a_batch_are_what_they_are_alone(kind: str, reduction: str, side: str) -> None:
    model = build(kind, reduction)
    rows = mixed(model)
    batch = batch_of(rows, side)
    for row, together in zip(rows, rows_of(logits(model, batch), batch), strict=True):
        torch.testing.assert_close(together, logits(model, batch_of([row]))[0], rtol=0, atol=2e-5)


@kinds
@pytest.mark.parametrize("keys", [REDUCTIONS["none"], REDUCTIONS["both"], ORIGINAL], ids=["none", "both", "original"])
def test_batches_generate_greedily_and_by_beams_what_their_rows_do(kind: str, keys: dict[str, Any]) -> None:
    model = build(kind, **keys)
    rows = mixed(model)
    batch = batch_of(rows, "left")
    for beams in (1, 2):
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
        new = model.generate(**batch, **options)[:, -4:]
        for number, row in enumerate(rows):
            alone = batch_of([row])
            expected = model.generate(**alone, **options)[:, -4:]
            assert torch.equal(new[number : number + 1], expected)
            if beams == 1:
                assert torch.equal(model.generate(**alone, **options, use_cache=False)[:, -4:], expected)


@kinds
@pytest.mark.parametrize("keys", [REDUCTIONS["none"], REDUCTIONS["both"], ORIGINAL], ids=["none", "both", "original"])
def test_a_conversation_goes_on_in_its_cache(kind: str, keys: dict[str, Any]) -> None:
    """A turn with an image, then one with a video, are what both are in one pass."""
    model = build(kind, **keys)
    whole = row_of(model, "tItttVtt", 3)
    start = whole["ids"].index(VIDEO) - 1
    batch = batch_of([whole])
    with torch.no_grad():
        first = model(
            input_ids=batch["input_ids"][:, :start], pixel_values=batch["pixel_values"],
            attention_mask=batch["attention_mask"][:, :start], use_cache=True,
        )  # fmt: skip
        then = model(
            input_ids=batch["input_ids"][:, start:], pixel_values_videos=batch["pixel_values_videos"],
            attention_mask=batch["attention_mask"], past_key_values=first.past_key_values,
        )  # fmt: skip
    torch.testing.assert_close(then.logits, logits(model, batch)[:, start:], rtol=0, atol=2e-5)


@kinds
def test_original_positions_of_frames_are_those_of_every_token(kind: str) -> None:
    """A budget of all patches and CLS leaves a frame as it is: positions, and so logits, are those of no budget."""
    every = {"dominant": PATCHES + 1, "contextual": 0}
    model, plain = build(kind, visionzip=every, positions="original"), build(kind)
    ours, theirs = row_of(model, "tVtt", 1), row_of(plain, "tVtt", 1)
    assert ours["ids"] == theirs["ids"]
    torch.testing.assert_close(logits(model, batch_of([ours])), logits(plain, batch_of([theirs])), rtol=0, atol=2e-5)
    fewer = build(kind, **ORIGINAL)
    videos = torch.randn(1, FRAMES, 3, SIDE, SIDE)
    with torch.no_grad():
        visual = fewer.model.get_frame_tokens(videos)
        places = fewer.model.get_video_features(videos).positions
    assert places.lengths == [FRAMES * (PATCHES + 1)]
    of_frames = places.tokens[0].view(FRAMES, 6) - torch.arange(FRAMES)[:, None] * (PATCHES + 1)
    assert of_frames[:, 0].tolist() == [0] * FRAMES, "CLS"
    assert torch.equal(of_frames[:, 1:4], visual.kept + 1)
    assert torch.equal(of_frames[:, 4:], visual.targets + 1)


@kinds
def test_frozen_layers_are_the_naive_ones_for_images_and_videos_alike(kind: str) -> None:
    model, plain = build(kind, "shortv"), build(kind)
    batch = batch_of([row_of(model, "tItVttt", 0)])
    visual = ((batch["input_ids"] == IMAGE) | (batch["input_ids"] == VIDEO)).unsqueeze(-1)
    for layer in REDUCTIONS["shortv"]["shortv"]["layers"]:
        plain.model.language_model.layers[layer].register_forward_hook(
            lambda module, args, output: torch.where(visual, args[0], output)
        )
    torch.testing.assert_close(logits(model, batch), logits(plain, batch), rtol=0, atol=2e-5)


@kinds
def test_text_with_the_embedding_of_a_placeholder_is_text_where_images_are_merged(kind: str) -> None:
    """A converted release's placeholders begin with the embedding of <unk>, which a text may hold."""
    model = build(kind, "both")
    with torch.no_grad():
        model.get_input_embeddings().weight[VIDEO] = model.get_input_embeddings().weight[7]
    batch = batch_of([row_of(model, "tItVttt", 0)])
    batch["input_ids"][0, -2] = 7
    visual = (batch["input_ids"] == IMAGE) | (batch["input_ids"] == VIDEO)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(batch["input_ids"])
        images = model.model.get_image_features(batch["pixel_values"]).pooler_output
        videos = model.model.get_video_features(batch["pixel_values_videos"]).pooler_output
        embeds[visual] = torch.cat([*images, *videos])
    merged = {"attention_mask": batch["attention_mask"], "inputs_embeds": embeds}
    found = logits(model, merged, mm_token_type_ids=visual.long())
    torch.testing.assert_close(found, logits(model, batch), rtol=0, atol=2e-5)


def key_of(method: str) -> dict[str, Any]:
    """A budget of that method; 6 tokens make a grid of 2 by 3."""
    dominant, contextual = (4, 2) if merges({"method": method}) else (6, 0)
    return {"dominant": dominant, "contextual": contextual, "method": method}


@pytest.mark.parametrize("kind", [pytest.param("hf", marks=pytest.mark.slow), "temporal"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_chooses_of_each_frame_what_it_would_of_that_frames_states(kind: str, method: str) -> None:
    model = build(kind, visionzip=key_of(method))
    rows = [row_of(model, layout, seed) for seed, layout in enumerate(["tVtt", "tItVttt"])]
    batch = batch_of(rows, "left")
    for row, together in zip(rows, rows_of(logits(model, batch), batch), strict=True):
        torch.testing.assert_close(together, logits(model, batch_of([row]))[0], rtol=0, atol=2e-5)
    videos = batch["pixel_values_videos"]
    with torch.no_grad():
        visual = model.model.get_frame_tokens(videos)
        hidden = model.model.video_tower(videos.flatten(0, 1), output_hidden_states=True).hidden_states[-2]
    assert visual.tokens.shape == (2 * FRAMES, 6, 24)
    if method in ("prumerge+", "pool", "downsample"):  # which change what they keep
        return
    cls = key_of(method)["dominant"] - visual.kept.shape[1]
    dominant = visual.tokens[:, cls : key_of(method)["dominant"]]
    kept = hidden[:, 1:].gather(1, visual.kept.unsqueeze(-1).expand(-1, -1, 24))
    torch.testing.assert_close(dominant, kept, rtol=0, atol=1e-5)
    if cls:
        torch.testing.assert_close(visual.tokens[:, :1], hidden[:, :1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_step_over_time_in_half_precision_chooses_what_float32_does(attention: str) -> None:
    model = build("temporal", "visionzip", attn_implementation=attention)
    videos = torch.randn(2, FRAMES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        exact = model.model.get_frame_tokens(videos)
        half = model.to(torch.bfloat16).model.get_frame_tokens(videos.bfloat16())
    assert half.tokens.dtype == torch.bfloat16
    same = (exact.kept == half.kept).all(dim=1).float().mean()
    assert same >= 0.75


@kinds
def test_gradients_reach_the_projector_from_frames(kind: str) -> None:
    model = build(kind, "both")
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    batch = batch_of([row_of(model, "tVtt", 0)])
    model(**batch).logits[0, -1].logsumexp(-1).backward()
    assert float(model.model.multi_modal_projector.linear_1.weight.grad.abs().max()) > 0


@kinds
@pytest.mark.parametrize("reduction", ["visionzip", "none"])
def test_placeholders_that_do_not_fit_are_refused(kind: str, reduction: str) -> None:
    model = build(kind, reduction)
    batch = batch_of([row_of(model, "tItVVt", 0)])
    with pytest.raises(ValueError, match="placeholders"):
        logits(model, {**batch, "pixel_values_videos": batch["pixel_values_videos"][:1]})
    if reduction == "visionzip":
        del batch["pixel_values_videos"]
        with pytest.raises(ValueError, match="placeholders"):
            logits(model, batch)


def test_what_a_tower_cannot_read_is_refused() -> None:
    model = build("temporal", "visionzip")
    said = rf"of {FRAMES + 1} frames; this tower has an embedding for each of {FRAMES} frames in every layer"
    for each in (model, build("temporal")):
        with pytest.raises(ReductionError, match=said):
            each.model.get_video_features(torch.zeros(1, FRAMES + 1, 3, SIDE, SIDE))
        with pytest.raises(ReductionError, match=r"not \[videos, frames, 3, S, S\]"):
            each.model.get_video_features(torch.zeros(FRAMES, 3, SIDE, SIDE))
    assert (
        len(build("hf", "visionzip").model.get_video_features(torch.zeros(1, 3, 3, SIDE, SIDE)).pooler_output[0]) == 18
    )
    with pytest.raises(ReductionError, match="video_frames is 0; it must be a whole number from 1"):
        ReducedTemporalVideoLlavaConfig(**KEYS, video_frames=0)
    siglip = {**KEYS, "vision_config": {**KEYS["vision_config"], "model_type": "siglip_vision_model"}}
    with pytest.raises(ReductionError, match="the tower is a siglip_vision_model; Video-LLaVA's are of clip_vision"):
        ReducedVideoLlavaConfig(**siglip)
    for kind in ("hf", "temporal"):
        with pytest.raises(ReductionError, match="has one budget for all images"):
            build(kind, visionzip={"dominant": 4, "contextual": 2, "per_image": {"chooser": "fixed"}})


def test_the_image_tower_is_the_vision_tower_of_other_families() -> None:
    model = build("hf", "visionzip").model
    assert isinstance(model.vision_tower, CLIPVisionModel)
    assert model.vision_tower is model.image_tower
    model.vision_tower = torch.nn.Identity()
    assert isinstance(model.image_tower, torch.nn.Identity)
    assert not [name for name, _ in model.named_modules() if name == "vision_tower"]
