"""Models that take videos: one image, several, a video and batches of all, against transformers and row by row."""

from pathlib import Path

import pytest
import torch
from reduced_models import REDUCTIONS, rows_of
from safetensors.torch import save_file
from video_rows import IMAGE, LAYOUTS, READS, VIDEO, batch_of, build_with_videos, logits, row_of

from shortzip.reduction.families import family_named


@pytest.mark.parametrize("family", READS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_without_reductions_it_is_transformers_model(family: str, name: str) -> None:
    ours, plain = build_with_videos(family, "none"), build_with_videos(family, "none", plain=True)
    batch = batch_of([row_of(READS[family], ours, layout, seed) for seed, layout in enumerate(LAYOUTS[name])])
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(logits(ours, batch)[mask], logits(plain, batch)[mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", READS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_in_a_batch_are_what_they_are_alone(family: str, reduction: str, side: str) -> None:
    model = build_with_videos(family, reduction)
    rows = [row_of(READS[family], model, layout, seed) for seed, layout in enumerate(LAYOUTS["a mixed batch"])]
    batch = batch_of(rows, side)
    for row, together in zip(rows, rows_of(logits(model, batch), batch), strict=True):
        torch.testing.assert_close(together, logits(model, batch_of([row]))[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", READS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_greedy_batches_generate_what_their_rows_do(family: str, reduction: str) -> None:
    model = build_with_videos(family, reduction)
    rows = [row_of(READS[family], model, layout, seed) for seed, layout in enumerate(LAYOUTS["a mixed batch"])]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    batch = batch_of(rows, "left")
    new = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for number, row in enumerate(rows):
        alone = batch_of([row])
        expected = model.generate(**alone, **options)[:, alone["input_ids"].shape[1] :]
        assert torch.equal(new[number : number + 1], expected)
        assert torch.equal(model.generate(**alone, **options, use_cache=False)[:, -5:], expected)


@pytest.mark.parametrize("family", READS)
def test_frozen_layers_are_the_naive_ones_for_images_and_videos_alike(family: str) -> None:
    """After a frozen layer, visual tokens get back what they had before it."""
    model, plain = build_with_videos(family, "shortv"), build_with_videos(family, "none", plain=True)
    batch = batch_of([row_of(READS[family], model, "tItVttt", 0)])
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


@pytest.mark.parametrize("family", READS)
@pytest.mark.parametrize("reduction", ["visionzip", "none"])
def test_placeholders_that_do_not_fit_are_refused(family: str, reduction: str) -> None:
    model = build_with_videos(family, reduction)
    batch = batch_of([row_of(READS[family], model, "tItVt", 0)])
    short = {**batch, "pixel_values_videos": batch["pixel_values_videos"][:, :2]}
    with pytest.raises(ValueError, match="placeholders"):
        logits(model, short)
    if reduction == "visionzip":
        del short["pixel_values_videos"]
        with pytest.raises(ValueError, match="placeholders"):
            logits(model, short)


@pytest.mark.parametrize("family", READS)
def test_an_older_releases_names_are_read(family: str, tmp_path: Path) -> None:
    """`language_model.model.…` and `vision_tower.vision_model.…`, as the published releases have them."""
    plain = build_with_videos(family, "none", plain=True)
    plain.config.architectures = [type(plain).__name__]
    plain.config.save_pretrained(tmp_path)
    names = {"model.language_model.": "language_model.model.", "lm_head": "language_model.lm_head",
             "model.vision_tower.": "vision_tower.vision_model.", "model.": ""}  # fmt: skip
    older = {}
    for name, tensor in plain.state_dict().items():
        ours = next(key for key in names if name.startswith(key))
        older[names[ours] + name.removeprefix(ours)] = tensor.clone()
    save_file(older, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = family_named(family).model_class.from_pretrained(tmp_path)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
