"""What is measured on: the device, its software, and what it reaches on its own."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from shortzip.scripts.proofs.section import Proof
from shortzip.train.run.report import matmul_speed, synchronise

PACKAGES = (
    "torch", "transformers", "accelerate", "tokenizers", "safetensors", "huggingface_hub", "numpy", "pillow",
    "bitsandbytes", "peft", "deepspeed", "datasets",
)  # fmt: skip
COPIED = 1 << 28  # values


def describe(proof: Proof) -> None:
    """Name, memory and versions; matrix products and copies as measured. A device that is not there fails."""
    device = torch.device(proof.settings.device)
    rows = [["Python", platform.python_version()], ["host", f"{os.cpu_count()} cores, {platform.machine()}"]]
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        capability = f"{found.major}.{found.minor}"
        rows.insert(0, ["device", f"{found.name}, {found.total_memory / 2**30:.1f} GiB, capability {capability}"])
        rows.append(["CUDA", str(torch.version.cuda)])
        proof.figures(device=found.name, total_memory=found.total_memory)
    else:
        rows.insert(0, ["device", "CPU"])
    rows += [[name, _version(name)] for name in PACKAGES]
    seconds = 0.5 if device.type == "cuda" else 0.05
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        speed = matmul_speed(device, dtype, seconds)
        rows.append([f"matrix product, {name}", f"{speed / 1e12:.1f} TFLOP/s"])
        proof.figures(**{f"matmul_{name}": speed})
    copied = _copy_speed(device, seconds)
    rows.append(["copy on the device, read and written", f"{copied / 1e9:.0f} GB/s"])
    proof.figures(copy_bytes_per_second=copied)
    proof.check("the device computes", True)
    proof.table("The device and what runs on it", ["", ""], rows)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _copy_speed(device: torch.device, seconds: float) -> float:
    count = COPIED if device.type == "cuda" else COPIED >> 5
    source, target = torch.zeros(count, device=device), torch.empty(count, device=device)
    best, started = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - started < seconds:
        synchronise(device)
        begun = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        best = min(best, time.perf_counter() - begun)
    return 8 * count / best
