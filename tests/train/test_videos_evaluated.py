"""What a model says of videos: by `evaluate`, by files of questions, and by lmms-eval's model interface."""

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from made_videos import write_frames, write_video
from PIL import Image
from test_videos import FRAMES, dataset_of, write_rows
from tiny_onevision import write_onevision

from shortzip.data.instructions import read_instructions
from shortzip.data.videos import Sampling, files_of
from shortzip.reduction.reductions import Reductions
from shortzip.scripts.evaluate_papers import check_rows, model_arguments
from shortzip.train.evaluation.answers import evaluate
from shortzip.train.evaluation.lmms_model import ReducedLlava, ReducedLlavaChat
from shortzip.train.evaluation.lmms_plugin import doc_to_messages, doc_to_visual, write_questions
from shortzip.train.inputs.prompts import batch_prompts, encode_prompt
from shortzip.train.inputs.videos import visual_tokens_of
from shortzip.train.release.loading import load_release
from shortzip.train.serving.answers_file import Answerer, read_questions
from shortzip.train.settings.command_line import parse_config
from shortzip.train.settings.comparing import PapersConfig

BUDGET, LAYERS = {"dominant": 4, "contextual": 2}, {"layers": [1, 3]}
HOW: dict[str, Any] = {"budget": "4+2", "layers": "1+3", "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onevision(tmp_path_factory.mktemp("onevision") / "tiny-hf")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("videos"))


def test_evaluation_reads_videos(release: Path, rows: Path) -> None:
    """Loss and answers of mixed rows in batches are those of the rows alone, in the model's own forward."""
    model, processor = load_release(str(release), Reductions(BUDGET, LAYERS))
    dataset = dataset_of(processor, rows)
    results = [
        evaluate("tiny", model, dataset, Accelerator(cpu=True), batch_size=size, max_new_tokens=4, timed=size > 1)
        for size in (1, 4)
    ]
    (one, answers), (four, together) = results
    assert one.loss == pytest.approx(four.loss, rel=1e-5)
    assert [answer.answer for answer in answers] == [answer.answer for answer in together]
    assert one.questions == 7
    assert four.prefill_ms > 0
    of_videos = [row.videos for row in dataset.conversations]
    assert sum(map(len, of_videos)) == 6
    total = sum(
        sum(sample.encoded.input_ids.count(token) for token in visual_tokens_of(processor))
        for sample in (dataset[number] for number in range(len(dataset)))
    )
    assert one.visual_tokens == pytest.approx(total / 9), "of nine images and videos"


def test_questions_of_a_file(release: Path, rows: Path, tmp_path: Path) -> None:
    model, processor = load_release(str(release), Reductions(BUDGET, LAYERS))
    supervision = dataset_of(processor, rows).supervision
    asked = json.loads(rows.read_text())[:4]
    asked.append({**asked[0], "id": "gone", "video": "gone.mp4"})
    asked.append({"question_id": 7, "text": "name the colour", "video": "clips/a.mp4"})
    (tmp_path / "questions.json").write_text(json.dumps(asked))
    questions = read_questions(str(tmp_path / "questions.json"))
    answerer = Answerer(model, supervision, str(rows.parent), max_new_tokens=4)
    found: dict[int, Any] = {}
    for part in answerer.answer(questions, range(len(questions)), batch_size=3):
        found.update(part)
    assert found[4].error is not None
    assert "gone.mp4: there is no such file" in found[4].error
    assert found[5].answer == found[0].answer
    evaluated = dataset_of(processor, rows)
    for number in (0, 3):
        sample: Any = evaluated[number]
        prompt = sample.encoded.input_ids[: sample.encoded.answers[0][0]]
        inputs = {"input_ids": torch.tensor([prompt]), "pixel_values_videos": torch.stack(sample.frames)}
        said = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, pad_token_id=processor.tokenizer.pad_token_id
        )
        text = processor.tokenizer.decode(said[0, len(prompt) :], skip_special_tokens=True).strip()
        assert found[number].answer == text


def test_prompts_with_videos_of_different_lengths_are_generated_together(release: Path, rows: Path) -> None:
    model, processor = load_release(str(release), Reductions(BUDGET, LAYERS))
    dataset = dataset_of(processor, rows, fps=1)
    prompts = []
    for number in (0, 3):
        sample: Any = dataset[number]
        turns = dataset.conversations[number].turns[:1]
        prompts.append(encode_prompt(dataset.supervision, turns, [], videos=sample.frames))
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}

    def said(*some: Any) -> list[list[int]]:
        inputs = batch_prompts(dataset.supervision, some, model.device)
        return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()

    assert "video_frames" in batch_prompts(dataset.supervision, prompts, model.device)
    assert said(*prompts) == said(prompts[0]) + said(prompts[1])


