"""A LLaVA release of a few kilobytes and instructions for it, made on the spot: random weights, the real classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers import decoders as tokenizer_decoders
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE_SIZE, PATCH_SIZE = 24, 4
PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
LLM_LAYERS = 4
COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230), "white": (250, 250, 250)}
QUESTIONS = ("what colour is the picture?", "name the colour", "is it bright?")


def write_release(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a plain transformers LLaVA: CLIP with CLS (36 patches), projector, Llama (4 layers, width 32)."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=24, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, projection_dim=24,
            image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, initializer_range=0.3, initializer_factor=1.0,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=LLM_LAYERS,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projector_hidden_act="gelu", vision_feature_layer=-2, vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # the default initialisation lets an image move the logits by next to nothing
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.normal_(0, 0.3)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(dtype).save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    LlavaProcessor(
        image_processor, tokenizer, patch_size=PATCH_SIZE, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_next_release(folder: Path, grids: tuple[tuple[int, int], ...] = ((1, 2), (2, 1))) -> Path:
    """Writes a LLaVA-NeXT of the same parts: two tiles, beside or above each other, and the base one.

    `grids`: in place of these two, rows and columns of tiles.
    """
    write_release(folder)
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


def write_clip(folder: Path, vision_config: CLIPVisionConfig) -> Path:
    """Writes a CLIP with a vision tower of this config, a text tower of 8 positions and letters for tokens."""
    vision = {**vision_config.to_dict(), "projection_dim": 12}
    text = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "vocab_size": 60, "max_position_embeddings": 8, "initializer_range": 1.0, "projection_dim": 12,
    }  # fmt: skip
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    letters = [chr(number) for number in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    return folder


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer trained on the prompt and the instructions below, with LLaVA's special tokens."""
    text = [
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: ASSISTANT:",
        *QUESTIONS,
        *(f"it is {color}" for color in COLORS),
        "yes no hello what is your name? a text without a picture",
    ]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    tokenizer.decoder = tokenizer_decoders.Sequence(
        [
            tokenizer_decoders.Replace("▁", " "),
            tokenizer_decoders.ByteFallback(),
            tokenizer_decoders.Fuse(),
            tokenizer_decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>", "<image>", "<pad>"], show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="left", model_max_length=2048,
    )  # fmt: skip


def write_instructions(folder: Path, count: int, seed: int = 0, text_only_every: int = 5) -> Path:
    """Writes `count` conversations in LLaVA's JSON with their images: one to three turns, some with two images, every
    `text_only_every`-th without one. Returns the JSON's path; the image root is its folder."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        if text_only_every and index % text_only_every == text_only_every - 1:
            turns = [("hello, what is your name?", "a text without a picture")] * int(rng.integers(1, 3))
            rows.append({"id": f"text-{index}", "conversations": _turns(turns)})
            continue
        names = []
        for position in range(2 if index % 7 == 3 else 1):
            color = list(COLORS)[int(rng.integers(len(COLORS)))]
            noise = rng.normal(0, 25, (20, 28, 3))
            name = f"images/{seed}-{index}-{position}.png"
            Image.fromarray(np.clip(np.array(COLORS[color]) + noise, 0, 255).astype(np.uint8)).save(folder / name)
            names.append(name)
        turns = [(question, f"it is {color}") for question in QUESTIONS[: int(rng.integers(1, 4))]]
        turns[0] = ("<image>" * len(names) + "\n" + turns[0][0], turns[0][1])
        rows.append(
            {"id": f"picture-{index}", "image": names if len(names) > 1 else names[0], "conversations": _turns(turns)}
        )
    path = folder / "instructions.json"
    path.write_text(json.dumps(rows, indent=1))
    return path


def _turns(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
