"""The engine that the launcher asked for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from shortzip.train.run.launcher import is_sharded
from shortzip.train.step.engine import ShardedEngine, WholeEngine
from shortzip.train.step.objective import SupervisedLoss
from shortzip.train.step.zero_engine import ZeroEngine


def start_engine(
    accelerator: Accelerator,
    module: SupervisedLoss,
    adamw: torch.optim.AdamW,
    parameters: Mapping[str, nn.Parameter],
    max_grad_norm: float,
) -> WholeEngine:
    """The engine that the launcher asked for. Arguments: as of `WholeEngine`."""
    engine: type[WholeEngine] = WholeEngine
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine = ZeroEngine
    elif is_sharded():
        engine = ShardedEngine
    return engine(accelerator, module, adamw, parameters, max_grad_norm)
