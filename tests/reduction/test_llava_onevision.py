"""LLaVA-OneVision: one image, several, a video and batches of all, against transformers' model and row by row."""

from typing import Any

import pytest
import torch
from reduced_models import PAD, REDUCTIONS, rows_of
from safetensors.torch import save_file
from tiny_onevision import SIDE, onevision_config, plain_onevision
from torch import Tensor

from shortzip.reduction import ReducedLlavaOnevisionConfig, ReducedLlavaOnevisionForConditionalGeneration
from shortzip.reduction.modeling_reduced_llava_onevision import uncut_among_several

IMAGE, VIDEO = 90, 91
FRAMES = 3
SIZES = {"I": [50, 58], "S": [20, 44], "T": [30, 30]}  # I alone in its row; S and T together
LAYOUTS = {
    "one image": ["ttItt"],
    "several images": ["tSttTt"],
    "a video": ["tVtt"],
    "an image and a video": ["tItVttt", "tVtIt"],
    "a mixed batch": ["ttItttt", "tSTVtt", "ttttt", "tVVt"],
}


def build(reduction: str, plain: bool = False, **keys: Any) -> Any:
    base = plain_onevision(onevision_config(92, IMAGE, VIDEO, pad_token_id=PAD, bos_token_id=1, eos_token_id=2))
    with torch.no_grad():
        base.lm_head.weight[IMAGE:] = 0  # it would write placeholders
    if plain:
        return base
    config = ReducedLlavaOnevisionConfig(**{**base.config.to_dict(), **REDUCTIONS[reduction], **keys})
    model = ReducedLlavaOnevisionForConditionalGeneration(config).eval()
    model.load_state_dict(base.state_dict())
    return model


def row_of(model: Any, layout: str, seed: int) -> dict[str, Any]:
    """One row as ids, and its images ([tiles, 3, S, S], size) and videos, in their order."""
    generator = torch.Generator().manual_seed(seed)
    several = sum(layout.count(name) for name in SIZES) > 1
    ids: list[int] = []
    images: list[Tensor] = []
    videos: list[Tensor] = []
    for part in layout:
        if part in SIZES:
            size = uncut_among_several([SIZES[part]], [2 if several else 1]) if not several else [[0, 0]]
            tiles = model.model._tiles(size)[0]
            ids += [IMAGE] * model.model._token_counts(None, size, None)[0]
            images.append(torch.randn(tiles, 3, SIDE, SIDE, generator=generator))
        elif part == "V":
            budget = model.config.visionzip
            each = 9 if budget is None else budget["dominant"] + budget["contextual"]
            ids += [VIDEO] * (FRAMES * each + 1)
            videos.append(torch.randn(FRAMES, 3, SIDE, SIDE, generator=generator))
        else:
            ids.append(int(torch.randint(3, IMAGE, (1,), generator=generator)))
    sizes = [SIZES[part] for part in layout if part in SIZES]
    return {"ids": ids, "images": images, "sizes": sizes, "videos": videos}


def batch_of(rows: list[dict[str, Any]], side: str = "right") -> dict[str, Tensor]:
    length = max(len(row["ids"]) for row in rows)
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(0, len(row["ids"])) if side == "right" else slice(length - len(row["ids"]), length)
        ids[number, place] = torch.tensor(row["ids"])
        mask[number, place] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    images = [image for row in rows for image in row["images"]]
    if images:
        most = max(map(len, images))
        filled = [torch.cat([image, image.new_zeros(most - len(image), 3, SIDE, SIDE)]) for image in images]
        batch["pixel_values"] = torch.stack(filled)
        batch["image_sizes"] = torch.tensor([size for row in rows for size in row["sizes"]])
        batch["batch_num_images"] = torch.tensor([len(row["images"]) for row in rows if row["images"]])
    videos = [video for row in rows for video in row["videos"]]
    return batch | ({"pixel_values_videos": torch.stack(videos)} if videos else {})


def logits(model: Any, batch: dict[str, Tensor], **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch, **more).logits


