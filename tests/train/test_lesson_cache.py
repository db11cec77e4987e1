"""Lessons that are kept: what the teacher says is said once, belongs to its row, and is the same in every step."""

import copy
import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from runs import checkpoint_tensors, run_here, write_recipe
from safetensors.torch import load_file, save_file
from tiny import write_next_release, write_release
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from shortzip.data.dataset import Collator, ConversationDataset
from shortzip.data.drops import BadSample
from shortzip.data.errors import UserError
from shortzip.data.instructions import read_instructions
from shortzip.data.kept import identity_of
from shortzip.data.supervision import Supervision
from shortzip.reduction.reductions import Reductions
from shortzip.scripts.estimate_cost import estimate, known_release
from shortzip.train.inputs import lesson_cache
from shortzip.train.inputs.feature_cache import FeatureCache
from shortzip.train.inputs.identity import release_identity
from shortzip.train.inputs.lesson_cache import LessonCache, lessons_identity, row_key
from shortzip.train.inputs.lesson_filling import Asked, fill_lessons
from shortzip.train.inputs.loading import layout_of
from shortzip.train.inputs.samples import check_positions
from shortzip.train.inputs.shards import DamagedShard
from shortzip.train.release.loading import load_release
from shortzip.train.release.opening import open_release
from shortzip.train.run.processes import StopRequest
from shortzip.train.run.report import Reporter
from shortzip.train.run.session import Session
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import load_config
from shortzip.train.settings.commands import EstimateConfig
from shortzip.train.settings.distill import DistillConfig
from shortzip.train.step.adapters import ProjectorAdapter, adapter_config
from shortzip.train.step.flops import StepFlops
from shortzip.train.step.memory import TrainingStep, training_step_memory
from shortzip.train.step.micro_batch import StepEstimate
from shortzip.train.step.objective import SupervisedLoss, count_supervised, projector_parameters, train_only_projector
from shortzip.train.step.teacher import Teacher
from shortzip.train.step.teaching_cost import teacher_bytes

BUDGET, HEAT, DISTILL = {"dominant": 5, "contextual": 3}, 2.0, DistillConfig(0.4, 2.0)


def session() -> Session:
    return Session(Accelerator(cpu=True), Reporter(is_main=False), StopRequest())


def dataset_of(instructions: Path, processor: Any, rows: slice = slice(14)) -> ConversationDataset:
    return ConversationDataset(read_instructions(instructions)[rows], Supervision(processor), instructions.parent)


def filled(root: Path, folder: Path, model: Any, dataset: ConversationDataset, **options: Any) -> tuple[Any, int]:
    release = open_release(str(folder))
    identity = lessons_identity(release_identity(release), model, dataset.supervision.processor, HEAT, False)
    cache = LessonCache(root, identity)
    asked = Asked(model, release, torch.device("cpu"), HEAT)
    return cache, fill_lessons(cache, dataset, asked, session(), **options)


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def kept(request: Any, tiny_release: Path, tiny_instructions: Path, tmp_path_factory: Any) -> tuple[Any, ...]:
    """A model, its rows with their lessons, the release; the projector has moved on since."""
    folder = tiny_release
    if request.param == "llava_next":
        folder = write_next_release(tmp_path_factory.mktemp("next"))
    model, processor = load_release(str(folder), Reductions(BUDGET, {"layers": [1, 2]}))
    train_only_projector(model, torch.float32)
    with torch.no_grad():  # whatever the student's projector is by now: the lessons are the release's
        for parameter in projector_parameters(model).values():
            parameter.add_(torch.full_like(parameter, 0.01))
    dataset = dataset_of(tiny_instructions, processor)
    dataset.lessons, _ = filled(tmp_path_factory.mktemp("lessons"), folder, model, dataset)
    return model, dataset, folder


def batch_of(dataset: ConversationDataset, rows: Any) -> Any:
    lay_out = layout_of(dataset.supervision, taught=True, asked=False)
    return Collator.of(dataset.supervision, lay_out)([dataset[row] for row in rows])


