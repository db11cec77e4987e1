"""Questions about videos with a judge: their files as tasks, and the recipe of Video-LLaVA's table at toy size."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from judge_server import Judge
from lmms_eval.api.instance import Instance
from lmms_eval.utils import load_yaml_config
from made_videos import write_video

from shortzip.data.errors import FileInTheWay, MissingFile, UserError
from shortzip.data.videos import Sampling
from shortzip.scripts.evaluate_papers import check_rows, digest_of, model_arguments, task_files
from shortzip.scripts.evaluate_papers import main as evaluate_papers
from shortzip.scripts.make_lmms_task import main
from shortzip.scripts.tiny.temporal_video_llava import write_release
from shortzip.train.evaluation.lmms_judge import lmms_evals_own, process_results, with_judge
from shortzip.train.evaluation.lmms_model import ReducedLlavaChat
from shortzip.train.evaluation.lmms_plugin import TEMPLATES
from shortzip.train.evaluation.video_questions import SHIPPED_TASKS, TEMPLATE
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import parse_config
from shortzip.train.settings.comparing import PapersConfig

RECIPE = TEMPLATES.parent / "video-llava-7b.yaml"
YES, NO = "{'pred': 'yes', 'score': 4}", "{'pred': 'no', 'score': 1}"


def write_questions(folder: Path, name: str = "msvd_qa") -> list[str]:
    """Files with the benchmarks' own keys, and the flags that give them. ActivityNet's videos have v_ before their
    names, and its answers a type."""
    is_typed = name == "activitynet_qa"
    questions = [
        {"video_name": "a", "question": "what is a man doing?", "question_id": 51478 if not is_typed else "v_a_1"},
        {"video_name": "b_2_10", "question": "who is on stage", "question_id": 51479 if not is_typed else "v_b_2"},
    ]
    answers: list[dict[str, Any]] = [
        {"answer": answer, "question_id": row["question_id"], **({"type": 3} if is_typed else {})}
        for answer, row in zip(("ride", "woman"), questions, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test_q.json").write_text(json.dumps(questions))
    (folder / "test_a.json").write_text(json.dumps(answers))
    for place, video in enumerate(("a", "b_2_10")):
        write_video(folder / "videos" / f"{'v_' * is_typed}{video}{('.mp4', '.mkv')[place]}", 12, first=100 * place)
    given = {"questions": "test_q.json", "answers": "test_a.json", "videos": "videos"}
    return ["--name", name, *(word for key, file in given.items() for word in (f"--{key}", str(folder / file)))]


def change(path: Path, **changes: Any) -> None:
    """Rewrites the second row; a key that is None is taken out."""
    first, second = json.loads(path.read_text())
    second = {key: value for key, value in {**second, **changes}.items() if value is not None}
    path.write_text(json.dumps([first, second]))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------ from the files


def test_questions_become_a_shipped_tasks_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in SHIPPED_TASKS:
        main(write_questions(tmp_path / name, name))
        where = tmp_path / "checkpoints" / "video-qa" / f"{name}.jsonl"
        first, second = lines_of(where)
        is_typed = name == "activitynet_qa"
        assert second == {
            "question": "who is on stage", "question_id": "v_b_2" if is_typed else "51479", "video_name": "b_2_10",
            "answer": "woman", "type": "3" if is_typed else "",
            "video": str(tmp_path / name / "videos" / f"{'v_' * is_typed}b_2_10.mkv"),
        }  # fmt: skip
        assert (first["answer"], Path(first["video"]).name) == ("ride", f"{'v_' * is_typed}a.mp4")
        task = load_yaml_config(str(TEMPLATES / f"{name}.yaml"), mode="simple")
        assert task["task"] == name
        looked_in = (TEMPLATES / task["dataset_kwargs"]["data_files"]["test"]).resolve()
        assert looked_in == TEMPLATES.parents[2] / "checkpoints" / "video-qa" / f"{name}.jsonl"
    given = write_questions(tmp_path / "msvd_qa")
    with pytest.raises(FileInTheWay, match=r"msvd_qa\.jsonl exists already: give --overwrite"):
        main(given)
    main([*given, "--overwrite", "--data.samples", "1"])
    assert len(lines_of(Path("checkpoints/video-qa/msvd_qa.jsonl"))) == 1


def test_answers_are_paired_by_place_or_by_id(tmp_path: Path) -> None:
    given = [*write_questions(tmp_path), "--output", str(tmp_path / "tasks"), "--overwrite"]
    path = tmp_path / "test_a.json"
    first, second = json.loads(path.read_text())
    for answers, expected in (
        ([second, first], ["ride", "woman"]),
        ([{"answer": "x", "question_id": 1}, first, second, second], ["ride", "woman"]),
        ([{"answer": 2}, {"answer": "woman"}], ["2", "woman"]),  # without ids
    ):
        path.write_text(json.dumps(answers))
        main(given)
        assert [line["answer"] for line in lines_of(tmp_path / "tasks" / "msvd_qa.jsonl")] == expected
    written = sorted(file.name for file in (tmp_path / "tasks").iterdir())
    assert written == ["msvd_qa.jsonl", "msvd_qa.yaml"]
    # ids that stand there twice are told apart by their places, as the authors' code pairs all of them
    change(tmp_path / "test_q.json", question_id=first["question_id"])
    path.write_text(json.dumps([first, {**second, "question_id": first["question_id"]}]))
    main(given)
    assert [line["answer"] for line in lines_of(tmp_path / "tasks" / "msvd_qa.jsonl")] == ["ride", "woman"]


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("test_a.json", {"question_id": 9}, r"1 of 2 questions have no answer in .*test_a\.json: 51479: give the ans"),
        ("test_a.json", {"answer": None}, r"test_a\.json, row 1 has no answer; needed are answer"),
        ("test_a.json", {"answer": ""}, r"test_a\.json, row 1 has no answer"),
        ("test_a.json", {"question_id": 51478}, r"question_id 51478 stands there with two answers"),
        ("test_q.json", {"video_name": "c"}, r"1 of 2 questions have no video in .*videos: c: needed is NAME\.mp4"),
        ("test_q.json", {"question": None}, r"test_q\.json, row 1 has no question"),
        ("test_q.json", {"video_name": None}, r"test_q\.json, row 1 has no video_name"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(
    tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    given = write_questions(tmp_path)
    change(tmp_path / file, **changes)
    with pytest.raises(UserError, match=message):
        main([*given, "--output", str(tmp_path / "tasks")])
    assert not (tmp_path / "tasks").exists()


def test_what_is_missing_is_counted_and_named(tmp_path: Path) -> None:
    given = write_questions(tmp_path)
    rows = json.loads((tmp_path / "test_q.json").read_text())
    many = [{**rows[0], "question_id": number, "video_name": f"gone{number // 2}"} for number in range(14)]
    (tmp_path / "test_q.json").write_text(json.dumps([*rows, *many]))
    answers = json.loads((tmp_path / "test_a.json").read_text())
    with pytest.raises(UserError, match=r"14 of 16 questions have no answer in .*: 0, 1, 2, 3, 4 and 9 more: give"):
        main(given)
    answers += [{"answer": "x", "question_id": row["question_id"]} for row in many]
    (tmp_path / "test_a.json").write_text(json.dumps(answers))
    named = r"14 of 16 questions have no video in .*: gone0, gone1, gone2, gone3, gone4 and 2 more: needed"
    with pytest.raises(UserError, match=named):
        main(given)


def test_settings_and_files_that_are_no_questions(tmp_path: Path) -> None:
    given = write_questions(tmp_path)
    with pytest.raises(ConfigError, match="answers, videos: not given; questions, answers and videos go together"):
        main(given[:4])
    with pytest.raises(ConfigError, match=r"name is demo_scenes, the demo's: give another, like tgif_qa"):
        main(given[2:])
    with pytest.raises(ConfigError, match=r"give no data\.instructions"):
        main([*given, "--instructions", "rows.json"])
    with pytest.raises(MissingFile, match="nowhere: there is no such folder"):
        main([*given, "--videos", str(tmp_path / "nowhere")])
    with pytest.raises(FileInTheWay, match="the folder of the shipped tasks"):
        main([*given, "--output", str(TEMPLATES)])
    (tmp_path / "test_a.json").write_text("[1]")
    with pytest.raises(UserError, match="row 0 is a int; needed is an object with answer"):
        main(given)
    (tmp_path / "test_a.json").write_text("[]")
    with pytest.raises(UserError, match="holds no rows"):
        main(given)


# ----------------------------------------------------------------------------------------------------------- the judge


@pytest.fixture
def judge() -> Iterator[Judge]:
    judge = Judge(lambda text: YES if "man doing" in text else NO)
    yield judge
    judge.stop()


@pytest.fixture
def own(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """lmms-eval's module, whose judge is this one."""
    module = lmms_evals_own()
    settings = {
        "API_TYPE": "openai", "API_KEY": "a key", "API_URL": judge.url, "GPT_EVAL_MODEL_NAME": "gpt-3.5-turbo",
        "headers": {"Authorization": "Bearer a key"}, "NUM_SECONDS_TO_SLEEP": 0,
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setattr(module, name, value, raising=False)
    return module


DOC = {
    "question": "what is a man doing?", "question_id": "7", "video_name": "a", "answer": "ride", "type": "",
    "video": "a.mp4",
}  # fmt: skip


def test_without_a_judge_nothing_is_asked(own: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert with_judge([DOC]) == [DOC]
    monkeypatch.setattr(own, "API_KEY", "YOUR_API_KEY")
    with pytest.raises(UserError, match=r"a judge scores these answers, and there is none \(API_TYPE is 'openai'"):
        with_judge([DOC])
    monkeypatch.setattr(own, "API_TYPE", "azure")
    monkeypatch.delattr(own, "API_KEY")
    with pytest.raises(UserError, match=r"API_TYPE is 'azure'"):
        with_judge([DOC])


def test_an_answer_without_a_verdict_has_no_score(
    own: ModuleType, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge.verdict = lambda text: f"Sure! {YES}"
    assert process_results(DOC, ["riding"])["gpt_eval_score"]["score"] == 4
    for unreadable in ("I cannot say", "{'pred': 'yes'}", "{'pred': 'yes', 'score': 'high'}", "{'pred': yes}"):
        judge.verdict = lambda text, said=unreadable: said  # type: ignore[misc]
        with pytest.raises(UserError, match=r"question 7: the judge \(gpt-3\.5-turbo\) gave no verdict .*'riding'"):
            process_results(DOC, ["riding"])
    assert len(judge.asked) == 5
    monkeypatch.setattr(own, "API_URL", "http://127.0.0.1:9/v1/chat/completions")  # nobody is there
    with pytest.raises(UserError, match="gave no verdict"):
        process_results(DOC, ["riding"])


# ---------------------------------------------------------------------------------------------------------- the recipe


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("video-llava") / "tiny")


def recipe(release: Path, folder: Path, *more: str) -> list[str]:
    """The recipe with a small model and a budget that its grid can have."""
    given = ["--model", str(release), "--device", "cpu", "--include_path", str(folder)]
    return ["--config", str(RECIPE), "--budgets", "[all, 4+2]", *given, *more]


def test_the_recipe_is_the_papers_table() -> None:
    config = parse_config(PapersConfig, ["--config", str(RECIPE)], default=None, program="test")
    assert list(dict.fromkeys(task.task for task in config.tasks)) == list(SHIPPED_TASKS)
    assert [task.averaged for task in config.tasks] == [True, False] * 4
    assert all(task.judge and task.full is None for task in config.tasks)
    assert config.budgets == ["all", "14+3"]
    assert config.frames is not None
    assert config.frames * 17 == 136
    (published,) = config.published
    assert (published.budget, published.percent) == ("14+3", 93.2)
    for task in config.tasks:
        names = [file.name for file in task_files(task.task, str(TEMPLATES))]
        assert names[:2] == [f"{task.task}.yaml", TEMPLATE]


def test_the_recipe_with_a_small_model_and_a_judge(
    release: Path, tmp_path: Path, own: ModuleType, judge: Judge
) -> None:
    """Its own keys but for release and budget; the tasks' own functions; both metrics of one run."""
    main([*write_questions(tmp_path), "--output", str(tmp_path / "tasks")])
    config = parse_config(PapersConfig, recipe(release, tmp_path / "tasks"), default=None, program="test")
    rows = check_rows(config)
    assert [row.budget for row in rows] == ["all", "4+2"]
    flops = [checked.llm_flops for checked in rows.values()]
    assert flops[0] > flops[1]
    accuracy, score = (task for task in config.tasks if task.task == "msvd_qa")
    assert digest_of(accuracy, config) == digest_of(score, config), "one run has both"
    task = load_yaml_config(str(tmp_path / "tasks" / "msvd_qa.yaml"))
    documents = task["process_docs"](lines_of(tmp_path / "tasks" / "msvd_qa.jsonl"))
    said: list[str] = []
    for row in rows:
        asked = ReducedLlavaChat.create_from_arg_string(
            model_arguments(row, config), {"device": "cpu", "batch_size": config.batch_size}
        )
        assert asked.supervision.sampling == Sampling(8)
        asked.task_dict = {"task": {"test": documents}}

        def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
            shown = [{"type": "video", "url": url} for url in task["doc_to_visual"](doc)]
            return [{"role": "user", "content": [*shown, {"type": "text", "text": task["doc_to_text"](doc)}]}]

        generation = {**task["generation_kwargs"], "max_new_tokens": 4}
        requests = [
            Instance(
                "generate_until",  # type: ignore[arg-type]
                ("", messages, generation, number, "task", "test"),  # type: ignore[arg-type]
                idx=0,
                metadata={"task": "task", "doc_id": number, "repeats": 1},
            )
            for number in range(len(documents))
        ]
        answers = asked.generate_until(requests)
        said += answers
        results = [task["process_results"](doc, [answer]) for doc, answer in zip(documents, answers, strict=True)]
        found = {
            entry["metric"]: entry["aggregation"]([result[entry["metric"]] for result in results], args=None)
            for entry in task["metric_list"]
        }
        assert found == {"gpt_eval_accuracy": 50.0, "gpt_eval_score": 2.5}
    assert any(said)
    assert {request["model"] for request in judge.asked} == {"gpt-3.5-turbo"}
    texts = [request["messages"][-1]["content"] for request in judge.asked]
    pattern = r"Question: (.*)\nCorrect Answer: (.*)\nPredicted Answer: ((?:.|\n)*)\n\nProvide"
    judged = [match.groups() for text in texts if (match := re.search(pattern, text))]
    asked_and_right = [("what is a man doing?", "ride"), ("who is on stage", "woman")] * 2
    assert judged == [(*pair, answer) for pair, answer in zip(asked_and_right, said, strict=True)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_table_by_the_real_lmms_eval(
    release: Path, tmp_path: Path, judge: Judge, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All four tasks; of TGIF's answers the judge says nothing readable, so that its cells stay empty."""
    for name in SHIPPED_TASKS:
        given = write_questions(tmp_path / name, name)
        if name == "tgif_qa":
            change(tmp_path / name / "test_q.json", question="what is unspeakable?")
        main([*given, "--output", str(tmp_path / "tasks")])
    judge.verdict = lambda text: "…" if "unspeakable" in text else YES if "man doing" in text else NO
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    given = recipe(release, tmp_path / "tasks", "--output", str(tmp_path / "out"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"TGIF, TGIF score, MSVD, .*: GPT judges the answers"):
        evaluate_papers(given)
    assert not (tmp_path / "out").exists()
    for key, value in {"OPENAI_API_KEY": "a key", "OPENAI_API_URL": judge.url, "MODEL_VERSION": "judge"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit, match="4 of the runs failed"):
        evaluate_papers(given)
    said = capsys.readouterr().out
    assert "gave no verdict of the answer" in said
    assert "the same run of lmms-eval, which failed above" in said
    lines = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert [line["budget"] for line in lines] == ["all", "4+2"]
    columns = {"MSVD": 50.0, "MSVD score": 2.5, "MSRVTT": 50.0, "MSRVTT score": 2.5}
    columns |= {"ActivityNet": 50.0, "ActivityNet score": 2.5}
    assert [line["scores"] for line in lines] == [columns, columns]
    assert "about one video, of 8 frames" in (tmp_path / "out" / "table.md").read_text()
    assert set(judge.keys) == {"Bearer a key"}
    assert {request["model"] for request in judge.asked} == {"judge"}


@pytest.mark.slow
def test_lmms_eval_alone_asks_nothing_without_a_judge(release: Path, tmp_path: Path) -> None:
    main([*write_questions(tmp_path), "--output", str(tmp_path / "tasks")])
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "reduced_llava", "--model_args",
        f"pretrained={release},budget=4+2,dtype=float32", "--include_path", str(tmp_path / "tasks"), "--tasks",
        "msvd_qa", "--device", "cpu", "--output_path", str(tmp_path / "out"), "--log_samples",
    ]  # fmt: skip
    judges = ("OPENAI_API_KEY", "OPENAI_API_URL", "API_TYPE", "HF_HOME")
    environment = {key: value for key, value in os.environ.items() if key not in judges}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert "a judge scores these answers, and there is none" in done.stdout + done.stderr
    assert not list((tmp_path / "out").rglob("*_results.json"))
