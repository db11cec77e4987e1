"""The settings of two commands that compare: `evaluate` and `papers`; those of `frontier` are beside it (frontier.py).

Nothing here imports what a command works with: its --help needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from shortzip.reduction.selectors import VISIONZIP
from shortzip.train.settings.budget import VisionZipConfig
from shortzip.train.settings.checks import ConfigError, refuse_idle_positions, repeated
from shortzip.train.settings.config import FastVConfig, ShortVConfig
from shortzip.train.settings.flags import REPEATED

ALL, NONE = "all", "none"
TRAINING_FREE, TUNED = "training-free", "tuned"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class HeldOut:
    """The conversations to answer."""

    instructions: str | None = None
    """Held-out conversations in LLaVA's JSON; null: those of the run's own config, and its settings of them."""
    image_root: str | None = None
    """Folder that image paths start from; null means the folder of the instructions, or as the run."""
    samples: int | None = None
    """Only the first so many conversations; null means all, or as the run."""
    on_bad_sample: Literal["raise", "skip"] | None = None
    """What a bad row or image gets: an error, or being left out and counted; null means an error, or as the run."""
    video_frames: int | None = None
    """Frames of a video that are seen; null means as many as the release was trained with, or as the run."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of scripts/evaluate_models.py.

    shortzip evaluate --model llava-hf/llava-1.5-7b-hf --model checkpoints/RUN --instructions FILE.json
    """

    model: list[str] = field(metadata=REPEATED)
    """A release, reduced checkpoint or run folder; repeat the option for several."""
    data: HeldOut
    """The conversations to answer."""
    revision: str | None = None
    """Branch, tag or commit, for a single Hub id."""
    visionzip: VisionZipConfig | None = None
    """Also evaluate each release with this budget, and a checkpoint that was tuned for several with it in its own's
    place. visionzip.dominant: patches kept as they are, CLS counted among
    them; visionzip.contextual: tokens that the other patches are merged into; visionzip.method: another selection, or
    a baseline, whose parameters are keys beside it."""
    shortv: ShortVConfig | None = None
    """Also evaluate each release with these frozen layers. shortv.layers: their indices, from 0. (shortv.freeze and
    shortv.calibration_samples: only when tuning.)"""
    fastv: FastVConfig | None = None
    """Also evaluate each release with pruning inside the language model, instead of shortv. FastV by fastv.layer:
    layers passed before the pruning, and fastv.keep: share of the visual tokens kept; or another fastv.method
    (pyramiddrop with fastv.positions, sparsevlm, sparsevlm+) by fastv.layers and fastv.keep."""
    positions: Literal["compact", "original"] = "compact"
    """Where the tokens of such a reduced release stand: numbered anew, or where they would with all visual tokens."""
    text_tower: str | None = None
    """Also evaluate each release (LLaVA-1.5) with the budget's tokens chosen by each question (CDPruner), which is
    read with this CLIP, a folder or a Hub id: the one that the vision tower comes from."""
    mixed_precision: Literal["no", "bf16"] | None = None
    """Dtype of the computation: fp32 (no) or bf16. null: that of the first run among the models; without one, fp32 on
    a CPU and bf16 on a GPU."""
    load_in_4bit: bool | None = None
    """Whether the language model's layers are loaded in 4 bits. null: as the first run among the models did."""
    batch_size: int = 16
    """Conversations (loss) and questions (answers) per batch."""
    max_new_tokens: int = 64
    """Longest answer, in tokens."""
    output: str = "checkpoints/evaluation"
    """Folder for the table as JSON and for each model's answers."""
    overwrite: bool = False
    """Replace an evaluation that is there already."""

    def __post_init__(self) -> None:
        if self.shortv is not None and self.shortv.layers is None:
            raise ConfigError("how many layers freeze is chosen when a run starts: list them here (--freeze 31,29,30)")
        if self.fastv is not None and self.shortv is not None:
            raise ConfigError("fastv and shortv do not go together: give one of them")
        refuse_idle_positions(self.positions, self.visionzip, self.fastv)
        if self.text_tower is not None and self.visionzip is None:
            raise ConfigError(
                f"text_tower is {self.text_tower!r}, with no budget: CDPruner chooses as many as one says"
            )
        if self.revision is not None and len(self.model) != 1:
            raise ConfigError(f"revision {self.revision!r} fits one model, and there are {len(self.model)}")
        if not self.model or "" in self.model:
            raise ConfigError("give at least one --model, and a folder or a Hub id with each")
        if twice := repeated(self.model):
            raise ConfigError(f"model {twice[0]} is given twice: give each model once")
        for key in ("batch_size", "max_new_tokens"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}: at least 1 is needed")


