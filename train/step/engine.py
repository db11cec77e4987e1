"""What differs between the ways of spreading a run over processes: who holds which weights, who sums the gradients.

- `WholeEngine`: one process, or DDP: the whole model in each, the projector's gradients summed between them.
- `ShardedEngine`: FSDP2: each process keeps a part of every LLM layer, and all of them of the tower and the projector.
- `ZeroEngine`: DeepSpeed: ZeRO-2 spreads the projector's moments, ZeRO-3 all weights as well.

The loop sees the same of each: gradients that are added up and averaged over the processes, an update that all of them
make or skip, and the projector with its moments whole and in fp32, which is what checkpoints hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from shortzip.data.dataset import MicroBatch
from shortzip.reduction.families import family_of
from shortzip.train.run.checkpoint import optimizer_tensors, restore_optimizer
from shortzip.train.run.launcher import is_sharded
from shortzip.train.step.objective import SupervisedLoss

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def weights_share(accelerator: Accelerator) -> float | None:
    """What a device holds of the LLM's weights under an engine that spreads them: 1 / processes, or 0 where they wait
    in the host's memory; None where it holds the whole model."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        plugin = accelerator.state.deepspeed_plugin
        zero = plugin.deepspeed_config["zero_optimization"]
        if int(zero["stage"]) < 3:
            return None
        offloaded = (zero.get("offload_param") or {}).get("device") in ("cpu", "nvme")
        return 0.0 if offloaded else 1 / accelerator.num_processes
    return 1 / accelerator.num_processes if is_sharded() else None


def spread(module: SupervisedLoss, mesh: DeviceMesh) -> None:
    """Spreads LLM layers, embeddings and head over a mesh of processes by FSDP2; tower and projector stay whole."""
    from torch.distributed.fsdp import fully_shard

    module.plain, inner = True, module.model.model
    whole = _whole_parts(inner)
    for layer in inner.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh, ignored_params={weight for part in whole for weight in part.parameters()})


def _whole_parts(inner: Any) -> list[nn.Module]:
    """Towers and projector of a model without its head."""
    towers = family_of(inner.config.model_type).towers
    return [*(getattr(inner, name) for name in towers), inner.multi_modal_projector]


class WholeEngine:
    """Every process holds the whole model.

    Args:
        accelerator: the processes.
        module: the loss; on any device.
        adamw: over `parameters`, without moments yet. The engine may replace what it holds, never the groups
            themselves: a schedule that sets their learning rates goes on doing so.
        parameters: what is trained, by name; fp32, with the values to begin with.
        max_grad_norm: the gradient's norm is clipped to it; 0 for no clipping.
    """

    can_repeat = True
    """Whether a step can be begun again in the middle of it."""

    def __init__(
        self,
        accelerator: Accelerator,
        module: SupervisedLoss,
        adamw: torch.optim.AdamW,
        parameters: Mapping[str, nn.Parameter],
        max_grad_norm: float,
    ) -> None:
        self.accelerator, self.adamw, self.parameters = accelerator, adamw, dict(parameters)
        self.trained, self.max_grad_norm = list(parameters.values()), max_grad_norm
        self.prepare(module)

    def prepare(self, module: SupervisedLoss) -> None:
        self.module, self.optimizer = self.accelerator.prepare(module, self.adamw)

    @property
    def unwrapped(self) -> nn.Module:
        """The loss without what the engine does to gradients: for forward passes alone."""
        return self.accelerator.unwrap_model(self.module)

    def backward(self, batch: MicroBatch, scale: float, *, last: bool) -> Tensor:
        """Adds a micro-batch's gradient, times `scale`; returns its loss, a float32 scalar.

        `last`: it is this process's last one of the global batch. Every process has the same number of them.
        """
        with nullcontext() if last else self.accelerator.no_sync(self.module):
            loss = self.module(batch)
            self.accelerator.backward(loss * scale)
        return loss.detach()

    def update(self, *, finite: bool) -> float:
        """Clips the gradient, averaged over the processes, and makes the update; then forgets it.

        The update is skipped if the loss was not `finite` on all processes, or the gradient is not. Returns the
        gradient's norm before clipping, not finite if it was not (DeepSpeed: if the update was skipped at all).
        """
        norm = float(self.accelerator.clip_grad_norm_(self.trained, self.max_grad_norm or math.inf))
        if finite and math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def discard(self) -> None:
        """Forgets the gradient."""
        self.optimizer.zero_grad()

    def projector(self) -> dict[str, Tensor]:
        """What is trained, whole and in fp32. All processes call it."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def moments(self) -> dict[str, Tensor]:
        """AdamW's `exp_avg.NAME`, `exp_avg_sq.NAME` and `step.NAME`; empty before the first update. As `projector`."""
        return optimizer_tensors(self.adamw, {parameter: name for name, parameter in self.parameters.items()})

    def restore_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `moments` gave, under any engine. Raises `CheckpointError` if names or shapes do not fit."""
        restore_optimizer(self.adamw, self.parameters, tensors)


class ShardedEngine(WholeEngine):
    """FSDP2: LLM layers, embeddings and head are spread; tower and projector, which are small, are whole.

    Sharded weights are untrained and have no gradient: only the whole projector's is summed, by hand.
    """

    can_repeat = False

    def prepare(self, module: SupervisedLoss) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        device, inner = self.accelerator.device, module.model.model
        for part in _whole_parts(inner):
            part.to(device)
        spread(module, init_device_mesh(device.type, (self.accelerator.num_processes,)))
        self.module: Any = module
        self.optimizer: Any = self.adamw

    @property
    def unwrapped(self) -> nn.Module:
        return self.module

    def backward(self, batch: MicroBatch, scale: float, *, last: bool) -> Tensor:
        loss = self.module(batch)
        (loss * scale).backward()
        return loss.detach()

    def update(self, *, finite: bool) -> float:
        for parameter in self.trained:
            assert parameter.grad is not None, "a micro-batch gives every trained weight a gradient, if of zeros"
            torch.distributed.all_reduce(parameter.grad.div_(self.accelerator.num_processes))
        return super().update(finite=finite)
