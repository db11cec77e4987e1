"""The settings of the commands that answer: `serve` and `answer`.

Nothing here imports what a command works with: its --help needs no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shortzip.reduction.errors import ReductionError
from shortzip.reduction.parsing import budget_by, parse_budget
from shortzip.reduction.selectors import VISIONZIP
from shortzip.train.settings.checks import ConfigError, _at_least, _within, repeated
from shortzip.train.settings.flags import POSITIONAL, REPEATED

_LISTED = re.compile(r"(?:(?P<name>[\w.:+-]+)=)?(?P<model>.+?)(?:@(?P<budget>\d+\+\d+)(?::(?P<method>[^@]+))?)?")


@dataclass(frozen=True)
class Listed:
    """A model as --model lists it: [NAME=]MODEL[@BUDGET[:METHOD]]."""

    name: str
    """What requests call it."""
    model: str
    """A release, a reduced checkpoint or a run's folder; or a Hub id."""
    visionzip: dict[str, Any] | None
    """The config's key, of a release that is served reduced and untuned; None: as it was saved."""

    @classmethod
    def parse(cls, text: str) -> Listed:
        """Raises `ConfigError` for text of another form, or a method that there is not."""
        found = _LISTED.fullmatch(text)
        if found is None:
            raise ConfigError(f"model {text!r}: write [NAME=]MODEL[@BUDGET[:METHOD]], like small=checkpoints/run")
        name = found["name"] or found["model"].rstrip("/").rpartition("/")[2]
        if found["budget"] is None:
            return cls(name, found["model"], None)
        try:
            budget = parse_budget(found["budget"])
            return cls(name, found["model"], budget_by(budget, found["method"] or VISIONZIP))
        except ReductionError as error:
            raise ConfigError(f"model {text!r}: {error}") from error


@dataclass(frozen=True)
class ServeConfig:
    """Settings of scripts/serve.py.

    shortzip serve --model checkpoints/llava-1.5-7b-64 --engine http://127.0.0.1:8000/v1
    """

    model: list[str] = field(metadata=REPEATED)
    """[NAME=]MODEL[@BUDGET[:METHOD]]; repeat the option for several, all of the release that the engine runs. MODEL is
    a release, a reduced checkpoint or a run's folder; NAME is what requests call it (default: the folder's name);
    @54+10 serves a release reduced and untuned, @64+0:scope or @64+0:vispruner:important=0.25 by another method."""
    engine: str
    """Address of the engine's OpenAI-compatible interface, with its /v1."""
    engine_model: str | None = None
    """What the engine calls its model; null: the first that it lists."""
    images: str | None = None
    """Folder whose images may be asked for as file:// addresses; null: none may."""
    allow_http: bool = False
    """Whether images are fetched from http(s) addresses; of public machines only."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where images are encoded."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the tower, and of what the engine is sent; the projector is float32. auto: bfloat16 on a GPU, else
    float32."""
    batch_size: int = 16
    """Images encoded at once, of whatever requests are waiting."""
    max_requests: int = 256
    """Requests at a time; more are refused (429) with the advice to come again."""
    max_images: int = 16
    """Images of one request."""
    max_image_mb: float = 20.0
    """Megabytes of one image's file."""
    max_request_mb: float = 32.0
    """Megabytes of a request's body, its images in base64 among them."""
    seconds: float = 300.0
    """After so many a request is given up (504)."""
    engine_seconds: float = 120.0
    """After so many without a word of the engine its request is given up (504)."""
    upload_seconds: float = 30.0
    """In so many a request's body, or an image from an address, must have come (408)."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 8080
    """Port to listen on."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model is []: at least one is needed")
        if again := repeated([listed.name for listed in self.listed]):
            raise ConfigError(f"model: {again[0]!r} stands there twice: give names, like small=checkpoints/run")
        if not re.match(r"https?://[^/]", self.engine):
            raise ConfigError(f"engine is {self.engine!r}: needed is an address like http://127.0.0.1:8000/v1")
        _within(self, "", batch_size=(1, 1024), max_requests=(1, 65536), max_images=(1, 256), port=(0, 65535))
        _at_least(
            self, "", max_image_mb=0.001, max_request_mb=0.001, seconds=0.1, engine_seconds=0.1, upload_seconds=0.1
        )
        if self.images is not None and not Path(self.images).is_dir():
            raise ConfigError(f"images: {self.images} is no folder")

    @property
    def listed(self) -> list[Listed]:
        """The models, in order."""
        return [Listed.parse(text) for text in self.model]


@dataclass(frozen=True)
class AnswerConfig:
    """Settings of scripts/answer.py.

    shortzip answer questions.jsonl --model checkpoints/llava-1.5-7b-64 --image_root images
    """

    questions: str = field(metadata=POSITIONAL)
    """Conversations that end with a question, in LLaVA's JSON or JSON Lines; true answers after it are left out."""
    model: str
    """A release, a reduced checkpoint or a run's folder; or a Hub id."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    image_root: str | None = None
    """Folder that image paths start from; null means the folder of the questions."""
    output: Path | None = None
    """The answers, JSON Lines; null: beside the questions, as NAME.answers.jsonl. What is there is continued."""
    overwrite: bool = False
    """Replace the answers that are there; what was interrupted, of the same questions and model, is continued."""
    batch_size: int = 16
    """Questions answered at once."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of everything but the projector; auto: bfloat16 on a GPU, else float32."""
    chat_template: str = "auto"
    """As data.chat_template of a run."""

    def __post_init__(self) -> None:
        _within(self, "", batch_size=(1, 4096), max_new_tokens=(1, 65536))
