"""Tiny random models of the real classes, and batches of every kind for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaNextConfig, LlavaNextForConditionalGeneration

from shortzip.reduction import (
    ReducedLlavaConfig,
    ReducedLlavaForConditionalGeneration,
    ReducedLlavaNextConfig,
    ReducedLlavaNextForConditionalGeneration,
)

IMAGE_TOKEN, PAD = 90, 0
VISIONZIP = {"dominant": 4, "contextual": 2}
SHORTV = {"layers": [0, 2, 3]}
REDUCTIONS: dict[str, dict[str, Any]] = {
    "none": {"visionzip": None, "shortv": None},
    "visionzip": {"visionzip": VISIONZIP, "shortv": None},
    "shortv": {"visionzip": None, "shortv": SHORTV},
    "both": {"visionzip": VISIONZIP, "shortv": SHORTV},
}
# Methods of every kind: it merges and keeps CLS, chooses greedily, changes what it keeps, looks behind the projector.
METHODS: dict[str, dict[str, Any]] = {
    "duet": {"dominant": 4, "contextual": 2, "method": "duet", "window": 2},
    "scope": {"dominant": 5, "contextual": 0, "method": "scope"},
    "prumerge+": {"dominant": 5, "contextual": 0, "method": "prumerge+"},
    "projected": {"dominant": 5, "contextual": 0, "method": "divprune", "space": "projected"},
}
# Every way to a budget, for where its tokens stand.
WAYS: dict[str, dict[str, Any]] = {
    "visionzip": {"dominant": 4, "contextual": 2},
    "dominant only": {"dominant": 5, "contextual": 0},
    "random": {"dominant": 5, "contextual": 0, "method": "random", "seed": 1},
    "grid": {"dominant": 6, "contextual": 0, "method": "grid"},
    "pool": {"dominant": 6, "contextual": 0, "method": "pool"},
    "all": {"dominant": 16, "contextual": 0, "method": "grid"},
    "downsample": {"dominant": 6, "contextual": 0, "method": "downsample"},
}
NEXT_SIZES = [[32, 32], [20, 40], [44, 18], [9, 60], [30, 33]]  # height, width; the second and third lose patches
TOWERS: dict[str, dict[str, Any]] = {
    "clip": {"model_type": "clip_vision_model", "initializer_range": 0.5, "hidden_act": "quick_gelu"},
    "siglip": {"model_type": "siglip_vision_model"},
}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-mha": {"model_type": "llama", "num_key_value_heads": 4},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 8},
    "mistral-window": {"model_type": "mistral", "sliding_window": 6, "head_dim": 8},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
    },
}


def build(
    decoder: str = "llama",
    tower: str = "clip",
    reduction: str = "both",
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    next_: bool = False,
    plain: bool = False,
    seed: int = 0,
    visionzip: dict[str, Any] | None = None,
    **config: Any,
) -> Any:
    """A model in eval mode; two calls that differ in `reduction` or `attention` only share their weights' values.

    `visionzip`: in place of that of `reduction`. `config`: further keys of the config, reductions among them.
    """
    reductions = {**REDUCTIONS[reduction], **({"visionzip": visionzip} if visionzip else {})}
    parts: dict[str, Any] = {
        "vision_config": {
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
            **TOWERS[tower],
        },
        "text_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 91,
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            **DECODERS[decoder],
        },
        "image_token_index": IMAGE_TOKEN,
        "vision_feature_select_strategy": "default" if tower == "clip" else "full",
        "attn_implementation": attention,
        **({"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]} if next_ else {}),
        **config,
    }
    torch.manual_seed(seed)
    plain_model = (
        LlavaNextForConditionalGeneration(LlavaNextConfig(**copy.deepcopy(parts)))
        if next_
        else LlavaForConditionalGeneration(LlavaConfig(**copy.deepcopy(parts)))
    )
    with torch.no_grad():
        for name, parameter in plain_model.named_parameters():
            if "projector" in name:
                parameter.normal_(0, 0.3)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
    if plain:
        model: Any = plain_model
    elif next_:
        model = ReducedLlavaNextForConditionalGeneration(ReducedLlavaNextConfig(**{**reductions, **parts}))
        model.load_state_dict(plain_model.state_dict())
    else:
        model = ReducedLlavaForConditionalGeneration(ReducedLlavaConfig(**{**reductions, **parts}))
        model.load_state_dict(plain_model.state_dict())
    # A model that writes <image> by itself would test transformers' handling of that, not ours.
    with torch.no_grad():
        model.lm_head.weight[IMAGE_TOKEN] = 0
    return model.to(dtype).eval()


def original(method: str = "visionzip", **options: Any) -> Any:
    """A model that keeps positions."""
    return build(reduction="none", visionzip=METHODS[method], positions="original", **options)


def images(model: Any, sizes: list[list[int]], seed: int = 0) -> dict[str, Tensor]:
    """Flat tiles of images of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    tiles = sum(model.model._tiles(sizes))
    return {"pixel_values": torch.randn(tiles, 3, 16, 16, generator=generator), "image_sizes": torch.tensor(sizes)}


