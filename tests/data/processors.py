"""The goldens' tokenizer in a LLaVA processor, for tests."""

from pathlib import Path

from transformers import AutoTokenizer, LlavaNextProcessor, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

GOLDEN = Path(__file__).parents[1] / "golden"


def llava_processor(**tokenizer_settings: object) -> LlavaProcessor:
    """LLaVA-1.5's processor at 112 pixels and 64 patches, with the goldens' tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "llava_release" / "llava-v1.5-tiny", **tokenizer_settings)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    sizes = {"size": {"shortest_edge": 112}, "crop_size": {"height": 112, "width": 112}}
    return LlavaProcessor(
        LlavaImageProcessorPil(do_pad=True, **sizes),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def llava_next_processor() -> LlavaNextProcessor:
    """LLaVA-NeXT's processor with tiles of 28 pixels and 4 patches."""
    tokenizer = llava_processor().tokenizer
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
    )
    return LlavaNextProcessor(
        image_processor,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