@pytest.mark.parametrize("name", LAYOUTS)
def test_without_reductions_it_is_transformers_model(name: str) -> None:
    ours, plain = build("none"), build("none", plain=True)
    batch = batch_of([row_of(ours, layout, seed) for seed, layout in enumerate(LAYOUTS[name])])
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(logits(ours, batch)[mask], logits(plain, batch)[mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_in_a_batch_are_what_they_are_alone(reduction: str, side: str) -> None:
    model = build(reduction)
    rows = [row_of(model, layout, seed) for seed, layout in enumerate(LAYOUTS["a mixed batch"])]
    batch = batch_of(rows, side)
    for row, together in zip(rows, rows_of(logits(model, batch), batch), strict=True):
        torch.testing.assert_close(together, logits(model, batch_of([row]))[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_greedy_batches_generate_what_their_rows_do(reduction: str) -> None:
    model = build(reduction)
    rows = [row_of(model, layout, seed) for seed, layout in enumerate(LAYOUTS["a mixed batch"])]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    batch = batch_of(rows, "left")
    new = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for number, row in enumerate(rows):
        alone = batch_of([row])
        expected = model.generate(**alone, **options)[:, alone["input_ids"].shape[1] :]
        assert torch.equal(new[number : number + 1], expected)
        assert torch.equal(model.generate(**alone, **options, use_cache=False)[:, -5:], expected)


def test_frozen_layers_are_the_naive_ones_for_images_and_videos_alike() -> None:
    """After a frozen layer, visual tokens get back what they had before it."""
    model, plain = build("shortv"), build("none", plain=True)
    batch = batch_of([row_of(model, "tItVttt", 0)])
    visual = ((batch["input_ids"] == IMAGE) | (batch["input_ids"] == VIDEO)).unsqueeze(-1)
    for layer in REDUCTIONS["shortv"]["shortv"]["layers"]:
        plain.model.language_model.layers[layer].register_forward_hook(
            lambda module, args, output: torch.where(visual, args[0], output)
        )
    got = logits(model, batch)
    torch.testing.assert_close(got, logits(plain, batch), rtol=0, atol=2e-5)
    with torch.no_grad():
        found = model.model.get_image_features(batch["pixel_values"], batch["image_sizes"])
        videos = model.model.get_video_features(batch["pixel_values_videos"])
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    for number, features in ((IMAGE, found), (VIDEO, videos)):
        embeds = embeds.masked_scatter((batch["input_ids"] == number).unsqueeze(-1), torch.cat(features.pooler_output))
    merged = {"attention_mask": batch["attention_mask"], "inputs_embeds": embeds}
    torch.testing.assert_close(logits(model, merged, mm_token_type_ids=visual[..., 0].long()), got, rtol=0, atol=1e-5)


def test_a_frame_is_reduced_as_an_image_and_a_video_ends_in_one_newline() -> None:
    model = build("visionzip")
    video = torch.randn(2, FRAMES, 3, SIDE, SIDE)
    with torch.no_grad():
        found = model.model.get_video_features(video).pooler_output
        for number in range(2):
            frames = model.model.get_visual_tokens(video[number])
            expected = model.model.multi_modal_projector(frames.tokens).flatten(0, 1)
            torch.testing.assert_close(found[number][:-1], expected, rtol=0, atol=1e-6)
            assert torch.equal(found[number][-1], model.model.image_newline)


def test_several_images_are_a_tile_and_a_newline_each() -> None:
    model = build("visionzip")
    assert model.model._token_counts(None, [[50, 58], [0, 0]], None) == [10 * 6, 6 + 1]
    assert build("none").model._token_counts(None, [[0, 0]], None) == [25 + 1]


@pytest.mark.parametrize("reduction", ["visionzip", "none"])
def test_placeholders_that_do_not_fit_are_refused(reduction: str) -> None:
    model = build(reduction)
    batch = batch_of([row_of(model, "tItVt", 0)])
    short = {**batch, "pixel_values_videos": batch["pixel_values_videos"][:, :2]}
    with pytest.raises(ValueError, match="placeholders"):
        logits(model, short)
    if reduction == "visionzip":
        del short["pixel_values_videos"]
        with pytest.raises(ValueError, match="placeholders"):
            logits(model, short)


def test_original_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="positions: 'original' is not known for LLaVA-OneVision"):
        build("visionzip", positions="original")


def test_an_older_releases_names_are_read(tmp_path: Any) -> None:
    """`language_model.model.…` and `vision_tower.vision_model.…`, as the published releases have them."""
    plain = build("none", plain=True)
    plain.config.architectures = ["LlavaOnevisionForConditionalGeneration"]
    plain.config.save_pretrained(tmp_path)
    names = {"model.language_model.": "language_model.model.", "lm_head": "language_model.lm_head",
             "model.vision_tower.": "vision_tower.vision_model.", "model.": ""}  # fmt: skip
    older = {}
    for name, tensor in plain.state_dict().items():
        ours = next(key for key in names if name.startswith(key))
        older[names[ours] + name.removeprefix(ours)] = tensor.clone()
    save_file(older, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = ReducedLlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
