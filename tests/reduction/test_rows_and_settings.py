"""What a pass is given, against what the model is: placeholders row by row, and reductions changed after loading."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reduced_models import IMAGE_TOKEN, SHORTV, VISIONZIP, build

FASTV = {"layer": 2, "keep": 0.3}


def prompts(*placeholders: int, length: int = 60) -> torch.Tensor:
    """Right-padded rows, each with so many placeholders behind two words."""
    return torch.stack(
        [torch.tensor([5, 6] + [IMAGE_TOKEN] * count + [7] * (length - 2 - count)) for count in placeholders]
    )


def pictures(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("placeholders", "message"),
    [
        ((5, 7), "row 0 of the batch .* holds 5 image placeholders, its images give 6 visual tokens"),
        ((6, 5, 7), "row 1 of the batch .* holds 5 image placeholders, its images give 6 visual tokens"),
        ((12, 0, 8, 4), "row 2 of the batch .* holds 8 image placeholders, its images give 6 visual tokens"),
        ((6, 12, 6), "row 2 of the batch .* holds 6 .* give 0 visual tokens; all rows hold 24, all images give 18"),
        ((6, 6), "the prompts hold 12 image placeholders, the images give 18 visual tokens"),
    ],
    ids=str,
)
@pytest.mark.parametrize("how", ["forward", "generate", "embeddings"])
def test_a_row_holds_whole_images(placeholders: tuple[int, ...], message: str, how: str) -> None:
    model = build(reduction="visionzip")
    ids, pixels = prompts(*placeholders), pictures({(5, 7): 2, (12, 0, 8, 4): 4}.get(placeholders, 3))
    calls = {
        "forward": lambda: model(ids, pixel_values=pixels),
        "generate": lambda: model.generate(ids, pixel_values=pixels, max_new_tokens=1),
        "embeddings": lambda: model(inputs_embeds=model.get_input_embeddings()(ids), pixel_values=pixels),
    }
    with pytest.raises(ValueError, match=message):
        calls[how]()


@pytest.mark.parametrize("reduction", ["visionzip", "shortv", "both"])
def test_rows_of_any_number_of_images_pass(reduction: str) -> None:
    model = build(reduction=reduction)
    each = 16 if reduction == "shortv" else 6
    with torch.no_grad():
        model(prompts(2 * each, 0, each), pixel_values=pictures(3))
    with pytest.raises(ValueError, match=f"row 1 of the batch .* holds {each - 1} image placeholders"):
        model(prompts(each, each - 1, each + 1), pixel_values=pictures(3))


@pytest.mark.parametrize("reduction", ["visionzip", "shortv", "both"])
@pytest.mark.parametrize("size", [(16, 40), (30, 30), (12, 9)], ids=str)
def test_next_counts_each_images_own_tokens(reduction: str, size: tuple[int, int]) -> None:
    """Images of another shape have another number of tiles: a row holds those of its own."""
    model = build(reduction=reduction, next_=True)
    sizes = torch.tensor([size, [30, 30]])
    pixels = torch.randn(2, 5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first, second = (len(image) for image in model.model.get_image_features(pixels, sizes).pooler_output)
        model(prompts(first, second, length=180), pixel_values=pixels, image_sizes=sizes)
        model(prompts(first + second, 0, length=180), pixel_values=pixels, image_sizes=sizes)
    for call in (model, lambda *args, **kwargs: model.generate(*args, **kwargs, max_new_tokens=1)):
        with pytest.raises(ValueError, match=f"row 0 .* holds {first + 1} .* its images give {first} visual tokens"):
            call(prompts(first + 1, second - 1, length=180), pixel_values=pixels, image_sizes=sizes)


@pytest.mark.parametrize("reduction", ["visionzip", "shortv", "none"])
def test_next_needs_the_sizes_of_its_images(reduction: str) -> None:
    model = build(reduction=reduction, next_=True)
    pixels = torch.zeros(1, 3, 3, 16, 16)
    for call in (model, lambda *args, **kwargs: model.generate(*args, **kwargs, max_new_tokens=1)):
        with pytest.raises(ValueError, match=r"pixel_values are given without image_sizes.*pass both"):
            call(prompts(18), pixel_values=pixels)


CHANGES = {
    "fastv set": ("none", "fastv", FASTV, r"config\.fastv now says {'layer': 2.*loaded with None: load it again"),
    "visionzip set": ("none", "visionzip", VISIONZIP, r"config\.visionzip now says .*loaded with None"),
    "shortv set": ("none", "shortv", SHORTV, r"config\.shortv now says layers \[0, 2, 3\].*loaded with \[\] frozen"),
    "another budget": ("visionzip", "visionzip", {"dominant": 5, "contextual": 1}, "loaded with .*'contextual': 2"),
    "a method": ("visionzip", "visionzip", {"dominant": 6, "contextual": 0, "method": "random"}, "'method': 'random'"),
    "no method": ("visionzip", "visionzip", {**VISIONZIP, "method": "gird"}, "method is 'gird'; it must be one of"),
    "no budget": ("visionzip", "visionzip", [4, 2], "visionzip must be null or"),
    "no layers": ("shortv", "shortv", [1], "shortv must be null or"),
}


@pytest.mark.parametrize(("reduction", "key", "value", "message"), list(CHANGES.values()), ids=list(CHANGES))
def test_a_reduction_changed_after_loading(reduction: str, key: str, value: Any, message: str) -> None:
    model = build(reduction=reduction)
    ids = prompts(16 if reduction in ("none", "shortv") else 6)
    setattr(model.config, key, value)
    with pytest.raises(ValueError, match=message):
        model(ids, pixel_values=pictures(1))
    with pytest.raises(ValueError, match=message):
        model.generate(ids, pixel_values=pictures(1), max_new_tokens=1)


def test_a_reduction_changed_within_after_loading() -> None:
    model = build(reduction="visionzip")
    model.config.visionzip = dict(model.config.visionzip)  # its own: other tests share the one it was built with
    model.config.visionzip["dominant"] = 5
    with pytest.raises(ValueError, match=r"now says {'dominant': 5.*loaded with {'dominant': 4"):
        model(prompts(7), pixel_values=pictures(1))
    model = build(reduction="shortv")
    model.config.shortv = {"layers": list(model.config.shortv["layers"])}
    model.config.shortv["layers"].append(1)
    with pytest.raises(ValueError, match=r"layers \[0, 1, 2, 3\], but this model was loaded with \[0, 2, 3\] frozen"):
        model(prompts(16), pixel_values=pictures(1))


@pytest.mark.parametrize("value", [None, {"layer": 1, "keep": 0.3}, {"layer": 2, "keep": 0.9}], ids=str)
def test_fastv_changed_after_loading(value: Any) -> None:
    model = build(reduction="none", fastv=dict(FASTV))
    model.config.fastv = value
    with pytest.raises(
        ValueError, match=r"fastv: config\.fastv now says .*loaded with {'layer': 2, 'keep': 0.3}: load"
    ):
        model(prompts(16), pixel_values=pictures(1))


def test_turned_off_is_off() -> None:
    model, plain = build(reduction="both"), build(reduction="none")
    model.config.visionzip = model.config.shortv = None
    with torch.no_grad():
        expected = plain(prompts(16), pixel_values=pictures(1)).logits
        assert torch.equal(model(prompts(16), pixel_values=pictures(1)).logits, expected)
