"""Mini-Gemini's golden release (MGM's own layout), and variants of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "mini_gemini"
RELEASE = GOLDEN / "mgm-tiny"
EXPECTED = json.loads((GOLDEN / "mgm_tiny.json").read_text(encoding="utf-8"))
PHOTOGRAPH = GOLDEN.parent / "llava_release" / "images" / "waterview.jpg"
VOCABULARY = 1000


def expected() -> dict[str, torch.Tensor]:
    """What MGM's own code computed."""
    return load_file(GOLDEN / "mgm_tiny_io.safetensors")


def photograph() -> Image.Image:
    return Image.open(PHOTOGRAPH).convert("RGB")


def copy_of_release(folder: Path, **changes: Any) -> Path:
    """A writable copy with its tower folders beside it, with other keys in its config.json."""
    shutil.copytree(GOLDEN / "openai", folder / "openai")
    shutil.copytree(RELEASE, folder / RELEASE.name)
    path = folder / RELEASE.name / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder / RELEASE.name


def high_definition(folder: Path) -> Path:
    """The release as an HD one: four tiles and the whole image, 512 pixels for the ConvNeXt."""
    return copy_of_release(folder, image_grid=2, image_global=True, image_size_aux=512)
