"""The tiny Video-LLaVA and Video-LLaVA-hf that `shortzip tiny` writes; the first with a sentencepiece tokenizer."""

from pathlib import Path
from typing import Any

from shortzip.scripts.tiny.temporal_video_llava import (
    FRAMES,
    IMAGE_TOWER,
    original_tensors,
    temporal_video_llava,
    write_original,
    write_shards,
)
from shortzip.scripts.tiny.video_llava import PATCHES, SIDE, config_keys, plain_video_llava
from shortzip.scripts.tiny.video_llava import write_release as write_video_llava_hf

GOLDEN = Path(__file__).parent / "golden"
ROWS = 1000  # of the tokenizer


def write_original_video_llava(folder: Path, **changes: Any) -> Path:
    """`folder/Video-LLaVA-tiny`, with the tokenizer of the LLaVA release that ships with the tests."""
    tokenizer = GOLDEN / "llava_release" / "llava-v1.5-tiny"
    return write_original(folder / "Video-LLaVA-tiny", tokenizer=tokenizer, rows=ROWS, **changes)


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
