"""A whole run on a stand-in device, in a process of its own; prints what it had to wait for as JSON.

python tests/train/device_probe.py --config RECIPE --output_dir FOLDER …
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate import PartialState
from stand_in_device import DEVICE, Watch

from shortzip.train import tune_projector
from shortzip.train.settings.command_line import load_config


def main(argv: list[str]) -> None:
    config, real = load_config(argv), tune_projector.start_accelerator

    def start(settings: object) -> object:
        accelerator = real(settings)  # type: ignore[arg-type]
        PartialState().device = accelerator.state.device = DEVICE  # each copies the other now and then
        return accelerator

    torch.__future__.set_swap_module_params_on_conversion(True)  # so that a moved parameter stays the same object
    with mock.patch.object(tune_projector, "start_accelerator", start), Watch() as watch:
        tune_projector.run(config)
    found = {"waits": watch.waits, "wide": watch.wide, "products": watch.products}
    Path(config.output_dir, "device.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
