"""A tiny LLaVA that has learned something, for tests that need right answers beside wrong ones."""

from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from shortzip.data.dataset import Collator, ConversationDataset
from shortzip.data.instructions import read_instructions
from shortzip.data.supervision import Supervision
from shortzip.reduction.reductions import Reductions
from shortzip.train.release.loading import load_release
from shortzip.train.step.objective import SupervisedLoss


@pytest.fixture(scope="session")
def learned_release(tiny_release: Path, tiny_instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_release` after some steps of training all its weights with all visual tokens, as a plain LLaVA."""
    model, processor = load_release(str(tiny_release), Reductions())
    dataset = ConversationDataset(
        read_instructions(tiny_instructions), Supervision(processor), tiny_instructions.parent
    )
    collate = Collator.of(dataset.supervision)
    batches = [collate([dataset[index] for index in range(start, start + 10)]) for start in range(0, 40, 10)]
    module = SupervisedLoss(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(60):
        batch = batches[step % len(batches)]
        (module(batch) / (batch.inputs["labels"] != -100).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("learned")
    for path in tiny_release.iterdir():
        if path.name != "model.safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    plain = LlavaForConditionalGeneration.from_pretrained(tiny_release)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    return folder
