"""Makes a local task for lmms-eval of held-out conversations: a YAML file and its questions.

    python scripts/make_lmms_task.py                                                # the demo's held-out scenes
    python scripts/make_lmms_task.py --instructions FILE.json --image_root IMAGES --name mine
    lmms-eval --model reduced_llava --model_args pretrained=checkpoints/RUN --include_path checkpoints/lmms-tasks \
        --tasks mine --batch_size 16
    python scripts/make_lmms_task.py --name msvd_qa --questions test_q.json --answers test_a.json --videos FOLDER

NAME asks every question (exact match, as scripts/evaluate_models.py); NAME_likelihood, with lmms-eval's
--force_simple, takes the loss of the true answers to first questions. Questions about videos in the layout of
Video-ChatGPT's zero-shot evaluation (GPT_Zero_Shot_QA) become a task that a judge scores: shipped are tgif_qa,
msvd_qa, msrvtt_qa and activitynet_qa (configs/eval/video-llava-7b.yaml).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shortzip.data.files import refuse_inputs, refuse_to_replace
from shortzip.data.instructions import read_instructions
from shortzip.train.evaluation.lmms_plugin import write_questions, write_task
from shortzip.train.evaluation.video_questions import (
    SHIPPED_FOLDER,
    SHIPPED_TASKS,
    read_video_questions,
    write_lines,
    write_video_task,
)
from shortzip.train.inputs.samples import demo_folder, draw_demo_scenes
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import parse_config, run_command, say
from shortzip.train.settings.config import DEMO, DataConfig, DemoScenesConfig

SHIPPED = "demo_scenes"


@dataclass(frozen=True)
class Questions:
    """The conversations to ask."""

    instructions: str = DEMO
    """Held-out conversations in LLaVA's JSON; demo: the demo's held-out scenes, drawn if they are not there."""
    image_root: str | None = None
    """Folder that image paths start from; null means the folder of the instructions."""
    samples: int | None = None
    """Only the first so many conversations; null means all."""
    demo_scenes: DemoScenesConfig = field(default_factory=DemoScenesConfig)
    """The drawn scenes that `demo` stands for."""

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise ConfigError(f"data.samples is {self.samples}: at least 1 is needed, or null for all")


@dataclass(frozen=True)
class TaskConfig:
    """Settings of scripts/make_lmms_task.py."""

    data: Questions = field(default_factory=Questions)
    """The conversations to ask."""
    name: str = SHIPPED
    """The task's name."""
    questions: str | None = None
    """Questions about videos instead of conversations: rows of question, question_id and video_name."""
    answers: str | None = None
    """Their answers: rows of answer and question_id."""
    videos: str | None = None
    """Folder of their videos, NAME.mp4 or v_NAME.mp4."""
    output: str | None = None
    """Where it is written; null: checkpoints/lmms-tasks, and for the task of the demo beside its scenes, for those of
    questions about videos that ship in checkpoints/video-qa, where their files in configs/eval/tasks look."""
    overwrite: bool = False
    """Replace a task of that name that is there already."""

    def __post_init__(self) -> None:
        given = {key: getattr(self, key) for key in ("questions", "answers", "videos")}
        missing = [key for key, value in given.items() if value is None]
        if len(missing) == len(given):
            return
        if missing:
            raise ConfigError(f"{', '.join(missing)}: not given; questions, answers and videos go together")
        if self.data.instructions != DEMO or self.data.image_root is not None:
            raise ConfigError("a task is of questions about videos or of conversations: give no data.instructions")
        if self.name == SHIPPED:
            raise ConfigError(f"name is {SHIPPED}, the demo's: give another, like {', '.join(SHIPPED_TASKS)}")


def make(config: TaskConfig) -> None:
    """Writes the task and says how to run it. Raises ValueError or OSError for what cannot be read or written."""
    if config.questions is not None and config.answers is not None and config.videos is not None:
        make_of_videos(config, Path(config.questions), Path(config.answers), Path(config.videos))
        return
    data, source, root = config.data, config.data.instructions, config.data.image_root
    if source == DEMO:
        draw_demo_scenes(DataConfig("", eval_instructions=DEMO, demo_scenes=data.demo_scenes))
        drawn = demo_folder(data.demo_scenes, held_out=True)
        source, root = str(drawn / "instructions.json"), str(drawn / "images")
    conversations = read_instructions(source)[: data.samples]
    root = root or str(Path(source).parent)
    shipped = data.instructions == DEMO and config.output is None and config.name == SHIPPED
    if shipped:
        questions = Path(data.demo_scenes.folder) / "lmms-eval" / f"{SHIPPED}.jsonl"
        refuse_to_replace(questions, overwrite=config.overwrite)
        count = write_questions(conversations, root, questions)
        where, tasks = Path("configs/eval/tasks"), SHIPPED
    else:
        where, tasks = Path(config.output or "checkpoints/lmms-tasks"), config.name
        count = write_task(where, config.name, conversations, root, overwrite=config.overwrite)
    say_how(count, where, tasks)


def make_of_videos(config: TaskConfig, questions: Path, answers: Path, videos: Path) -> None:
    """The same for questions about videos."""
    lines = read_video_questions(questions, answers, videos, config.data.samples)
    if config.output is None and config.name in SHIPPED_TASKS:
        where, path = Path("configs/eval/tasks"), SHIPPED_FOLDER / f"{config.name}.jsonl"
        refuse_to_replace(path, overwrite=config.overwrite, inputs=(questions, answers))
        write_lines(path, lines)
    else:
        where = Path(config.output or "checkpoints/lmms-tasks")
        refuse_inputs([where / f"{config.name}.jsonl", where / f"{config.name}.yaml"], (questions, answers))
        write_video_task(where, config.name, lines, overwrite=config.overwrite)
    say_how(len(lines), where, config.name)
    say("A judge scores the answers: lmms-eval needs OPENAI_API_KEY, and MODEL_VERSION for the judge's name.")


def say_how(count: int, where: Path, tasks: str) -> None:
    say(f"{count} questions. lmms-eval --model reduced_llava --model_args pretrained=… --include_path {where} \\")
    say(f"    --tasks {tasks} --batch_size 16")


def main(argv: Sequence[str]) -> None:
    make(parse_config(TaskConfig, argv, program="make_lmms_task.py"))


if __name__ == "__main__":
    run_command(main)
