"""Training on videos with a small LLaVA-OneVision: from rows to the loss, mixed with images and text."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_videos import write_frames, write_video
from PIL import Image
from runs import checkpoint_tensors, copy_until, output_of, run_here, start_there, write_recipe
from tiny_onevision import SIDE, write_onevision
from torch import Tensor
from torch.utils.data import DataLoader

from shortzip.data.dataset import Collator, ConversationDataset, MicroBatch, Sample
from shortzip.data.drops import BadSample
from shortzip.data.instructions import read_instructions
from shortzip.data.supervision import Supervision
from shortzip.data.videos import Sampling
from shortzip.reduction.reductions import Reductions
from shortzip.train.inputs.identity import data_identity
from shortzip.train.inputs.loading import SharingCollator, layout_of
from shortzip.train.inputs.videos import sampling_of
from shortzip.train.preparation import refuse_videos
from shortzip.train.release.loading import load_release
from shortzip.train.run.checkpoint import CheckpointError
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.config import DataConfig, TuneConfig, VisionZipConfig
from shortzip.train.settings.distill import DistillConfig
from shortzip.train.step.objective import SupervisedLoss, train_only_projector
from shortzip.train.step.teacher import Teacher

REDUCTIONS = Reductions({"dominant": 4, "contextual": 2}, {"layers": [1, 3]})
FRAMES = 3


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onevision(tmp_path_factory.mktemp("onevision") / "tiny-hf")


def write_rows(folder: Path) -> Path:
    """Videos of several kinds, beside and among images and text."""
    write_video(folder / "clips" / "a.mp4", 9, size=(60, 44))
    write_video(folder / "clips" / "b.webm", 4, codec="libvpx-vp9", first=90)
    write_frames(folder / "frames", 5)
    Image.new("RGB", (58, 50), (200, 40, 90)).save(folder / "1.png")
    Image.new("RGB", (30, 30), (9, 200, 60)).save(folder / "2.png")

    def row(name: str, text: str, answer: str = "it is red", **media: Any) -> dict[str, Any]:
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
        return {"id": name, **media, "conversations": turns}

    rows = [
        row("video", "<video>\nname the colour", video="clips/a.mp4"),
        row("image", "<image>\nname the colour", "it is blue", image="1.png"),
        row("text", "hello, what is your name?", "a text without a picture"),
        row("two", "<video><video>\nis it bright?", "yes", video=["clips/b.webm", "frames"]),
        row("both", "<image>\n<video>\nis it bright?", "no", image="2.png", video="clips/b.webm"),
        row("other way", "<video>\n<image>\nis it bright?", "no", image="2.png", video="clips/a.mp4"),
        row("frames", "<image>\nname the colour", "it is white", video=["frames/frame0.png", "frames/frame4.png"]),
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("videos"))


def dataset_of(processor: Any, rows: Path, fps: float | None = None) -> ConversationDataset:
    supervision = Supervision(processor, max_length=None, sampling=Sampling(FRAMES, fps))
    return ConversationDataset(read_instructions(rows), supervision, rows.parent)


def batch_of(dataset: ConversationDataset, *numbers: int) -> MicroBatch:
    samples = [dataset[number] for number in numbers or range(len(dataset))]
    assert all(isinstance(sample, Sample) for sample in samples)
    return Collator.of(dataset.supervision, layout_of(dataset.supervision))(samples)


def plain_inputs(dataset: ConversationDataset, number: int) -> dict[str, Tensor]:
    """One row, as transformers' processor and model take it."""
    batch = batch_of(dataset, number).inputs
    inputs = {key: tensor for key, tensor in batch.items() if key not in ("labels", "video_frames")}
    if "video_frames" in batch:
        counts = batch["video_frames"].tolist()
        assert len(set(counts)) == 1
        inputs["pixel_values_videos"] = inputs["pixel_values_videos"].unflatten(0, (-1, counts[0]))
    return inputs