def test_a_lesson_is_what_transformers_own_model_says(kept: tuple[Any, ...]) -> None:
    model, dataset, folder = kept
    next_ = "Next" in type(model).__name__
    plain = (LlavaNextForConditionalGeneration if next_ else LlavaForConditionalGeneration).from_pretrained(folder)
    unreduced, lessons = layout_of(dataset.supervision, taught=True), dataset.lessons
    dataset.lessons = None
    for row in (0, 3):  # one image, two images
        batch = Collator.of(dataset.supervision, unreduced)([dataset[row]])
        full = batch.layout.full
        images = {key: batch.inputs[key] for key in ("pixel_values", "image_sizes") if key in batch.inputs}
        with torch.no_grad():
            logits = plain.eval()(input_ids=full.input_ids, attention_mask=full.attention_mask, **images).logits
        expected = (logits[:, :-1][full.labels[:, 1:] != -100] / HEAT).log_softmax(-1).topk(64)
        found = lessons.find(dataset[row], dataset.conversations[row].images, dataset)
        torch.testing.assert_close(found["taught_log_probs"], expected.values, rtol=1e-4, atol=1e-4)
        assert (found["taught_ids"] == expected.indices).float().mean() > 0.99  # but for ties
    dataset.lessons = lessons


def gradient(module: SupervisedLoss, dataset: ConversationDataset, cut: list[list[int]]) -> Any:
    batches = [batch_of(dataset, rows) for rows in cut]
    count = sum(count_supervised(batch.inputs["labels"]) for batch in batches)
    module.zero_grad()
    losses = []
    for batch in batches:
        loss = module(batch) / count
        loss.backward()
        losses.append(loss.item())
    return sum(losses), torch.cat(
        [p.grad.flatten() for p in projector_parameters(module.model).values() if p.grad is not None]
    )


@pytest.mark.parametrize("plain", [False, True])
def test_any_cut_gives_the_same_gradient_walked_and_plain(kept: tuple[Any, ...], plain: bool) -> None:
    model, dataset, _ = kept
    loss, whole = gradient(SupervisedLoss(model, distill=DISTILL), dataset, [[0, 1, 2, 3, 4, 5]])
    module = SupervisedLoss(model, distill=DISTILL, plain=plain)
    for cut in ([[4], [5, 0, 3], [], [2, 1]], [[0], [1], [2], [3], [4], [5]]):  # 4 is a text alone
        found_loss, found = gradient(module, dataset, cut)
        assert found_loss == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=2e-5 * whole.abs().max().item())
    labels_alone, _ = gradient(SupervisedLoss(model), dataset, [[0, 1, 2, 3, 4, 5]])
    assert abs(labels_alone - loss) > 1e-3


