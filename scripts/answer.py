"""Answers a file of questions, one JSON line each, in batches of similar length.

    python scripts/answer.py questions.jsonl --model checkpoints/RUN --image_root images

Questions are conversations that end with a question, in any format that instructions have, or LLaVA's own question
files (question_id, text, image). Killed or interrupted, the same command continues. An image that cannot be read costs
its own answer only. The answers are those of `generate`, greedy, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shortzip.data.files import held_alone, refuse_to_replace
from shortzip.data.kept import conversations_digest, identity_of
from shortzip.data.supervision import Supervision
from shortzip.train.inputs.samples import folder_of
from shortzip.train.inputs.videos import sampling_of
from shortzip.train.release.loading import load_release
from shortzip.train.release.opening import open_release, release_content
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.run.report import Reporter
from shortzip.train.serving.answers_file import Answerer, PartialAnswers, answer_file, read_questions
from shortzip.train.serving.device import place
from shortzip.train.settings.command_line import parse_config, run_command
from shortzip.train.settings.serving import AnswerConfig


def main(argv: Sequence[str]) -> None:
    run(parse_config(AnswerConfig, argv, program="answer.py"))


def run(config: AnswerConfig) -> None:
    """Answers. Raises `FileInTheWay`, `Busy`, and what reading questions and loading the model raises."""
    source = Path(config.questions)
    output = config.output or source.with_name(f"{source.stem}.answers.jsonl")
    refuse_to_replace(output, overwrite=config.overwrite, inputs=[source])
    questions = read_questions(config.questions)
    root = config.image_root or folder_of(config.questions)
    device, dtype = place(config.device, config.dtype)
    spec = ReleaseSpec(config.model, config.revision, chat_template=config.chat_template, dtype=dtype)
    release = open_release(spec)
    model, processor = load_release(release)
    supervision = Supervision(processor, max_length=None, sampling=sampling_of(processor))
    identity = identity_of(
        {
            "questions": conversations_digest(questions, root),
            "model": release_content(release),
            "template": supervision.template,
            "dtype": str(dtype),
            "max_new_tokens": config.max_new_tokens,
        }
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = output.with_name(f".{output.name}.lock")
    with held_alone(lock, str(output)), Reporter(True) as report:
        partial = PartialAnswers(output, identity, overwrite=config.overwrite)
        if partial.answers:
            report.say(f"{len(partial.answers)} of {len(questions)} questions are answered already: continuing")
        answerer = Answerer(model.to(device), supervision, root, config.max_new_tokens)
        try:
            answers = answer_file(
                answerer,
                questions,
                partial,
                config.batch_size,
                lambda done, total: report.progress("answering", done, total),
            )
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(f"interrupted: the same command continues {partial.path}") from interrupt
        report.end_progress()
        failed = [answer for answer in answers if answer.error is not None]
        if failed:
            report.say(f"{len(failed)} without an answer; the first is {failed[0].id}: {failed[0].error}")
        report.say(f"written: {output} ({len(answers)} answers)")
        lock.unlink(missing_ok=True)


if __name__ == "__main__":
    run_command(main)
