"""The demo model's training: packed conversations count as if each stood alone, and the script makes a checkpoint."""

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoProcessor, LlavaForConditionalGeneration

from shortzip.data.generated.scenes import sample_scene
from shortzip.scripts.make_demo_model import make
from shortzip.train.demo.language_model import SYSTEM, Writer, answer_logits, measure, questions_for
from shortzip.train.demo.model import DemoModelConfig, build_model, build_tokenizer
from shortzip.train.demo.tower import draw_scenes, normalise, tower_layers


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    return build_model(tokenizer).eval(), Writer(tokenizer)


@torch.no_grad()
def test_packed_conversations_count_as_if_each_stood_alone(untrained):
    model, writer = untrained
    pictures, _ = draw_scenes(5, 2, 1)
    conversations = [questions_for(5, index, 0, 4) for index in range(2)]
    hidden, _ = tower_layers(model.model.vision_tower, normalise(pictures))
    logits, targets, _ = answer_logits(model, hidden[:, 1:], writer.batch(conversations))
    packed = F.cross_entropy(logits, targets, reduction="sum")

    alone, tokens = torch.zeros(()), 0
    for index, row in enumerate(conversations):
        for conversation in row:
            text, answers = f"{SYSTEM} ", []
            for number, (_, question, answer) in enumerate(conversation):
                text += f"USER: {'<image>' * 144 + chr(10) if number == 0 else ''}{question} ASSISTANT: {answer}</s>"
                answers.append(answer)
            ids = torch.tensor([writer.tokenizer(text).input_ids])
            out = model(input_ids=ids, pixel_values=normalise(pictures[index : index + 1])).logits
            _, labels, _ = writer.conversation(conversation)
            labels = torch.tensor(labels)
            supervised = out[0, -len(labels) - 1 : -1][labels != -100]
            alone += F.cross_entropy(supervised, labels[labels != -100], reduction="sum")
            tokens += int((labels != -100).sum())
    assert tokens == len(targets)
    assert packed.item() == pytest.approx(alone.item(), rel=1e-5)


def test_the_tower_is_read_where_llava_reads_it(untrained):
    model, _ = untrained
    pixels = normalise(draw_scenes(5, 2, 1)[0])
    with torch.no_grad():
        hidden, attention = tower_layers(model.model.vision_tower, pixels)
        expected = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(hidden, expected)
    assert attention.shape == (2, 144)


def test_patch_labels_lie_on_their_objects():
    _, labels = draw_scenes(6, 30, 1)
    for index in range(30):
        objects = sample_scene(6, index).objects
        assert int(labels[index, 4].sum()) == len(objects)
        assert len(labels[index, 3].unique()) - 1 == len(objects)


def test_the_script_makes_an_ordinary_checkpoint(tmp_path):
    config = DemoModelConfig(
        output_dir=tmp_path, scenes=12, tower_steps=2, tower_batch=4, lm_steps=2, lm_batch=2,
        conversations=2, processes=1, compile=False, held_out=10,
    )  # fmt: skip
    make(config)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert model.dtype == torch.float32
    processor = AutoProcessor.from_pretrained(tmp_path)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    final = next(entry for entry in entries if entry.get("stage") == "held-out, all visual tokens")
    again = measure(model, Writer(processor.tokenizer), draw_scenes(1, 10, 1)[0], 1)
    assert again["questions"] == final["questions"]
    assert again["exact_match"] == final["exact_match"]
    with pytest.raises(ValueError, match="held-out"):
        make(DemoModelConfig(output_dir=tmp_path, seed=1))
