"""Trains `checkpoints/demo-llava`, the small genuine LLaVA that ShortZip runs on by default.

    python scripts/make_demo_model.py --output_dir checkpoints/demo-llava

Two stages, as LLaVA itself has a vision tower that was trained before it:

1. **Vision tower.** A CLIP tower learns, at the layer that LLaVA reads (`hidden_states[-2]`), to say for every patch
   which object it belongs to (colour, shape, size, place) and whether it is that object's middle. Its CLS token
   learns, from the same layer, which kinds of objects the scene holds and how many, and is rewarded for attending to
   them: that attention is what VisionZip reads.
2. **Projector and language model**, from scratch and with all visual tokens, on questions about scenes. Several short
   conversations share one picture: they stand one after another behind it, and a block mask with restarted positions
   keeps them from seeing each other, so each is supervised exactly as if it stood alone.

The model is never trained on reduced visual tokens. `log.jsonl` beside the weights keeps command, seed, time and
accuracy. Same seed, same machine, same number of threads: same weights.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from data.scene_questions import KINDS, NUMBERS, ask, vocabulary_text
from data.scenes import CANVAS, COLORS, PLACES, SHAPES, SIZES, render_scene, sample_scene

ROOT = Path(__file__).resolve().parent.parent
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PATCH = 8
GRID = CANVAS // PATCH
IGNORED = -100
HELD_OUT_SEED = 1  # scenes are a function of (seed, index): held-out ones share no seed with the training scenes


@dataclass
class DemoModelConfig:
    """What `scripts/make_demo_model.py` takes."""

    output_dir: Path = ROOT / "checkpoints" / "demo-llava"
    """Folder for weights, processor and log."""
    seed: int = 0
    """Seeds weights, scenes and questions. 1 is refused: the held-out scenes use it."""
    scenes: int = 60_000
    """Training scenes, drawn once."""
    tower_steps: int = 1500
    """Steps of stage 1."""
    tower_batch: int = 64
    """Scenes per step of stage 1."""
    lm_steps: int = 4500
    """Steps of stage 2."""
    lm_batch: int = 12
    """Scenes per step of stage 2."""
    conversations: int = 12
    """Conversations per scene and step in stage 2."""
    learning_rate: float = 2e-3
    """Peak learning rate of both stages (Muon scaled to AdamW's, and AdamW for embeddings and vectors)."""
    processes: int = 2
    """Processes that draw scenes."""
    work_dir: Path | None = None
    """Keeps drawn scenes and the tower of stage 1 here and reuses them (development)."""


# ---------------------------------------------------------------------------------------------------------------------
# Model and tokenizer


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
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=GRID * GRID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)


class Optimizer:
    """Muon for the matrices inside the layers, AdamW for everything else; one learning-rate factor for both."""

    def __init__(self, parameters: list[tuple[str, nn.Parameter]], learning_rate: float) -> None:
        inside = [p for n, p in parameters if p.ndim == 2 and "embed" not in n and "head" not in n]
        chosen = {id(p) for p in inside}
        rest = [p for _, p in parameters if id(p) not in chosen]
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


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1: the vision tower