class Task:
    """Documents of a made-up task, asked as lmms-eval asks."""

    def __init__(self, model: ReducedLlava, *documents: dict[str, Any]) -> None:
        self.model, self.documents = model, documents
        model.task_dict = {"task": {"test": list(documents)}}

    def ask(self, kind: str = "generate_until", **generation: Any) -> list[Any]:
        generation = generation or {"max_new_tokens": 4}
        requests = []
        for number, document in enumerate(self.documents):
            arguments: tuple[Any, ...] = (document["text"], generation, self._visual, number, "task", "test")
            if kind == "loglikelihood":
                arguments = (document["text"], document["target"], self._visual, number, "task", "test")
            if not self.model.is_simple:
                arguments = (document["text"], self._messages, generation, number, "task", "test")
            metadata = {"task": "task", "doc_id": number, "repeats": 1}
            requests.append(Instance(kind, arguments, idx=0, metadata=metadata))  # type: ignore[arg-type]
        return getattr(self.model, kind)(requests)

    @staticmethod
    def _visual(document: dict[str, Any]) -> list[Any]:
        return document["visuals"]

    @staticmethod
    def _messages(document: dict[str, Any]) -> list[dict[str, Any]]:
        kinds = ["image" if isinstance(visual, Image.Image) else "video" for visual in document["visuals"]]
        shown = [{"type": kind, "url": url} for kind, url in zip(kinds, document["visuals"], strict=True)]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": document["text"]}]}]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("shown")
    write_frames(folder / "frames", 6)
    write_video(folder / "a.mp4", 12)
    (folder / "no-suffix").write_bytes((folder / "a.mp4").read_bytes())
    frames = [Image.open(file).convert("RGB") for file in files_of("frames", folder)]
    return {
        "file": str(folder / "a.mp4"),
        "other": str(folder / "no-suffix"),
        "folder": str(folder / "frames"),
        "frames": frames,
        "array": np.stack([np.asarray(frame) for frame in frames]),
        "picture": Image.new("RGB", (30, 20), (220, 30, 30)),
    }


def test_lmms_eval_s_ways_to_give_a_video(release: Path, shown: dict[str, Any]) -> None:
    """By path, with and without a suffix, as a folder, an array of frames and a list of pictures: as one sees them."""
    model = ReducedLlava(str(release), max_frames_num=FRAMES, batch_size=2, **HOW)
    chat = ReducedLlavaChat(str(release), max_frames_num=FRAMES, batch_size=3, **HOW)
    text = "name the colour"
    documents = [{"text": text, "visuals": [shown[kind]]} for kind in ("file", "other", "folder", "frames", "array")]
    documents += [
        {"text": text, "visuals": [shown["picture"], shown["file"]]},
        {"text": "is it <video> or <image>?", "visuals": [shown["picture"], shown["file"]]},
        {"text": text, "visuals": []},
    ]
    for asked in (model, chat):
        said = Task(asked, *documents).ask()
        assert said == [Task(asked, document).ask()[0] for document in documents]
        assert said[0] == said[1]
        assert said[2] == said[3] == said[4]
    assert any(Task(model, *documents).ask())
    prompts = [model._question(text, Task._visual, number, "task", "test").prompt for number in (0, 2, 5)]
    assert [[len(video) for video in prompt.frames] for prompt in prompts] == [[FRAMES]] * 3
    assert not torch.equal(prompts[0].frames[0], prompts[1].frames[0])


def test_likelihoods_after_a_video_are_the_losses_of_training(release: Path, shown: dict[str, Any]) -> None:
    model = ReducedLlava(str(release), max_frames_num=FRAMES, batch_size=2, **HOW)
    document = {"text": "name the colour", "target": "it is red", "visuals": [shown["file"]]}
    loss, _ = Task(model, document).ask("loglikelihood")[0].text
    supervision = model.supervision
    frames = model.visuals.video(shown["file"])
    folder = Path(shown["file"]).parent
    row = {
        "video": "a.mp4",
        "conversations": [
            {"from": "human", "value": "<video>\nname the colour"},
            {"from": "gpt", "value": "it is red"},
        ],
    }
    (folder / "row.json").write_text(json.dumps([row]))
    encoded = supervision.encode(read_instructions(folder / "row.json")[0], frames=[FRAMES])
    inputs = {"input_ids": torch.tensor([encoded.input_ids]), "pixel_values_videos": frames[None]}
    with torch.no_grad():
        output = model.model(**inputs, labels=torch.tensor([encoded.labels]))
    assert loss == pytest.approx(output.loss.item(), rel=1e-4)


