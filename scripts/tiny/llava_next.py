"""A tiny LLaVA-NeXT."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
)

from shortzip.scripts.tiny import llava, original
from shortzip.scripts.tiny.llava import IMAGE_SIZE, PATCH_SIZE
from shortzip.scripts.tiny.words import build_tokenizer


def write_release(folder: Path, seed: int = 0, *, grids: tuple[tuple[int, int], ...] = ((1, 2), (2, 1))) -> Path:
    """Writes a LLaVA-NeXT of the same parts: two tiles, beside or above each other, and the base one.

    `grids`: in place of these two, rows and columns of tiles.
    """
    llava.write_release(folder, seed)
    plain, processor = LlavaConfig.from_pretrained(folder), LlavaProcessor.from_pretrained(folder)
    tiles = [[IMAGE_SIZE * rows, IMAGE_SIZE * columns] for rows, columns in grids]
    config = LlavaNextConfig(
        vision_config=plain.vision_config, text_config=plain.text_config, image_grid_pinpoints=tiles,
        image_token_index=plain.image_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = LlavaNextImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size, image_grid_pinpoints=tiles)
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    LlavaNextProcessor(
        images, processor.tokenizer, patch_size=PATCH_SIZE, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_original(folder: Path, seed: int = 0) -> Path:
    """The same release in LLaVA's own layout, whose tower is a release of its own."""
    return original.write(folder, seed, write_release, LlavaNextConfig, build_tokenizer(), inside=False)
