"""The untrained model as a teacher: what it says, what it costs in memory, and that no cut changes what is learned."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import checkpoint_tensors, run_here, write_recipe
from tiny import write_next_release
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from shortzip.data.dataset import Collator, ConversationDataset, MicroBatch
from shortzip.data.instructions import read_instructions
from shortzip.data.supervision import Supervision
from shortzip.reduction.errors import ReductionError
from shortzip.reduction.reductions import Reductions
from shortzip.train.inputs.loading import layout_of
from shortzip.train.release.loading import load_release
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import load_config
from shortzip.train.settings.distill import DistillConfig
from shortzip.train.step.objective import (
    SupervisedLoss,
    count_supervised,
    projector_parameters,
    train_only_projector,
)
from shortzip.train.step.places import expand_images
from shortzip.train.step.teacher import Lesson, Teacher, TopTokens, summed_lesson_loss

BUDGET, FROZEN, WEIGHT, HEAT = {"dominant": 5, "contextual": 3}, {"layers": [1, 2]}, 0.4, 2.0


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def taught(request: Any, tiny_release: Path, tiny_instructions: Path, tmp_path_factory: Any) -> tuple[Any, ...]:
    """A loss with a teacher whose student has moved on, its rows, the release."""
    release = tiny_release
    if request.param == "llava_next":
        release = write_next_release(tmp_path_factory.mktemp("next"))
    model, processor = load_release(str(release), Reductions(BUDGET, FROZEN))
    train_only_projector(model, torch.float32)
    module = SupervisedLoss(model, teacher=Teacher(model, torch.float32), distill=DistillConfig(WEIGHT, HEAT))
    with torch.no_grad():
        for parameter in projector_parameters(model).values():
            parameter.add_(torch.full_like(parameter, 0.01))
    dataset = ConversationDataset(
        read_instructions(tiny_instructions), Supervision(processor), tiny_instructions.parent
    )
    return module, dataset, release


def batch_of(dataset: ConversationDataset, rows: Any) -> MicroBatch:
    supervision = dataset.supervision
    return Collator.of(supervision, layout_of(supervision, taught=True))([dataset[row] for row in rows])


def by_hand(module: SupervisedLoss, release: Path, batch: MicroBatch) -> torch.Tensor:
    """Logits of transformers' own model on all tokens, and of ours, put together as the formula says."""
    kind = LlavaForConditionalGeneration
    if "image_sizes" in batch.inputs:
        kind = LlavaNextForConditionalGeneration
    inputs = dict(batch.inputs)
    labels = inputs.pop("labels")
    full = batch.layout.full
    with torch.no_grad():
        images = {key: inputs[key] for key in ("pixel_values", "image_sizes") if key in inputs}
        plain = kind.from_pretrained(release).eval()
        teacher = plain(input_ids=full.input_ids, attention_mask=full.attention_mask, **images).logits
        student = module.model(**inputs).logits
    theirs = teacher[:, :-1][full.labels[:, 1:] != -100]
    ours, targets = student[:, :-1][labels[:, 1:] != -100], labels[:, 1:][labels[:, 1:] != -100]
    divergence = kl_div(log_softmax(ours / HEAT, -1), log_softmax(theirs / HEAT, -1), reduction="sum", log_target=True)
    return (1 - WEIGHT) * cross_entropy(ours, targets, reduction="sum") + WEIGHT * HEAT**2 * divergence


@pytest.mark.parametrize("plain", [False, True])
def test_the_loss_is_that_of_the_formula(taught: tuple[Any, ...], plain: bool) -> None:
    module, dataset, release = taught
    batch = batch_of(dataset, range(6))  # one of them without an image
    module.plain = plain
    loss = module(batch)
    module.plain = False
    expected = by_hand(module, release, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    alone = SupervisedLoss(module.model)(batch)
    assert abs(alone.item() - expected.item()) > 1e-2 * expected.item()  # the teacher says something else


def test_any_cut_gives_the_same_gradient(taught: tuple[Any, ...]) -> None:
    module, dataset, _ = taught

    def gradient(cut: list[list[int]]) -> torch.Tensor:
        batches = [batch_of(dataset, rows) for rows in cut]
        count = sum(count_supervised(batch.inputs["labels"]) for batch in batches)
        module.zero_grad()
        for batch in batches:
            (module(batch) / count).backward()
        return torch.cat([p.grad.flatten() for p in projector_parameters(module.model).values() if p.grad is not None])

    whole = gradient([[0, 1, 2, 3, 4, 5]])
    for cut in ([[4], [5, 0, 3], [], [2, 1]], [[0], [1], [2], [3], [4], [5]]):
        torch.testing.assert_close(gradient(cut), whole, rtol=1e-5, atol=2e-5 * whole.abs().max().item())


def test_with_nothing_reduced_an_untrained_student_has_nothing_to_learn_from_it(
    tiny_release: Path, tiny_instructions: Path
) -> None:
    model, processor = load_release(str(tiny_release), Reductions())
    train_only_projector(model, torch.float32)
    module = SupervisedLoss(model, teacher=Teacher(model, torch.float32), distill=DistillConfig(1.0, 1.0))
    rows = read_instructions(tiny_instructions)
    dataset = ConversationDataset(rows, Supervision(processor), tiny_instructions.parent)
    loss = module(batch_of(dataset, range(4)))
    loss.backward()
    assert abs(loss.item()) < 1e-4
    assert max(p.grad.abs().max().item() for p in projector_parameters(model).values()) < 1e-4


def test_the_teacher_holds_no_weight_of_its_own_but_a_projector(taught: tuple[Any, ...]) -> None:
    module = taught[0]

    def held(part: nn.Module) -> dict[int, int]:
        return {tensor.data_ptr(): tensor.nbytes for tensor in part.parameters()}

    alone, both = held(module.model), held(module)
    projector = sum(tensor.nbytes for tensor in module.model.model.multi_modal_projector.parameters())
    assert sum(both.values()) - sum(alone.values()) == projector
    view = module.teacher._view
    assert view.language_model is module.model.model.language_model
    assert view.vision_tower is module.model.model.vision_tower
    assert not any(weight.requires_grad for weight in module.teacher.projector.parameters())


def lesson(kind: str, positions: int = 7, width: int = 6, vocabulary: int = 11) -> tuple[Any, ...]:
    torch.manual_seed(3)
    head = nn.Linear(width, vocabulary, bias=False, dtype=torch.float32).requires_grad_(False)
    states = torch.randn(positions, width, requires_grad=True)
    targets, outputs = torch.randint(vocabulary, (positions,)), torch.randn(positions, width)
    if kind == "states":
        return head, states, targets, Lesson(outputs, WEIGHT, HEAT)
    values = (head(outputs) / HEAT).log_softmax(-1).topk(vocabulary - 1 if kind == "all but one" else 4)
    return head, states, targets, Lesson(TopTokens(*values), WEIGHT, HEAT)


@pytest.mark.parametrize("kind", ["states", "top", "all but one"])
def test_the_fused_gradient_is_autograd_s(kind: str) -> None:
    head, states, targets, said = lesson(kind)
    loss = summed_lesson_loss(head, states, targets, said)
    loss.backward()
    fused, states.grad = states.grad, None
    open_head = copy.deepcopy(head).requires_grad_(True)  # a head that is trained takes the plain way
    plain = summed_lesson_loss(open_head, states, targets, said)
    plain.backward()
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused, states.grad, rtol=1e-4, atol=1e-5)