def test_frames_by_lmms_eval_s_arguments_and_what_is_refused(
    release: Path, tiny_release: Path, shown: dict[str, Any]
) -> None:
    assert ReducedLlava(str(release), **HOW).supervision.sampling == Sampling(32)
    words = f"pretrained={release},max_frames_num=8,fps=2"
    given = ReducedLlava.create_from_arg_string(words, {"device": "cpu"})
    assert given.supervision.sampling == Sampling(8, 2.0)
    images_only = ReducedLlava(str(tiny_release), budget="6+3", device="cpu")
    video = {"text": "x", "visuals": [shown["file"]]}
    with pytest.raises(ValueError, match="this task gives a video, and the model's family takes none"):
        Task(images_only, video).ask()
    with pytest.raises(ValueError, match="takes no videos"):
        ReducedLlava(str(tiny_release), device="cpu", max_frames_num=8)
    chat = ReducedLlavaChat(str(release), **HOW)
    part = {"type": "video", "url": shown["file"], "start_time": 1.0, "end_time": 2.0}
    with pytest.raises(ValueError, match=r"whole videos; this task gives seconds 1\.0 to 2\.0 of one"):
        chat.visuals.turns([{"role": "user", "content": [part]}])
    with pytest.raises(ValueError, match="no such file"):
        Task(chat, {"text": "x", "visuals": [shown["file"] + ".gone.mp4"]}).ask()


def test_held_out_rows_with_videos_are_a_local_task(release: Path, rows: Path, tmp_path: Path) -> None:
    """Its documents, asked through lmms-eval's interface, are answered as `evaluate` answers the rows."""
    model, processor = load_release(str(release), Reductions(BUDGET, LAYERS))
    told = read_instructions(rows)
    with pytest.raises(ValueError, match="frames: a local task's videos are files or folders; this one is a list"):
        write_questions(told, str(rows.parent), tmp_path / "q.jsonl")
    told = told[:-1]
    assert write_questions(told, str(rows.parent), tmp_path / "q.jsonl") == 6
    documents = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert [len(document["videos"]) for document in documents] == [1, 0, 0, 2, 1, 1]
    dataset = dataset_of(processor, rows)
    _, answers = evaluate("tiny", model, dataset, Accelerator(cpu=True), batch_size=4, max_new_tokens=4, timed=False)
    chat = ReducedLlavaChat(str(release), max_frames_num=FRAMES, batch_size=2, **HOW)
    chat.task_dict = {"task": {"test": documents}}
    requests = [
        Instance(
            "generate_until",  # type: ignore[arg-type]
            ("", doc_to_messages, {"max_new_tokens": 4}, number, "task", "test"),  # type: ignore[arg-type]
            idx=0,
            metadata={"task": "task", "doc_id": number, "repeats": 1},
        )
        for number in range(len(documents))
    ]
    assert chat.generate_until(requests) == [answer.answer for answer in answers][:6]
    assert len(doc_to_visual(documents[4])) == 2


# ---------------------------------------------------------------------------------------------- the recipe's own tasks

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "eval" / "video-llava-onevision-7b.yaml"
LETTERS = [
    f"{letter}. {word}" for letter, word in zip("ABCDE", ("red", "blue", "green", "white", "none"), strict=True)
]


def documents_of(task: str, home: Path) -> tuple[list[dict[str, Any]], Path]:
    """Documents with a task's own keys, and where its videos lie below HF_HOME."""
    if task == "mvbench":
        documents = [
            {"video": name, "question": "What colour is it?", "candidates": ["red", "blue"], "answer": "blue"}
            for name in ("a.webm", "b.webm")
        ]
        return documents, home / "mvbench_video" / "ssv2_video_mp4"
    if task == "videomme":
        keys = {
            "domain": "Knowledge",
            "sub_category": "Astronomy",
            "task_type": "Counting Problem",
            "duration": "short",
        }
        documents = [
            {**keys, "videoID": name, "question_id": name, "question": "What colour?", "options": LETTERS[:4],
             "answer": "B"}
            for name in ("a", "b")
        ]  # fmt: skip
        return documents, home / "videomme" / "data"
    documents = [
        {"video_idx": name, "question": "What colour?", "option": LETTERS, "answer": "1"} for name in ("a", "b")
    ]
    return documents, home / "egoschema" / "videos"


