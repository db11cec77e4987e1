"""Training with `positions: original`: the packed walk, features from a cache, and the plain pass give one loss."""

from typing import Any

import pytest
import torch
from reduced_models import IMAGE_TOKEN, NEXT_SIZES, WAYS, build, images, make_batch, make_row, original
from torch import Tensor

from shortzip.data.dataset import MicroBatch
from shortzip.reduction.positions import packed_shifts, shifts_of
from shortzip.train.step.objective import SupervisedLoss, recompute_layers, train_only_projector

LAYOUTS = ("tttIttttt", "tIttItttt", "ttttttt", "IttI", "tttttttttI")


def batch_of(model: Any, side: str = "right", layouts: tuple[str, ...] = LAYOUTS) -> dict[str, Tensor]:
    """Rows with one image, several, none, one that is not seen any more, and labels at some text tokens."""
    rows = [make_row(model, layout, seed) for seed, layout in enumerate(layouts)]
    batch = make_batch(rows, side)
    ids = batch["input_ids"]
    supervised = (ids != IMAGE_TOKEN) & batch["attention_mask"].bool() & (ids % 2 == 0)
    supervised &= batch["attention_mask"].cumsum(1) > 1
    return {**batch, "labels": torch.where(supervised, ids, -100)}


def loss_and_gradient(module: SupervisedLoss, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    module.zero_grad()
    loss = module(MicroBatch(inputs, []))
    loss.backward()
    projector = module.model.model.multi_modal_projector
    return loss.detach(), torch.cat([weight.grad.flatten() for weight in projector.parameters()])  # type: ignore[union-attr]  # all have one


def by_transformers(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Every token through every layer, in the model's own forward pass."""
    labels = inputs["labels"]
    states = model(**{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        states[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum"
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", ["visionzip", "pool"])
@pytest.mark.parametrize("frozen", [None, {"layers": [0, 2, 3]}], ids=["unfrozen", "frozen"])
def test_the_packed_walk(method: str, side: str, frozen: dict[str, Any] | None) -> None:
    model = original(method, shortv=frozen)
    train_only_projector(model, torch.float32)
    inputs = batch_of(model, side)
    expected = by_transformers(model, inputs)
    loss, gradient = loss_and_gradient(SupervisedLoss(model), inputs)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    slower, same_gradient = loss_and_gradient(SupervisedLoss(model, plain=True), inputs)
    torch.testing.assert_close(slower, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(same_gradient, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
    compact = build(reduction="none", visionzip=WAYS[method], shortv=frozen)
    assert abs(SupervisedLoss(compact)(MicroBatch(inputs, [])) - loss) > 1e-2


def test_features_from_a_cache_and_layers_computed_again() -> None:
    model = original()
    train_only_projector(model, torch.float32)
    inputs = batch_of(model)
    expected = loss_and_gradient(SupervisedLoss(model), inputs)
    visual = model.model.get_visual_tokens(inputs["pixel_values"])
    known = {key: value for key, value in inputs.items() if key != "pixel_values"}
    known |= {f"visual_{name}": visual[name].detach() for name in ("tokens", "kept", "targets")}
    torch.testing.assert_close(loss_and_gradient(SupervisedLoss(model), known), expected)
    torch.testing.assert_close(loss_and_gradient(SupervisedLoss(model, plain=True), known), expected)
    recompute_layers(model)
    torch.testing.assert_close(loss_and_gradient(SupervisedLoss(model), inputs), expected)


@pytest.mark.parametrize("layouts", [("tttt", "ttttt"), ("tttttt",)])
def test_rows_without_images(layouts: tuple[str, ...]) -> None:
    model = original()
    train_only_projector(model, torch.float32)
    inputs = batch_of(model, "right", layouts)
    loss, gradient = loss_and_gradient(SupervisedLoss(model), inputs)
    slower, _ = loss_and_gradient(SupervisedLoss(model, plain=True), inputs)
    torch.testing.assert_close(slower, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, by_transformers(model, inputs).detach(), rtol=1e-5, atol=1e-5)
    assert not gradient.any()


def test_with_fastv() -> None:
    """Which the walk leaves to the plain pass."""
    model = original(fastv={"layer": 2, "keep": 0.5}, shortv=None)
    train_only_projector(model, torch.float32)
    inputs = batch_of(model, layouts=("tttItt", "tIttItt"))
    query = {"fastv_query": (inputs["labels"] != -100).int().argmax(1) - 1}
    expected = by_transformers(model, {**inputs, **query})
    torch.testing.assert_close(loss_and_gradient(SupervisedLoss(model), inputs)[0], expected.detach())


@pytest.mark.parametrize("method", ["visionzip", "pool"])
@pytest.mark.parametrize("next_", [False, True])
def test_no_number_is_waited_for(method: str, next_: bool) -> None:
    """On the meta device nothing can be read back."""
    model = original(method, next_=next_)
    sizes = {"image_sizes": torch.tensor(NEXT_SIZES[:2])} if next_ else {}
    pixels = images(model, NEXT_SIZES[:2])["pixel_values"] if next_ else torch.randn(2, 3, 16, 16)
    visual = model.model.get_visual_tokens(pixels)
    places = model.model.image_positions(visual.kept.to("meta"), visual.targets.to("meta"), **sizes)
    assert all(image.device.type == "meta" for image in places.tokens)
    count = sum(map(len, places.tokens))
    before = torch.arange(count + 3, device="meta").clamp(max=count)
    assert packed_shifts(places, before, 0 * before, count).shape == (count + 3,)
    assert shifts_of(torch.ones(2, count, dtype=torch.bool, device="meta"), places).shape == (2, count + 1)


def test_bfloat16_is_near() -> None:
    fine, coarse = original(), original(dtype=torch.bfloat16)
    inputs = batch_of(fine)
    for model in (fine, coarse):
        train_only_projector(model, next(model.model.language_model.parameters()).dtype)
    expected, found = (SupervisedLoss(model)(MicroBatch(inputs, [])) for model in (fine, coarse))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


def test_tiles() -> None:
    model = original(next_=True)
    train_only_projector(model, torch.float32)
    pictures = images(model, NEXT_SIZES[:3])
    counts = [len(image) for image in model.model.get_image_features(**pictures).pooler_output]
    rows = [[3, *[IMAGE_TOKEN] * counts[0], *range(40, 46)], [4, 6, *[IMAGE_TOKEN] * counts[1], 8]]
    rows[1] += [*[IMAGE_TOKEN] * counts[2], 10, 12, 14]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = (ids != 0).long()
    labels = torch.where((ids % 2 == 0) & (ids != IMAGE_TOKEN) & (mask == 1), ids, -100)
    labels[:, 0] = -100
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, **pictures}
    expected = by_transformers(model, inputs)
    loss, gradient = loss_and_gradient(SupervisedLoss(model), inputs)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    visual = model.model.get_visual_tokens(pictures["pixel_values"])
    known = {key: value for key, value in inputs.items() if key != "pixel_values"}
    known |= {f"visual_{name}": visual[name].detach() for name in ("tokens", "kept", "targets")}
    again, same_gradient = loss_and_gradient(SupervisedLoss(model), known)
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(same_gradient, gradient)
