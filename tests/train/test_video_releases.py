"""Models that take videos, from both layouts to a tuned checkpoint: loading, training, cached features, publishing."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from finished_runs import finish
from PIL import Image
from runs import run_here, write_recipe
from test_lmms_eval import answer, run_lmms_eval, samples
from torch import Tensor

from shortzip.data.dataset import Collator, ConversationDataset, MicroBatch
from shortzip.data.instructions import Conversation, read_instructions
from shortzip.data.supervision import Supervision
from shortzip.reduction.families import family_named, family_of
from shortzip.reduction.reductions import Reductions
from shortzip.scripts.tiny import llava_next_video as next_video
from shortzip.scripts.tiny import llava_onevision as onevision
from shortzip.train.evaluation.lmms_plugin import write_task
from shortzip.train.inputs.chat import Chat
from shortzip.train.inputs.prompts import batch_prompts, encode_prompt
from shortzip.train.release.layouts import layout_for
from shortzip.train.release.loading import load_processor, load_release
from shortzip.train.release.opening import open_release
from shortzip.train.release.writing import write_reduced_checkpoint
from shortzip.train.step.objective import SupervisedLoss, train_only_projector

REDUCTIONS = Reductions({"dominant": 4, "contextual": 2}, {"layers": [1, 3]})
PICTURE = Image.new("RGB", (58, 50), (200, 40, 90))
QUESTION = "<image>\nname the colour"


class Tiny(NamedTuple):
    """A family's tiny release."""

    write: Callable[[Path], Path]
    write_original: Callable[[Path], Path]
    side: int
    ends: int
    """Tokens of a video beside its frames'."""
    system: str
    """Of what its template says first."""
    architecture: str
    several: bool
    """Whether several images are a list within a list."""


TINY = {
    "llava_onevision": Tiny(
        onevision.write_release, onevision.write_original, onevision.SIDE, 1, "You are a helpful assistant",
        "LlavaQwenForCausalLM", True,
    ),
    "llava_next_video": Tiny(
        next_video.write_release, next_video.write_original, next_video.SIDE, 0, "A chat between a curious user",
        "LlavaLlamaForCausalLM", False,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=TINY)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tiny(family: str) -> Tiny:
    return TINY[family]


@pytest.fixture(scope="module")
def release(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("release") / "tiny-hf")


@pytest.fixture(scope="module")
def loaded(release: Path) -> tuple[Any, Any]:
    return load_release(str(release), REDUCTIONS)


def inputs_for(model: Any, processor: Any, text: str, images: list[Image.Image]) -> dict[str, Tensor]:
    supervision = Supervision(processor, max_length=None)
    return batch_prompts(supervision, [encode_prompt(supervision, [("user", text)], images)], model.device)


def test_its_own_layout_becomes_the_release_in_transformers(
    family: str, tiny: Tiny, release: Path, tmp_path: Path
) -> None:
    original = tiny.write_original(tmp_path / "original")
    opened = open_release(str(original), cache_dir=tmp_path / "cache")
    assert opened.converted
    model, processor = load_release(opened, Reductions())
    plain, own = load_release(str(release), Reductions())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert tiny.system in processor.chat_template
    inputs = inputs_for(model, processor, QUESTION, [PICTURE])
    expected = inputs_for(plain, own, QUESTION, [PICTURE])
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain(**expected).logits)
    found = json.loads((original / "config.json").read_text())
    back = layout_for(family).to_original(plain.config, found["mm_vision_tower"], "tiny")
    assert {**back, "vocab_size": found["vocab_size"]} == found


REFUSED = {
    "llava_onevision": [
        ({"num_hidden_layers": None}, "config.json lacks num_hidden_layers; sizes are never guessed"),
        ({"image_aspect_ratio": "anyres_max_many"}, "image_aspect_ratio is 'anyres_max_many'; needed is anyres_max_"),
        ({"mm_projector_type": "linear"}, "the projector is 'linear'"),
    ],
    "llava_next_video": [
        ({"num_hidden_layers": None}, "config.json lacks num_hidden_layers; sizes are never guessed"),
        ({"mm_spatial_pool_mode": "conv"}, "mm_spatial_pool_mode is 'conv', known are average, max"),
        ({"mm_spatial_pool_stride": 4}, "mm_spatial_pool_stride is 4, needed is 2"),
        ({"image_grid_pinpoints": None}, "image_grid_pinpoints is missing"),
        ({"mm_projector_type": "linear"}, "the projector is 'linear'"),
    ],
}


