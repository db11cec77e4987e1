"""The device against the CPU: logits, losses and gradients of the small models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shortzip.data.dataset import MicroBatch
from shortzip.reduction.positions import keeps_positions, takes_encoded_images
from shortzip.reduction.reductions import Reductions
from shortzip.scripts.proofs.section import Proof
from shortzip.scripts.proofs.subjects import (
    BFLOAT16,
    BUDGET,
    FASTV,
    FLOAT32,
    GRADIENT,
    LAYERS,
    LOSS,
    Subject,
    Subjects,
    gap,
    near,
    on_both,
    scenes,
    small,
)
from shortzip.train.settings.distill import DistillConfig
from shortzip.train.step.objective import (
    SupervisedLoss,
    count_supervised,
    fastv_query,
    projector_parameters,
    recompute_layers,
    train_only_projector,
)
from shortzip.train.step.teacher import Teacher

KEPT = "original positions"
REDUCTIONS = {
    "all tokens": Reductions(),
    "VisionZip": Reductions(BUDGET),
    "ShortV": Reductions(None, LAYERS),
    "VisionZip and ShortV": Reductions(BUDGET, LAYERS),
    "FastV": Reductions(None, None, FASTV),
    "VisionZip and FastV": Reductions(BUDGET, None, FASTV),
}
if takes_encoded_images():  # this transformers knows them
    REDUCTIONS[KEPT] = Reductions(BUDGET, LAYERS, positions="original")


def equality(proof: Proof) -> None:
    """Logits at the supervised positions, in float32 and bfloat16, of every reduction."""
    data = scenes(proof.settings.folder)
    cpu, device = on_both(proof, data)
    coarse = [Subjects(data, where, torch.bfloat16) for where in ("cpu", proof.settings.device)]
    rows = []
    for name, reductions in REDUCTIONS.items():
        with proof.part(name):
            reference = cpu.reduced(reductions)
            expected, loss = _logits(reference)
            found, _ = _logits(device.reduced(reductions))
            difference, same = gap(found, expected), bool((found.argmax(-1).cpu() == expected.argmax(-1)).all())
            proof.check(
                f"{name}, float32", difference <= FLOAT32 and same, f"{small(difference)} of the largest logit"
            )
            (_, there), (_, here) = (_logits(subjects.reduced(reductions)) for subjects in reversed(coarse))
            # bfloat16 rounds either device's own way: it is held against float32, and against the CPU's distance.
            most = max(2 * abs(here - loss), near(loss, BFLOAT16))
            proof.check(f"{name}, bfloat16", abs(there - loss) <= most, f"loss {there:.4f}, in float32 {loss:.4f}")
            rows.append([name, small(difference), f"{loss:.4f}", f"{here:.4f}", f"{there:.4f}"])
    headings = ["demo-llava", "logits, float32: difference", "loss, CPU float32", "CPU bfloat16", "device bfloat16"]
    if KEPT not in REDUCTIONS:
        rows.append([f"{KEPT}: not with this transformers, needed is 5.18", "", "", "", ""])
    proof.table("Against the CPU (difference: of the largest logit)", headings, rows)


@torch.no_grad()
def _logits(subject: Subject) -> tuple[Tensor, float]:
    """[S, V] float32 at the supervised positions, and their mean cross-entropy."""
    model, batch = subject.model, subject.batch()
    labels = batch.inputs["labels"].to(model.device)
    inputs = {key: tensor.to(model.device) for key, tensor in batch.inputs.items() if key != "labels"}
    states = model.model(**inputs, **fastv_query(model, labels), use_cache=False).last_hidden_state[:, :-1]
    supervised = labels[:, 1:] != -100
    logits = model.lm_head(states[supervised]).float()
    return logits, torch.nn.functional.cross_entropy(logits, labels[:, 1:][supervised]).item()


@dataclass(frozen=True)
class Way:
    """A way of computing a training step's loss and gradient."""

    reductions: Reductions
    plain: bool = False
    recomputed: bool = False
    cached: bool = False
    taught: bool = False


