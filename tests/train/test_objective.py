"""The loss of a global batch, and what is trained by it: the same for every cut, nothing but the projector."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from shortzip.data.dataset import Collator, ConversationDataset, MicroBatch
from shortzip.data.instructions import Conversation, read_instructions
from shortzip.data.supervision import Supervision
from shortzip.reduction.reductions import Reductions
from shortzip.train.release.loading import load_release
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.step.components import describe_components
from shortzip.train.step.objective import (
    SupervisedLoss,
    count_supervised,
    projector_parameters,
    recompute_layers,
    train_only_projector,
)

BUDGET, FROZEN = {"dominant": 5, "contextual": 3}, {"layers": [1, 2]}


def loaded(release: Path, instructions: Path, **reductions: Any) -> tuple[SupervisedLoss, ConversationDataset]:
    model, processor = load_release(str(release), Reductions(**{"visionzip": BUDGET, "shortv": FROZEN, **reductions}))
    train_only_projector(model, torch.float32)
    conversations = read_instructions(instructions)
    dataset = ConversationDataset(conversations, Supervision(processor), instructions.parent)
    return SupervisedLoss(model), dataset


def gradient(module: SupervisedLoss, dataset: ConversationDataset, cut: Sequence[Sequence[int]]) -> torch.Tensor:
    """The projector's gradient for a global batch cut like this, flat; the loss scaled as the loop does."""
    collate = Collator.of(dataset.supervision)
    batches = [collate([dataset[index] for index in rows]) for rows in cut]
    count = max(1, sum(count_supervised(batch.inputs["labels"]) for batch in batches))
    module.zero_grad()
    for batch in batches:
        (module(batch) / count).backward()
    return torch.cat([p.grad.flatten() for p in projector_parameters(module.model).values() if p.grad is not None])


@pytest.fixture(scope="module")
def reduced(tiny_release: Path, tiny_instructions: Path) -> tuple[SupervisedLoss, ConversationDataset]:
    return loaded(tiny_release, tiny_instructions)


def test_with_both_reductions_off_the_loss_is_that_of_plain_llava(tiny_release: Path, tiny_instructions: Path) -> None:
    module, dataset = loaded(tiny_release, tiny_instructions, visionzip=None, shortv=None)
    batch = Collator.of(dataset.supervision)([dataset[index] for index in range(6)])
    plain = LlavaForConditionalGeneration.from_pretrained(tiny_release).eval()
    expected = plain(**batch.inputs).loss  # transformers' mean over the supervised tokens of its input
    assert module(batch).item() / count_supervised(batch.inputs["labels"]) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    "cut",
    [
        [[0], [1], [2], [3], [4], [5], [6], [7]],
        [[7, 3, 1], [0], [6, 5, 4, 2]],
        [[4], [0, 1, 2, 3, 5, 6, 7]],  # sample 4 has no image
        [[0, 1, 2, 3], [4], [], [5, 6, 7]],  # an empty micro-batch keeps a process in step
    ],
)
def test_any_cut_of_a_global_batch_gives_the_same_gradient(
    reduced: tuple[SupervisedLoss, ConversationDataset], cut: list[list[int]]
) -> None:
    module, dataset = reduced
    assert not dataset.conversations[4].images
    whole = gradient(module, dataset, [range(8)])
    assert whole.norm() > 0.1
    torch.testing.assert_close(gradient(module, dataset, cut), whole, rtol=1e-5, atol=1e-5 * whole.abs().max().item())


