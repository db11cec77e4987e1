"""The words of tiny releases, and their tokenizer."""

from __future__ import annotations

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers import decoders as tokenizer_decoders
from transformers import PreTrainedTokenizerFast

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230), "white": (250, 250, 250)}
QUESTIONS = ("what colour is the picture?", "name the colour", "is it bright?")


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


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """The same with Qwen's marks of turns."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    return tokenizer
