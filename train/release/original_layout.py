"""LLaVA's own release layout: reading its config, its tokenizer and its projector, and what is refused.

transformers' AutoConfig rejects `llava_llama` and silently gives default sizes for the `llava` of the 2023 releases
(it is another `llava` to it), so everything here is read from the original config itself.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, normalizers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)

from shortzip.data.errors import MissingFile, UserError
from shortzip.data.files import read_json
from shortzip.reduction.weight_files import check_json
from shortzip.train.release.tensor_files import TensorSpec

IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"
TURN_ENDS = ("<|eot_id|>", "<|im_end|>")
PROJECTOR_KEYS = ("0.weight", "0.bias", "2.weight", "2.bias")
PROJECTOR_NAMES = {
    "0.weight": "linear_1.weight",
    "0.bias": "linear_1.bias",
    "2.weight": "linear_2.weight",
    "2.bias": "linear_2.bias",
}
_MODEL_TYPES = ("llava", "llava_llama")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_TOWER_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LLAMA_KEYS = (
    *_REQUIRED,
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "initializer_range",
    "max_position_embeddings",
    "mlp_bias",
    "num_key_value_heads",
    "pad_token_id",
    "pretraining_tp",
    "tie_word_embeddings",
)


def check_original_config(config: Mapping[str, Any], where: str) -> None:
    """Refuses what cannot become a transformers LLaVA with a two-layer projector.

    Raises ValueError naming the key, what was found, what is needed and the cure.
    """
    model_type = config.get("model_type")
    if model_type not in _MODEL_TYPES:
        raise UserError(
            f"{where}: model_type is {model_type!r}, known for LLaVA's own layout are {', '.join(_MODEL_TYPES)} "
            "(LLaVA on Llama or Vicuna). For other language models use the transformers release, "
            "such as llava-hf/llava-v1.6-mistral-7b-hf"
        )
    missing = [key for key in (*_REQUIRED, "mm_vision_tower") if config.get(key) is None]
    if missing:
        raise UserError(f"{where}: config.json lacks {', '.join(missing)}; sizes are never guessed")
    check_sizes(config, _SIZES, f"{where}: config.json")
    check_projector_keys(config, where)
    if config.get("s2"):
        raise UserError(f"{where}: s2 (a vision tower run at several scales) is on, needed is off")
    if config.get("mm_vision_select_feature", "patch") not in ("patch", "cls_patch"):
        raise UserError(
            f"{where}: mm_vision_select_feature is {config['mm_vision_select_feature']!r}, known are patch, cls_patch"
        )
    if config.get("image_aspect_ratio") not in (None, "square", "pad", "anyres"):
        raise UserError(
            f"{where}: image_aspect_ratio is {config['image_aspect_ratio']!r}, known are square, pad and anyres"
        )


def check_projector_keys(config: Mapping[str, Any], where: str) -> None:
    """Refuses a config whose projector is not LLaVA 1.5's, or which puts tokens of its own around images."""
    projector = config.get("mm_projector_type", "linear")
    resampler = config.get("mm_resampler_type")
    if resampler is not None:
        raise UserError(
            f"{where}: the projector is a resampler (mm_resampler_type {resampler!r}), needed is the two-layer MLP "
            "mlp2x_gelu: use LLaVA 1.5 or later"
        )
    if projector != "mlp2x_gelu":
        raise UserError(
            f"{where}: the projector is {projector!r} (mm_projector_type), needed is the two-layer MLP mlp2x_gelu: "
            "use LLaVA 1.5 or later"
        )
    for key in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        if config.get(key, key == "mm_use_im_patch_token"):
            raise UserError(
                f"{where}: {key} is on, which puts tokens of its own around every image (LLaVA 1.0); needed is off: "
                "use LLaVA 1.5 or later"
            )


def check_sizes(config: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    """Refuses sizes that are there and are no whole number from 1: transformers would divide by them."""
    for key in keys:
        value = config.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"{where}: {key} is {value!r}, needed is a whole number from 1")


