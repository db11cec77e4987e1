"""The small models of a proof: demo-llava under any reductions, on the CPU and on the device, and rows for it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shortzip.data.dataset import Collator, ConversationDataset, MicroBatch
from shortzip.reduction.reductions import Reductions
from shortzip.scripts.proofs.section import Proof
from shortzip.train.inputs.loading import layout_of
from shortzip.train.inputs.prompts import Prompt, batch_prompts
from shortzip.train.inputs.samples import draw_demo_scenes, held_out_set
from shortzip.train.release.loading import load_release, share_weights
from shortzip.train.release.opening import open_release
from shortzip.train.release.processors import release_processor
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.settings.config import DataConfig, DemoScenesConfig
from shortzip.train.settings.recipes import DEMO_MODEL

BUDGET, LAYERS = {"dominant": 12, "contextual": 4}, {"layers": [4, 5, 6]}
FASTV: dict[str, Any] = {"layer": 2, "keep": 0.5}
ROWS = 4
# Rounding, as a share of what is compared: logits and visual tokens in float32, against the largest; a mean loss; a
# gradient, which has gone through every layer twice; and a loss in bfloat16, whose last bit is 2^-8.
FLOAT32, LOSS, GRADIENT, BFLOAT16 = 1e-4, 1e-3, 5e-3, 2e-2


def whole_float32() -> None:
    """Has the device compute float32 as float32: cuDNN would take TF32's 10 bits for the tower's first layer."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def scenes(folder: Path, count: int = 8) -> DataConfig:
    """Drawn scenes to train on and to hold out, `count` each."""
    drawn = DemoScenesConfig(folder=str(folder / "scenes"), train_scenes=count, eval_scenes=count)
    config = DataConfig(instructions="demo", eval_instructions="demo", num_workers=0, demo_scenes=drawn)
    draw_demo_scenes(config)
    return config


@dataclass(frozen=True)
class Subject:
    """A model, and conversations as it reads them."""

    model: Any
    dataset: ConversationDataset

    def batch(self, rows: int = ROWS, taught: bool = False) -> MicroBatch:
        supervision = self.dataset.supervision
        samples = [self.dataset[row] for row in range(min(rows, len(self.dataset)))]
        return Collator.of(supervision, layout_of(supervision, taught))(samples)

    def prompts(self, rows: int = ROWS) -> dict[str, Tensor]:
        """The first questions of the first conversations, padded on the left, on the model's device."""
        chosen = []
        for row in range(min(rows, len(self.dataset))):
            sample = self.dataset.load(self.dataset.conversations[row])
            start, _ = sample.encoded.answers[0]
            chosen.append(Prompt(sample.encoded.input_ids[:start], sample.pixels, sample.image_sizes))
        return batch_prompts(self.dataset.supervision, chosen, self.model.device)


class Subjects:
    """demo-llava on a device in a dtype; its reduced models share their weights."""

    def __init__(
        self, data: DataConfig, device: str, dtype: torch.dtype = torch.float32, *, four_bit: bool = False
    ) -> None:
        spec = ReleaseSpec(str(DEMO_MODEL), dtype=dtype, load_in_4bit=four_bit)
        self.data, self.release = data, open_release(spec)
        model, _ = load_release(self.release, Reductions())
        self.whole = model.to(device)

    def reduced(self, reductions: Reductions) -> Subject:
        model = share_weights(self.whole, reductions)
        return Subject(model, held_out_set(self.data, release_processor(self.release, model.config)))

    def alone(self, reductions: Reductions) -> Subject:
        """As `reduced`, with weights of its own: for what trains them."""
        subject = self.reduced(reductions)
        return Subject(copy.deepcopy(subject.model), subject.dataset)


def on_both(proof: Proof, data: DataConfig) -> tuple[Subjects, Subjects]:
    """In float32: on the CPU, and on the device that is proven."""
    whole_float32()
    return Subjects(data, "cpu"), Subjects(data, proof.settings.device)


def gap(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest expected value."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    if found.shape != expected.shape:
        raise ValueError(f"shape {tuple(found.shape)} where the CPU gives {tuple(expected.shape)}")
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def near(loss: float, share: float) -> float:
    """How far another loss may be from this one; near zero, as demo-llava's with all tokens is, more than a share."""
    return share * loss + 0.1 * share


def small(value: float) -> str:
    return f"{value:.1e}"
