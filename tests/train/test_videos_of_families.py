"""Every family that takes videos is trained on them the same way: placeholders, the step, caches and evaluation."""

import json
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from made_videos import picture
from test_videos import batch_of, plain_inputs, write_rows

from shortzip.data.dataset import ConversationDataset, Sample
from shortzip.data.instructions import read_instructions
from shortzip.data.pixels import frames_pixels
from shortzip.data.supervision import Supervision
from shortzip.reduction.families import all_families, family_of
from shortzip.reduction.flops import visual_tokens_of_video
from shortzip.reduction.reductions import Reductions
from shortzip.train.inputs.feature_cache import FeatureCache, features_identity
from shortzip.train.inputs.feature_filling import fill_cache
from shortzip.train.inputs.prompts import batch_prompts, encode_prompt
from shortzip.train.inputs.videos import sampling_of
from shortzip.train.release.loading import load_release
from shortzip.train.release.opening import open_release, release_content
from shortzip.train.release.towers import leave_out_towers
from shortzip.train.run.processes import StopRequest
from shortzip.train.run.report import Reporter
from shortzip.train.run.session import Session
from shortzip.train.serving.answers_file import Answerer, read_questions
from shortzip.train.step.objective import SupervisedLoss, train_only_projector
from shortzip.train.step.places import unreduced

WITH_VIDEOS = [family.name for family in all_families() if family.video_frames]
BUDGET = {"dominant": 4, "contextual": 2}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module", params=WITH_VIDEOS)
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "tiny"
    import_module(f"shortzip.scripts.tiny.{request.param}").write_release(folder)
    return folder


def dataset_of(model: Any, processor: Any, rows: Path) -> ConversationDataset:
    sampling = sampling_of(processor, 3 if family_of(model.config.model_type).any_frames else None)
    supervision = Supervision(processor, max_length=None, sampling=sampling)
    return ConversationDataset(read_instructions(rows), supervision, rows.parent)


def test_the_known_families_take_videos() -> None:
    assert {"llava_onevision", "llava_next_video", "video_llava", "temporal_video_llava"} <= set(WITH_VIDEOS)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("budget", [BUDGET, pytest.param(None, marks=pytest.mark.slow)])
def test_a_mixed_batch_is_trained_on_as_the_model_reads_its_rows(
    release: Path, rows: Path, budget: Any, positions: str
) -> None:
    reductions = Reductions(budget, positions=positions)
    if positions == "original" and budget is not None and "onevision" in str(release):
        with pytest.raises(ValueError, match="positions"):
            load_release(str(release), reductions)
        return
    model, processor = load_release(str(release), reductions)
    train_only_projector(model, torch.float32)
    dataset = dataset_of(model, processor, rows)
    expected = torch.zeros(())
    for number in range(len(dataset)):
        labels = batch_of(dataset, number).inputs["labels"]
        logits = model(**plain_inputs(dataset, number)).logits[:, :-1].flatten(0, 1)
        targets = labels[:, 1:].flatten()
        expected = expected + torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
    expected.backward()
    wanted = model.model.multi_modal_projector.linear_1.weight.grad.clone()
    assert float(wanted.abs().max()) > 0
    for plain in (False, True):
        model.zero_grad()
        loss = SupervisedLoss(model, plain=plain, videos=True)(batch_of(dataset))
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        found = model.model.multi_modal_projector.linear_1.weight.grad
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_placeholders_are_what_the_family_says_of_frames(release: Path, rows: Path) -> None:
    for budget in (BUDGET, None):
        model, processor = load_release(str(release), Reductions(budget))
        dataset = dataset_of(model, processor, rows)
        sample = dataset[0]
        assert isinstance(sample, Sample)
        (frames,) = sample.frame_counts
        expected = visual_tokens_of_video(model.config, budget, frames)
        assert sample.encoded.input_ids.count(processor.video_token_id) == expected
        assert len(sample.encoded.input_ids) == dataset.lengths[0]


def test_prompts_with_videos_and_images_are_generated_in_batches_as_alone(release: Path, rows: Path) -> None:
    model, processor = load_release(str(release), Reductions(BUDGET))
    dataset = dataset_of(model, processor, rows)
    prompts = []
    for number in (0, 3, 6):
        sample: Any = dataset[number]
        turns = dataset.conversations[number].turns[:1]
        prompts.append(encode_prompt(dataset.supervision, turns, [], videos=sample.frames))
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}

    def said(*some: Any) -> list[list[int]]:
        inputs = batch_prompts(dataset.supervision, some, model.device)
        return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()

    assert said(*prompts) == [said(prompt)[0] for prompt in prompts]


