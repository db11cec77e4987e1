"""A LLaVA release of a few kilobytes and instructions for it, made on the spot: random weights, the real classes.

The releases are those that `shortzip tiny` writes (scripts/tiny/).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionConfig

from shortzip.scripts.tiny.llava import IMAGE_SIZE, LLM_LAYERS, PATCH_SIZE, PATCHES, write_release
from shortzip.scripts.tiny.llava_next import write_release as write_next_release
from shortzip.scripts.tiny.words import COLORS, QUESTIONS, build_tokenizer

__all__ = [
    "COLORS",
    "IMAGE_SIZE",
    "LLM_LAYERS",
    "PATCHES",
    "PATCH_SIZE",
    "QUESTIONS",
    "build_tokenizer",
    "write_clip",
    "write_instructions",
    "write_next_release",
    "write_release",
]


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