def find_projector(specs: Mapping[str, TensorSpec], where: str) -> dict[str, str]:
    """The projector's tensor names in an original file: `0.weight` → the name there.

    Any prefix is accepted, as LLaVA's own loader does. Raises ValueError for a file without a projector, and for a
    linear one, a deeper MLP or a resampler.
    """
    names = {name.split("mm_projector.", 1)[1]: name for name in specs if "mm_projector." in name}
    if set(names) == set(PROJECTOR_KEYS):
        return names
    needed = "needed is LLaVA 1.5's two-layer MLP (mm_projector.0 and .2)"
    if not names:
        raise UserError(f"{where} holds no projector (no tensor named mm_projector), {needed}")
    if set(names) == {"weight", "bias"}:
        kind = f"a linear one, {tuple(specs[names['weight']].shape)}"
    elif all(key.split(".")[0].isdigit() for key in names):
        kind = f"an MLP of {len({key.split('.')[0] for key in names})} layers"
    else:
        kind = f"a resampler or another module with {', '.join(sorted(names)[:4])} …"
    raise UserError(f"{where}: the projector is {kind}; {needed}: use LLaVA 1.5 or later")


def check_projector_widths(shapes: Mapping[str, tuple[int, ...]], tower: int, hidden: int, where: str) -> None:
    """Refuses a projector that does not fit between the vision tower and the language model.

    `shapes`: of linear_1.weight and linear_2.weight, and of their biases if there are any; `tower` and `hidden`:
    widths of the tower and the LLM.
    """
    needed = {"linear_1.weight": (hidden, tower), "linear_2.weight": (hidden, hidden)}
    biases = {name: (hidden,) for name in ("linear_1.bias", "linear_2.bias") if name in shapes}
    for name, shape in {**needed, **biases}.items():
        if tuple(shapes[name]) != shape:
            raise UserError(
                f"{where}: the projector's {name} is {tuple(shapes[name])}, needed is {shape} (vision tower {tower} "
                f"wide, language model {hidden} wide): it belongs to another release; take the projector and the "
                "base of the same size"
            )


def text_config(config: Mapping[str, Any], vocab_size: int) -> LlamaConfig:
    """The Llama part of an original config, with the given number of embedding rows."""
    values = {key: config[key] for key in LLAMA_KEYS if key in config}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)}
    if config.get("rope_scaling"):
        scaling = dict(config["rope_scaling"])
        rope["rope_type"] = scaling.pop("type", scaling.pop("rope_type", "default"))
        rope.update(scaling)
    return LlamaConfig(**values, rope_parameters=rope, vocab_size=vocab_size)


def tower_config(folder: Path) -> CLIPVisionConfig:
    """The vision config of a CLIP folder (CLIPModel or CLIPVisionModel). Raises ValueError for other towers."""
    config = read_json(folder / "config.json")
    if config.get("model_type") == "clip":
        part = config.get("vision_config", {})
        if not isinstance(part, dict):
            raise UserError(f"{folder}: vision_config in config.json is {part!r}, needed is an object")
        check_sizes(part, _TOWER_SIZES, f"{folder}: vision_config in config.json")
        return CLIPVisionConfig.from_dict(part)
    if config.get("model_type") == "clip_vision_model":
        check_sizes(config, _TOWER_SIZES, f"{folder}: config.json")
        return CLIPVisionConfig.from_dict(config)
    raise UserError(
        f"{folder}: the vision tower is a {config.get('model_type')!r}, LLaVA's own layout knows CLIP towers only"
    )


@dataclass(frozen=True)
class Vocabulary:
    """The release's tokenizer, made fast, with the placeholder added."""

    tokenizer: PreTrainedTokenizerFast
    image_token_id: int
    rows: int
    """Embedding rows needed: those of the release, or more where the placeholder needs one."""


