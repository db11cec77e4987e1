"""Gradients into the projector, and the dtypes a run trains in."""

import pytest
import torch
from reduced_models import REDUCTIONS, build, make_batch, make_row

reductions = pytest.mark.parametrize("reduction", list(REDUCTIONS))


def training_batch(model):
    batch = make_batch(
        [make_row(model, "ttIttt", 1), make_row(model, "tIItt", 2), make_row(model, "tttt", 3)], "right"
    )
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def loss_of(model, batch):
    # Not the model's own loss, which is in float32 whatever the model is in.
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits, labels = model(**inputs).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, labels)


def in_float64_throughout(model):
    """transformers' RMSNorm rounds to float32 inside, which finite differences would measure; torch's does not."""
    for parent in list(model.model.language_model.modules()):
        for name, module in list(parent.named_children()):
            if type(module).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(module.weight.shape, module.variance_epsilon, dtype=torch.float64)
                norm.weight = module.weight
                setattr(parent, name, norm)


def projector_gradient(model, batch):
    model.requires_grad_(False)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    model.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    return loss.detach(), torch.cat([parameter.grad.flatten() for parameter in projector.parameters()])


@pytest.mark.parametrize("decoder", ["llama", "mistral-window", "qwen2"])
@reductions
def test_projector_gradients_equal_finite_differences(reduction, decoder):
    model = build(decoder, reduction=reduction, dtype=torch.float64).train()
    in_float64_throughout(model)
    batch = training_batch(model)
    _, gradient = projector_gradient(model, batch)
    parameters = list(model.model.multi_modal_projector.parameters())
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        losses = []
        for step in (1e-6, -2e-6, 1e-6):  # forth, back beyond the start, home again
            offset = 0
            with torch.no_grad():
                for parameter in parameters:
                    count = parameter.numel()
                    parameter += step * direction[offset : offset + count].view_as(parameter)
                    offset += count
                losses.append(loss_of(model, batch))
        measured = (losses[0] - losses[1]) / 2e-6
        torch.testing.assert_close(measured, gradient @ direction, rtol=1e-6, atol=1e-8)


@reductions
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_gradient_checkpointing_changes_nothing(reduction, reentrant):
    model = build(reduction=reduction).train()
    batch = training_batch(model)
    loss, gradient = projector_gradient(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    again, checkpointed = projector_gradient(model, batch)
    assert torch.equal(loss, again)
    torch.testing.assert_close(checkpointed, gradient, rtol=0, atol=1e-7)
    assert gradient.abs().max() > 1e-3


@reductions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_float32_projector_works_in_a_model_of_another_dtype(reduction, dtype):
    reference = build(reduction=reduction).train()
    model = build(reduction=reduction, dtype=dtype).train()
    model.model.multi_modal_projector.float()
    batch = training_batch(reference)
    loss, gradient = projector_gradient(model, {**batch, "pixel_values": batch["pixel_values"].to(dtype)})
    assert gradient.dtype == torch.float32
    assert model(**batch).logits.dtype == dtype
    expected_loss, _ = projector_gradient(reference, batch)
    assert abs(loss.float() - expected_loss) < 0.1


@reductions
def test_autocast_runs_and_keeps_float32_gradients(reduction):
    model = build(reduction=reduction).train()
    batch = training_batch(model)
    expected_loss, _ = projector_gradient(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradient = projector_gradient(model, batch)
    assert gradient.dtype == torch.float32
    assert abs(loss - expected_loss) < 0.1


@reductions
def test_eager_and_sdpa_give_the_same_gradients(reduction):
    gradients = []
    for attention in ("sdpa", "eager"):
        model = build(reduction=reduction, attention=attention).train()
        gradients.append(projector_gradient(model, training_batch(model))[1])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)


def test_text_only_rows_give_the_projector_no_gradient():
    model = build().train()
    both = make_batch([make_row(model, "ttIttt", 1), make_row(model, "tttt", 3)], "right")
    both["labels"] = both["input_ids"].clone()
    both["labels"][0] = -100
    both["labels"][1, both["attention_mask"][1] == 0] = -100
    _, gradient = projector_gradient(model, both)
    assert not gradient.any()