def test_a_row_is_its_content_whatever_the_budget_and_wherever_it_lies(
    kept: tuple[Any, ...], tiny_instructions: Path, tmp_path: Path
) -> None:
    _, dataset, _ = kept

    def keys(instructions: Path, processor: Any, rows: slice = slice(4)) -> list[str]:
        found = dataset_of(instructions, processor, rows)
        loaded = [found.load(row) for row in found.conversations]
        return [row_key(sample, row.images, found) for sample, row in zip(loaded, found.conversations, strict=True)]

    processor = dataset.supervision.processor
    expected = keys(tiny_instructions, processor)
    assert len(set(expected)) == 4
    other = copy.deepcopy(processor)
    other.visionzip = {"dominant": 3, "contextual": 1}
    assert keys(tiny_instructions, other) == expected
    other.visionzip = None
    assert keys(tiny_instructions, other) == expected
    shutil.copytree(tiny_instructions.parent, tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / tiny_instructions.name
    assert keys(moved, processor) == expected
    rows = json.loads(moved.read_text())
    Image.new("RGB", (20, 28), "red").save(moved.parent / rows[0]["image"])
    rows[1]["conversations"][0]["value"] = "<image>\nis it bright?"
    rows[2]["conversations"][1]["value"] = "no"
    moved.write_text(json.dumps(rows))
    changed = keys(moved, processor)
    assert [a == b for a, b in zip(changed, expected, strict=True)] == [False, False, False, True]


def test_every_input_of_a_lesson_is_part_of_its_identity(tmp_path: Path) -> None:
    folder = write_release(tmp_path / "release")
    model, processor = load_release(str(folder), Reductions(BUDGET))
    identities: list[dict[str, Any]] = []

    def note(heat: float = HEAT, four_bit: bool = False) -> None:
        parts = release_identity(open_release(str(folder)))
        identities.append(lessons_identity(parts, model, processor, heat, four_bit))

    note()
    note(heat=1.0)
    note(four_bit=True)
    for part in (r"language_model.*layers\.1", "vision_tower", "multi_modal_projector", "lm_head"):
        tensors = load_file(folder / "model.safetensors")
        name = next(name for name in sorted(tensors) if re.search(part, name) and tensors[name].is_floating_point())
        tensors[name].view(-1)[0] += 1
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        note()
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.1
    (folder / "config.json").write_text(json.dumps(config))
    note()
    processor.image_processor.do_pad = False
    note()
    model.config.text_config.vocab_size = 40
    note()
    model.to(torch.bfloat16)
    note()
    assert len({identity_of(identity) for identity in identities}) == len(identities)
    model.config.visionzip, model.config.shortv, processor.visionzip = None, {"layers": [1]}, None
    note()
    assert identities[-1] == identities[-2], "neither budget nor frozen layers matter to a teacher"


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_damaged_and_missing_lessons_are_computed_anew_and_no_others(
    tiny_release: Path, tiny_instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr("shortzip.train.inputs.shards.SHARD_ENTRIES", 3)
    monkeypatch.setattr("shortzip.train.inputs.lesson_filling.TOKENS_AT_ONCE", 160)
    model, processor = load_release(str(tiny_release), Reductions(BUDGET))
    dataset = dataset_of(tiny_instructions, processor)
    cache, computed = filled(tmp_path, tiny_release, model, dataset, num_workers=workers)
    assert computed == len(cache) == sum(bool(row.images) for row in dataset.conversations)
    expected = {key: copy.deepcopy(cache.tensors(key)) for key in cache._places}
    shards = sorted(cache.folder.glob("*.safetensors"))
    content = shards[0].read_bytes()
    shards[0].write_bytes(content[:-64] + bytes(64))
    shards[1].unlink()  # as if it had been killed before
    reader = LessonCache(tmp_path, json.loads((cache.folder / "identity.json").read_text()))
    with pytest.raises(DamagedShard, match="its rows are then computed anew"):
        reader.tensors(next(key for key, place in reader._places.items() if place[0] == shards[0].name))
    again, computed = filled(tmp_path, tiny_release, model, dataset, num_workers=workers)
    assert 0 < computed < len(expected)
    assert again._places.keys() == expected.keys()
    for key, lesson in expected.items():
        assert (again.tensors(key)["ids"] == lesson["ids"]).float().mean() > 0.98  # but for ties
        torch.testing.assert_close(again.tensors(key)["log_probs"], lesson["log_probs"])
    with monkeypatch.context() as patched:
        patched.setattr("shortzip.train.inputs.lesson_filling.Teacher", None)
        assert filled(tmp_path, tiny_release, model, dataset, num_workers=workers)[1] == 0


def test_an_image_that_changed_since_is_refused(tiny_release: Path, tiny_instructions: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_instructions.parent, tmp_path / "rows")
    model, processor = load_release(str(tiny_release), Reductions(BUDGET))
    dataset = dataset_of(tmp_path / "rows" / tiny_instructions.name, processor, slice(2))
    dataset.lessons, _ = filled(tmp_path / "lessons", tiny_release, model, dataset)
    assert dataset[0].lesson
    Image.new("RGB", (20, 28), "red").save(tmp_path / "rows" / str(dataset.conversations[0].images[0]))
    with pytest.raises(BadSample, match="has changed since its row's lesson was stored"):
        dataset[0]


class Int8(nn.Module):
    """A linear layer whose weight is no floating-point one, as in 4 bits: what may be called and not be trained."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.scale = float(layer.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter((layer.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states @ (self.weight.to(states.dtype) * self.scale).T


def test_an_adapter_and_quantised_layers_hear_the_release(
    tiny_release: Path, tiny_instructions: Path, tmp_path: Path
) -> None:
    """The lessons are those of the release's own projector, and of its language model as it was loaded."""
    plain, processor = load_release(str(tiny_release), Reductions(BUDGET))
    quantised, _ = load_release(str(tiny_release), Reductions(BUDGET))
    for layer, other in zip(quantised.model.language_model.layers, plain.model.language_model.layers, strict=True):
        for name, part in list(layer.named_modules()):
            if isinstance(part, nn.Linear):
                held = Int8(part)
                layer.set_submodule(name, held)
                other.get_submodule(name).weight.data = held.weight.data * held.scale
    dataset = dataset_of(tiny_instructions, processor, slice(4))
    expected, _ = filled(tmp_path / "expected", tiny_release, plain, dataset)
    train_only_projector(quantised, torch.float32)
    adapter = ProjectorAdapter(quantised, adapter_config("dora", r=4, lora_alpha=8.0))
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.add_(0.1)
    found, computed = filled(tmp_path / "found", tiny_release, quantised, dataset)
    assert computed == len(found) == len(expected) == 4
    for key in expected._places:
        torch.testing.assert_close(found.tensors(key)["log_probs"], expected.tensors(key)["log_probs"])
    dataset.lessons = found
    module = SupervisedLoss(quantised, distill=DISTILL)
    module(batch_of(dataset, range(4))).backward()
    gradients = [parameter.grad for parameter in adapter.parameters.values()]
    assert all(gradient is not None for gradient in gradients)
    assert max(gradient.abs().max().item() for gradient in gradients) > 0


def test_rows_that_the_teacher_cannot_read_whole_are_refused(tiny_release: Path, tiny_instructions: Path) -> None:
    model, processor = load_release(str(tiny_release), Reductions(BUDGET))
    dataset = dataset_of(tiny_instructions, processor)
    longest = int(dataset.lengths.max())
    model.config.text_config.max_position_embeddings = longest
    check_positions(model.config, dataset)
    with pytest.raises(UserError, match=rf"language model's {longest} .*that the teacher reads \(distill\): set data"):
        check_positions(model.config, dataset, taught=True)


def test_shards_are_as_they_were_before_lessons_came(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, {"of": "a test"})
    tokens, chosen = torch.arange(12, dtype=torch.float32).view(1, 4, 3), torch.arange(2).view(1, 2)
    cache.write({"b": (tokens, chosen), "a": (tokens + 1, chosen)})
    (shard,) = cache.folder.glob("*.safetensors")
    assert (cache.folder.name, shard.name) == ("86e25677ac8802fe", "1eb7c54d52831bbfe8942af0.safetensors")
    digest = hashlib.sha256(shard.read_bytes()).hexdigest()
    assert digest == "79569384e13b315750f8cd897000886f950ddac43fbf71424e15b469c4c9076a"


@pytest.fixture
def recipe(tmp_path: Path, tiny_release: Path, tiny_instructions: Path) -> Path:
    folders = {"cache_teacher": str(tmp_path / "lessons"), "cache_features": str(tmp_path / "features")}
    distill = {"weight": 0.5, "temperature": HEAT}
    return write_recipe(
        tmp_path / "recipe.yaml", tiny_release, tiny_instructions, data=folders, distill=distill, max_steps=2
    )


def test_a_second_run_asks_no_teacher_and_runs_no_tower(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run_here(recipe, tmp_path / "first")
    assert "lessons: 0 rows" not in capsys.readouterr().out
    for module in ("preparation", "inputs.lesson_filling"):
        monkeypatch.setattr(f"shortzip.train.{module}.Teacher", None)
    monkeypatch.setattr("shortzip.train.inputs.lesson_filling.load_tower", None)
    monkeypatch.setattr("shortzip.train.inputs.feature_filling.load_tower", None)
    second = run_here(recipe, tmp_path / "second")
    said = capsys.readouterr().out
    assert "lessons: 0 rows computed" in said
    assert "features: 0 images computed" in said
    ours, theirs = checkpoint_tensors(second, 2), checkpoint_tensors(first, 2)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_lessons_of_all_tokens_are_the_teacher_asked_in_the_step(
    tiny_release: Path, tiny_instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = load_release(str(tiny_release), Reductions(BUDGET))
    train_only_projector(model, torch.float32)
    dataset = dataset_of(tiny_instructions, processor, slice(6))
    asked = Collator.of(dataset.supervision, layout_of(dataset.supervision, taught=True))
    module = SupervisedLoss(model, teacher=Teacher(model, torch.float32), distill=DISTILL)
    expected = module(asked([dataset[row] for row in range(6)])).item()
    found = []
    for count in (64, 10_000):
        monkeypatch.setattr(lesson_cache, "TOP_TOKENS", count)
        dataset.lessons, _ = filled(tmp_path, tiny_release, model, dataset)
        found.append(SupervisedLoss(model, distill=DISTILL)(batch_of(dataset, range(6))).item())
        dataset.lessons = None
    assert found[1] == pytest.approx(expected, rel=1e-5)
    assert 0.9 * expected < found[0] < expected, "what the rest hides is left out"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"distill": None}, "data.cache_teacher is .* but distill is null"),
        ({"data.cache_teacher": None}, "distill with data.cache_features .* leaves the teacher without a tower"),
    ],
)
def test_what_does_not_go_together_is_refused(recipe: Path, keys: dict[str, Any], message: str) -> None:
    arguments = [part for key in keys for part in (f"--{key}", "null")]
    with pytest.raises(ConfigError, match=message):
        load_config(["--config", str(recipe), *arguments])


