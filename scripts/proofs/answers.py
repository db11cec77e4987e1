"""What the models answer on the device: generation, evaluation, and the layers that LC would freeze."""

from __future__ import annotations

import functools
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from shortzip.reduction.calibration_prompts import CalibrationSample
from shortzip.reduction.layer_choice import rank_layers
from shortzip.reduction.layer_contribution import measure_layer_contributions
from shortzip.reduction.reductions import Reductions
from shortzip.scripts.proofs.agreement import REDUCTIONS
from shortzip.scripts.proofs.section import Proof, Settings, Skipped, apart
from shortzip.scripts.proofs.subjects import BUDGET, Subject, Subjects, on_both, scenes, small, whole_float32
from shortzip.train.evaluation.answers import Answer, Evaluation, evaluate

NEW_TOKENS = 8
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
}
GENERATED = [name for name in REDUCTIONS if name not in ("VisionZip", "ShortV", "FastV")]
SCENES = 32  # that are answered


def generation(proof: Proof) -> None:
    """Prompts padded on the left, each search: the CPU's tokens, in float32; and samples in bfloat16."""
    data = scenes(proof.settings.folder)
    cpu, device = on_both(proof, data)
    coarse = Subjects(data, proof.settings.device, torch.bfloat16)
    rows = []
    for name in GENERATED:
        row = [name]
        for search, options in SEARCHES.items():
            with proof.part(f"{name}, {search}"):
                expected = _generated(cpu.reduced(REDUCTIONS[name]), **options)
                found = _generated(device.reduced(REDUCTIONS[name]), **options)
                same = int((found == expected).all(dim=1).sum()) if found.shape == expected.shape else 0
                words = f"{same} of {len(expected)}"
                proof.check(
                    f"{name}, {search}", same == len(expected), f"{same} of {len(expected)} rows as on the CPU"
                )
                row.append(words)
        with proof.part(f"{name}, sampled"):
            torch.manual_seed(0)
            drawn = _generated(coarse.reduced(REDUCTIONS[name]), do_sample=True)
            fits = bool((drawn >= 0).all() and (drawn < coarse.whole.config.text_config.vocab_size).all())
            proof.check(f"{name}, sampled in bfloat16", fits, f"ids {drawn.tolist()}")
        rows.append(row + [""] * (len(SEARCHES) + 1 - len(row)))
    proof.table("Rows with the CPU's tokens, float32", ["demo-llava", *SEARCHES], rows)


@torch.no_grad()
def _generated(subject: Subject, **options: Any) -> Tensor:
    """[B, NEW_TOKENS] ids on the CPU."""
    prompts = subject.prompts()
    how = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    return subject.model.generate(**prompts, **how)[:, prompts["input_ids"].shape[1] :].cpu()


def compiled(proof: Proof) -> None:
    """transformers compiles decoding by itself where the cache is static and the device is CUDA."""
    if proof.settings.device != "cuda":
        raise Skipped("transformers compiles decoding on CUDA only")
    cpu, device = on_both(proof, scenes(proof.settings.folder))
    for name in ("all tokens", "VisionZip and ShortV"):
        with proof.part(name):
            expected = _generated(cpu.reduced(REDUCTIONS[name]))
            found = _generated(device.reduced(REDUCTIONS[name]), cache_implementation="static")
            same = int((found == expected).all(dim=1).sum())
            proof.check(name, same == len(expected), f"{same} of {len(expected)} rows as on the CPU")


def evaluation(proof: Proof) -> None:
    """Loss and answers of held-out scenes, as `shortzip evaluate` finds them."""
    scenes(proof.settings.folder, _count(proof.settings))
    rows = []
    answered = {
        where: apart(functools.partial(_evaluated, proof.settings, where)) for where in ("cpu", proof.settings.device)
    }
    for name, (expected, answers) in answered["cpu"].items():
        found, said = answered[proof.settings.device][name]
        same = sum(ours.answer == theirs.answer for ours, theirs in zip(said, answers, strict=True))
        difference = abs(found.loss - expected.loss) / expected.loss
        # An answer may turn on a tie: one in a hundred may.
        holds = difference <= 1e-3 and same >= 0.99 * len(answers)
        proof.check(
            name, holds, f"{same} of {len(answers)} answers as on the CPU, loss differs by {small(difference)}"
        )
        rows.append(
            [name, f"{expected.exact_match:.1%}", f"{found.exact_match:.1%}", f"{same} of {len(answers)}",
             small(difference), f"{expected.prefill_ms:.1f} ms", f"{found.prefill_ms:.1f} ms"]
        )  # fmt: skip
    headings = ["demo-llava", "exact match, CPU", "device", "same answers", "loss", "prefill, CPU", "device"]
    proof.table("Held-out scenes, float32", headings, rows)


def _count(settings: Settings) -> int:
    return 4 if settings.tiny else SCENES


def _evaluated(settings: Settings, where: str) -> dict[str, tuple[Evaluation, list[Answer]]]:
    whole_float32()
    subjects = Subjects(scenes(settings.folder, _count(settings)), where)
    accelerator, found = Accelerator(cpu=where == "cpu"), {}
    for name in ("all tokens", "VisionZip and ShortV", "VisionZip and FastV"):
        subject = subjects.reduced(REDUCTIONS[name])
        found[name] = evaluate(
            name, subject.model, subject.dataset, accelerator, batch_size=8, max_new_tokens=4 * NEW_TOKENS
        )
    return found


def calibration(proof: Proof) -> None:
    """LC of every layer, and so which are frozen first."""
    data = scenes(proof.settings.folder)
    cpu, device = on_both(proof, data)
    coarse = Subjects(data, proof.settings.device, torch.bfloat16)
    budget = Reductions(BUDGET)
    values = [_contributions(subjects.reduced(budget)) for subjects in (cpu, device, coarse)]
    expected, found, in_bf16 = values
    # The last layers' are zero up to rounding: what counts is the difference against the largest.
    difference = max(abs(a - b) for a, b in zip(found, expected, strict=True)) / max(expected)
    proof.check("layer contribution", difference <= 1e-3, f"differs by {small(difference)} of the largest")
    orders = [rank_layers(each) for each in values]
    proof.check("the order of the layers", orders[0] == orders[1], f"{orders[1]} for {orders[0]}")
    rows = [
        [str(layer), *(f"{each:.3e}" for each in (expected[layer], found[layer], in_bf16[layer]))]
        for layer in orders[0]
    ]
    proof.table("Layer contribution, most ineffective first", ["layer", "CPU", "device", "device, bfloat16"], rows)
    proof.figures(lc_order_cpu=orders[0], lc_order_device=orders[1], lc_order_bfloat16=orders[2])


def _contributions(subject: Subject) -> list[float]:
    samples = []
    for conversation in subject.dataset.conversations:
        sample = subject.dataset.load(conversation)
        start, _ = sample.encoded.answers[0]
        prompt = torch.tensor(sample.encoded.input_ids[:start])
        pixels = torch.stack(sample.pixels).to(subject.model.dtype)
        samples.append(CalibrationSample(prompt, pixels))
    return measure_layer_contributions(subject.model, samples).mean()