def alike(key: str, text: str) -> str:
    """The one way to write a budget, method, layers or fastv, by which rows are compared. Raises ConfigError."""
    from shortzip.reduction.reductions import Reductions  # imports torch, which --help does not wait for

    try:
        if key == "layers":
            return Reductions.parse(layers=text).layers_words
        if key == "fastv":
            return Reductions.parse(fastv=text).fastv_words
        if key == "method":
            return Reductions.parse("1+0", method=text).method_words
        return Reductions.parse(text).budget_words
    except ValueError as error:
        raise ConfigError(str(error)) from error


def refuse_repeated(key: str, values: Sequence[Any]) -> None:
    again = repeated(values)
    if again:
        raise ConfigError(f"{key}: {again[0]} stands there {values.count(again[0])} times; once is allowed")


@dataclass(frozen=True)
class Task:
    """A benchmark."""

    name: str
    """The column's heading."""
    task: str
    """lmms-eval's task."""
    metrics: list[str]
    """The metrics of its results whose sum is the score, like ["exact_match,none"]."""
    scale: float = 100.0
    """The score is multiplied by this: 100 for shares, 1 for scores that are percent or points already."""
    gen_kwargs: str | None = None
    """Settings of generation over the task's own, as lmms-eval takes them."""
    full: float | None = None
    """The paper's score with all tokens."""
    judge: bool = False
    """Whether a judge, like GPT-4, gives the score. Without one lmms-eval may make a score up instead of failing."""
    averaged: bool = True
    """Whether the score counts in "% of full": not if lower is better, or the papers leave it out."""

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ConfigError(f"task {self.name}: metrics is empty; at least one is needed")