def test_top_tokens_say_at_most_what_the_whole_distribution_says() -> None:
    head, states, targets, whole = lesson("states")
    full = summed_lesson_loss(head, states, targets, whole)
    top = summed_lesson_loss(head, states, targets, lesson("top")[3])
    everything = summed_lesson_loss(head, states, targets, lesson("all but one")[3])
    torch.testing.assert_close(everything, full, rtol=1e-5, atol=1e-5)
    assert top < full


@given(st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1, max_size=4), st.integers(1, 3), st.integers(1, 9))
def test_images_are_expanded_where_they_stand(rows: list[list[int]], there: int, wanted: int) -> None:
    """0 stands for an image, the rest is text."""
    short = [[t for token in row for t in ([9] * there if token == 0 else [token])] + [5] for row in rows]
    long = [[t for token in row for t in ([9] * wanted if token == 0 else [token])] + [5] for row in rows]

    def padded(lists: list[list[int]]) -> tuple[torch.Tensor, ...]:
        tensors = [torch.tensor(row) for row in lists]
        ids = nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=7)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True)
        return ids, mask, torch.where((mask == 1) & (ids == 5), ids, -100)

    images = sum(row.count(0) for row in rows)
    wide = expand_images(*padded(short), [(there, wanted)] * images, image_token_id=9)
    expected = padded(long)
    assert torch.equal(wide[1], expected[1])
    assert torch.equal(wide[0] * wide[1], expected[0] * expected[1])
    assert torch.equal(wide[2], expected[2])
    if images:
        with pytest.raises(ReductionError, match="placeholders are left in a row"):
            expand_images(*padded(short), [(there, wanted)] * (images - 1), image_token_id=9)


def test_a_run_with_a_teacher_goes_on_bit_for_bit(tiny_release: Path, tiny_instructions: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        tiny_release,
        tiny_instructions,
        distill={"weight": 0.5, "temperature": 2.0},
        max_steps=4,
    )
    whole = run_here(recipe, tmp_path / "whole")
    broken = run_here(recipe, tmp_path / "broken")
    for step in ("step-000004", "final"):
        (broken / step).rename(tmp_path / step)
    run_here(recipe, broken, "--resume_from_checkpoint", "latest")
    ours, theirs = checkpoint_tensors(broken, 4), checkpoint_tensors(whole, 4)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    without = run_here(recipe, tmp_path / "without", "--distill", "null")
    labels_alone = checkpoint_tensors(without, 4)
    assert any(not torch.equal(ours[name], labels_alone[name]) for name in ours)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("weight", 0, "distill.weight is 0"),
        ("weight", 1.5, "distill.weight is 1.5: a share above 0 and up to 1"),
        ("temperature", 0, "distill.temperature is 0: more than 0"),
        ("temperature", -1, "distill.temperature is -1"),
    ],
)
def test_bad_values_are_refused(key: str, value: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DistillConfig(**{key: value})


def test_fastv_and_a_teacher_are_refused_together(tiny_release: Path, tiny_instructions: Path, tmp_path: Path) -> None:
    fastv = {"layer": 1, "keep": 0.5}
    recipe = write_recipe(
        tmp_path / "r.yaml", tiny_release, tiny_instructions, shortv=None, fastv=fastv, distill={"weight": 0.5}
    )
    with pytest.raises(ConfigError, match="distill and fastv"):
        load_config(["--config", str(recipe)])