@pytest.mark.parametrize("reduction", ["shortv", "fastv", "original"])
def test_embeddings_into_which_videos_are_merged_are_told_by_the_processors_token_types(
    release: Path, reduction: str
) -> None:
    """Those that it writes at tokens of videos are 2."""
    if reduction == "original" and "onevision" in str(release):
        return  # refused, as above
    keys: dict[str, Any] = {
        "shortv": {"shortv": {"layers": [1, 3]}}, "fastv": {"fastv": {"layer": 2, "keep": 0.5}},
        "original": {"positions": "original"},
    }[reduction]  # fmt: skip
    model, processor = load_release(str(release), Reductions(BUDGET, **keys))
    family = family_of(model.config.model_type)
    count = 3 if family.any_frames else family.frames_read(model.config)
    text, video = "<video>\nname the colour", [picture(number) for number in range(count)]
    inputs = dict(processor(text=text, videos=[video], return_tensors="pt", return_mm_token_type_ids=True))
    types, ids = inputs.pop("mm_token_type_ids"), inputs["input_ids"]
    assert types.unique().tolist() == [0, 2]
    with torch.no_grad():
        expected = model(**inputs).logits
        (features,) = model.model.get_video_features(inputs["pixel_values_videos"]).pooler_output
        embeds = model.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter((ids == processor.video_token_id).unsqueeze(-1), features)
        merged = {"inputs_embeds": embeds, "mm_token_type_ids": types}
        if reduction == "original":
            with pytest.raises(ValueError, match="do not say where the visual tokens"):
                model(**merged)
        else:
            torch.testing.assert_close(model(**merged).logits, expected, rtol=0, atol=1e-5)


def test_frames_by_themselves_have_the_pixels_that_they_have_among_others(release: Path) -> None:
    model, processor = load_release(str(release), Reductions(BUDGET))
    family = family_of(model.config.model_type)
    count = 4 if family.any_frames else family.frames_read(model.config)
    frames = [picture(number) for number in range(count)]
    together = processor.video_processor([frames])[0]
    assert torch.equal(frames_pixels(iter(frames), processor), together)


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_from_cached_features_loss_and_gradient_are_the_same(
    release: Path, rows: Path, tmp_path: Path, positions: str
) -> None:
    """And another sampling, or another file, has no features there."""
    if positions == "original" and "onevision" in str(release):
        return  # refused, as above
    model, processor = load_release(str(release), Reductions(BUDGET, positions=positions))
    train_only_projector(model, torch.float32)
    dataset = dataset_of(model, processor, rows)
    loss = SupervisedLoss(model)(batch_of(dataset))
    loss.backward()
    wanted = model.model.multi_modal_projector.linear_1.weight.grad.clone()
    cache = FeatureCache(tmp_path, features_identity(model, processor))
    session = Session(Accelerator(cpu=True), Reporter(is_main=False), StopRequest())
    assert fill_cache(cache, model, processor, [dataset], session, batch_size=2) == 6
    assert fill_cache(cache, model, processor, [dataset], session) == 0
    sampling = dataset.supervision.sampling
    assert sampling is not None
    assert cache.find_video("clips/a.mp4", rows.parent, sampling) is not None
    assert cache.find_video("clips/a.mp4", rows.parent, replace(sampling, frames=sampling.frames + 1)) is None
    assert cache.find_video("clips/a.mp4", rows.parent, replace(sampling, fps=1.0)) is None
    leave_out_towers(model)
    dataset.features = cache
    batch = batch_of(dataset)
    assert not any(name.startswith("pixel_values") for name in batch.inputs)
    for plain in (False, True):
        model.zero_grad()
        cached = SupervisedLoss(model, plain=plain, videos=True)(batch)
        cached.backward()
        assert cached.item() == pytest.approx(loss.item(), rel=1e-4)
        found = model.model.multi_modal_projector.linear_1.weight.grad
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_frames_read_otherwise_are_another_cache(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = load_release(str(release), Reductions(BUDGET))
    before = features_identity(model, processor)
    assert before == features_identity(model, processor)
    settings = {**processor.frames_read_by(), "side": 7}
    monkeypatch.setattr(processor, "frames_read_by", lambda: settings)
    assert features_identity(model, processor) != before


def test_settings_of_frames_are_part_of_what_a_release_is_recognised_by(release: Path, tmp_path: Path) -> None:
    """Answers and evaluations are kept under it."""
    copy = shutil.copytree(release, tmp_path / "copy")
    before = release_content(open_release(str(copy)))
    path = copy / "video_preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_mean": [0.1] * 3} if path.is_file() else {}))
    assert release_content(open_release(str(copy))) != before


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_a_prompt_with_a_video_is_as_long_as_the_positions_that_it_takes(
    release: Path, rows: Path, positions: str, tmp_path: Path
) -> None:
    if positions == "original" and "onevision" in str(release):
        return  # refused, as above
    model, processor = load_release(str(release), Reductions(BUDGET, positions=positions))
    supervision = dataset_of(model, processor, rows).supervision
    (tmp_path / "asked.json").write_text(json.dumps([{"question_id": 7, "text": "name it", "video": "clips/a.mp4"}]))
    questions = read_questions(str(tmp_path / "asked.json"))
    counting = unreduced(supervision) if positions == "original" else supervision
    assert supervision.sampling is not None
    longest = len(counting.prompt(questions[0], frames=[supervision.sampling.frames])) + 4
    answerer = Answerer(model, supervision, str(rows.parent), max_new_tokens=4)
    for limit, error in ((longest, None), (longest - 1, f"more than {longest - 1} positions")):
        answerer.longest = limit
        (said,) = (said[0] for said in answerer.answer(questions, [0], 1))
        assert said.error is None if error is None else error in str(said.error)
