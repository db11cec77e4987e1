"""The tiny LLaVA-OneVision that `shortzip tiny` writes."""

from shortzip.scripts.tiny.llava_onevision import SIDE, onevision_config, plain_onevision
from shortzip.scripts.tiny.llava_onevision import write_original as write_original_onevision
from shortzip.scripts.tiny.llava_onevision import write_release as write_onevision

__all__ = ["SIDE", "onevision_config", "plain_onevision", "write_onevision", "write_original_onevision"]
