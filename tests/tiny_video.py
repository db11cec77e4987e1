"""The tiny Video-LLaVA and Video-LLaVA-hf of `shortzip.scripts.tiny`; the original with a sentencepiece tokenizer."""

from pathlib import Path
from typing import Any

from shortzip.scripts.tiny.video_llava import (
    FRAMES,
    IMAGE_TOWER,
    PATCHES,
    SIDE,
    config_keys,
    original_tensors,
    plain_video_llava,
    temporal_video_llava,
    write_shards,
    write_video_llava_hf,
)
from shortzip.scripts.tiny.video_llava import write_original_video_llava as write_original

GOLDEN = Path(__file__).parent / "golden"
ROWS = 1000  # of the tokenizer


def write_original_video_llava(folder: Path, **changes: Any) -> Path:
    """In its authors' layout, with the tokenizer of the LLaVA release that ships with the tests."""
    return write_original(folder, tokenizer=GOLDEN / "llava_release" / "llava-v1.5-tiny", rows=ROWS, **changes)


__all__ = [
    "FRAMES",
    "GOLDEN",
    "IMAGE_TOWER",
    "PATCHES",
    "ROWS",
    "SIDE",
    "config_keys",
    "original_tensors",
    "plain_video_llava",
    "temporal_video_llava",
    "write_original_video_llava",
    "write_shards",
    "write_video_llava_hf",
]
