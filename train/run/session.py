"""What goes through a whole run: the processes, what they show, and the request to stop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from shortzip.train.run.processes import StopRequest, StopRequested
from shortzip.train.run.report import Reporter


@dataclass(frozen=True)
class Session:
    """The processes of a command, their screen and what may ask them to end; one for all runs of the command."""

    accelerator: Accelerator
    report: Reporter
    stop: StopRequest

    def total(self, *values: float | Tensor) -> list[float]:
        """Each value summed over the processes, in float64. All of them call it, and get the same."""
        if self.accelerator.num_processes == 1:
            return [float(value) for value in values]
        device = self.accelerator.device
        parts = [torch.as_tensor(value, dtype=torch.float64).to(device, non_blocking=True) for value in values]
        return self.accelerator.reduce(torch.stack(parts)).tolist()

    def asked_to_stop(self) -> bool:
        """Whether one of the processes was asked to stop. All of them call it, and get the same."""
        return self.total(self.stop.signal is not None) != [0]

    def stopped(self) -> StopRequested:
        """What to raise where a run ends because one of its processes was asked to stop."""
        return StopRequested(self.stop.signal or "a signal to another process")