def test_a_run_with_lessons_is_not_continued_by_one_that_asks(recipe: Path) -> None:
    config = load_config(["--config", str(recipe)])
    asks = replace(config, data=replace(config.data, cache_teacher=None, cache_features=None))
    elsewhere = replace(config, data=replace(config.data, cache_teacher="other"))
    assert config.shaping_settings() == elsewhere.shaping_settings()
    assert config.shaping_settings() != asks.shaping_settings()


def test_a_teacher_that_is_asked_costs_its_pass_and_one_that_is_kept_nothing(
    tiny_release: Path, tiny_instructions: Path
) -> None:
    model, processor = load_release(str(tiny_release), Reductions(BUDGET))
    dataset = dataset_of(tiny_instructions, processor)
    alone, taught = StepFlops(model, dataset), StepFlops(model, dataset, taught=True)
    text = next(number for number, row in enumerate(dataset.conversations) if not row.images)
    assert taught([text]) == alone([text])
    assert taught([0]) > 1.5 * alone([0]), "36 visual tokens of 4 instead of 8"
    config, budget = known_release("llava-1.5-7b"), {"text_tokens": 512, "visual_tokens": 64, "micro_batch_size": 4}
    step = TrainingStep(**budget)
    parts = training_step_memory(config, step)
    student = parts.activations + parts.working
    more = teacher_bytes(config, step, 576, student)
    copies = 20_979_712 * 2 + 4 * 512 * 4096 * 2  # the projector and the states, in bfloat16
    assert copies < more < 2**30
    assert teacher_bytes(config, step, 576, 0) > more
    estimate = StepEstimate(config, step, 128)
    limits = estimate.largest(24 * 2**30, True)
    fewer = replace(estimate, taught=576).largest(24 * 2**30, True)
    assert limits is not None
    assert fewer is not None
    assert (fewer.tokens or 0) < (limits.tokens or 0)


def test_the_estimate_counts_a_teacher() -> None:
    (_, alone), (_, taught) = (estimate(EstimateConfig(distill=distill)) for distill in (False, True))
    assert [row.memory.get("teacher") for row in alone] == [None] * 4
    assert all(row.memory["teacher"] > 0 for row in taught)
    assert all(b.training_flops > a.training_flops for a, b in zip(alone, taught, strict=True))
    assert all(
        b.training_bytes == sum(b.memory.values()) > a.training_bytes for a, b in zip(alone, taught, strict=True)
    )
