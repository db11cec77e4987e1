"""Where a command that answers computes, and in what."""

from __future__ import annotations

import torch

from shortzip.train.settings.checks import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def place(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """What `device` (auto, cpu, cuda) and `dtype` (auto, or of `DTYPES`) mean on this machine.

    auto: a GPU where there is one, and bfloat16 there, float32 on a CPU. Raises `ConfigError` for a GPU that is not
    there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', and there is no GPU here: give --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    automatic = torch.bfloat16 if device == "cuda" else torch.float32
    return torch.device(device), automatic if dtype == "auto" else DTYPES[dtype]