@pytest.fixture
def lmms_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """lmms-eval's own functions for the three tasks, which look for videos below HF_HOME."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setitem(
        sys.modules, "cv2", types.ModuleType("cv2")
    )  # Video-MME imports it, and asks nothing of it here
    found = {}
    for name in ("mvbench", "videomme", "egoschema"):
        spec = importlib.util.find_spec(f"lmms_eval.tasks.{name}.utils")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[name] = module
    return found


def test_the_recipe_of_the_video_benchmarks_with_a_small_model(
    release: Path, tmp_path: Path, lmms_tasks: dict[str, Any]
) -> None:
    """Its own keys but for the release and budgets that a small grid can have; lmms-eval's own prompts and metrics."""
    arguments = ["--config", str(RECIPE), "--model", str(release), "--budgets", "[all, 4+2]", "--device", "cpu"]
    config = parse_config(PapersConfig, arguments, default=None, program="test")
    assert [task.task for task in config.tasks] == ["mvbench_mean", "videomme", "egoschema_subset"]
    assert all(task.full is None for task in config.tasks)
    rows = check_rows(config)
    assert [row.budget for row in rows] == ["all", "4+2"]
    flops = [checked.llm_flops for checked in rows.values()]
    assert flops[0] > flops[1]
    mvbench, videomme, egoschema = (lmms_tasks[name] for name in ("mvbench", "videomme", "egoschema"))
    choices = {"pre_prompt": "", "post_prompt": "\nAnswer with the option's letter from the given choices directly."}
    own = {"sub_task": "action_antonym", "post_prompt": "Only give the best option.\n"}
    functions: dict[str, tuple[Any, Any, Any]] = {
        "mvbench": (
            lambda doc: mvbench.mvbench_doc_to_visual(doc, own),
            lambda doc: mvbench.mvbench_doc_to_text(doc, own),
            mvbench.mvbench_process_results,
        ),
        "videomme": (
            videomme.videomme_doc_to_visual,
            lambda doc: videomme.videomme_doc_to_text(doc, choices),
            videomme.videomme_process_results,
        ),
        "egoschema": (
            egoschema.egoschema_doc_to_visual,
            lambda doc: egoschema.egoschema_doc_to_text(doc, choices),
            egoschema.egoschema_process_results_generation,
        ),
    }
    generation = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}
    for row in rows:
        asked = ReducedLlavaChat.create_from_arg_string(
            model_arguments(row, config), {"device": "cpu", "batch_size": config.batch_size}
        )
        assert asked.supervision.sampling == Sampling(32)
        for task, metric in zip(functions, (task.metrics[0] for task in config.tasks), strict=True):
            documents, folder = documents_of(task, tmp_path)
            suffix, codec = (".webm", "libvpx-vp9") if task == "mvbench" else (".mp4", "libx264")
            for place, name in enumerate(("a", "b")):
                if not (folder / f"{name}{suffix}").exists():
                    write_video(folder / f"{name}{suffix}", 12, codec=codec, first=100 * place)
            visual, text, process = functions[task]
            prompts = [{"text": text(doc), "visuals": visual(doc)} for doc in documents]
            said = Task(asked, *prompts).ask(**generation)
            assert len(said) == 2
            results = [process(doc, [answer]) for doc, answer in zip(documents, said, strict=True)]
            assert all(metric.removesuffix(",none") in result for result in results)


def test_the_mean_of_mvbench_is_a_group_of_lmms_evals_own_tasks() -> None:
    group = yaml.safe_load((RECIPE.parent / "tasks" / "mvbench_mean.yaml").read_text())
    own = yaml.safe_load(
        (Path(str(importlib.util.find_spec("lmms_eval").origin)).parent / "tasks/mvbench/mvbench.yaml").read_text()
    )
    assert group["task"] == own["task"]
    assert len(group["task"]) == 20
    assert group["aggregate_metric_list"] == [
        {"metric": "mvbench_accuracy", "aggregation": "mean", "weight_by_size": False}
    ]
