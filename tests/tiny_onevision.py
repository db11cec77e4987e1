"""The tiny LLaVA-OneVision that `shortzip tiny` writes."""

from shortzip.scripts.tiny.llava_onevision import (
    SIDE,
    onevision_config,
    plain_onevision,
    write_onevision,
    write_original_onevision,
)

__all__ = ["SIDE", "onevision_config", "plain_onevision", "write_onevision", "write_original_onevision"]