def test_a_micro_batch_s_result_does_not_depend_on_those_before_it(
    tiny_release: Path, tiny_instructions: Path
) -> None:
    """Bit for bit, or a resumed run would differ from one that was never interrupted. Rows that share a longer
    beginning (their image comes later), or none, come first."""
    fresh, dataset = loaded(tiny_release, tiny_instructions)
    seasoned, _ = loaded(tiny_release, tiny_instructions)
    turns = [("user", "the colour"), ("assistant", "no"), ("user", "<image>\nis it bright?"), ("assistant", "yes")]
    late = Conversation("late", dataset.conversations[0].images, tuple(turns))
    collate = Collator.of(dataset.supervision)
    for rows in ([dataset.load(late)], [dataset[4]], [dataset[4], dataset[9]]):
        seasoned(collate(rows)).backward()
    for rows in ([0, 1, 2], [4], [3]):
        results = []
        for module in (fresh, seasoned):
            module.zero_grad()
            loss = module(collate([dataset[index] for index in rows]))
            loss.backward()
            results.append([loss, *(p.grad for p in projector_parameters(module.model).values())])
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_text_alone_gives_the_projector_exact_zeros_and_not_no_gradient(
    reduced: tuple[SupervisedLoss, ConversationDataset],
) -> None:
    module, dataset = reduced
    only_text = gradient(module, dataset, [[4, 9]])
    assert only_text.shape == (sum(p.numel() for p in projector_parameters(module.model).values()),)
    assert torch.equal(only_text, torch.zeros_like(only_text))


def test_the_projector_is_not_rounded_on_its_way_to_training_in_bf16(tiny_release: Path) -> None:
    exact = projector_parameters(load_release(str(tiny_release), Reductions(BUDGET, FROZEN))[0])
    model, _ = load_release(ReleaseSpec(str(tiny_release), dtype=torch.bfloat16), Reductions(BUDGET, FROZEN))
    train_only_projector(model, torch.bfloat16)
    for name, parameter in projector_parameters(model).items():
        assert torch.equal(parameter, exact[name])


def test_only_the_projector_is_trained_and_nothing_upstream_has_a_graph(tiny_release: Path) -> None:
    model, _ = load_release(ReleaseSpec(str(tiny_release), dtype=torch.bfloat16), Reductions(BUDGET, FROZEN))
    model.train()
    train_only_projector(model, torch.bfloat16)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(projector_parameters(model))
    assert len(trained) == 4
    assert {p.dtype for p in projector_parameters(model).values()} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if n not in trained} == {torch.bfloat16}
    assert not any(module.training for module in model.modules())
    inputs: list[torch.Tensor] = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    model.model.get_image_features(torch.rand(2, 3, 24, 24))
    assert not inputs[0].requires_grad
    rows = {name: (count, dtype, trained) for name, count, dtype, trained in describe_components(model)}
    assert rows["projector"] == (24 * 32 + 32 + 32 * 32 + 32, "float32", True)
    assert not any(trained for name, (_, _, trained) in rows.items() if name != "projector")
    assert sum(count for count, _, _ in rows.values()) == sum(p.numel() for p in model.parameters())


def test_gradient_checkpointing_recomputes_and_changes_no_gradient(
    reduced: tuple[SupervisedLoss, ConversationDataset], tiny_release: Path, tiny_instructions: Path
) -> None:
    module, dataset = reduced
    expected = gradient(module, dataset, [range(6)])
    other, _ = loaded(tiny_release, tiny_instructions)
    train_only_projector(other.model, torch.float32)
    recompute_layers(other.model)
    calls: list[bool] = []
    projection = other.model.model.language_model.layers[1].mlp.up_proj
    projection.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    torch.testing.assert_close(gradient(other, dataset, [range(6)]), expected, rtol=1e-6, atol=1e-8)
    assert sum(calls) == 2, "the layer ran once: nothing was recomputed"


def test_logits_are_computed_at_supervised_positions_only(
    reduced: tuple[SupervisedLoss, ConversationDataset],
) -> None:
    module, dataset = reduced
    batch = Collator.of(dataset.supervision)([dataset[index] for index in range(5)])
    shapes: list[torch.Size] = []
    handle = module.model.lm_head.register_forward_hook(lambda _, arguments, output: shapes.append(output.shape))
    module(batch)
    handle.remove()
    assert sum(rows for rows, _ in shapes) == count_supervised(batch.inputs["labels"])