def test_what_of_its_layout_is_refused(family: str, tiny: Tiny, release: Path, tmp_path: Path) -> None:
    original = tiny.write_original(tmp_path / "original")
    whole = json.loads((original / "config.json").read_text())
    for change, message in REFUSED[family]:
        config = {key: held for key, held in {**whole, **change}.items() if held is not None}
        (original / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            open_release(str(original), cache_dir=tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*/config.json"))


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_what_the_processor_writes_is_what_the_data_writes_and_what_the_model_fills(
    tiny: Tiny, loaded: tuple[Any, Any], count: int
) -> None:
    model, processor = loaded
    pictures = [PICTURE, Image.new("RGB", (20, 44)), Image.new("RGB", (30, 30), (9, 200, 60))][:count]
    ours = inputs_for(model, processor, "<image>" * count + "\n" * bool(count) + "name the colour", pictures)
    turns = [{"role": "user", "content": [{"type": "image"}] * count + [{"type": "text", "text": "name the colour"}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    theirs = processor(
        images=([pictures] if tiny.several else pictures) if pictures else None, text=text, return_tensors="pt"
    )
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    if count:
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    with torch.no_grad():
        torch.testing.assert_close(model(**ours).logits, model(**theirs).logits, rtol=0, atol=1e-6)


def test_frames_of_a_video(tiny: Tiny, loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    frames = np.random.default_rng(0).integers(0, 256, (3, 30, 44, 3), dtype=np.uint8)
    inputs = processor(text="<video>\nname the colour", videos=[frames], return_tensors="pt")
    assert inputs["pixel_values_videos"].shape == (1, 3, 3, tiny.side, tiny.side)
    assert int((inputs["input_ids"] == processor.video_token_id).sum()) == 3 * 6 + tiny.ends
    pictures = [Image.fromarray(frame) for frame in frames]
    again = processor(text="<video>\nname the colour", videos=pictures, return_tensors="pt")
    assert torch.equal(again["pixel_values_videos"], inputs["pixel_values_videos"])
    new = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert new.shape[1] == inputs["input_ids"].shape[1] + 3
    with pytest.raises(ValueError, match="those of one batch must have the same number"):
        processor(text=["<video>", "<video>"], videos=[frames, frames[:2]], return_tensors="pt")


def test_frames_are_those_of_the_releases_video_processor(tmp_path: Path) -> None:
    release = next_video.write_release(tmp_path / "tiny")
    path = release / "video_preprocessor_config.json"
    settings = json.loads(path.read_text())
    frames = np.random.default_rng(0).integers(0, 256, (2, 30, 44, 3), dtype=np.uint8)

    def pixels(**change: Any) -> Tensor:
        path.write_text(json.dumps({**settings, **change}))
        processor = load_processor(open_release(str(release)))
        processor.save_pretrained(tmp_path / "saved")
        saved = type(processor).from_pretrained(tmp_path / "saved")
        found, again = (each(text="<video>", videos=[frames], return_tensors="pt") for each in (processor, saved))
        assert torch.equal(found["pixel_values_videos"], again["pixel_values_videos"])
        return found["pixel_values_videos"]

    before, brighter = pixels(), pixels(image_mean=[0.1, 0.1, 0.1])
    mean, spread = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    torch.testing.assert_close(brighter, before + (mean - 0.1) / spread, rtol=0, atol=1e-5)
    whole = Image.fromarray(frames[0]).resize((35, 24), Image.Resampling.BICUBIC).crop((5, 0, 29, 24))
    expected = (
        torch.tensor(np.array(whole)).permute(2, 0, 1) / 255 - torch.tensor(settings["image_mean"]).view(3, 1, 1)
    ) / spread
    torch.testing.assert_close(before[0, 0], expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="frames are cut to 16 by 16 pixels, and the vision tower reads 24 by 24"):
        pixels(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"video_preprocessor_config.json holds a list"):
        load_processor(open_release(str(release)))
    path.unlink()  # then they are an image's
    processor = load_processor(open_release(str(release)))
    assert torch.equal(processor(text="<video>", videos=[frames], return_tensors="pt")["pixel_values_videos"], before)


def test_a_conversation_that_grows_to_several_images(loaded: tuple[Any, Any]) -> None:
    """The first picture is cut into tiles until there is a second one."""
    model, processor = loaded
    supervision = Supervision(processor, max_length=None)
    chat, fresh = Chat(model, supervision), Chat(model, supervision)
    other = Image.new("RGB", (30, 30), (9, 200, 60))
    chat.ask("name the colour", [PICTURE], max_new_tokens=3)
    for images in ([other], [], [other]):
        answer = chat.ask("and now?", images, max_new_tokens=3)
        assert fresh.reply(chat.turns[:-1], chat.images, 3, keep=False).text == answer


def mixed_batch(processor: Any, tmp_path: Path) -> MicroBatch:
    for name, size in (("a", (58, 50)), ("b", (44, 20)), ("c", (30, 30))):
        noise = np.random.default_rng(len(name) + size[0]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{name}.png")
    rows = [
        Conversation("one", ("a.png",), (("user", "<image>\nname the colour"), ("assistant", "it is red"))),
        Conversation("two", ("b.png", "c.png"), (("user", "<image><image>\nis it bright?"), ("assistant", "yes"))),
        Conversation("text", (), (("user", "hello"), ("assistant", "a text without a picture"))),
    ]
    supervision = Supervision(processor, max_length=None)
    dataset = ConversationDataset(rows, supervision, tmp_path)
    return Collator.of(supervision)([dataset.load(row) for row in rows])


@pytest.mark.parametrize("words", ["reduced", "every token"])
def test_the_packed_walk_gives_the_gradient_of_a_plain_pass(release: Path, tmp_path: Path, words: str) -> None:
    reductions = REDUCTIONS if words == "reduced" else Reductions()
    model, processor = load_release(str(release), reductions)
    train_only_projector(model, torch.float32)
    batch = mixed_batch(processor, tmp_path)
    gradients = []
    for packed in (True, False):
        model.zero_grad()
        if packed:
            loss = SupervisedLoss(model)(batch)
        else:
            count = int((batch.inputs["labels"][:, 1:] != -100).sum())
            logits = model(**{key: held for key, held in batch.inputs.items() if key != "labels"}).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch.inputs["labels"][:, 1:].flatten(), reduction="sum", ignore_index=-100
            )
            assert count > 0
        loss.backward()
        gradients.append((loss.item(), model.model.multi_modal_projector.linear_1.weight.grad.clone()))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    assert float(gradients[1][1].abs().max()) > 0
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-4, atol=1e-5)


def single_image_rows(instructions: Path, tmp_path: Path) -> Path:
    rows = [row for row in json.loads(instructions.read_text()) if isinstance(row.get("image", ""), str)]
    path = tmp_path / "single.json"
    path.write_text(json.dumps(rows))
    assert len(rows) >= 10
    return path


@pytest.mark.slow
def test_a_run_and_what_it_leaves(family: str, release: Path, tiny_instructions: Path, tmp_path: Path) -> None:
    """Rows of one image, of several and of none; its weights load in transformers' own class."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        release,
        tiny_instructions,
        max_steps=2,
        data={"fraction": 1.0},
        final_evaluation=False,
    )
    folder = run_here(recipe, tmp_path / "run", "--data.image_root", str(tiny_instructions.parent))
    tuned, processor = load_release(str(folder / "final"))
    before, _ = load_release(str(release), REDUCTIONS)
    ours, theirs = (model.model.multi_modal_projector.linear_1.weight for model in (tuned, before))
    assert not torch.equal(ours, theirs)
    plain_class = getattr(transformers, f"{family_named(family).stem}ForConditionalGeneration")
    plain, info = plain_class.from_pretrained(folder / "final", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(plain.model.multi_modal_projector.linear_1.weight, ours)
    assert processor.visionzip == REDUCTIONS.visionzip


@pytest.mark.slow
def test_cached_features_give_the_same_run(tiny: Tiny, release: Path, tiny_instructions: Path, tmp_path: Path) -> None:
    rows = single_image_rows(tiny_instructions, tmp_path) if tiny.several else tiny_instructions
    made = []
    for cache in (None, str(tmp_path / "cache")):
        recipe = write_recipe(
            tmp_path / "recipe.yaml", release, rows, max_steps=2,
            data={"fraction": 1.0, "cache_features": cache}, final_evaluation=False,
        )  # fmt: skip
        name = "plain" if cache is None else "cached"
        folder = run_here(recipe, tmp_path / name, "--data.image_root", str(tiny_instructions.parent))
        made.append(load_release(str(folder / "final"))[0].model.multi_modal_projector.linear_1.weight)
    torch.testing.assert_close(made[0], made[1], rtol=0, atol=1e-6)
    if not tiny.several:
        return
    # An image is read otherwise where it is one of several.
    recipe = write_recipe(
        tmp_path / "recipe.yaml", release, tiny_instructions, max_steps=2,
        data={"fraction": 1.0, "cache_features": str(tmp_path / "other")},
    )  # fmt: skip
    with pytest.raises(ValueError, match="LLaVA-OneVision reads an image otherwise"):
        run_here(recipe, tmp_path / "refused", "--data.image_root", str(tiny_instructions.parent))


_LOAD = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
sys.path = [path for path in sys.path if "__editable__" not in path]
import importlib.util
assert not importlib.util.find_spec("shortzip")
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
folder, out = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
picture = Image.new("RGB", (58, 50), (200, 40, 90))
text = "<image><image>\\nname the colour <video>"
inputs = processor(images=[[picture, picture]], videos=[[picture] * 3], text=text, return_tensors="pt")
with torch.no_grad():
    torch.save(model(**inputs).logits, out)
"""


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["full", "projector"])
def test_what_is_published_loads_without_shortzip(family: str, release: Path, tmp_path: Path, shape: str) -> None:
    opened = open_release(str(release))
    model, processor = load_release(opened, REDUCTIONS)
    projector = model.model.multi_modal_projector.state_dict()
    write_reduced_checkpoint(tmp_path / "out", opened, projector, processor, REDUCTIONS, shape=shape)
    code = {path.name for path in (tmp_path / "out").glob("*.py")}
    assert {f"modeling_reduced_{family}.py", "modeling_videos.py", "processing_videos.py", "media.py"} <= code
    assert not any(name.startswith("family") for name in code)
    run = subprocess.run(
        [sys.executable, "-P", "-c", _LOAD, str(tmp_path / "out"), str(tmp_path / "logits.pt")],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    text = "<image><image>\nname the colour <video>"
    inputs = processor(images=[[PICTURE, PICTURE]], videos=[[PICTURE] * 3], text=text, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-5)


def test_a_llava_carries_no_code_of_these_families(tiny_release: Path, tmp_path: Path) -> None:
    run = finish(tmp_path / "run", tiny_release, REDUCTIONS)
    assert not [path for path in (run / "final").glob("*.py") if "video" in path.name or "onevision" in path.name]


@pytest.mark.slow
def test_lmms_eval_answers_as_evaluate_does(release: Path, tiny_held_out: Path, tmp_path: Path) -> None:
    _, said = answer(release, tiny_held_out)
    assert write_task(tmp_path, "tiny", read_instructions(tiny_held_out), str(tiny_held_out.parent)) == len(said)
    run_lmms_eval(tmp_path, release, "--tasks", "tiny", "--gen_kwargs", "max_new_tokens=8")
    theirs = [entry["filtered_resps"] for entry in sorted(samples(tmp_path, "tiny"), key=lambda e: e["doc_id"])]
    assert theirs == [entry["answer"] for entry in said]


def test_what_is_written_for_its_authors_code(
    tiny: Tiny, release: Path, loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    model, processor = loaded
    projector, target = model.model.multi_modal_projector.state_dict(), tmp_path / "llava-tuned"
    write_reduced_checkpoint(
        target, open_release(str(release)), projector, processor, REDUCTIONS, shape="llava", vision_tower="a-tower"
    )
    config = json.loads((target / "config.json").read_text())
    assert config["architectures"] == [tiny.architecture]
    assert Reductions.from_config(config) == REDUCTIONS
    written = torch.load(target / "mm_projector.bin", weights_only=True)
    assert torch.equal(written["model.mm_projector.0.weight"], projector["linear_1.weight"])


def test_a_release_of_an_unknown_family_says_what_is_known_and_where_to_add_it() -> None:
    known = "known are llava, reduced_llava, llava_next, .*llava_onevision.*Adding a family"
    with pytest.raises(ValueError, match=rf"here: model_type is 'idefics3', {known}"):
        family_of("idefics3", "here")