@dataclass(frozen=True)
class Tuned:
    """A tuned checkpoint, and the reductions that it was tuned for."""

    model: str
    """Reduced checkpoint, run folder or Hub id."""
    budget: str
    """dominant+contextual; all for every visual token."""
    layers: str = NONE
    """The frozen layers."""
    method: str = VISIONZIP
    """How tokens are chosen, with parameters as in random:seed=3."""
    fastv: str = NONE
    """Pruning inside the language model: FastV's layer and share, like 2+0.5, or
    pyramiddrop:8+16+24:0.5+0.25+0.125."""
    positions: Literal["compact", "original"] = "compact"
    """Where tokens stand."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", alike("budget", self.budget))
        object.__setattr__(self, "method", alike("method", self.method))
        object.__setattr__(self, "layers", alike("layers", self.layers))
        object.__setattr__(self, "fastv", alike("fastv", self.fastv))


@dataclass(frozen=True)
class Published:
    """What a paper reports of a row."""

    percent: float
    """The stated mean over the benchmarks of score / score with all tokens, times 100."""
    source: str
    """Which table of which paper."""
    budget: str = ALL
    """The row's budget."""
    layers: str = NONE
    """The row's frozen layers."""
    kind: str = TRAINING_FREE
    """training-free or tuned."""
    method: str = VISIONZIP
    """The row's method."""
    scores: dict[str, float] = field(default_factory=dict)
    """The scores that `percent` is the mean of, by the tasks' names."""
    flops: float | None = None
    """The language model's FLOPs, in percent of those with all tokens."""
    rerun: bool = False
    """Measured by others than the method's authors: it stands behind their figure."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", alike("budget", self.budget))
        object.__setattr__(self, "layers", alike("layers", self.layers))
        object.__setattr__(self, "method", alike("method", self.method))
        if self.kind not in (TRAINING_FREE, TUNED):
            raise ConfigError(f"published: kind is {self.kind!r}; it must be {TRAINING_FREE} or {TUNED}")

    @property
    def row_key(self) -> tuple[str, ...]:
        """What no other entry may have: one figure of the authors per row, and one of each who has run it again."""
        key = (self.kind, self.budget, self.layers, self.method)
        return (*key, self.source) if self.rerun else key


@dataclass(frozen=True)
class PapersConfig:
    """Settings of scripts/evaluate_papers.py.

    shortzip papers --config llava-1.5-7b --processes 8
    """

    model: str
    """The release."""
    tasks: list[Task]
    """The benchmarks."""
    output: str
    """Folder of the results and of the table."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    budgets: list[str] = field(default_factory=list)
    """Budgets, each with each of `layers`: dominant+contextual, or all."""
    layers: list[str] = field(default_factory=lambda: [NONE])
    """Lists of frozen layers like 31+29+30, or none."""
    methods: list[str] = field(default_factory=lambda: [VISIONZIP])
    """Ways to the budget: visionzip, other published selections and baselines, like vispruner:important=0.25."""
    positions: list[Literal["compact", "original"]] = field(default_factory=lambda: ["compact"])
    """Where the tokens of budgets stand: numbered anew (compact), or where they would with all visual tokens."""
    fastv: list[str] = field(default_factory=list)
    """Pruning inside the language model, on all tokens: FastV's layer and share kept, like 2+0.5; other methods like
    pyramiddrop:8+16+24:0.5+0.25+0.125 or sparsevlm:2+6+15:66+30+17."""
    tuned: list[Tuned] = field(default_factory=list)
    """Tuned checkpoints, as further rows."""
    published: list[Published] = field(default_factory=list)
    """The papers' figures, to stand beside the rows."""
    text_tokens: int = 64
    """Text tokens of the prompt, about one image, whose FLOPs are counted (64 in ShortV's paper)."""
    frames: int | None = None
    """Of tasks with videos: frames of a video that are seen, and whose FLOPs are counted instead of an image's."""
    processes: int = 1
    """Processes (GPUs) of each run of lmms-eval."""
    device: str = "cuda"
    """Where one process computes."""
    dtype: str = "auto"
    """float32, bfloat16 or float16; auto: bfloat16 on a GPU."""
    batch_size: int = 16
    """Prompts at once."""
    include_path: str | None = None
    """Folder of local tasks."""
    skip_judged: bool = False
    """Leave out the tasks that a judge like GPT-4 scores."""
    limit: int | None = None
    """Only the first so many documents of each task: to try the machinery, not to report."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("tasks is empty: at least one benchmark is needed")
        names = [task.name for task in self.tasks]
        refuse_repeated("tasks", names)
        object.__setattr__(self, "budgets", [alike("budget", budget) for budget in self.budgets])
        object.__setattr__(self, "layers", [alike("layers", layers) for layers in self.layers])
        object.__setattr__(self, "fastv", [alike("fastv", fastv) for fastv in self.fastv])
        object.__setattr__(self, "methods", [alike("method", method) for method in self.methods])
        refuse_repeated("positions", self.positions)
        refuse_repeated("tuned", self.tuned)
        refuse_repeated("published", [entry.row_key for entry in self.published])
        strange = [name for entry in self.published for name in entry.scores if name not in names]
        if strange:
            raise ConfigError(f"published: scores of {strange[0]!r}; the tasks are {', '.join(names)}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        if min(self.processes, self.batch_size, self.text_tokens, 1 if self.frames is None else self.frames) < 1:
            counts = f"processes {self.processes}, batch_size {self.batch_size}, text_tokens {self.text_tokens}"
            raise ConfigError(f"{counts}: at least 1 each is needed")

    @property
    def asked(self) -> list[Task]:
        """The tasks that are run."""
        return [task for task in self.tasks if not (task.judge and self.skip_judged)]
