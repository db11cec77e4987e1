"""The real lmms-eval on a local task, and what it asks of a model, without its tasks."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from PIL import Image
from tiny import write_clip

from shortzip.data.images import open_image
from shortzip.data.instructions import Conversation, read_instructions
from shortzip.reduction.reductions import Reductions
from shortzip.train.evaluation.comparison import Candidate, compare
from shortzip.train.evaluation.lmms_model import ReducedLlava, ReducedLlavaChat, _reductions, _Request
from shortzip.train.evaluation.lmms_plugin import middle_image, write_questions, write_task
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.settings.config import DataConfig

ROOT = Path(__file__).resolve().parents[2]
BUDGET, LAYERS = {"dominant": 6, "contextual": 3}, [1, 2]
ARGUMENTS = "budget=6+3,layers=1+2,dtype=float32"


def answer(release: Path, instructions: Path) -> tuple[float, list[dict[str, Any]]]:
    """Exact match and answers, as scripts/evaluate_models.py gets them."""
    data = DataConfig(str(instructions), eval_instructions=str(instructions))
    candidate = Candidate("reduced", ReleaseSpec(str(release)), Reductions(BUDGET, {"layers": LAYERS}))
    found, (said,) = compare([candidate], data, Accelerator(cpu=True), batch_size=4, max_new_tokens=8)
    return found[0].exact_match, [asdict(answer) for answer in said]


@pytest.fixture(scope="module")
def held_out(tiny_release: Path, tiny_held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of which every other one ends with what the model says, so that some answers are right."""
    folder = tmp_path_factory.mktemp("lmms")
    (folder / "images").symlink_to(tiny_held_out.parent / "images")
    _, said = answer(tiny_release, tiny_held_out)
    last = {entry["id"]: entry["answer"] for entry in said}
    rows = json.loads(tiny_held_out.read_text())
    for row in rows[::2]:
        row["conversations"][-1]["value"] = last[row["id"]] or "nothing"
    (folder / "held-out.json").write_text(json.dumps(rows))
    return folder / "held-out.json"


