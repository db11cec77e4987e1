"""The benchmark's savings: each switched off gives the same gradient, and only while it is off."""

import pytest
import torch

from shortzip.data.dataset import MicroBatch
from shortzip.scripts.benchmarks.memory import peak_tensor_bytes
from shortzip.scripts.benchmarks.savings import savings_of
from shortzip.scripts.benchmarks.shapes import ConversationLengths, ModelShape, build_models, make_batch
from shortzip.train.step import supervised_states as walk
from shortzip.train.step.objective import SupervisedLoss, projector_parameters

SHAPE = ModelShape(
    {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2},
    {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
     "image_size": 24, "patch_size": 4},
    4, 2, [1, 2],
)  # fmt: skip


def test_without_a_saving_the_gradient_is_the_same() -> None:
    model = build_models(SHAPE, torch.device("cpu"), torch.float32).both
    rows = [ConversationLengths(True, ((3, 2),)), ConversationLengths(True, ((4, 6), (2, 1)))]
    batch = make_batch(rows, 6, 1, model.config, torch.device("cpu"))
    module = SupervisedLoss(model)

    def gradient(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        model.zero_grad()
        module(MicroBatch(inputs, [])).backward()
        return torch.cat([p.grad.flatten() for p in projector_parameters(model).values() if p.grad is not None])

    expected, original = gradient(batch), walk._Walk
    savings = savings_of(model, SHAPE)
    assert len(savings) == 8
    for saving in savings:
        with saving.off():
            found = gradient(saving.prepare(batch))
        if saving.prepare is dict:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
        else:
            assert not torch.equal(found, expected), "positions without a label are computed only if given one"
        torch.testing.assert_close(gradient(batch), expected, rtol=1e-5, atol=1e-6)
        row = rows[1].shape(6, 1)
        if saving.flops is not None:
            assert saving.flops(row, batch["input_ids"].shape[1] + 5) > 0
    assert walk._Walk is original


def test_tensors_are_counted_from_their_making_to_their_end() -> None:
    outside = torch.zeros(1000)

    def work() -> None:
        first = outside + 1  # 4000 bytes
        second = first * 2  # 8000 at once
        del first
        kept = second.view(10, 100)[:2]  # a view is nothing new
        kept.add_(1)
        torch.cat([second[:500], second[:500]])  # 8000 again

    assert peak_tensor_bytes(work, torch.device("cpu")) == 8000
    assert peak_tensor_bytes(lambda: outside.view(10, 100), torch.device("cpu")) == pytest.approx(0)
