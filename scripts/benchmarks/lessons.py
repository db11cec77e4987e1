"""What is lost when a teacher's likeliest tokens are kept in place of all its logits: loss, gradient, bytes.

    python scripts/benchmarks/lessons.py [--rows 128]

On the demo, reduced as configs/demo.yaml says (16 of 144 tokens, with 5 frozen layers), at weight 1 and temperatures 1
and 2: KL per supervised token, whole and of `TOP_TOKENS` and a rest, and how far the projector's gradients lie apart.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from shortzip.data.dataset import Collator, ConversationDataset, MicroBatch
from shortzip.data.generated.scene_questions import write_scenes
from shortzip.data.instructions import read_instructions
from shortzip.data.supervision import Supervision
from shortzip.reduction.reductions import Reductions
from shortzip.train.inputs.lesson_cache import tokens_kept
from shortzip.train.inputs.loading import layout_of
from shortzip.train.release.loading import load_release
from shortzip.train.settings.distill import DistillConfig
from shortzip.train.step.objective import SupervisedLoss, projector_parameters, train_only_projector
from shortzip.train.step.teacher import Teacher, top_tokens


def gradient(module: SupervisedLoss, batch: MicroBatch) -> tuple[float, Tensor]:
    """The batch's loss, and the projector's gradient, flat."""
    module.zero_grad()
    loss = module(batch)
    loss.backward()
    parameters = projector_parameters(module.model).values()
    return loss.item(), torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoints/demo-llava")
    parser.add_argument("--rows", type=int, default=128)
    arguments = parser.parse_args()
    model, processor = load_release(arguments.model, Reductions.parse("12+4", "1+3+5+6+7"))
    train_only_projector(model, torch.float32)
    teacher = Teacher(model, torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(Path(folder), 7, arguments.rows)
        rows = read_instructions(Path(folder) / "instructions.json")[: arguments.rows]
        dataset = ConversationDataset(rows, Supervision(processor), Path(folder) / "images")
        collate = Collator.of(dataset.supervision, layout_of(dataset.supervision, taught=True))
        batch = collate([dataset.load(row) for row in dataset.conversations])
    count = tokens_kept(model.config.text_config.vocab_size)
    for temperature in (1.0, 2.0):
        distill = DistillConfig(1.0, temperature)
        asked = SupervisedLoss(model, teacher=teacher, distill=distill)
        kept = top_tokens(model.lm_head, asked.teacher_states(batch), temperature, count)
        whole, wanted = gradient(asked, batch)
        inputs = {**batch.inputs, "taught_log_probs": kept.log_probs, "taught_ids": kept.ids.int()}
        lay_out = layout_of(dataset.supervision, taught=True, asked=False)
        lessons = MicroBatch(inputs, batch.sample_ids, layout=lay_out(inputs))
        top, found = gradient(SupervisedLoss(model, distill=distill), lessons)
        positions, apart = len(kept.ids), float((found - wanted).norm() / wanted.norm())
        rest = float((1 - kept.log_probs.exp().sum(-1)).clamp(min=0).mean())
        print(
            f"temperature {temperature:g}: {positions} positions, {count} of {model.config.text_config.vocab_size} "
            f"tokens kept, {rest:.2e} left over; temperature² KL per token {whole / positions:.5f} whole, "
            f"{top / positions:.5f} kept ({(whole - top) / whole:.2e} less); gradients {apart:.2e} apart; "
            f"{8 * count} bytes a position"
        )


if __name__ == "__main__":
    main()
