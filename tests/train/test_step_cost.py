"""What a step costs, and what is done when memory runs out."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from shortzip.data.batching import BatchPlan
from shortzip.data.dataset import ConversationDataset
from shortzip.data.instructions import read_instructions
from shortzip.data.supervision import Supervision
from shortzip.reduction.reductions import Reductions
from shortzip.train.release.loading import load_release
from shortzip.train.run.report import LEFT_OUT, Speed, matmul_speed
from shortzip.train.step.flops import (
    RowShape,
    StepFlops,
    needed_flops,
    plain_flops,
)
from shortzip.train.step.micro_batch import half_the_micro_batch, in_words


def llava_7b() -> LlavaConfig:
    tower = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    return LlavaConfig(text_config=LlamaConfig(vocab_size=32000), vision_config=tower)


def test_a_7b_step_costs_what_counting_by_hand_gives() -> None:
    config, row = llava_7b(), RowShape(text=200, visual=64, supervised=98)
    h, m, v = 4096, 11008, 32000
    layer = 2 * 264 * (4 * h + 3 * m) * h
    attention = 4 * 264**2 * h
    tower = (2 * 576 * 588 * 1024) + 23 * (2 * 577 * 12 * 1024**2 + 4 * 577**2 * 1024)
    projector = 2 * 2 * 64 * (1024 * h + h * h) + 2 * 64 * h * h
    expected = 32 * (2 * layer + 3 * attention) + 2 * 2 * 264 * h * v + tower + projector
    assert plain_flops(config, row, checkpointing=False, whole_tower=False) == expected
    more = plain_flops(config, row, checkpointing=True, whole_tower=False) - expected
    assert more == 32 * (layer + attention)
    text = RowShape(text=264, visual=0, supervised=98)
    forward = plain_flops(config, text, checkpointing=True, backward=False)
    assert forward == 32 * (layer + attention) + 2 * 264 * h * v, "without an image in its micro-batch"
    # Without a beginning to share, frozen layers or unsupervised tokens, only the text before the loss differs.
    everything = RowShape(text=200, visual=64, supervised=264)
    assert needed_flops(config, everything, shared=0, frozen_layers=[]) == expected


def test_each_saving_lowers_the_count() -> None:
    config, row = llava_7b(), RowShape(text=200, visual=64, supervised=98)
    layers = list(range(13, 32))
    counts = [
        needed_flops(config, row, shared=0, frozen_layers=[]),
        needed_flops(config, row, shared=0, frozen_layers=layers),
        needed_flops(config, row, shared=35, frozen_layers=layers),
        needed_flops(config, row, shared=35, frozen_layers=layers, tower=False),
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[2] == pytest.approx(5.57e12, rel=0.01)
    text = needed_flops(config, RowShape(200, 0, 98), shared=35, frozen_layers=layers)
    assert text < counts[3] / 2, "text alone has no backward pass"


def test_the_flops_of_a_step_follow_its_samples(tiny_release: Path, tiny_instructions: Path) -> None:
    model, processor = load_release(str(tiny_release), Reductions({"dominant": 5, "contextual": 3}))
    dataset = ConversationDataset(
        read_instructions(tiny_instructions), Supervision(processor), tiny_instructions.parent
    )
    flops = StepFlops(model, dataset)
    assert flops([0, 3]) == flops([0]) + flops([3])
    assert flops([4]) < flops([0]), "a row without an image has neither tower nor backward pass"
    model.model.vision_tower = torch.nn.Identity()
    assert StepFlops(model, dataset)([0]) < flops([0])


def test_mfu_is_the_share_of_the_peak_and_leaves_the_first_steps_out() -> None:
    speed = Speed(peak=100.0)
    for _ in range(LEFT_OUT):
        speed.add(1, 1, 50.0, 0.0, 1.0)
    assert speed.averages() == {}
    speed.add(4, 40, 2.0, 0.5, 120.0)
    assert speed.averages()["mfu"] == pytest.approx(0.6)
    assert "MFU 60%" in speed.text(3)
    assert "MFU" not in Speed().text(3)


def test_a_matrix_product_has_a_speed() -> None:
    assert matmul_speed(torch.device("cpu"), torch.float32, seconds=0) > 1e8


def test_out_of_memory_halves_the_micro_batch_once_and_keeps_the_global_batches() -> None:
    plan = BatchPlan([10] * 20, 8, micro_batch_size=4, max_tokens_per_micro_batch=40)
    smaller = half_the_micro_batch(plan, torch.OutOfMemoryError("full"), again=False)
    assert in_words(smaller.micro_batch_size, smaller.max_tokens) == "micro-batches of at most 2 rows and 20 tokens"
    before, after = plan.global_batch(8), smaller.global_batch(8)
    assert before.samples == after.samples
    assert max(map(len, after.micro_batches[0])) == 2 < max(map(len, before.micro_batches[0]))
    with pytest.raises(torch.OutOfMemoryError, match=r"again.*lower per_device_train_batch_size.*resume.*full"):
        half_the_micro_batch(smaller, torch.OutOfMemoryError("full"), again=True)


def test_out_of_memory_stops_with_the_cure_where_halving_cannot_help() -> None:
    with pytest.raises(torch.OutOfMemoryError, match=r"one row at a time.*lower data.max_length"):
        half_the_micro_batch(BatchPlan([9], 1, micro_batch_size=1), torch.OutOfMemoryError(), again=False)
    plan = BatchPlan([9] * 4, 4, micro_batch_size=2, num_processes=2)
    with pytest.raises(torch.OutOfMemoryError, match="on one of 2 processes"):
        half_the_micro_batch(plan, torch.OutOfMemoryError(), again=False)