def test_rows_are_counted_with_all_that_their_videos_give(release: Path, rows: Path) -> None:
    _, processor = load_release(str(release), REDUCTIONS)
    dataset = dataset_of(processor, rows)
    assert dataset.videos.tolist() == [1, 0, 0, 2, 1, 1, 1]
    assert dataset.frames.tolist() == [3, 0, 0, 6, 3, 3, 3]
    for number, row in enumerate(dataset.conversations):
        sample = dataset[number]
        assert isinstance(sample, Sample)
        ids = sample.encoded.input_ids
        assert len(ids) == dataset.lengths[number]
        assert ids.count(processor.video_token_id) == len(row.videos) * (FRAMES * 6 + 1)
        assert sample.frame_counts == [FRAMES] * len(row.videos)
        assert all(frames.shape == (FRAMES, 3, SIDE, SIDE) for frames in sample.frames)
        marked = [token for token, label in zip(ids, sample.encoded.labels, strict=True) if label != -100]
        assert processor.video_token_id not in marked


def test_prompts_are_those_of_the_processor(release: Path, rows: Path) -> None:
    _, processor = load_release(str(release), REDUCTIONS)
    dataset = dataset_of(processor, rows)
    sample = dataset[3]
    assert isinstance(sample, Sample)
    content = [{"type": "video"}, {"type": "video"}, {"type": "text", "text": "is it bright?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    frames = [[Image.new("RGB", (9, 9))] * FRAMES] * 2
    theirs = processor(text=text, videos=frames, return_tensors="pt")["input_ids"][0].tolist()
    assert sample.encoded.input_ids[: len(theirs)] == theirs


@pytest.mark.parametrize("frozen", [None, {"layers": [1, 3]}])
@pytest.mark.parametrize("budget", [{"dominant": 4, "contextual": 2}, None])
def test_a_mixed_batch_s_loss_is_that_of_the_model_row_by_row(
    release: Path, rows: Path, budget: Any, frozen: Any
) -> None:
    """Images, videos and text in one batch, packed and whole, against the model's own forward of each row."""
    model, processor = load_release(str(release), Reductions(budget, frozen))
    train_only_projector(model, torch.float32)
    dataset = dataset_of(processor, rows)
    expected = torch.zeros(())
    for number in range(len(dataset)):
        labels = batch_of(dataset, number).inputs["labels"]
        logits = model(**plain_inputs(dataset, number)).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
        )
        expected = expected + loss
    expected.backward()
    wanted = model.model.multi_modal_projector.linear_1.weight.grad.clone()
    assert float(wanted.abs().max()) > 0
    for plain in (False, True):
        model.zero_grad()
        loss = SupervisedLoss(model, plain=plain, videos=True)(batch_of(dataset))
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        found = model.model.multi_modal_projector.linear_1.weight.grad
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_videos_of_different_lengths_in_one_batch(release: Path, rows: Path) -> None:
    """With fps a short video has fewer frames: what one batch gives is what its rows give alone."""
    model, processor = load_release(str(release), REDUCTIONS)
    dataset = dataset_of(processor, rows, fps=1)
    batch = batch_of(dataset)
    assert batch.inputs["video_frames"].tolist() == [3, 1, 3, 1, 3, 2]
    with torch.no_grad():
        whole = SupervisedLoss(model)(batch).item()
        alone = sum(SupervisedLoss(model)(batch_of(dataset, number)).item() for number in range(len(dataset)))
    assert whole == pytest.approx(alone, rel=1e-5)


def test_a_micro_batch_without_videos_runs_an_empty_one_where_others_have_some(
    release: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process calls the same modules as often, whatever its rows hold: sharded weights are gathered then."""
    model, processor = load_release(str(release), REDUCTIONS)
    dataset = dataset_of(processor, rows)
    calls: list[str] = []
    for name in ("vision_tower", "multi_modal_projector"):
        module = getattr(model.model, name)
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    counted = []
    with torch.no_grad():
        for numbers in ((0,), (1,), (2,), (4,), (0, 1, 2)):
            calls.clear()
            SupervisedLoss(model, plain=True, videos=True)(batch_of(dataset, *numbers))
            counted.append(calls.count("multi_modal_projector"))
    assert counted == [2] * 5


def test_a_teacher_too_reads_an_empty_video_where_others_have_some(release: Path, rows: Path) -> None:
    model, processor = load_release(str(release), REDUCTIONS)
    dataset, teacher = dataset_of(processor, rows), Teacher(model, torch.float32)
    calls: list[str] = []
    model.model.vision_tower.register_forward_pre_hook(lambda *_: calls.append("tower"))
    teacher.projector.register_forward_pre_hook(lambda *_: calls.append("projector"))
    collator = Collator.of(dataset.supervision, layout_of(dataset.supervision, taught=True))
    taught = SupervisedLoss(model, plain=True, videos=True, teacher=teacher, distill=DistillConfig(weight=0.5))
    for numbers in ((0,), (1,), (2,), (4,), (0, 1, 2)):
        calls.clear()
        with torch.no_grad():
            assert torch.isfinite(taught(collator([dataset[number] for number in numbers])))
        assert calls == ["tower", "projector"] * 2, numbers


def test_a_teacher_reads_videos_whole(release: Path, rows: Path) -> None:
    """Taught by itself at all visual tokens, a model that reduces nothing learns nothing: the divergence is zero."""
    model, processor = load_release(str(release), Reductions())
    train_only_projector(model, torch.float32)
    dataset = dataset_of(processor, rows)
    samples: Any = [dataset[number] for number in (0, 3, 4, 5, 6)]
    supervision = dataset.supervision
    batch = Collator.of(supervision, layout_of(supervision, taught=True))(samples)
    teacher, distill = Teacher(model, torch.float32), DistillConfig(weight=1.0, temperature=1.0)
    for plain in (False, True):
        loss = SupervisedLoss(model, plain=plain, teacher=teacher, distill=distill, videos=True)(batch)
        assert abs(loss.item()) < 1e-3
    reduced, processor = load_release(str(release), REDUCTIONS)
    train_only_projector(reduced, torch.float32)
    dataset = dataset_of(processor, rows)
    supervision = dataset.supervision
    samples = [dataset[number] for number in (0, 3, 4, 5, 6)]
    batch = Collator.of(supervision, layout_of(supervision, taught=True))(samples)
    teacher = Teacher(reduced, torch.float32)
    losses = [
        SupervisedLoss(reduced, plain=plain, teacher=teacher, distill=distill, videos=True)(batch).item()
        for plain in (False, True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] > 0.01


def test_the_release_s_own_number_of_frames(release: Path, tiny_release: Path) -> None:
    _, processor = load_release(str(release), REDUCTIONS)
    assert sampling_of(processor) == Sampling(32)
    assert sampling_of(processor, 8, 2.0) == Sampling(8, 2.0)
    _, without = load_release(str(tiny_release), Reductions())
    assert sampling_of(without) is None
    with pytest.raises(ValueError, match=r"frames of a video is 8: a LLaVA-1\.5 takes no videos"):
        sampling_of(without, 8)


def test_data_workers_decode_the_frames(release: Path, rows: Path) -> None:
    _, processor = load_release(str(release), REDUCTIONS)
    dataset = dataset_of(processor, rows)
    collate = SharingCollator(Collator.of(dataset.supervision, layout_of(dataset.supervision)))
    batches = [[0, 1, 2], [3, 4], [5, 6]]
    loader: Any = DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=2)
    for numbers, found in zip(batches, loader, strict=True):
        expected = batch_of(dataset, *numbers)
        assert found.inputs.keys() == expected.inputs.keys()
        assert all(torch.equal(found.inputs[key], expected.inputs[key]) for key in expected.inputs)
        assert found.inputs["pixel_values_videos"].is_shared()
        assert torch.equal(found.layout.is_video, expected.layout.is_video)


# ---------------------------------------------------------------------------------------------------------- whole runs


def recipe_for(path: Path, release: Path, rows: Path, **keys: Any) -> Path:
    data = {"video_frames": FRAMES, "num_workers": 0, **keys.pop("data", {})}
    keys = {
        "max_steps": 4,
        "warmup_ratio": 0.0,
        "global_batch_size": 4,
        "per_device_train_batch_size": 2,
        "save_steps": 1,
        **keys,
    }
    return write_recipe(path, release, rows, data=data, final_evaluation=False, **keys)


@pytest.mark.slow
def test_a_run_on_videos_resumes_bit_for_bit_and_its_cached_twin_is_the_same(
    release: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_for(tmp_path / "recipe.yaml", release, rows)
    whole = run_here(recipe, tmp_path / "whole")
    said = capsys.readouterr().out
    assert "7 conversations, 5 with videos (18 frames), 1 of them without an image" in " ".join(said.split())
    continued = copy_until(whole, tmp_path / "continued", 2)
    run_here(recipe, continued, "--resume_from_checkpoint", "latest")
    for step in (3, 4):
        before, after = checkpoint_tensors(whole, step), checkpoint_tensors(continued, step)
        assert all(torch.equal(before[name], after[name]) for name in before)
    cached = recipe_for(tmp_path / "cached.yaml", release, rows, data={"cache_features": str(tmp_path / "cache")})
    capsys.readouterr()
    twin = run_here(cached, tmp_path / "twin")
    assert "features: 6 images and videos computed" in capsys.readouterr().out
    again = run_here(cached, tmp_path / "again")
    assert "features: 0 images and videos computed" in capsys.readouterr().out
    for other in (twin, again):
        before, after = checkpoint_tensors(whole, 4), checkpoint_tensors(other, 4)
        for name in before:
            torch.testing.assert_close(before[name], after[name], rtol=1e-4, atol=1e-6)


def test_all_that_a_run_s_videos_are_is_in_its_identity(release: Path, tmp_path: Path) -> None:
    _, processor = load_release(str(release), REDUCTIONS)
    rows = write_rows(tmp_path)
    before = data_identity(dataset_of(processor, rows))

    def changed() -> list[str]:
        now = data_identity(dataset_of(processor, rows))
        return [part for part in before if now[part] != before[part]]

    assert changed() == []
    for file in ("clips/a.mp4", "frames/frame4.png"):
        content = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert changed() == ["the videos"], file
        (tmp_path / file).write_bytes(content)
    other = data_identity(dataset_of(processor, rows, fps=1.0))
    assert [part for part in before if other[part] != before[part]] == ["which frames of videos are seen"]
    rows.write_text(rows.read_text().replace("clips/b.webm", "clips/../clips/b.webm"))
    assert changed() == ["the names of the videos"]


@pytest.mark.slow
def test_a_run_is_not_continued_on_other_frames(release: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows")
    recipe = recipe_for(tmp_path / "recipe.yaml", release, rows, max_steps=1)
    run = run_here(recipe, tmp_path / "run")
    resume = ("--resume_from_checkpoint", "latest")
    with pytest.raises(CheckpointError, match="video_frames was 3 and is 2"):
        run_here(recipe, run, *resume, "--data.video_frames", "2")
    with pytest.raises(CheckpointError, match=r"video_fps was None and is 1\.0"):
        run_here(recipe, run, *resume, "--data.video_fps", "1")
    content = (rows.parent / "clips" / "b.webm").read_bytes()
    write_video(rows.parent / "clips" / "b.webm", 4, codec="libvpx-vp9", first=120)
    with pytest.raises(CheckpointError, match=r"the videos \(1 of 4, such as clips/b\.webm\)"):
        run_here(recipe, run, *resume)
    (rows.parent / "clips" / "b.webm").write_bytes(content)
    Image.new("RGB", (48, 32)).save(rows.parent / "frames" / "frame4.png")
    with pytest.raises(CheckpointError, match=r"the videos \(2 of 4, such as frames\)"):
        run_here(recipe, run, *resume)


def test_what_is_not_done_with_videos_is_refused(release: Path, rows: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path / "recipe.yaml", release, rows)
    with pytest.raises(ValueError, match="budget_schedule is set, and 5 rows have videos"):
        run_here(recipe, tmp_path / "run", "--budget_schedule.start", "10")
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.slow
def test_a_damaged_video_is_a_bad_sample_that_is_listed(release: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows")
    file = rows.parent / "clips" / "a.mp4"
    file.write_bytes(file.read_bytes()[:500])
    recipe = recipe_for(tmp_path / "recipe.yaml", release, rows, max_steps=2)
    with pytest.raises(BadSample, match=r"clips/a\.mp4: cannot be decoded"):
        run_here(recipe, tmp_path / "raised")
    settings = ("--data.on_bad_sample", "skip", "--data.max_bad_fraction", "0.9", "--max_steps", "2")
    run = run_here(recipe, tmp_path / "skipped", *settings)
    dropped = [json.loads(line) for line in (run / "dropped.jsonl").read_text().splitlines()]
    assert {drop["sample_id"] for drop in dropped} == {"video", "other way"}
    assert {drop["reason"] for drop in dropped} == {"unreadable_video"}


@pytest.mark.slow
def test_a_release_without_videos_trains_on_the_other_rows_and_says_so(
    tiny_release: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_for(tmp_path / "recipe.yaml", tiny_release, rows, max_steps=1, data={"video_frames": None})
    run = run_here(recipe, tmp_path / "run")
    said = " ".join(capsys.readouterr().out.split())
    assert "5 rows were left out: 5 video" in said
    assert len((run / "dropped.jsonl").read_text().splitlines()) == 5
    with pytest.raises(ValueError, match="takes no videos"):
        run_here(recipe, tmp_path / "asked", "--data.video_frames", "3")


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}], ids=["ddp", "fsdp2"])
def test_two_processes_give_the_run_of_one(release: Path, rows: Path, tmp_path: Path, engine: dict[str, str]) -> None:
    """Also where one has videos in a micro-batch and the other has none."""
    recipe = recipe_for(tmp_path / "recipe.yaml", release, rows, max_steps=3, save_steps=3, global_batch_size=6)
    alone = run_here(recipe, tmp_path / "alone")
    process = start_there(recipe, tmp_path / "two", processes=2, variables=engine)
    said = output_of(process)
    assert process.returncode == 0, said[-3000:]
    before, after = checkpoint_tensors(alone, 3), checkpoint_tensors(tmp_path / "two", 3)
    for name in before:
        torch.testing.assert_close(before[name], after[name], rtol=1e-4, atol=1e-6)


def test_held_out_videos_are_not_kept_under_several_budgets(release: Path, rows: Path, tmp_path: Path) -> None:
    _, processor = load_release(str(release), REDUCTIONS)
    some = dataset_of(processor, rows)
    none = ConversationDataset([row for row in some.conversations if not row.videos], some.supervision, rows.parent)
    several = {"budgets": ["4+2", "6+3"], "visionzip": VisionZipConfig(dominant=4, contextual=2)}
    plain = TuneConfig(model="m", data=DataConfig("rows.json"), output_dir=str(tmp_path), **several)
    cached = replace(plain, data=replace(plain.data, cache_features=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"budgets is set, and 5 rows have videos.*: set it to \[\]"):
        refuse_videos(plain, some, None)
    with pytest.raises(ConfigError, match="and budgets are set, and 5 held-out rows have videos"):
        refuse_videos(cached, none, some)
    for config, held_out in ((plain, some), (cached, none), (cached, None)):
        refuse_videos(config, none, held_out)
