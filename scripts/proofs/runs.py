"""Whole runs on the device: of every kind, killed and resumed, and with the language model in 4 bits."""

from __future__ import annotations

import functools
import importlib.util
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from shortzip.reduction.positions import takes_encoded_images
from shortzip.scripts.proofs.agreement import BOTH, Way, loss_and_gradient
from shortzip.scripts.proofs.section import Proof, Skipped, apart, start_apart
from shortzip.scripts.proofs.subjects import BFLOAT16, FASTV, LOSS, Subjects, gap, near, scenes, small, whole_float32
from shortzip.train.run.processes import StopRequest, start_accelerator
from shortzip.train.run.report import Reporter
from shortzip.train.run.run_folder import is_finished, read_metrics
from shortzip.train.run.session import Session
from shortzip.train.settings.budget import VisionZipConfig
from shortzip.train.settings.config import DataConfig, DistillConfig, FastVConfig, ShortVConfig, TuneConfig
from shortzip.train.settings.recipes import DEMO_MODEL
from shortzip.train.tune_projector import held_folder, tune

STEPS, ROWS = 3, 8
KILLED_STEPS, KILLED_AFTER = 24, 3
POLL_S, WAIT_S = 0.002, 50.0


def every_kind(proof: Proof) -> None:
    """Three steps of each kind of run, with data workers: the CPU's losses in float32; and in bfloat16."""
    data = scenes(proof.settings.folder, ROWS)
    device, rows = proof.settings.device, []
    kinds = kinds_of(data, proof.settings.folder)
    if not takes_encoded_images():
        del kinds["original positions"]
    if proof.settings.tiny:
        kinds = {name: kinds[name] for name in ("VisionZip and ShortV", "cached features")}
    for name, config in kinds.items():
        with proof.part(name):
            expected = losses(config, proof.settings.folder / "cpu", "cpu")
            found = losses(config, proof.settings.folder / "device", device)
            coarse = losses(replace(config, mixed_precision="bf16"), proof.settings.folder / "bfloat16", device)
            difference = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
            agree = all(abs(a - b) <= near(b, 2 * LOSS) for a, b in zip(found, expected, strict=True))
            proof.check(name, agree, f"losses {found} for {expected}")
            agree = all(abs(a - b) <= near(b, 5 * BFLOAT16) for a, b in zip(coarse, expected, strict=True))
            proof.check(f"{name}, bfloat16", agree, f"losses {coarse} for {expected}")
            rows.append([name, *(f"{run[-1]:.4f}" for run in (expected, found, coarse)), small(difference)])
    headings = ["run", f"loss of step {STEPS}, CPU", "device", "device, bfloat16", "float32: difference"]
    proof.table("Runs of demo-llava", headings, rows)


def kinds_of(data: DataConfig, folder: Path) -> dict[str, TuneConfig]:
    """A run of every kind that computes something of its own."""
    run = base(data)
    assert run.visionzip is not None
    by_dpp = VisionZipConfig(16, 0, "dpp")
    return {
        "VisionZip and ShortV": run,
        "all tokens": replace(run, visionzip=None, shortv=None),
        "layers chosen by LC": replace(run, shortv=ShortVConfig(freeze="60%", calibration_samples=4)),
        "layers computed again": replace(run, gradient_checkpointing=True),
        "cached features": replace(run, data=replace(data, cache_features=str(folder / "features"))),
        "original positions": replace(run, positions="original"),
        "teacher": replace(run, distill=DistillConfig(0.5, 2.0)),
        "FastV": replace(run, shortv=None, fastv=FastVConfig(**FASTV)),
        "dpp": replace(run, visionzip=by_dpp),
    }


def base(data: DataConfig, **keys: Any) -> TuneConfig:
    """Three steps of demo-llava with both reductions, in float32, on all scenes in two micro-batches."""
    settings: dict[str, Any] = {
        "model": str(DEMO_MODEL), "data": replace(data, num_workers=1),
        "visionzip": VisionZipConfig(12, 4), "shortv": ShortVConfig([4, 5, 6]),
        "learning_rate": 1e-2, "max_steps": STEPS, "global_batch_size": ROWS, "per_device_train_batch_size": ROWS // 2,
        "mixed_precision": "no", "final_evaluation": False, "pictures": 0,
    }  # fmt: skip
    return TuneConfig(**{**settings, **keys})


