"""Stage 2 of the demo model: projector and language model, on all visual tokens (scripts/make_demo_model.py)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from shortzip.data.generated.scene_questions import KINDS, ask
from shortzip.data.generated.scenes import sample_scene
from shortzip.train.demo.model import GRID, SYSTEM, DemoModelConfig, Optimizer
from shortzip.train.demo.tower import normalise, tower_layers

IGNORED = -100
# Kinds that name an object by two words at once. Looking up two at once is learned last, so training practises it.
TWO_WORDS = ("place", "size", "existence")
Turns = list[tuple[str, str, str]]  # (kind, question, answer) of one conversation


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

    def conversation(self, turns: Turns) -> tuple[list[int], list[int], list[int]]:
        """Ids, labels, and for each id the number of the turn whose answer it belongs to (-1: none)."""
        ids, labels, owner = [], [], []
        for number, (_, question, answer) in enumerate(turns):
            opening = f"\n{question} ASSISTANT:" if number == 0 else f"USER: {question} ASSISTANT:"
            question_ids = self._ids(opening)
            answer_ids = [*self._ids(f"{opening} {answer}")[len(question_ids) :], self.tokenizer.eos_token_id]
            ids += question_ids + answer_ids
            labels += [IGNORED] * len(question_ids) + answer_ids
            owner += [-1] * len(question_ids) + [number] * len(answer_ids)
        return ids, labels, owner

    def batch(self, scenes: list[list[Turns]]) -> dict[str, torch.Tensor]:
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
        groups = columns[3]
        same = (groups[:, :, None] == groups[:, None, :]) | (groups[:, None, :] == 0)
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


def questions_for(seed: int, index: int, draw: int, conversations: int, practice: int = 0) -> list[Turns]:
    """Conversations about one scene, `practice` of them single questions that name an object by colour and shape."""
    rng = np.random.default_rng((seed, index, 4, draw))
    scene = sample_scene(seed, index)
    turns = rng.choice([1, 2, 3], size=conversations - practice, p=[0.7, 0.2, 0.1])
    drills = [ask(scene, rng, kinds=TWO_WORDS) for _ in range(practice)]
    return drills + [ask(scene, rng, int(count)) for count in turns]


def train_language_model(
    model: LlavaForConditionalGeneration, writer: Writer, features: torch.Tensor, config: DemoModelConfig
) -> Iterator[dict[str, object]]:
    model.model.vision_tower.requires_grad_(False)
    model.train()
    if config.compile:
        model.model.language_model.compile(dynamic=False)
    optimizer = Optimizer([(n, p) for n, p in model.named_parameters() if p.requires_grad], config.learning_rate)
    generator = torch.Generator().manual_seed(config.seed + 1)
    order: list[int] = []
    draw = -1
    for step in range(config.lm_steps):
        if len(order) < config.lm_batch:
            order, draw = torch.randperm(len(features), generator=generator).tolist(), draw + 1
        rows, order = order[: config.lm_batch], order[config.lm_batch :]
        batch = writer.batch(
            [questions_for(config.seed, row, draw, config.conversations, config.practice) for row in rows]
        )
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
    right, totals = dict.fromkeys((*KINDS, "follow_up"), 0), dict.fromkeys((*KINDS, "follow_up"), 0)
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
                totals[kind] += 1
                right[kind] += (row, number) not in wrong
    model.train()
    table = {kind: round(right[kind] / max(1, totals[kind]), 4) for kind in totals}
    return {
        "exact_match": round(sum(right.values()) / sum(totals.values()), 4),
        "questions": sum(totals.values()),
        **table,
    }
