"""What the tasks of questions about videos refer to (configs/eval/tasks/_video_qa_template_yaml): a judge scores them.

Prompt and reading of the verdicts are lmms-eval's, of its ActivityNet-QA: the words of Video-LLaVA's own evaluation
(videollava/eval/video/eval_video_qa.py), which are Video-ChatGPT's. The judge is reached by lmms-eval's environment
variables: OPENAI_API_KEY, OPENAI_API_URL (the whole address of chat completions) and MODEL_VERSION (the judge's name).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from huggingface_hub import constants

from shortzip.data.errors import UserError, shown

NO_KEY = "YOUR_API_KEY"  # what lmms-eval sends where there is none


def lmms_evals_own() -> ModuleType:
    """lmms-eval's module of ActivityNet-QA, which asks for HF_HOME as it is imported, for videos of its own."""
    os.environ.setdefault("HF_HOME", constants.HF_HOME)
    return importlib.import_module("lmms_eval.tasks.activitynetqa.utils")


def with_judge(dataset: Any) -> Any:
    """The questions as they are, before the first is answered. Raises UserError where no judge could be asked."""
    own = lmms_evals_own()
    if own.API_TYPE != "openai" or own.API_KEY in ("", NO_KEY):
        raise UserError(
            f"a judge scores these answers, and there is none (API_TYPE is {own.API_TYPE!r}; lmms-eval asks this one "
            "by OpenAI's interface alone): set OPENAI_API_KEY, and OPENAI_API_URL for another address than OpenAI's"
        )
    return dataset


def doc_to_visual(doc: dict[str, Any]) -> list[str]:
    """The path of a question's video."""
    return [str(doc["video"])]


def doc_to_text(doc: dict[str, Any]) -> str:
    """The question alone, as Video-LLaVA was asked it."""
    return str(doc["question"])


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """What the judge says of an answer: yes or no, and 0 to 5.

    Raises UserError for an answer without a verdict, which lmms-eval's loop around this function asks for four more
    times: a score of the other answers alone, or of a made-up verdict, is none.
    """
    own = lmms_evals_own()
    try:
        verdict: dict[str, Any] = own.activitynetqa_process_results(doc, results)
    except TypeError as error:  # it takes the verdict apart without having been able to read it
        raise UserError(
            f"question {doc['question_id']}: the judge ({own.GPT_EVAL_MODEL_NAME}) gave no verdict of the answer "
            f"{shown(results[0], 100)!r}, or none that lmms-eval can read; why stands above"
        ) from error
    return verdict


def aggregate_accuracy(results: Sequence[dict[str, Any]], args: Any) -> float:
    """Percent of answers that the judge calls right."""
    return float(lmms_evals_own().activitynetqa_aggregate_accuracy(results, args))


def aggregate_score(results: Sequence[dict[str, Any]], args: Any) -> float:
    """The mean of the judge's scores, 0 to 5."""
    return float(lmms_evals_own().activitynetqa_aggregate_score(results, args))