def split_after_images(tokenizer: Any, *marks: str) -> Any:
    """A fast tokenizer that starts the text after an image (or a video) as LLaVA does: as a text of its own.

    LLaVA tokenizes the pieces between images one by one, and sentencepiece tokenizers open every text with a space.
    transformers' fast ones leave it out after a special token, so that the ids would differ from those the release was
    trained on by one per image. A normalizer puts that space there. A tokenizer that needs none is returned as it is.
    """
    alone = tokenizer.encode("\nA", add_special_tokens=False)
    if all(tokenizer.encode(f"{mark}\nA", add_special_tokens=False)[1:] == alone for mark in marks):
        return tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["normalizer"] is not None:
        return tokenizer
    for token in state["added_tokens"]:
        if token["content"] in marks:
            token["normalized"] = True  # or the text is split at it before the normalizer sees it
    backend = Tokenizer.from_str(json.dumps(state))
    another = "|".join(re.escape(mark) for mark in marks)
    steps = [normalizers.Replace(Regex(rf"{re.escape(mark)}(?!{another}|\z)"), f"{mark} ") for mark in marks]
    backend.normalizer = steps[0] if len(steps) == 1 else normalizers.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        pad_token=tokenizer.pad_token,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        clean_up_tokenization_spaces=False,
    )


def read_vocabulary(folder: Path, rows: int, marks: tuple[str, ...] = (IMAGE_TOKEN,)) -> Vocabulary:
    """Turns the release's sentencepiece tokenizer into a fast one that gives LLaVA's ids, and adds `marks`, in their
    order: `<image>`, and others beside it.

    `rows`: embedding rows of the release. Where a placeholder's id lies beyond them, rows grow to the next multiple
    of 64 (32 000 → 32 064, as in the transformers releases).
    """
    if not (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        raise MissingFile(f"{folder} holds no tokenizer (tokenizer.model): copy it from the release's base")
    check_json(folder, _TOKENIZER_FILES)
    fast = (folder / "tokenizer_config.json").is_file() and not (folder / "tokenizer.model").is_file()
    kind = read_json(folder / "tokenizer_config.json").get("tokenizer_class") if fast else None
    # Llama 3's, or sentencepiece's.
    known = PreTrainedTokenizerFast if kind == "PreTrainedTokenizerFast" else LlamaTokenizer
    slow = known.from_pretrained(folder, trust_remote_code=False)
    if len(slow) > rows:
        raise UserError(f"{folder}: the tokenizer has {len(slow)} tokens, the embeddings only {rows} rows")
    slow.padding_side = "left"
    slow.pad_token = slow.pad_token or slow.unk_token or slow.eos_token
    slow.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks], special_tokens=True)
    tokenizer = split_after_images(slow, *marks)
    ids = tokenizer.get_vocab()
    image_token_id, needed = ids[IMAGE_TOKEN], max(ids[mark] for mark in marks) + 1
    return Vocabulary(tokenizer, image_token_id, rows if rows >= needed else math.ceil(needed / 64) * 64)


def build_generation_config(folder: Path, config: Mapping[str, Any], vocabulary: Vocabulary) -> GenerationConfig:
    """Ids and length of the release's generation config; its sampling settings only where it samples."""
    path = folder / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    keys = ["max_length"] + (["do_sample", "temperature", "top_p", "top_k"] if settings.get("do_sample") else [])
    values: dict[str, Any] = {key: settings[key] for key in keys if key in settings}
    tokenizer = vocabulary.tokenizer
    for key, fallback in (("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id)):
        values[f"{key}_token_id"] = settings.get(f"{key}_token_id", config.get(f"{key}_token_id", fallback))
    values["pad_token_id"] = tokenizer.pad_token_id
    # Where a turn's end is another token than the text's, generation ends at both.
    turns = [token for end in TURN_ENDS if (token := tokenizer.get_vocab().get(end)) is not None]
    ends = values["eos_token_id"] if isinstance(values["eos_token_id"], list) else [values["eos_token_id"]]
    if more := [token for token in turns if token not in ends]:
        values["eos_token_id"] = [*ends, *more]
    return GenerationConfig(**values)
