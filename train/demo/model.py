"""The demo model: its settings, tokenizer, architecture and optimizer (scripts/make_demo_model.py trains it)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava.processing_llava import LlavaProcessor

from shortzip.data.generated.scene_questions import vocabulary_text
from shortzip.data.generated.scenes import CANVAS
from shortzip.data.supervision import load_template

ROOT = Path(__file__).resolve().parents[2]
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PATCH = 8
GRID = CANVAS // PATCH


@dataclass
class DemoModelConfig:
    """What `scripts/make_demo_model.py` takes."""

    output_dir: Path = ROOT / "checkpoints" / "demo-llava"
    """Folder for weights, processor and log."""
    overwrite: bool = False
    """Replace the model that is there already."""
    seed: int = 0
    """Seeds weights, scenes and questions. 1 is refused: the held-out scenes use it."""
    scenes: int = 60_000
    """Training scenes, drawn once."""
    held_out: int = 500
    """Held-out scenes that the finished model is measured on."""
    tower_steps: int = 1500
    """Steps of stage 1."""
    tower_batch: int = 64
    """Scenes per step of stage 1."""
    lm_steps: int = 2200
    """Steps of stage 2."""
    lm_batch: int = 12
    """Scenes per step of stage 2."""
    conversations: int = 12
    """Conversations per scene and step in stage 2."""
    practice: int = 0
    """How many of these are single questions that name an object by colour and shape."""
    continue_from: Path | None = None
    """Start stage 2 from these weights (a state dict kept in another run's `partial.pt`) and keep that run's log."""
    learning_rate: float = 2e-3
    """Peak learning rate of both stages (Muon scaled to AdamW's, and AdamW for embeddings and vectors)."""
    processes: int = 2
    """Processes that draw scenes."""
    compile: bool = True
    """Compile the language model in stage 2: a fifth faster, after a minute."""
    work_dir: Path | None = None
    """Keeps drawn scenes and the tower of stage 1 here and reuses them (development)."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """BPE with byte fallback over the scenes' sentences and the licence's English, set up as Llama's tokenizer is.

    The space mark goes before every stretch between special tokens, as in the releases, so that a prompt has the same
    ids whether it is tokenized whole or around its images.
    """
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    special = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", split=True)  # no token spans two words
    corpus = [SYSTEM, "USER: ASSISTANT:"] * 50 + vocabulary_text() + (ROOT / "LICENSE").read_text().splitlines()
    tokenizer.train_from_iterator(corpus, BpeTrainer(vocab_size=1024, special_tokens=special, show_progress=False))
    trained = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in trained["merges"]]
    llama = Tokenizer(BPE(trained["vocab"], merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    llama.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    llama.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    llama.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=llama,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=2048,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A LLaVA of 2.9 M parameters: 12 x 12 patches, a 5-layer tower read at layer 4, an 8-layer language model."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=CANVAS,
        patch_size=PATCH,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.encode("<image>", add_special_tokens=False)[0],
        image_seq_length=GRID * GRID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)


class Optimizer:
    """Muon for the matrices inside the layers, AdamW for everything else; one learning-rate factor for both."""

    def __init__(self, parameters: list[tuple[str, nn.Parameter]], learning_rate: float) -> None:
        inside = [p for n, p in parameters if p.ndim == 2 and "embed" not in n and "head" not in n]
        inside_ids = {id(p) for p in inside}
        rest = [p for _, p in parameters if id(p) not in inside_ids]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(inside, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.peak = learning_rate
        self.parameters = [p for _, p in parameters]

    def step(self, done: float) -> float:
        """One step at `done` (0 to 1) of the schedule: warm-up over 2 %, then cosine to zero. Returns the norm."""
        factor = min(1.0, done / 0.02) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, 1.0))
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.peak * factor
            part.step()
            part.zero_grad()
        return norm


def save_demo_model(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes an ordinary transformers checkpoint: weights in float32, processor with the Vicuna v1 template."""
    image_processor = LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": CANVAS},
        crop_size={"height": CANVAS, "width": CANVAS},
    )
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=load_template("vicuna_v1"),
    )
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