def tokens_per_image(model: Any) -> int:
    """Placeholders that one image (LLaVA, not NeXT) takes."""
    visionzip = getattr(model.config, "visionzip", None)
    return 16 if visionzip is None else visionzip["dominant"] + visionzip["contextual"]


def make_row(model: Any, layout: str, seed: int = 0) -> dict[str, Tensor]:
    """One prompt without padding: in `layout` every "t" is a text token and every "I" an image ("ttIttI").

    Its pixel_values are absent when it has no image.
    """
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for part in layout:
        if part == "I":
            ids += [IMAGE_TOKEN] * tokens_per_image(model)
        else:
            ids.append(int(torch.randint(3, IMAGE_TOKEN, (1,), generator=generator)))
    row = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if "I" in layout:
        pixels = torch.randn(layout.count("I"), 3, 16, 16, generator=generator)
        row["pixel_values"] = pixels.to(next(model.parameters()).dtype)
    return row


def make_batch(rows: list[dict[str, Tensor]], side: str) -> dict[str, Tensor]:
    """The rows as one batch, padded on `side`."""
    length = max(row["input_ids"].shape[1] for row in rows)

    def pad(states: Tensor, value: int) -> Tensor:
        missing = length - states.shape[1]
        padding = (missing, 0) if side == "left" else (0, missing)
        return torch.nn.functional.pad(states, padding, value=value)

    batch = {
        "input_ids": torch.cat([pad(row["input_ids"], PAD) for row in rows]),
        "attention_mask": torch.cat([pad(row["attention_mask"], 0) for row in rows]),
    }
    pixels = [row["pixel_values"] for row in rows if "pixel_values" in row]
    if pixels:
        batch["pixel_values"] = torch.cat(pixels)
    return batch


def rows_of(states: Tensor, batch: dict[str, Tensor]) -> list[Tensor]:
    """What [B, L, ...] holds at the positions of each row that are not padding."""
    return [state[mask.bool()] for state, mask in zip(states, batch["attention_mask"], strict=True)]


def freeze_naively(model: Any, layers: list[int]) -> None:
    """The definition of ShortV on a plain model: after a layer, visual tokens get back what they had before it.

    The positions are read from the `input_ids` of the model's next forward passes.
    """
    visual: dict[str, Tensor] = {}

    def remember(module: Any, args: Any, kwargs: Any) -> None:
        visual["mask"] = ((args[0] if args else kwargs["input_ids"]) == IMAGE_TOKEN).unsqueeze(-1)

    def restore(module: Any, args: Any, output: Tensor) -> Tensor:
        return torch.where(visual["mask"], args[0], output)

    model.model.register_forward_pre_hook(remember, with_kwargs=True)
    for layer in layers:
        model.model.language_model.layers[layer].register_forward_hook(restore)
