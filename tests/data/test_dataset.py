"""From conversations to micro-batches: tensors, lengths, dropped rows, and rows that cannot be read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processors import llava_next_processor, llava_processor
from torch.utils.data import DataLoader

import shortzip.data.dataset
from shortzip.data.batching import BatchPlan, micro_batches_of
from shortzip.data.dataset import Collator, ConversationDataset, MicroBatch, Sample
from shortzip.data.drops import BadSample, Drop, DropLog, TooManyBadSamples
from shortzip.data.instructions import Conversation
from shortzip.data.supervision import Supervision, load_template


@pytest.fixture(scope="module")
def supervision() -> Supervision:
    return Supervision(llava_processor(), load_template("vicuna_v1"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, size in (("wide.png", (30, 50)), ("tall.png", (50, 30)), ("square.png", (40, 40))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "broken.png").write_bytes((folder / "square.png").read_bytes()[:200])
    return folder


def row(name: str, images: tuple[str, ...] = (), answer: str = "A boat.", question: str = "Q") -> Conversation:
    return Conversation(name, images, (("user", "<image>" * len(images) + question), ("assistant", answer)))


def test_a_micro_batch_holds_what_the_model_takes(supervision: Supervision, root: Path) -> None:
    rows = [
        row("two", ("wide.png", "tall.png")),
        row("text", answer="A long answer it is."),
        row("one", ("square.png",)),
    ]
    dataset = ConversationDataset(rows, supervision, root)
    batch = Collator.of(supervision)([dataset[0], dataset[1], dataset[2]])
    lengths = [len(supervision.encode(conversation).input_ids) for conversation in rows]
    assert batch.sample_ids == ["two", "text", "one"]
    assert set(batch.inputs) == {"input_ids", "attention_mask", "labels", "pixel_values"}
    for key in ("input_ids", "attention_mask", "labels"):
        assert batch.inputs[key].shape == (3, max(lengths))
        assert batch.inputs[key].dtype == torch.int64
    assert batch.inputs["attention_mask"].sum(1).tolist() == lengths == dataset.lengths.tolist()
    assert batch.inputs["pixel_values"].shape == (3, 3, 112, 112)
    assert batch.inputs["pixel_values"].dtype == torch.float32
    # In the order of the placeholders: the first row's two images, then the last row's.
    alone = [dataset[0], dataset[2]]
    pixels = [image for sample in alone if isinstance(sample, Sample) for image in sample.pixels]
    assert torch.equal(batch.inputs["pixel_values"], torch.stack(pixels))
    padded = batch.inputs["attention_mask"] == 0
    assert (batch.inputs["labels"][padded] == -100).all()
    assert (batch.inputs["input_ids"][padded] == supervision.tokenizer.pad_token_id).all()
    supervised = (batch.inputs["labels"] != -100).sum(1)
    assert supervised.tolist() == dataset.supervised.tolist()
    chosen = batch.inputs["labels"] != -100
    assert torch.equal(batch.inputs["labels"][chosen], batch.inputs["input_ids"][chosen])


def test_a_batch_without_images_has_no_pixels(supervision: Supervision) -> None:
    dataset = ConversationDataset([row("a"), row("b")], supervision)
    assert "pixel_values" not in Collator.of(supervision)([dataset[0], dataset[1]]).inputs


@pytest.mark.parametrize("rows", [[], [Drop("x", "missing_image", "gone")]])
def test_an_empty_micro_batch_is_one_row_that_teaches_nothing(supervision: Supervision, rows: list[Drop]) -> None:
    batch = Collator.of(supervision)(rows)
    assert batch.inputs["input_ids"].shape == (1, 1)
    assert batch.inputs["attention_mask"].tolist() == [[1]]
    assert batch.inputs["labels"].tolist() == [[-100]]
    assert (batch.sample_ids, batch.dropped) == ([], rows)


def test_tiles_of_llava_next_are_filled_up(root: Path) -> None:
    supervision = Supervision(llava_next_processor(), load_template("vicuna_v1"))
    dataset = ConversationDataset([row("a", ("square.png",)), row("b", ("wide.png", "tall.png"))], supervision, root)
    samples = [dataset[0], dataset[1]]
    batch = Collator.of(supervision)(samples)
    tiles = [len(image) for sample in samples if isinstance(sample, Sample) for image in sample.pixels]
    assert batch.inputs["pixel_values"].shape == (3, max(tiles), 3, 28, 28)
    assert batch.inputs["image_sizes"].tolist() == [[40, 40], [30, 50], [50, 30]]
    assert batch.inputs["attention_mask"].sum(1).tolist() == dataset.lengths.tolist()
    short = tiles.index(min(tiles))
    assert (batch.inputs["pixel_values"][short, tiles[short] :] == 0).all()


def test_rows_that_cannot_be_used_are_dropped_and_counted_before_training(
    supervision: Supervision, root: Path
) -> None:
    short = Supervision(supervision.processor, supervision.template, max_length=160)
    rows = [
        row("kept", ("wide.png",)),
        row("empty", answer=""),
        row("long question", question="boat " * 200),
        row("long answer", answer="boat " * 200),
    ]
    drops = DropLog()
    dataset = ConversationDataset(rows, short, root, drops=drops)
    assert [conversation.id for conversation in dataset.conversations] == ["kept", "long answer"]
    assert drops.counts == {"no_answer": 1, "too_long": 1}
    assert dataset.cut == {"answer": 1}
    assert dataset.lengths.max() == 160
    with pytest.raises(ValueError, match=r"no row is left.*1 no_answer"):
        ConversationDataset(rows[1:2], short, root)


def loader(dataset: ConversationDataset, workers: int) -> DataLoader[Any]:
    plan = BatchPlan(dataset.lengths, 4, num_epochs=1, micro_batch_size=2)
    return DataLoader(
        dataset,
        batch_sampler=list(micro_batches_of(plan.batches())),
        collate_fn=Collator.of(dataset.supervision),
        num_workers=workers,
    )


def test_missing_images_are_found_before_training(supervision: Supervision, root: Path) -> None:
    rows = [row("good", ("wide.png",)), *(row(f"gone {number}", (f"gone{number}.png",)) for number in range(3))]
    with pytest.raises(BadSample, match=r"row 'gone 0': .*gone0\.png.*images of 2 more of 4 rows") as caught:
        ConversationDataset(rows, supervision, root)
    assert caught.value.reason == "missing_image"
    dataset = ConversationDataset(rows, supervision, root, drops=DropLog("skip", max_bad_fraction=0.75))
    assert [conversation.id for conversation in dataset.conversations] == ["good"]
    assert len(dataset.lengths) == len(dataset.supervised) == 1
    assert dataset.drops.counts == {"missing_image": 3}
    with pytest.raises(TooManyBadSamples, match="3 of 4 rows"):
        ConversationDataset(rows, supervision, root, drops=DropLog("skip", max_bad_fraction=0.74))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_stops_the_run_with_the_row_and_the_file(
    supervision: Supervision, root: Path, workers: int
) -> None:
    dataset = ConversationDataset([row("good", ("wide.png",)), row("the bad one", ("broken.png",))], supervision, root)

    def run() -> None:
        for batch in loader(dataset, workers):
            dataset.drops.extend(batch.dropped)

    with pytest.raises(BadSample, match=r"row 'the bad one': .*broken\.png") as caught:
        run()
    assert caught.value.reason == "unreadable_image"


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_skipped_and_listed(
    supervision: Supervision, root: Path, workers: int, tmp_path: Path
) -> None:
    rows = [row("good", ("wide.png",)), row("bad", ("broken.png",)), row("worse", ("broken.png",)), row("fine")]
    dataset = ConversationDataset(rows, supervision, root, drops=DropLog("skip", max_bad_fraction=0.02))
    seen: list[str] = []
    for batch in loader(dataset, workers):
        seen += batch.sample_ids
        dataset.drops.extend(batch.dropped)
    assert sorted(seen) == ["fine", "good"]
    assert dataset.drops.counts == {"unreadable_image": 2}
    assert dataset.drops.summary() == "2 rows were left out: 2 unreadable_image"
    dataset.drops.write(tmp_path / "dropped.jsonl")
    listed = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert sorted(drop["sample_id"] for drop in listed) == ["bad", "worse"]
    assert all(drop["file"].endswith("broken.png") for drop in listed)
    dataset.drops.check(seen=100)
    with pytest.raises(TooManyBadSamples, match=r"2 of 99 rows.*max_bad_fraction = 2\.0%"):
        dataset.drops.check(seen=99, minimum=99)


def test_an_image_that_was_cut_off_is_never_opened(supervision: Supervision, root: Path) -> None:
    turns = (("user", "<image>Q"), ("assistant", "A"), ("user", "<image>R"), ("assistant", "boat " * 50))
    whole = Conversation("x", ("wide.png", "gone.png"), turns)
    length = supervision.encode(whole).answers[0][1]
    dataset = ConversationDataset([whole], Supervision(supervision.processor, supervision.template, length), root)
    sample = dataset[0]
    assert isinstance(sample, Sample)
    assert len(sample.pixels) == 1


def test_lengths_are_counted_once(
    supervision: Supervision, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row("a", ("wide.png",)), row("empty", answer=""), row("b", answer="boat " * 90)]
    first = ConversationDataset(rows, supervision, root, cache_dir=tmp_path)
    calls: list[str] = []
    encode = Supervision.encode

    def counted(self: Supervision, conversation: Conversation, *of_row: Any) -> Any:
        calls.append(conversation.id)
        return encode(self, conversation, *of_row)

    monkeypatch.setattr(Supervision, "encode", counted)
    again = ConversationDataset(rows, supervision, root, cache_dir=tmp_path)
    assert calls == []
    assert again.lengths.tolist() == first.lengths.tolist()
    assert again.supervised.tolist() == first.supervised.tolist()
    assert again.drops.counts == first.drops.counts == {"no_answer": 1}
    # Other rows, limits or templates are counted anew.
    ConversationDataset(rows[:1], supervision, root, cache_dir=tmp_path)
    ConversationDataset(rows, Supervision(supervision.processor, supervision.template, 150), root, cache_dir=tmp_path)
    other = supervision.template.replace("USER", "HUMAN")
    ConversationDataset(rows, Supervision(supervision.processor, other), root, cache_dir=tmp_path)
    assert len(calls) == 7
    # A damaged cache is no obstacle.
    for file in tmp_path.iterdir():
        file.write_text("{")
    ConversationDataset(rows, supervision, root, cache_dir=tmp_path)
    assert len(calls) == 10


def test_a_missing_image_is_not_remembered(root: Path, tmp_path: Path) -> None:
    supervision = Supervision(llava_next_processor(), load_template("vicuna_v1"))
    rows = [row("here", ("wide.png",)), row("late", ("late.png",))]
    (tmp_path / "wide.png").write_bytes((root / "wide.png").read_bytes())
    for expected in (1, 2):
        dataset = ConversationDataset(
            rows, supervision, tmp_path, drops=DropLog("skip", 0.5), cache_dir=tmp_path / "cache"
        )
        assert len(dataset) == expected
        (tmp_path / "late.png").write_bytes((root / "tall.png").read_bytes())


def test_the_loader_gives_the_same_micro_batches_from_any_position(supervision: Supervision, root: Path) -> None:
    rows = [row(str(number), ("wide.png",) * (number % 3), answer="boat " * (number % 5 + 1)) for number in range(11)]
    dataset = ConversationDataset(rows, supervision, root)
    plan = BatchPlan(dataset.lengths, 4, num_epochs=2, micro_batch_size=2)

    def batches(position: int, workers: int) -> list[MicroBatch]:
        sampler = micro_batches_of(plan.batches(position))
        return list(
            DataLoader(dataset, batch_sampler=sampler, collate_fn=Collator.of(supervision), num_workers=workers)
        )

    whole, resumed = batches(0, 0), batches(8, 1)
    skipped = sum(len(batch.micro_batches[0]) for batch in plan.batches() if batch.position < 8)
    assert len(whole) == skipped + len(resumed)
    for one, other in zip(whole[skipped:], resumed, strict=True):
        assert one.sample_ids == other.sample_ids
        assert one.inputs.keys() == other.inputs.keys()
        assert all(torch.equal(one.inputs[key], other.inputs[key]) for key in one.inputs)


def test_moving_a_micro_batch_keeps_everything_and_leaves_what_the_cpu_reads(supervision: Supervision) -> None:
    inputs = {"input_ids": torch.ones(1, 2, dtype=torch.int64), "pixel_values": torch.ones(1, 3, 2, 2)}
    batch = shortzip.data.dataset.MicroBatch(inputs, ["a"], [Drop("b", "too_long", "")])
    moved = batch.to("meta")
    assert {name: tensor.device.type for name, tensor in moved.inputs.items()} == {
        "input_ids": "cpu", "pixel_values": "meta"
    }  # fmt: skip
    assert (moved.sample_ids, moved.dropped) == (batch.sample_ids, batch.dropped)


@pytest.mark.parametrize(("mode", "share"), [("ignore", 0.1), ("skip", 1.5), ("skip", -0.1)])
def test_senseless_settings_of_the_log_are_refused(mode: str, share: float) -> None:
    with pytest.raises(ValueError, match=r"on_bad_sample|max_bad_fraction"):
        DropLog(mode, share)  # type: ignore[arg-type]


def test_an_unknown_reason_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown reason 'odd'"):
        BadSample("odd", "x", "")
