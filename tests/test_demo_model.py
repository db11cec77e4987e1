"""checkpoints/demo-llava is what the README says: an ordinary LLaVA that looks, and whose CLS attends to objects."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from shortzip.data.generated.scene_questions import ask
from shortzip.data.generated.scenes import CELL, render_scene, sample_scene

FOLDER = Path(__file__).resolve().parents[1] / "checkpoints" / "demo-llava"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
UNSEEN = 77  # a seed that neither training nor the log's held-out scenes use


@pytest.fixture(scope="module")
def demo():
    model = LlavaForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(FOLDER)


@torch.no_grad()
def _share_right(demo, other_picture: bool) -> float:
    """Greedy answers to two questions about each of 48 scenes, asked as any user of transformers asks."""
    model, processor = demo
    prompts, images, truth = [], [], []
    for index in range(48):
        shown = render_scene(sample_scene(UNSEEN, index + 1 if other_picture else index))
        for turn in range(2):
            rng = np.random.default_rng((UNSEEN, index, turn))
            _, question, answer = ask(sample_scene(UNSEEN, index), rng)[0]
            prompts.append(f"{SYSTEM} USER: <image>\n{question} ASSISTANT:")
            images.append(Image.fromarray(shown))
            truth.append(answer)
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    said = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(s.strip() == t for s, t in zip(said, truth, strict=True)) / len(truth)


def test_answers_by_looking(demo):
    assert _share_right(demo, other_picture=False) >= 0.85
    assert _share_right(demo, other_picture=True) < 0.5


def test_size_and_shape(demo):
    model, processor = demo
    config = model.config
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 12_000_000
    assert config.text_config.num_hidden_layers >= 8
    assert (config.vision_config.image_size // config.vision_config.patch_size) ** 2 >= 144
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == config.image_token_id
    text = "Unseen wörds, 数字 and 🏞️ survive a round trip."
    assert processor.tokenizer.decode(processor.tokenizer(text).input_ids, skip_special_tokens=True) == text


@torch.no_grad()
def test_cls_attends_to_objects(demo):
    """VisionZip keeps what CLS attends to: its 16 strongest patches must lie on objects, far beyond chance."""
    from shortzip.reduction import ReducedLlavaForConditionalGeneration

    model = ReducedLlavaForConditionalGeneration.from_pretrained(
        FOLDER, visionzip={"dominant": 17, "contextual": 0}, dtype=torch.float32
    ).eval()
    _, processor = demo
    scenes = [sample_scene(UNSEEN, index) for index in range(40)]
    scenes = [scene for scene in scenes if len(scene.objects) >= 4]
    images = [Image.fromarray(render_scene(scene)) for scene in scenes]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    kept = model.model.get_visual_tokens(pixels).kept
    on_object = []
    for scene, patches in zip(scenes, kept, strict=True):
        cells = {(item.top // CELL, item.left // CELL) for item in scene.objects}
        on_object += [((int(p) // 12) * 8 // CELL, (int(p) % 12) * 8 // CELL) in cells for p in patches]
    assert np.mean(on_object) > 0.9


def test_the_log_is_complete():
    entries = [json.loads(line) for line in (FOLDER / "log.jsonl").read_text().splitlines()]
    assert entries[0]["command"][1] == "scripts/make_demo_model.py"
    assert entries[0]["settings"]["seed"] == 0
    measured = {entry["stage"]: entry for entry in entries if "exact_match" in entry}
    assert measured["held-out, all visual tokens"]["exact_match"] >= 0.85
    assert measured["held-out, another scene's picture"]["exact_match"] < 0.5
    assert all(later["seconds"] >= earlier["seconds"] for earlier, later in pairwise(entries))