def losses(config: TuneConfig, folder: Path, where: str) -> list[float]:
    """Those of a run's steps."""
    config = replace(config, output_dir=str(folder), overwrite_output_dir=folder.exists())
    apart(functools.partial(_tune, config, where), Path(f"{folder}.log"))
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line and "grad_norm" in line]


def _tune(config: TuneConfig, where: str) -> None:
    """The run without what follows it: a table, and the loss as a picture, for which matplotlib may be missing."""
    if where == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # Accelerate's own way of being told
    whole_float32()
    accelerator = start_accelerator(config)
    session = Session(accelerator, Reporter(accelerator.is_main_process), StopRequest())
    with session.stop, session.report, held_folder(config, session) as folder:
        tune(config, folder, session)


def killed_and_resumed(proof: Proof) -> None:
    """A run that SIGKILL ends, continued, has the projector of one that was left alone."""
    data, folder = scenes(proof.settings.folder, ROWS), proof.settings.folder
    steps = KILLED_STEPS // 2 if proof.settings.tiny else KILLED_STEPS
    config = base(data, max_steps=steps, save_steps=1, save_total_limit=None)
    losses(config, folder / "whole", proof.settings.device)
    killed = replace(config, output_dir=str(folder / "killed"))
    process, connection = start_apart(functools.partial(_tune, killed, proof.settings.device), folder / "killed.log")
    _kill_after(process, Path(killed.output_dir), KILLED_AFTER)
    connection.close()
    proof.check("it was killed before its end", not is_finished(folder / "killed"), "it had finished")
    apart(
        functools.partial(_tune, replace(killed, resume_from_checkpoint="latest"), proof.settings.device),
        folder / "killed.log",
    )
    whole, resumed = (_projector(folder / name, steps) for name in ("whole", "killed"))
    difference, exact = gap(resumed, whole), torch.equal(resumed, whole)
    exactly = "bit for bit" if exact else f"within {small(difference)}"
    proof.check("the projector of the run that was left alone", difference <= 1e-4, f"differs by {small(difference)}")
    proof.figures(resumed_bit_for_bit=exact, resumed_difference=difference)
    proof.table("Killed and resumed, float32", ["steps", "the same projector"], [[str(steps), exactly]])


def _kill_after(process: Any, folder: Path, step: int) -> None:
    """SIGKILL, as soon as the checkpoint of a step is there. Raises RuntimeError if none comes."""
    latest = time.monotonic() + WAIT_S
    while not (folder / f"step-{step:06d}").exists():
        if not process.is_alive() or time.monotonic() > latest:
            raise RuntimeError(f"{folder}: no checkpoint of step {step}; {Path(f'{folder}.log').read_text()[-2000:]}")
        time.sleep(POLL_S)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def _projector(folder: Path, step: int) -> Tensor:
    tensors = load_file(folder / f"step-{step:06d}" / "projector.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def in_4_bits(proof: Proof) -> None:
    """Loss, gradient and answers with the language model's layers in NF4, near those in bfloat16."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Skipped("bitsandbytes is not installed")
    data, rows = scenes(proof.settings.folder), []
    device, found = proof.settings.device, {}
    for name, four in (("bfloat16", False), ("NF4", True)):
        subjects = Subjects(data, device, torch.bfloat16, four_bit=four)
        found[name] = loss_and_gradient(subjects.reduced(BOTH), Way(BOTH), torch.bfloat16)
        rows.append([name, f"{found[name][0]:.4f}"])
    (loss, gradient), (coarse, rough) = found["bfloat16"], found["NF4"]
    cosine = float(torch.cosine_similarity(gradient, rough, dim=0))
    proof.check("loss in 4 bits", abs(coarse - loss) <= 0.2 * loss, f"{coarse:.4f} for {loss:.4f}")
    proof.check("gradient in 4 bits", cosine > 0.7, f"cosine {cosine:.3f} with bfloat16's")
    rows[1].append(f"{cosine:.3f}")
    rows[0].append("1")
    proof.table("demo-llava in 4 bits", ["the LLM's layers", "loss", "gradient: cosine with bfloat16's"], rows)