def run_lmms_eval(folder: Path, release: Path, *more: str, processes: int = 1) -> tuple[dict[str, Any], str]:
    """results.json of the real command line, and what it printed."""
    module = ["-m", "lmms_eval"]
    if processes > 1:
        module = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *module]
    command = [
        sys.executable, *module, "--model", "reduced_llava", "--model_args", f"pretrained={release},{ARGUMENTS}",
        "--include_path", str(folder), "--batch_size", "4", "--device", "cpu", "--output_path", str(folder / "out"),
        "--log_samples", *more,
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    if processes > 1:
        environment["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = max((folder / "out").rglob("*_results.json"), key=lambda file: file.stat().st_mtime_ns)
    return json.loads(results.read_text()), done.stdout


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    file = sorted((folder / "out").rglob(f"*_samples_{task}.jsonl"))[-1]
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_command_lines_exact_match_is_evaluates(tiny_release: Path, held_out: Path, tmp_path: Path) -> None:
    exact_match, said = answer(tiny_release, held_out)
    assert 0 < exact_match < 1
    assert write_task(tmp_path, "tiny", read_instructions(held_out), str(held_out.parent)) == len(said)
    results, shown = run_lmms_eval(tmp_path, tiny_release, "--tasks", "tiny", "--gen_kwargs", "max_new_tokens=8")
    assert results["results"]["tiny"]["exact_match,none"] == pytest.approx(exact_match, abs=1e-12)
    theirs = [entry["filtered_resps"] for entry in sorted(samples(tmp_path, "tiny"), key=lambda e: e["doc_id"])]
    assert theirs == [entry["answer"] for entry in said]
    assert "exact_match" in shown


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_and_likelihoods(
    tiny_release: Path, held_out: Path, tmp_path: Path, model: ReducedLlava
) -> None:
    exact_match, _ = answer(tiny_release, held_out)
    write_task(tmp_path, "tiny", read_instructions(held_out), str(held_out.parent))
    results, _ = run_lmms_eval(
        tmp_path, tiny_release, "--tasks", "tiny", "--gen_kwargs", "max_new_tokens=8", processes=2
    )
    assert results["results"]["tiny"]["exact_match,none"] == pytest.approx(exact_match, abs=1e-12)
    results, _ = run_lmms_eval(tmp_path, tiny_release, "--tasks", "tiny_likelihood", "--force_simple")
    losses = []
    for conversation in read_instructions(held_out):
        turns = conversation.turns[:2]
        images = conversation.images[: turns[0][1].count("<image>")]
        encoded = model.supervision.encode(replace(conversation, images=images, turns=turns))
        inputs: dict[str, Any] = {"input_ids": torch.tensor([encoded.input_ids])}
        if images:
            shown = [open_image(image, held_out.parent) for image in images]
            inputs |= model.supervision.processor.image_processor(shown, return_tensors="pt")
        with torch.no_grad():
            losses.append(model.model(**inputs, labels=torch.tensor([encoded.labels])).loss.item())
    found = results["results"]["tiny_likelihood"]
    assert found["perplexity,none"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert found["acc,none"] == 0, "a random model says no true answer with its end"


@pytest.mark.slow
def test_the_shipped_task_of_the_demo_answers_as_evaluate_py(tmp_path: Path) -> None:
    def script(name: str, *arguments: str) -> None:
        command = [sys.executable, str(ROOT / "scripts" / name), *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    script("make_lmms_task.py")
    demo, budget = "checkpoints/demo-llava", ("--visionzip.dominant", "12", "--visionzip.contextual", "4")
    given = ("--model", demo, *budget, "--data.instructions", "demo", "--data.samples", "20")
    script("evaluate_models.py", *given, "--output", str(tmp_path))
    answers = (tmp_path / "answers" / "reduced--untuned.jsonl").read_text().splitlines()[:30]
    said = [json.loads(line) for line in answers]
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "reduced_llava", "--model_args",
        f"pretrained={demo},budget=12+4,dtype=float32", "--include_path", "configs/eval/tasks", "--device", "cpu",
        "--tasks", "demo_scenes", "--batch_size", "8", "--limit", "30", "--output_path", str(tmp_path / "out"),
        "--log_samples",
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = sorted(samples(tmp_path, "demo_scenes"), key=lambda entry: entry["doc_id"])
    assert [entry["filtered_resps"] for entry in theirs] == [entry["answer"] for entry in said]
    assert [entry["exact_match"] for entry in theirs] == [entry["correct"] for entry in said]
    assert 0 < sum(entry["correct"] for entry in said) < len(said)


# ------------------------------------------------------------------------------------------------ without the command


class Asked:
    """Requests on documents of a made-up task, as lmms-eval builds them."""

    def __init__(self, model: ReducedLlava, documents: list[dict[str, Any]]) -> None:
        self.model, self.documents = model, documents
        model.task_dict = {"task": {"test": documents}}

    def ask(self, kind: str, **generation: Any) -> list[Any]:
        requests = []
        for number, document in enumerate(self.documents):
            visual = self._visual
            arguments: tuple[Any, ...] = (document["text"], generation, visual, number, "task", "test")
            if kind == "loglikelihood":
                arguments = (document["text"], document["target"], visual, number, "task", "test")
            if not self.model.is_simple:
                arguments = (document["text"], self._messages, generation, number, "task", "test")
            metadata = {"task": "task", "doc_id": number, "repeats": 1}
            requests.append(Instance(kind, arguments, 0, metadata))  # type: ignore[arg-type]
        return getattr(self.model, kind)(requests)

    @staticmethod
    def _visual(document: dict[str, Any]) -> list[Image.Image]:
        return document["images"]

    @staticmethod
    def _messages(document: dict[str, Any]) -> list[dict[str, Any]]:
        images = [{"type": "image", "url": image} for image in document["images"]]
        return [{"role": "user", "content": [*images, {"type": "text", "text": document["text"]}]}]


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    red, blue = Image.new("RGB", (30, 20), (220, 30, 30)), Image.new("RGBA", (20, 30), (40, 60, 230, 255))
    return [
        {"text": "name the colour", "target": "it is red", "images": [red]},
        {"text": "what colour is the picture?", "target": "it is blue", "images": [blue]},
        {"text": "hello", "target": "a text without a picture", "images": []},
        {"text": "is it <image> or <image>?", "target": "no", "images": [red, blue]},
    ]


@pytest.fixture(scope="module")
def model(tiny_release: Path) -> ReducedLlava:
    return ReducedLlava(str(tiny_release), budget="6+3", layers="1+2", device="cpu", batch_size=3, dtype="float32")


def test_batches_answer_as_single_requests(
    model: ReducedLlava, tiny_release: Path, documents: list[dict[str, Any]]
) -> None:
    together = Asked(model, documents).ask("generate_until", max_new_tokens=6, until=["\n\n"])
    alone = [Asked(model, [one]).ask("generate_until", max_new_tokens=6, until=["\n\n"])[0] for one in documents]
    assert together == alone
    chat = ReducedLlavaChat(str(tiny_release), budget="6+3", layers="1+2", device="cpu", batch_size=2, dtype="float32")
    assert Asked(chat, documents).ask("generate_until", max_new_tokens=6, until=[]) == together
    assert any(together)


def test_settings_that_are_equal_but_written_otherwise_leave_no_request_out(model: ReducedLlava) -> None:
    """Of several tasks in one run; what is not answered lmms-eval would score as the text "None"."""
    settings: list[dict[str, Any]] = [
        {"temperature": 0, "max_new_tokens": 16}, {"temperature": 0, "max_new_tokens": 32},
        {"temperature": 0.0, "max_new_tokens": 16},
    ]  # fmt: skip
    asked = [_Request(f"question {n}", setting, lambda n=n: n) for n, setting in enumerate(settings)]  # type: ignore[misc]
    said = model._batched(asked, lambda batch, _: [f"answer to {n}" for n in batch], "test")
    assert said == ["answer to 0", "answer to 1", "answer to 2"]


def test_a_literal_placeholder_without_an_image_is_text_that_is_left_out(
    model: ReducedLlava, tiny_release: Path, documents: list[dict[str, Any]]
) -> None:
    red = documents[0]["images"]
    odd = [{"text": "what is an <image> token?", "images": []}, {"text": "<image> and <image> show?", "images": red}]
    plain = [{"text": "what is an  token?", "images": []}, {"text": "and  show?", "images": red}]
    chat = ReducedLlavaChat(str(tiny_release), budget="6+3", layers="1+2", device="cpu", batch_size=2, dtype="float32")
    for asked in (model, chat):
        said, expected = (Asked(asked, several).ask("generate_until", max_new_tokens=6) for several in (odd, plain))
        assert said == expected


def test_images_are_read_when_their_batch_is_due(
    model: ReducedLlava, documents: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pixels of a whole benchmark do not fit into memory: VQAv2's would be 290 GB."""
    read, ahead = [], []

    class Counted(Asked):
        @staticmethod
        def _visual(document: dict[str, Any]) -> list[Image.Image]:
            read.append(document)
            return document["images"]

    def answer_nothing(batch: list[Any], generation: Any) -> list[str]:
        ahead.append(len(read))
        return [""] * len(batch)

    monkeypatch.setattr(model, "_generate", answer_nothing)
    Counted(model, documents[:1] * 7).ask("generate_until", max_new_tokens=1)
    assert ahead == [3, 6, 7]


@pytest.mark.parametrize(
    ("generation", "samples"),
    [
        ({}, False),
        ({"do_sample": True}, True),
        ({"temperature": 0, "do_sample": True}, False),
        ({"temperature": 1}, True),
    ],
)
def test_when_answers_are_sampled(
    model: ReducedLlava,
    documents: list[dict[str, Any]],
    generation: dict[str, Any],
    samples: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, Any] = {}

    def generate(**settings: Any) -> torch.Tensor:
        given.update(settings)
        return settings["input_ids"]

    monkeypatch.setattr(model.model, "generate", generate)
    Asked(model, documents[:1]).ask("generate_until", **generation)
    assert given["do_sample"] is samples


def test_answers_end_at_until(model: ReducedLlava, documents: list[dict[str, Any]]) -> None:
    whole = Asked(model, documents[:1]).ask("generate_until", max_new_tokens=6)[0]
    stop = whole[2]
    assert Asked(model, documents[:1]).ask("generate_until", max_new_tokens=6, until=stop) == [
        whole.split(stop)[0].strip()
    ]


def test_the_stop_that_lmms_eval_sets_by_itself_cuts_nothing(
    model: ReducedLlava, documents: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.supervision.tokenizer, "batch_decode", lambda *_, **__: ["first\n\nsecond\nthird"])
    asked = Asked(model, documents[:1])
    assert asked.ask("generate_until", max_new_tokens=1, until=["\n\n"]) == ["first\n\nsecond\nthird"]
    assert asked.ask("generate_until", max_new_tokens=1, until=["\n"]) == ["first"]


def test_of_a_video_the_frame_in_the_middle_is_shown() -> None:
    frames = [Image.new("RGBA", (2, 2), (number, 0, 0, 255)) for number in range(4)]
    (shown,) = middle_image({"image": frames})
    assert (shown.mode, shown.getpixel((0, 0))) == ("RGB", (2, 0, 0))


def test_likelihoods_are_the_losses_of_training(model: ReducedLlava, documents: list[dict[str, Any]]) -> None:
    found = [result.text for result in Asked(model, documents[:3]).ask("loglikelihood")]
    for (loss, is_greedy), document in zip(found, documents[:3], strict=True):
        images = document["images"]
        turns = (("user", "<image>\n" * len(images) + document["text"]), ("assistant", document["target"]))
        encoded = model.supervision.encode(Conversation("", ("",) * len(images), turns))
        inputs: dict[str, Any] = {"input_ids": torch.tensor([encoded.input_ids])}
        if images:
            inputs["pixel_values"] = _pixels(model, images[0])
        with torch.no_grad():
            output = model.model(**inputs, labels=torch.tensor([encoded.labels]))
        assert loss == pytest.approx(output.loss.item(), rel=1e-4)
        assert not is_greedy


def test_likelihoods_with_fastv_prune_as_answering_does(tiny_release: Path, documents: list[dict[str, Any]]) -> None:
    """By the question's last token, not by the answer's, which would look at what it is about to say."""
    pruned = ReducedLlava(str(tiny_release), fastv="1+0.1", device="cpu", batch_size=3, dtype="float32")
    said = Asked(pruned, documents[:2]).ask("generate_until", max_new_tokens=3)
    encode = pruned.supervision.encode
    for document, answer in zip(documents, said, strict=False):
        conversation = Conversation("", ("",), (("user", "<image>\n" + document["text"]), ("assistant", answer)))
        ids = encode(conversation).input_ids
        (start, end), pixels = encode(conversation).answers[0], _pixels(pruned, document["images"][0])
        last = start - 1
        with torch.no_grad():
            states = pruned.model.model(
                input_ids=torch.tensor([ids[:end]]), pixel_values=pixels, fastv_query=torch.tensor([last])
            ).last_hidden_state
            logits = pruned.model.lm_head(states[0, last : end - 1])
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:end])).item()
        (result,) = Asked(pruned, [{**document, "target": answer}]).ask("loglikelihood")
        assert result.text[0] == pytest.approx(expected, rel=1e-5)


def _pixels(model: ReducedLlava, image: Image.Image) -> torch.Tensor:
    shown = image.convert("RGB")
    return model.supervision.processor.image_processor(shown, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("given", ["fastv=2", "fastv=0.5", "budget=64", "revision=5"])
def test_numbers_that_lmms_eval_reads_are_refused_as_text_is(tiny_release: Path, given: str) -> None:
    with pytest.raises(ValueError, match=r"like 2\+0\.5|dominant\+contextual|revision .5. is for Hub ids"):
        ReducedLlava.create_from_arg_string(f"pretrained={tiny_release},{given}", {"device": "cpu"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": "64"}, "dominant\\+contextual"),
        ({"layers": "a"}, "write indices like 31\\+29\\+30"),
        ({"fastv": "2"}, "like 2\\+0.5"),
        ({"method": "pool"}, "no budget is given"),
        ({"budget": "9+0", "method": "scope:beta=1"}, "method scope has no parameter 'beta': it takes alpha"),
        ({"batch_size": "auto"}, "a number of prompts"),
        ({"dtype": "int8"}, "choose one of auto, float32"),
        ({"trust_remote_code": True}, "is no reduced checkpoint"),
        ({"text_tower": "some/clip"}, "with no budget: CDPruner takes a budget and no other method"),
        (
            {"text_tower": "some/clip", "budget": "4+0", "method": "scope"},
            "with method scope: CDPruner takes a budget",
        ),
        ({"text_tower": "/nowhere/clip", "budget": "4+0"}, "text_tower is '/nowhere/clip': it must be a CLIP release"),
    ],
)
def test_bad_arguments_are_refused(tiny_release: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReducedLlava(str(tiny_release), device="cpu", **arguments)


def test_baselines_are_arguments_too(tiny_release: Path) -> None:
    drawn = ReducedLlava(str(tiny_release), budget="9+0", method="random", seed=3, fastv="2+0.5", device="cpu")
    assert drawn.model.config.visionzip == {"dominant": 9, "contextual": 0, "method": "random", "seed": 3}
    assert drawn.model.config.fastv == {"layer": 2, "keep": 0.5}
    assert drawn.model.config.positions == "compact"
    kept = ReducedLlava(str(tiny_release), budget="9+0", positions="original", device="cpu")
    assert kept.model.config.positions == "original"


def test_a_budget_is_chosen_by_the_checkpoints_own_method_where_none_is_named() -> None:
    chosen: dict[str, Any] = {"dominant": 9, "contextual": 0, "method": "scope", "alpha": 0.5}
    own = {**chosen, "per_image": {"chooser": "image", "scale": 9.0, "min": 4, "max": 9}}

    def asked(saved: Any, budget: str, method: str | None = None) -> Any:
        return _reductions(Reductions(saved), budget, method, 0, None, None, None).visionzip

    for saved in (chosen, own):
        assert asked(saved, "4+0") == {**chosen, "dominant": 4}
        assert asked(saved, "4+2", "visionzip") == asked(None, "4+2") == {"dominant": 4, "contextual": 2}
        assert asked(saved, "all") is None


def test_a_methods_parameters_are_in_its_word(tiny_release: Path) -> None:
    words = f"pretrained={tiny_release},budget=9+0,method=vispruner:important=0.25"
    chosen = ReducedLlava.create_from_arg_string(words, {"device": "cpu"})
    expected = {"dominant": 9, "contextual": 0, "method": "vispruner", "important": 0.25}
    assert chosen.model.config.visionzip == expected


@pytest.fixture(scope="module")
def clip(model: ReducedLlava, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP release with a tower of the tiny release's width, whose questions are letters."""
    return str(write_clip(tmp_path_factory.mktemp("clip"), model.model.config.vision_config))


def test_cdpruner_chooses_by_the_question(tiny_release: Path, documents: list[dict[str, Any]], clip: str) -> None:
    how: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
    asking = ReducedLlava(str(tiny_release), budget="4+0", text_tower=clip, batch_size=4, **how)
    asked: list[str] = []
    embed = asking._reader.embed_questions
    object.__setattr__(asking._reader, "embed_questions", lambda words, to: (asked.extend(words), embed(words, to))[1])
    together = Asked(asking, documents).ask("generate_until", max_new_tokens=6)
    assert sorted(asked) == ["is it  or ?"] * 2 + ["name the colour", "what colour is the picture?"]
    assert [Asked(asking, [one]).ask("generate_until", max_new_tokens=6)[0] for one in documents] == together
    chat = ReducedLlavaChat(str(tiny_release), budget="4+0", text_tower=clip, batch_size=4, **how)
    assert Asked(chat, documents[:3]).ask("generate_until", max_new_tokens=6) == together[:3]
    # With all patches there is nothing to choose: the answers and losses are those of any method.
    every = ReducedLlava(str(tiny_release), budget="36+0", text_tower=clip, batch_size=4, **how)
    plain = ReducedLlava(str(tiny_release), budget="36+0", method="fastervlm", batch_size=4, **how)
    assert _answers(every, documents) == _answers(plain, documents)


def _answers(model: ReducedLlava, documents: list[dict[str, Any]]) -> tuple[list[str], list[Any]]:
    losses = [result.text[0] for result in Asked(model, documents).ask("loglikelihood")]
    return Asked(model, documents).ask("generate_until", max_new_tokens=6), [pytest.approx(loss) for loss in losses]


def test_videos_are_refused(model: ReducedLlava) -> None:
    with pytest.raises(ValueError, match="images and videos only; this task gives a dict"):
        Asked(model, [{"text": "x", "images": [{"type": "video"}]}]).ask("generate_until")


def test_questions_hold_all_turns_before_them(held_out: Path, tmp_path: Path) -> None:
    conversations = read_instructions(held_out)
    count = write_questions(conversations, str(held_out.parent), tmp_path / "q.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert count == len(lines) == sum(len(conversation.turns) // 2 for conversation in conversations)
    for line in lines:
        assert len(line["roles"]) == 2 * line["turn"] + 1
        assert sum(text.count("<image>") for text in line["texts"]) == len(line["images"])
        assert all(Path(image).is_absolute() for image in line["images"])
    with pytest.raises(ValueError, match="letters, digits"):
        write_task(tmp_path, "a/b", conversations, None)
