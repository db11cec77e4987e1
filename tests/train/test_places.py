"""The layout of a micro-batch's integers: made where the data is, and all that the loss needs of them."""

import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.utils import _recursive_to
from torch.utils.data import DataLoader

from shortzip.data.dataset import Collator, ConversationDataset, MicroBatch
from shortzip.data.instructions import read_instructions
from shortzip.data.supervision import Supervision
from shortzip.reduction.reductions import Reductions
from shortzip.train.inputs.loading import SharingCollator
from shortzip.train.release.loading import load_release
from shortzip.train.step import objective
from shortzip.train.step.objective import SupervisedLoss, train_only_projector
from shortzip.train.step.places import LayOut, Places, lay_out

IMAGE = 9


@pytest.fixture(scope="module")
def tuned(tiny_release: Any, tiny_instructions: Any) -> tuple[SupervisedLoss, ConversationDataset]:
    model, processor = load_release(
        str(tiny_release), Reductions({"dominant": 5, "contextual": 3}, {"layers": [1, 2]})
    )
    train_only_projector(model, torch.float32)
    rows = read_instructions(tiny_instructions)
    return SupervisedLoss(model), ConversationDataset(rows, Supervision(processor), tiny_instructions.parent)


def collator_of(dataset: ConversationDataset) -> SharingCollator:
    processor = dataset.supervision.processor
    return SharingCollator(Collator.of(dataset.supervision, LayOut(processor.image_token_id)))


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [0], [4], []], ids=["mixed", "one image", "text only", "empty"])
@pytest.mark.parametrize("workers", [0, 1])
def test_the_loss_reads_no_integer_but_its_layout(
    tuned: tuple[SupervisedLoss, ConversationDataset], rows: list[int], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, dataset = tuned
    expected = module(Collator.of(dataset.supervision)([dataset[row] for row in rows]))
    loader: Any = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=[rows],  # type: ignore[arg-type]
        collate_fn=collator_of(dataset),
        num_workers=workers,
    )
    (batch,) = loader
    assert all(tensor.is_shared() for tensor in batch.inputs.values()) == bool(workers)
    monkeypatch.setattr(objective, "LayOut", None)
    floats = {key: tensor for key, tensor in batch.inputs.items() if tensor.is_floating_point()}
    assert len(batch.inputs) - len(floats) == 3
    assert torch.equal(module(MicroBatch(floats, [], layout=batch.layout)), expected)


def test_ddp_moves_nothing_of_a_micro_batch(tuned: tuple[SupervisedLoss, ConversationDataset]) -> None:
    """Not its integers either, which would have to be read back."""
    dataset = tuned[1]
    batch = collator_of(dataset)([dataset[0]])
    ((moved,),) = _recursive_to((batch,), torch.device("meta"), False)
    assert moved is batch


def test_whether_the_decoder_can_be_walked_is_asked_once(
    tuned: tuple[SupervisedLoss, ConversationDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dataset = tuned[0].model, tuned[1]
    asked: list[Any] = []
    monkeypatch.setattr(objective, "can_walk", lambda decoder: asked.append(decoder) or True)
    module = SupervisedLoss(model)
    for _ in range(2):
        module(Collator.of(dataset.supervision)([dataset[0]]))
    assert len(asked) == 1


TOKENS = st.lists(st.tuples(st.sampled_from([1, 2, 3, IMAGE]), st.booleans()), min_size=1, max_size=9)


@given(st.lists(TOKENS, min_size=1, max_size=4), st.booleans())
def test_every_needed_token_has_one_place(rows: list[list[tuple[int, bool]]], left: bool) -> None:
    length = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.int64), torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for number, row in enumerate(rows):
        start = length - len(row) if left else 0
        for column, (token, supervised) in enumerate(row, start):
            ids[number, column], mask[number, column] = token, 1
            if supervised and token != IMAGE and column > start:
                labels[number, column] = token
    layout = pickle.loads(pickle.dumps(lay_out(ids, mask, labels, image_token_id=IMAGE)))
    assert layout.placeholders == int((ids == IMAGE).sum())
    parts = [part.places for part in (layout.with_image, layout.text_only) if part is not None]
    for places in parts:
        check(places)
    targets = [target for places in parts for target in places.targets.tolist()]
    assert sorted(targets) == sorted(labels[labels != -100].tolist())
    if layout.with_image is not None:
        used = layout.placeholders if layout.used is None else len(layout.used)
        assert layout.with_image.places.visual_count == used > 0
    if layout.text_only is not None:
        assert layout.text_only.places.visual_count == 0


def check(places: Places) -> None:
    """Slots hold the positions of their tokens, each once, and empty ones a position beyond them."""
    count = places.visual_count
    for padded, positions in (
        (places.every, places.positions),
        (places.text, places.positions[count:]),
        (places.ends, places.positions[places.packed_ends]),
    ):
        assert padded.rows.flatten()[padded.slots].tolist() == positions.tolist()
        assert len(set(padded.slots.tolist())) == len(padded.slots)
        empty = torch.ones(padded.rows.numel(), dtype=torch.bool).index_fill(0, padded.slots, False)
        assert bool((padded.rows.flatten()[empty] > places.positions.max()).all())
    assert int(places.positions.min()) >= places.shared
