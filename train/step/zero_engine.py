"""DeepSpeed as an engine: it sums, clips and applies gradients itself, and holds the weights that are saved."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from shortzip.data.dataset import MicroBatch
from shortzip.train.run.checkpoint import CheckpointError
from shortzip.train.run.report import synchronise
from shortzip.train.step.engine import WholeEngine
from shortzip.train.step.objective import SupervisedLoss

MOMENTS = ("exp_avg", "exp_avg_sq")


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

    def backward(self, batch: MicroBatch, scale: float, *, last: bool) -> Tensor:
        self.module.set_gradient_accumulation_boundary(last)
        loss = self.module(batch)
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
        moments: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items() if steps else ():
            for kind in MOMENTS:
                moments[f"{kind}.{name}"] = safe_get_full_optimizer_state(parameter, kind).detach().cpu()
            moments[f"step.{name}"] = steps[0].detach().cpu().clone()
        return moments

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