BOTH = REDUCTIONS["VisionZip and ShortV"]
WAYS = {
    "all tokens": Way(Reductions()),
    "needed tokens": Way(BOTH),
    "every token": Way(BOTH, plain=True),
    "layers computed again": Way(BOTH, recomputed=True),
    "every token, layers computed again": Way(BOTH, plain=True, recomputed=True),
    "cached features": Way(BOTH, cached=True),
    "teacher": Way(BOTH, taught=True),
    "teacher, every token": Way(BOTH, plain=True, taught=True),
    "FastV": Way(REDUCTIONS["VisionZip and FastV"], plain=True),
}
if KEPT in REDUCTIONS:
    WAYS |= {
        KEPT: Way(REDUCTIONS[KEPT]),
        f"{KEPT}, every token": Way(REDUCTIONS[KEPT], plain=True),
        f"{KEPT}, cached features": Way(REDUCTIONS[KEPT], cached=True),
    }


def step(proof: Proof) -> None:
    """Loss and projector gradient of a micro-batch, each way, in float32 and bfloat16."""
    data = scenes(proof.settings.folder)
    cpu, device = on_both(proof, data)
    coarse = Subjects(data, proof.settings.device, torch.bfloat16)
    rows = []
    for name, way in WAYS.items():
        with proof.part(name):
            loss, gradient = loss_and_gradient(cpu.alone(way.reductions), way)
            there, found = loss_and_gradient(device.alone(way.reductions), way)
            difference = gap(found, gradient)
            holds = difference <= GRADIENT and abs(there - loss) <= near(loss, LOSS)
            proof.check(f"{name}, float32", holds, f"loss {there:.6f} for {loss:.6f}, gradient {small(difference)}")
            in_bf16, coarse_gradient = loss_and_gradient(coarse.alone(way.reductions), way, torch.bfloat16)
            cosine = float(torch.cosine_similarity(coarse_gradient, gradient, dim=0))
            holds = cosine > 0.95 and abs(in_bf16 - loss) <= near(loss, 3 * BFLOAT16)
            proof.check(f"{name}, bfloat16", holds, f"loss {in_bf16:.4f} for {loss:.4f}, cosine {cosine:.4f}")
            rows.append([name, f"{loss:.4f}", small(abs(there - loss) / loss), small(difference), f"{cosine:.4f}"])
    headings = ["the step", "loss, CPU", "difference", "gradient: difference", "bfloat16's gradient: cosine"]
    proof.table("A micro-batch of demo-llava against the CPU in float32", headings, rows)


def loss_and_gradient(subject: Subject, way: Way, dtype: torch.dtype = torch.float32) -> tuple[float, Tensor]:
    """The mean loss, and the projector's gradient, float64 on the CPU."""
    model = subject.model
    train_only_projector(model, dtype)
    teacher, distill = (Teacher(model, dtype), DistillConfig(0.5, 2.0)) if way.taught else (None, None)
    recompute_layers(model, way.recomputed)
    loss_module = SupervisedLoss(model, plain=way.plain, teacher=teacher, distill=distill).to(model.device)
    batch = subject.batch(taught=way.taught).to(model.device)
    count = count_supervised(batch.inputs["labels"])
    loss = loss_module(with_features(model, batch) if way.cached else batch) / count
    loss.backward()
    return loss.item(), gradient_of(model).double().cpu()


def gradient_of(model: Any) -> Tensor:
    """The projector's, flat."""
    parameters = projector_parameters(model).values()
    return torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])


@torch.no_grad()
def with_features(model: Any, batch: MicroBatch) -> MicroBatch:
    """The micro-batch with what tower and selection make of its pixels, as the cache of features gives it."""
    inputs = dict(batch.inputs)
    found = model.model.get_visual_tokens(inputs.pop("pixel_values"))
    inputs |= {"visual_tokens": found.tokens, "visual_kept": found.kept}
    if keeps_positions(model.config):
        inputs["visual_targets"] = found.targets
    return MicroBatch(inputs, batch.sample_ids, layout=batch.layout)
