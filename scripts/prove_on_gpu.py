"""Proves on a GPU what no CPU can: every CUDA path against the CPU, and the step at 7B and 13B. Ten minutes.

    python scripts/prove_on_gpu.py                                         # or: make prove-gpu
    python scripts/prove_on_gpu.py --sections step-7b --memory_limit 24GiB
    python scripts/prove_on_gpu.py --device cpu --shapes tiny              # the script itself, on any machine

Runs from a clone that is not installed: of what ShortZip needs, torch, transformers, accelerate, pillow and rich are
enough. Nothing is downloaded: small models are checkpoints/demo-llava, large ones have random weights, made on the
device. Each section runs in a process of its own with a time budget; one that fails is in the report with its
traceback, and the others go on. The report is Markdown and JSON; the exit status is 1 where something failed.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def name_the_clone() -> None:
    """Has `shortzip` mean the folders of this clone, as an install would."""
    if "shortzip" not in sys.modules:
        package = ModuleSpec("shortzip", None, is_package=True)
        package.submodule_search_locations = [str(ROOT)]
        sys.modules["shortzip"] = module_from_spec(package)


def main() -> int:
    # Sections are forked. Asked whether there is a GPU, torch would start CUDA, which does not survive that; this
    # has it ask NVML.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    name_the_clone()
    from shortzip.scripts.proofs.command import prove

    return prove(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
