"""What differs between the ways of spreading a run over processes: who holds which weights, who sums the gradients.

- `WholeEngine`: one process, or DDP: the whole model in each, the projector's gradients summed between them.
- `ShardedEngine`: FSDP2: each process keeps a part of every LLM layer, and all of them of the tower and the projector.
- `ZeroEngine`: DeepSpeed: ZeRO-2 spreads the projector's moments, ZeRO-3 all weights as well.

The loop sees the same of each: gradients that are added up and averaged over the processes, an update that all of them
make or skip, and the projector with its moments whole and in fp32, which is what checkpoints hold.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import Tensor, nn

from shortzip.train.run.checkpoint import CheckpointError, optimizer_tensors, restore_optimizer
from shortzip.train.settings.config import ConfigError, TuneConfig
from shortzip.train.step.objective import SupervisedLoss
from shortzip.train.step.flops import synchronise

MOMENTS = ("exp_avg", "exp_avg_sq")


def deepspeed_wanted() -> bool:
    """Whether the launcher asks for DeepSpeed."""
    return parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and not parse_flag_from_env("ACCELERATE_USE_CPU")


def fsdp2_wanted() -> bool:
    """Whether the launcher asks for FSDP2. (On a CPU Accelerate itself does not listen.)"""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


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
    return 1 / accelerator.num_processes if _shards() else None


def _shards() -> bool:
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

    def backward(self, inputs: Mapping[str, Tensor], scale: float, *, last: bool) -> Tensor:
        """Adds a micro-batch's gradient, times `scale`; returns its loss, a float32 scalar.

        `last`: it is this process's last one of the global batch. Every process has the same number of them.
        """
        with nullcontext() if last else self.accelerator.no_sync(self.module):
            loss = self.module(inputs)
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
        from torch.distributed.fsdp import fully_shard

        module.plain = True
        device, inner = self.accelerator.device, module.model.model
        mesh = init_device_mesh(device.type, (self.accelerator.num_processes,))
        whole = (inner.vision_tower, inner.multi_modal_projector)
        for part in whole:
            part.to(device)
        for layer in inner.language_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh, ignored_params={weight for part in whole for weight in part.parameters()})
        self.module: Any = module
        self.optimizer: Any = self.adamw

    @property
    def unwrapped(self) -> nn.Module:
        return self.module

    def backward(self, inputs: Mapping[str, Tensor], scale: float, *, last: bool) -> Tensor:
        loss = self.module(inputs)
        (loss * scale).backward()
        return loss.detach()

    def update(self, *, finite: bool) -> float:
        for parameter in self.trained:
            assert parameter.grad is not None, "a micro-batch gives every trained weight a gradient, if of zeros"
            torch.distributed.all_reduce(parameter.grad.div_(self.accelerator.num_processes))
        return super().update(finite=finite)


class ZeroEngine(WholeEngine):
    """DeepSpeed's ZeRO-1, -2 or -3, which sums, clips and applies gradients itself.

    In bf16 it casts the projector too, and keeps fp32 masters: these are what is saved and restored.
    """

    can_repeat = False

    def prepare(self, module: SupervisedLoss) -> None:
        import deepspeed

        plugin = self.accelerator.state.deepspeed_plugin
        settings = plugin.deepspeed_config
        # Micro-batches differ in number from step to step: the loop says which one is the last, and scales the loss.
        settings.update(
            train_micro_batch_size_per_gpu=1,
            train_batch_size=self.accelerator.num_processes,
            gradient_accumulation_steps=1,
            gradient_clipping=float(self.max_grad_norm),
            zero_force_ds_cpu_optimizer=False,
        )
        self.stage = int(settings["zero_optimization"]["stage"])
        masters = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        if settings["bf16"]["enabled"]:
            for parameter in module.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        if self.stage == 3:
            module.plain = True
            # Before DeepSpeed's engine, which would put the whole model on each device first.
            deepspeed.zero.Init(module=module, config_dict_or_path=settings)
            for buffer in module.buffers():
                buffer.data = buffer.data.to(self.accelerator.device)
        self.module, self.optimizer = self.accelerator.prepare(module, self.adamw)
        for name, parameter in self.parameters.items():
            self._set(parameter, masters[name], None)

    def backward(self, inputs: Mapping[str, Tensor], scale: float, *, last: bool) -> Tensor:
        self.module.set_gradient_accumulation_boundary(last)
        loss = self.module(inputs)
        self.module.backward(loss * scale, scale_wrt_gas=False)
        return loss.detach()

    def update(self, *, finite: bool) -> float:
        if not finite:
            self._spoil_gradient()
        self.module.step()  # skips what is not finite, on all processes, and clears its buffers either way
        return float(self.module.get_global_grad_norm()) if self.module.was_step_applied() else math.inf

    def discard(self) -> None:
        self._spoil_gradient()
        self.module.step()

    def projector(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p).detach().cpu() for name, p in self.parameters.items()}

    def moments(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = [state["step"] for state in self.adamw.state.values()]
        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items() if steps else ():
            for kind in MOMENTS:
                found[f"{kind}.{name}"] = safe_get_full_optimizer_state(parameter, kind).detach().cpu()
            found[f"step.{name}"] = steps[0].detach().cpu().clone()
        return found

    def restore_moments(self, tensors: Mapping[str, Tensor]) -> None:
        if not tensors:
            return
        expected = {f"{kind}.{name}" for name in self.parameters for kind in (*MOMENTS, "step")}
        if set(tensors) != expected:
            differing = ", ".join(sorted(expected ^ set(tensors))[:3])
            raise CheckpointError(f"optimizer.safetensors does not fit this projector: {differing} …")
        step = tensors[f"step.{next(iter(self.parameters))}"]
        zero = self.module.optimizer
        flat = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        for part in flat:  # torch would make them at the first update
            moments = {kind: torch.zeros_like(part) for kind in MOMENTS}
            self.adamw.state[part] = {"step": step.clone(), **moments}
        if self.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.parameters.items():
            for kind in MOMENTS:
                self._set(parameter, tensors[f"{kind}.{name}"], kind)

    def _set(self, parameter: nn.Parameter, value: Tensor, kind: str | None) -> None:
        """Sets a parameter's fp32 master, or a moment of it, from the whole `value`."""
        from deepspeed import utils

        if self.stage < 3:
            device = self.accelerator.device
            if kind is None:
                utils.safe_set_full_fp32_param(parameter, value.to(device))
            else:
                utils.safe_set_full_optimizer_state(parameter, value.to(device), kind)
            return
        # Not safe_set_full_…: it reads beyond the end of a value that does not divide by the number of processes.
        mine = utils.safe_get_local_fp32_param(parameter)
        size, processes = mine.numel(), self.accelerator.num_processes
        padded = nn.functional.pad(value.flatten(), (0, size * processes - value.numel()))
        part = padded[size * self.accelerator.process_index :][:size].to(mine)
        if kind is None:
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, kind)

    def _spoil_gradient(self) -> None:
        """Makes the gradient NaN, so that DeepSpeed skips the update and clears whatever it keeps of it."""
        from deepspeed import utils

        for parameter in self.trained:
            if self.stage == 3:
                utils.safe_set_local_grad(parameter, torch.full_like(utils.safe_get_local_grad(parameter), math.nan))
            else:
                utils.safe_set_full_grad(parameter, torch.full(parameter.shape, math.nan, device=parameter.device))
        synchronise(self.accelerator.device)  # DeepSpeed looks for what is not finite on a stream of its own


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
    elif _shards():
        engine = ShardedEngine
    return engine(accelerator, module, adamw, parameters, max_grad_norm)