def _draw(task: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 `[n, 96, 96, 3]` and patch labels int8 `[n, 5, 144]` of scenes `first ... last - 1`."""
    seed, first, last = task
    pictures = np.empty((last - first, CANVAS, CANVAS, 3), np.uint8)
    labels = np.zeros((last - first, 5, GRID, GRID), np.int8)
    words = [list(COLORS), list(SHAPES), list(SIZES), list(PLACES)]
    edges = np.arange(GRID) * PATCH
    for row, index in enumerate(range(first, last)):
        scene = sample_scene(seed, index)
        pictures[row] = render_scene(scene)
        for item in scene.objects:
            across = np.minimum(edges + PATCH, item.left + item.diameter) - np.maximum(edges, item.left)
            down = np.minimum(edges + PATCH, item.top + item.diameter) - np.maximum(edges, item.top)
            covered = np.outer(np.clip(down, 0, None), np.clip(across, 0, None)) >= 0.4 * PATCH * PATCH
            for channel, word in enumerate((item.color, item.shape, item.size, item.place)):
                labels[row, channel][covered] = 1 + words[channel].index(word)
            middle = item.diameter // 2
            labels[row, 4, (item.top + middle) // PATCH, (item.left + middle) // PATCH] = 1
    return pictures, labels.reshape(last - first, 5, -1)


def draw_scenes(seed: int, count: int, processes: int) -> tuple[torch.Tensor, torch.Tensor]:
    tasks = [(seed, first, min(first + 500, count)) for first in range(0, count, 500)]
    with Pool(processes) as pool:
        parts = pool.map(_draw, tasks)
    return (
        torch.from_numpy(np.concatenate([pictures for pictures, _ in parts])),
        torch.from_numpy(np.concatenate([labels for _, labels in parts])),
    )


def normalise(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 `[n, H, W, 3]` to float32 `[n, 3, H, W]`, with CLIP's mean and standard deviation."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return ((pictures.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def tower_layers(tower: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`hidden_states[-2]` `[n, 1 + 144, width]` and the CLS row of attention `[n, 144]` in the block that makes it."""
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    read = tower.encoder.layers[:-1]
    for layer in read[:-1]:
        hidden = layer(hidden, None)
    block = read[-1]
    normed = block.layer_norm1(hidden)
    heads, width = block.self_attn.num_heads, hidden.shape[-1] // block.self_attn.num_heads
    query = block.self_attn.q_proj(normed[:, :1]).unflatten(-1, (heads, width)).transpose(1, 2)
    key = block.self_attn.k_proj(normed).unflatten(-1, (heads, width)).transpose(1, 2)
    attention = (query @ key.transpose(-1, -2) * width**-0.5).float().softmax(-1).mean(1)[:, 0, 1:]
    return block(hidden, None), attention


class TowerHeads(nn.Module):
    """Linear read-outs that exist during stage 1 only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [1 + len(COLORS), 1 + len(SHAPES), 1 + len(SIZES), 1 + len(PLACES), 2]
        self.patch_head = nn.Linear(width, sum(self.sizes))
        self.kinds_head = nn.Linear(width, len(COLORS) * len(SHAPES) + len(NUMBERS))
        self.norm = nn.LayerNorm(width)

    def forward(self, hidden: torch.Tensor, attention: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        labels = labels.long()
        hidden = self.norm(hidden.float())
        parts = self.patch_head(hidden[:, 1:]).split(self.sizes, dim=-1)
        losses = {}
        on_object = labels[:, 0] > 0
        for name, part, target in zip(
            ("color", "shape", "size", "place", "middle"), parts, labels.unbind(1), strict=True
        ):
            each = F.cross_entropy(part.transpose(1, 2), target, reduction="none")
            losses[name] = each[on_object].mean() + each[~on_object].mean()
        middle = labels[:, 4].bool()
        kind = (labels[:, 0] - 1) * len(SHAPES) + labels[:, 1] - 1
        present = torch.zeros(len(labels), len(COLORS) * len(SHAPES))
        present.scatter_reduce_(1, kind.clamp(min=0), middle.float(), reduce="amax")
        kinds, count = self.kinds_head(hidden[:, 0]).split([present.shape[1], len(NUMBERS)], dim=-1)
        losses["kinds"] = 10 * F.binary_cross_entropy_with_logits(kinds, present)
        losses["count"] = F.cross_entropy(count, middle.sum(1))
        losses["attention"] = -(attention * on_object).sum(1).clamp(min=1e-6).log().mean()
        with torch.no_grad():
            right = [
                (p.argmax(-1) == t)[on_object].float().mean()
                for p, t in zip(parts[:4], labels.unbind(1)[:4], strict=True)
            ]
            self.accuracy = {
                name: round(float(r), 4) for name, r in zip(("color", "shape", "size", "place"), right, strict=True)
            }
            self.accuracy["count"] = round(float((count.argmax(-1) == middle.sum(1)).float().mean()), 4)
            self.accuracy["attention_on_objects"] = round(float((attention * on_object).sum(1).mean()), 4)
        return losses


def train_tower(
    tower: nn.Module, pictures: torch.Tensor, labels: torch.Tensor, config: DemoModelConfig
) -> Iterator[dict[str, object]]:
    heads = TowerHeads(tower.config.hidden_size)
    named = [(n, p) for n, p in tower.named_parameters() if "post_layernorm" not in n]
    named += [("head." + n, p) for n, p in heads.named_parameters()]
    optimizer = Optimizer(named, config.learning_rate)
    generator = torch.Generator().manual_seed(config.seed)
    for step in range(config.tower_steps):
        rows = torch.randint(len(pictures), (config.tower_batch,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            hidden, attention = tower_layers(tower, normalise(pictures[rows]))
        losses = heads(hidden, attention, labels[rows])
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step(step / config.tower_steps)
        if step % 50 == 0 or step == config.tower_steps - 1:
            yield {
                "stage": "tower",
                "step": step,
                **{k: round(v.item(), 4) for k, v in losses.items()},
                **heads.accuracy,
            }


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2: projector and language model


class Writer:
    """Turns scenes into token ids, labels, positions and conversation numbers for stage 2."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.image = tokenizer.convert_tokens_to_ids("<image>")
        head = tokenizer(f"{SYSTEM} USER: <image>").input_ids  # <s> first, the image's placeholder last
        self.prefix = head[:-1] + [self.image] * (GRID * GRID)
        self.known: dict[str, list[int]] = {}

    def _ids(self, text: str) -> list[int]:
        """Ids of `text` as it stands behind an image token, without that token."""
        if text not in self.known:
            self.known[text] = self.tokenizer("<image>" + text, add_special_tokens=False).input_ids[1:]
        return self.known[text]

    def conversation(self, turns: list[tuple[str, str, str]]) -> tuple[list[int], list[int], list[int]]:
        """Ids, labels, and for each id the number of the turn whose answer it belongs to (-1: none)."""
        ids, labels, owner = [], [], []
        for number, (_, question, answer) in enumerate(turns):
            opening = f"\n{question} ASSISTANT:" if number == 0 else f"USER: {question} ASSISTANT:"
            asked = self._ids(opening)
            said = [*self._ids(f"{opening} {answer}")[len(asked) :], self.tokenizer.eos_token_id]
            ids += asked + said
            labels += [IGNORED] * len(asked) + said
            owner += [-1] * len(asked) + [number] * len(said)
        return ids, labels, owner

    def batch(self, scenes: list[list[list[tuple[str, str, str]]]]) -> dict[str, torch.Tensor]:
        """Packs each scene's conversations behind the shared prefix; `[scenes, length]`, padded on the right.

        `turn` numbers each answer within its row (-1 elsewhere); `mask` is `[scenes, 1, length, length]`, True = sees.
        """
        rows = []
        for conversations in scenes:
            ids, labels = list(self.prefix), [IGNORED] * len(self.prefix)
            positions, group = list(range(len(self.prefix))), [0] * len(self.prefix)
            turn, turns = [-1] * len(self.prefix), 0
            for number, conversation in enumerate(conversations):
                more, more_labels, owner = self.conversation(conversation)
                ids += more
                labels += more_labels
                positions += range(len(self.prefix), len(self.prefix) + len(more))
                group += [number + 1] * len(more)
                turn += [-1 if o < 0 else turns + o for o in owner]
                turns += len(conversation)
            rows.append((ids, labels, positions, group, turn))
        length = -(-max(len(row[0]) for row in rows) // 64) * 64  # few lengths: few compiled graphs
        fill = (self.tokenizer.pad_token_id, IGNORED, 0, -1, -1)
        columns = [
            torch.tensor([row[k] + [fill[k]] * (length - len(row[k])) for row in rows]) for k in range(len(fill))
        ]
        group = columns[3]
        same = (group[:, :, None] == group[:, None, :]) | (group[:, None, :] == 0)
        mask = same & torch.ones(length, length, dtype=torch.bool).tril()
        names = ("input_ids", "labels", "position_ids", "group", "turn")
        return {**dict(zip(names, columns, strict=True)), "mask": mask[:, None]}


def answer_logits(
    model: LlavaForConditionalGeneration, features: torch.Tensor, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits `[k, vocabulary]` at the k supervised positions, their targets `[k]` and where they stand `[k, 2]`."""
    projected = model.model.multi_modal_projector(features)
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    image = (batch["input_ids"] == model.config.image_token_id).unsqueeze(-1)
    embeddings = embeddings.masked_scatter(image, projected.to(embeddings.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=batch["mask"],
        position_ids=batch["position_ids"],
        use_cache=False,
    ).last_hidden_state
    where = (batch["labels"][:, 1:] != IGNORED).nonzero()
    targets = batch["labels"][:, 1:][where[:, 0], where[:, 1]]
    return model.lm_head(hidden[where[:, 0], where[:, 1]]).float(), targets, where


@torch.no_grad()
def tower_features(tower: nn.Module, pictures: torch.Tensor, batch: int = 128) -> torch.Tensor:
    """`hidden_states[-2]` without CLS for all pictures, bfloat16 `[n, 144, width]`: the tower is finished by now."""
    parts = []
    for chunk in pictures.split(batch):
        with torch.autocast("cpu", torch.bfloat16):
            hidden, _ = tower_layers(tower, normalise(chunk))
        parts.append(hidden[:, 1:].to(torch.bfloat16))
    return torch.cat(parts)


def questions_for(seed: int, index: int, draw: int, conversations: int) -> list[list[tuple[str, str, str]]]:
    rng = np.random.default_rng((seed, index, 4, draw))
    scene = sample_scene(seed, index)
    return [ask(scene, rng, int(turns)) for turns in rng.choice([1, 2, 3], size=conversations, p=[0.7, 0.2, 0.1])]


def train_language_model(
    model: LlavaForConditionalGeneration, writer: Writer, features: torch.Tensor, config: DemoModelConfig
) -> Iterator[dict[str, object]]:
    model.model.vision_tower.requires_grad_(False)
    model.train()
    model.model.language_model.compile(dynamic=False)
    optimizer = Optimizer([(n, p) for n, p in model.named_parameters() if p.requires_grad], config.learning_rate)
    generator = torch.Generator().manual_seed(config.seed + 1)
    order: list[int] = []
    draw = -1
    for step in range(config.lm_steps):
        if len(order) < config.lm_batch:
            order, draw = torch.randperm(len(features), generator=generator).tolist(), draw + 1
        rows, order = order[: config.lm_batch], order[config.lm_batch :]
        batch = writer.batch([questions_for(config.seed, row, draw, config.conversations) for row in rows])
        with torch.autocast("cpu", torch.bfloat16):
            logits, targets, _ = answer_logits(model, features[rows], batch)
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        norm = optimizer.step(step / config.lm_steps)
        if step % 25 == 0 or step == config.lm_steps - 1:
            right = (logits.argmax(-1) == targets).float().mean().item()
            yield {
                "stage": "language model",
                "step": step,
                "loss": round(loss.item(), 4),
                "token_accuracy": round(right, 4),
                "gradient_norm": round(norm, 3),
            }


@torch.no_grad()
def measure(
    model: LlavaForConditionalGeneration, writer: Writer, pictures: torch.Tensor, seed: int, blind: bool = False
) -> dict[str, float]:
    """Exact match by kind of question on scenes `0 ... n - 1` of `seed`, fp32, all visual tokens.

    An answer counts when every one of its tokens and its end is the most likely one after the true tokens before it:
    that is when greedy decoding returns exactly this answer. `blind` replaces every scene's picture by another's.
    """
    model.eval()
    right, asked = dict.fromkeys((*KINDS, "follow_up"), 0), dict.fromkeys((*KINDS, "follow_up"), 0)
    rows = torch.arange(len(pictures))
    for chunk in rows.split(25):
        questions = [questions_for(seed, int(row), 0, 6) for row in chunk]
        shown = pictures[(chunk + 1) % len(pictures)] if blind else pictures[chunk]
        features = tower_layers(model.model.vision_tower, normalise(shown))[0][:, 1:]
        batch = writer.batch(questions)
        logits, targets, where = answer_logits(model, features, batch)
        turn = batch["turn"][:, 1:][where[:, 0], where[:, 1]]
        wrong = {
            (int(r), int(t))
            for r, t in zip(where[logits.argmax(-1) != targets, 0], turn[logits.argmax(-1) != targets], strict=True)
        }
        for row, conversations in enumerate(questions):
            for number, (kind, _, _) in enumerate(turn for conversation in conversations for turn in conversation):
                asked[kind] += 1
                right[kind] += (row, number) not in wrong
    model.train()
    table = {kind: round(right[kind] / max(1, asked[kind]), 4) for kind in asked}
    return {
        "exact_match": round(sum(right.values()) / sum(asked.values()), 4),
        "questions": sum(asked.values()),
        **table,
    }


# ---------------------------------------------------------------------------------------------------------------------


def save(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    from transformers import AutoProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava.processing_llava import LlavaProcessor

    image_processor = LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": CANVAS},
        crop_size={"height": CANVAS, "width": CANVAS},
    )
    template = (ROOT / "data" / "templates" / "vicuna_v1.jinja").read_text()
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    AutoProcessor.from_pretrained(folder)


def make(config: DemoModelConfig) -> None:
    """Trains the demo model, measures it on held-out scenes and saves it with its log.

    Raises:
        ValueError: the seed is the held-out scenes' own.
    """
    if config.seed == HELD_OUT_SEED:
        raise ValueError(f"seed {config.seed} draws the held-out scenes: choose any other")
    started = time.time()
    torch.manual_seed(config.seed)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    log = (config.output_dir / "log.jsonl").open("w")

    def note(entry: dict[str, object]) -> None:
        line = json.dumps({**entry, "seconds": round(time.time() - started, 1)})
        print(line, flush=True)
        print(line, file=log, flush=True)

    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items() if k != "work_dir"}
    note(
        {
            "command": ["python", *sys.argv],
            "settings": settings,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
    )

    kept = config.work_dir / f"scenes-{config.seed}-{config.scenes}.pt" if config.work_dir else None
    if kept and kept.exists():
        pictures, labels = torch.load(kept, weights_only=True)
    else:
        pictures, labels = draw_scenes(config.seed, config.scenes, config.processes)
        if kept:
            torch.save((pictures, labels), kept)
    held_out, _ = draw_scenes(HELD_OUT_SEED, 500, config.processes)
    note({"stage": "scenes", "drawn": len(pictures)})

    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    note({"parameters": sum(p.numel() for p in model.parameters()), "vocabulary": len(tokenizer)})
    tower = model.model.vision_tower
    kept = config.work_dir / "tower.pt" if config.work_dir else None
    if kept and kept.exists():
        state, entries = torch.load(kept, weights_only=True)
        tower.load_state_dict(state)
        for entry in entries:
            note({**entry, "reused": True})
    else:
        entries = []
        for entry in train_tower(tower, pictures, labels, config):
            entries.append({**entry, "seconds_then": round(time.time() - started, 1)})
            note(entry)
        if kept:
            torch.save((tower.state_dict(), entries), kept)
    del labels

    writer = Writer(tokenizer)
    features = tower_features(tower, pictures)
    note({"stage": "features", "shape": list(features.shape)})
    for entry in train_language_model(model, writer, features, config):
        note(entry)
        if entry["step"] and int(str(entry["step"])) % 500 == 0:
            note({"stage": "held-out", **measure(model, writer, held_out[:100], HELD_OUT_SEED)})
            torch.save(model.state_dict(), config.output_dir / "partial.pt")
    (config.output_dir / "partial.pt").unlink(missing_ok=True)
    note({"stage": "held-out, all visual tokens", **measure(model, writer, held_out, HELD_OUT_SEED)})
    note({"stage": "held-out, another scene's picture", **measure(model, writer, held_out, HELD_OUT_SEED, blind=True)})
    save(model, tokenizer, config.output_dir)
    note({"stage": "saved"})


if __name__ == "__main__":
    make(auto_cli(DemoModelConfig))
