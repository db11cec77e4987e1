"""Both releases of Video-LLaVA, tiny, and what their tests ask of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file
from tiny_video import FRAMES, write_original_video_llava, write_video_llava_hf
from torch import Tensor

from shortzip.reduction.reductions import Reductions
from shortzip.train.release.opening import open_release

REDUCTIONS = Reductions({"dominant": 4, "contextual": 2}, {"layers": [1, 3]})
PICTURE = Image.new("RGB", (58, 50), (200, 40, 90))
VIDEO = np.random.default_rng(0).integers(0, 256, (FRAMES, 30, 44, 3), dtype=np.uint8)
PROMPT = "USER: <image>\nname the colour of <video>\nnow ASSISTANT:"


def write_both(folder: Path) -> tuple[Path, dict[str, Path]]:
    """The original release in its authors' layout, and both in transformers'."""
    original = write_original_video_llava(folder / "original")
    converted = open_release(str(original), cache_dir=folder / "converted").folder
    return original, {"hf": write_video_llava_hf(folder / "tiny-hf"), "temporal": converted}


def inputs_of(processor: Any) -> dict[str, Tensor]:
    """What a processor makes of an image and a video in one prompt."""
    return dict(processor(images=PICTURE, videos=[VIDEO], text=PROMPT, return_tensors="pt"))


def folder_tensors(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
