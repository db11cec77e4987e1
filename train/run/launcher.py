"""What the launcher asked for (accelerate launch, torchrun), and whether the settings go with it."""

from __future__ import annotations

import importlib.util
import os

import torch
from accelerate.utils import parse_flag_from_env

from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.config import TuneConfig


def deepspeed_wanted() -> bool:
    """Whether the launcher asks for DeepSpeed."""
    return parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and not parse_flag_from_env("ACCELERATE_USE_CPU")


def fsdp2_wanted() -> bool:
    """Whether the launcher asks for FSDP2. (On a CPU Accelerate itself does not listen.)"""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def is_sharded() -> bool:
    """Whether this is one of the processes of FSDP2."""
    return fsdp2_wanted() and torch.distributed.is_initialized()


def check_engine(config: TuneConfig) -> None:
    """Raises `ConfigError`, with the cure, for settings that the engine which the launcher asks for cannot do."""
    engine = "DeepSpeed" if deepspeed_wanted() else "FSDP2" if fsdp2_wanted() else None
    if engine is None:
        return
    if engine == "DeepSpeed" and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("DeepSpeed is not installed: pip install 'shortzip[deepspeed]'")
    if engine == "FSDP2" and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            "FSDP 1 cannot mix weights that are trained and weights that are not: set fsdp_version to 2 in the "
            "launch file's fsdp_config, as configs/accelerate/fsdp2.yaml does"
        )
    if config.load_in_4bit:
        raise ConfigError(
            f"load_in_4bit does not go with {engine}, which cannot spread quantised weights: launch with "
            "configs/accelerate/ddp.yaml (in 4 bits the model fits each card), or set load_in_4bit to false"
        )
    if engine == "DeepSpeed" and config.tuning != "full":
        raise ConfigError(
            f"tuning {config.tuning} does not go with DeepSpeed, which would spread the projector that the adapter is "
            "merged into: launch with configs/accelerate/ddp.yaml or fsdp2.yaml, or set tuning to full"
        )