@pytest.mark.parametrize("reductions", [{}, {"shortv": None}, {"visionzip": None, "shortv": None}])
@pytest.mark.parametrize("rows", [range(8), [0], [4], []], ids=["mixed", "one image", "text only", "empty"])
def test_computing_only_what_is_needed_changes_neither_loss_nor_gradient(
    tiny_release: Path, tiny_instructions: Path, reductions: dict[str, Any], rows: Sequence[int]
) -> None:
    module, dataset = loaded(tiny_release, tiny_instructions, **reductions)
    plain = SupervisedLoss(module.model, plain=True)
    batch = Collator.of(dataset.supervision)([dataset[index] for index in rows])
    torch.testing.assert_close(module(batch), plain(batch), rtol=1e-5, atol=0)
    found, expected = gradient(module, dataset, [rows]), gradient(plain, dataset, [rows])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    "fastv",
    [
        {"method": "pyramiddrop", "layers": [1, 3], "keep": [0.5, 0.25]},
        {"method": "sparsevlm", "layers": [0, 2], "keep": [5, 3]},
    ],
)
def test_pruning_inside_the_language_model_trains_whatever_the_cut(
    tiny_release: Path, tiny_instructions: Path, fastv: dict[str, Any]
) -> None:
    module, dataset = loaded(tiny_release, tiny_instructions, shortv=None, fastv=fastv)
    assert module.plain
    expected = gradient(module, dataset, [range(8)])
    assert expected.abs().max() > 0
    found = gradient(module, dataset, [range(3), range(3, 4), range(4, 8)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_the_text_before_the_image_is_computed_once_for_a_run(
    reduced: tuple[SupervisedLoss, ConversationDataset],
) -> None:
    module, dataset = SupervisedLoss(reduced[0].model), reduced[1]
    sizes: list[int] = []
    projection = module.model.model.language_model.layers[0].self_attn.k_proj
    handle = projection.register_forward_hook(lambda _, arguments, output: sizes.append(len(output)))
    collate = Collator.of(dataset.supervision)
    for rows in ([0], [1, 2], [0, 1]):
        module(collate([dataset[index] for index in rows]))
    handle.remove()
    ids = dataset[0].encoded.input_ids  # type: ignore[union-attr]
    before = ids.index(dataset.supervision.processor.image_token_id)
    assert before > 5
    assert sizes[0] == before, "the beginning comes first, alone"
    assert len(sizes) == 4, "and once"
    assert sizes[1] < len(ids) - before


def test_a_wrong_number_of_visual_tokens_is_refused(reduced: tuple[SupervisedLoss, ConversationDataset]) -> None:
    module, dataset = reduced
    batch = Collator.of(dataset.supervision)([dataset[0]])
    pixels = batch.inputs.pop("pixel_values")
    with pytest.raises(ValueError, match="8 placeholders, the images give 16"):
        module(MicroBatch({**batch.inputs, "pixel_values": pixels.repeat(2, 1, 1, 1)}, []))
    with pytest.raises(ValueError, match="8 placeholders and there are 0"):
        module(batch)


@pytest.mark.parametrize("visionzip", [BUDGET, None])
def test_recomputing_layers_keeps_nothing_of_the_tower(
    tiny_release: Path, tiny_instructions: Path, visionzip: dict[str, int] | None
) -> None:
    """transformers would have the tower's embeddings require a gradient, and run a backward pass through it."""
    module, dataset = loaded(tiny_release, tiny_instructions, visionzip=visionzip)
    pixels = Collator.of(dataset.supervision)([dataset[0]]).inputs["pixel_values"]
    expected = gradient(module, dataset, [range(8)])
    seen: list[bool] = []
    module.model.model.vision_tower.encoder.layers[0].register_forward_hook(
        lambda block, inputs, states: seen.append(states.requires_grad)
    )
    for again in (True, False):
        recompute_layers(module.model, again)
        module.model.model.get_image_features(pixels)
        for plain in (True, False):
            module.plain = plain
            torch.testing.assert_close(gradient(module, dataset, [range(8)]), expected, rtol=1e-4, atol=1e-6)
    assert seen
    assert not any(seen)
