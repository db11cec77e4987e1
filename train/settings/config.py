"""Every setting of a run, as dataclasses; train/settings/command_line.py reads them from YAML and the command line.

Settings that do not go together raise `ConfigError` when they are put together, before anything is loaded.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from shortzip.data.videos import MOST_FRAMES
from shortzip.reduction.parsing import parse_bytes
from shortzip.train.settings.budget import BudgetScheduleConfig, FastVConfig, VisionZipConfig
from shortzip.train.settings.budget_list import check_budgets
from shortzip.train.settings.checks import ConfigError, _at_least, _within, check_seed, refuse_idle_positions
from shortzip.train.settings.distill import DistillConfig, check_teacher
from shortzip.train.settings.method_parameters import flat_settings

DEMO = "demo"  # the value of data.instructions that stands for the drawn scenes
# Where and how fast a run goes and what it shows may change when it is continued; `data` and the release are
# recognised by their content, wherever they are.
FREE_KEYS = (
    "model", "revision", "mm_projector", "vision_tower", "data", "per_device_train_batch_size", "cpu_threads",
    "max_tokens_per_micro_batch", "max_memory", "gradient_checkpointing", "max_nonfinite_steps", "output_dir",
    "run_name", "overwrite_output_dir", "resume_from_checkpoint", "save_steps", "save_total_limit", "logging_steps",
    "report_to", "eval_steps", "eval_batch_size", "final_evaluation", "control", "max_new_tokens", "pictures",
    "push_to_hub", "hub_model_id", "hub_private_repo", "hub_shape", "hub_base",
)  # fmt: skip
SHAPING_DATA_KEYS = ("fraction", "max_length", "chat_template", "on_bad_sample", "video_frames", "video_fps")


@dataclass(frozen=True)
class ShortVConfig:
    """The LLM layers in which visual tokens are frozen: listed, or chosen by LC when the run starts."""

    layers: list[int] | None = None
    """Indices of the frozen layers, from 0."""
    freeze: str | int | None = None
    """Instead of `layers`: how many layers to freeze, as a number or a share ("60%"): the first of `ranking`."""
    ranking: Literal["lc", "cosine", "random"] = "lc"
    """With `freeze`: the layers with the lowest LC; or, to compare with, those that turn visual tokens least (cosine),
    or any (random, drawn with the run's seed)."""
    calibration_samples: int = 64
    """With `freeze`: training conversations that LC is measured on."""

    def __post_init__(self) -> None:
        if (self.layers is None) == (self.freeze is None):
            raise ConfigError("shortv needs either layers or freeze: set the other one to null")
        if self.freeze is not None and not re.fullmatch(r"\d+|\d+(\.\d+)?%", str(self.freeze)):
            raise ConfigError(f"shortv.freeze is {self.freeze!r}: a number of layers (19) or a share (60%) is needed")
        _at_least(self, "shortv.", calibration_samples=1)


@dataclass(frozen=True)
class DemoScenesConfig:
    """The drawn scenes that `instructions: demo` stands for."""

    folder: str = "checkpoints/demo-scenes"
    """Where they are written, if they are not there yet."""
    train_scenes: int = 20_000
    """Scenes in the whole training set, of which data.fraction is drawn."""
    eval_scenes: int = 256
    """Held-out scenes (another seed)."""
    train_seed: int = 101
    """Seed of the training scenes."""
    eval_seed: int = 102
    """Seed of the held-out scenes."""

    def __post_init__(self) -> None:
        check_seed("data.demo_scenes.train_seed", self.train_seed)
        check_seed("data.demo_scenes.eval_seed", self.eval_seed)
        if self.train_seed == self.eval_seed:
            raise ConfigError("data.demo_scenes: train_seed and eval_seed are equal, so nothing would be held out")
        _within(self, "data.demo_scenes.", train_scenes=(1, 1_000_000), eval_scenes=(1, 1_000_000))


@dataclass(frozen=True)
class DataConfig:
    """What is trained on, and what is held out."""

    instructions: str
    """Conversations to train on, in LLaVA's JSON (or JSON Lines); `demo` draws scenes instead."""
    image_root: str | None = None
    """Folder that image paths start from; null means the folder of the instructions."""
    fraction: float = 1.0
    """Share of the conversations to train on, drawn with `seed`, in proportion to their sources: below 1, of those
    with an image and an answer, as scripts/prepare_subset.py draws them."""
    eval_instructions: str | None = None
    """Held-out conversations; null means none."""
    eval_image_root: str | None = None
    """Image folder of the held-out file; null means image_root, or the folder of eval_instructions without one."""
    eval_samples: int | None = None
    """Only the first so many held-out conversations; null means all."""
    max_length: int = 2048
    """Tokens per conversation, visual tokens included; longer ones are cut after a whole turn."""
    video_frames: int | None = None
    """Frames of a video that are seen; null: as the release was trained. With video_fps: at most so many."""
    video_fps: float | None = None
    """Instead of evenly spread frames, so many per second of a video; null: evenly spread."""
    num_workers: int = 2
    """Processes that load images, per training process; 0 loads them in the loop."""
    worker_timeout: int = 300
    """Seconds after which a loading process that gives nothing is taken for hung, and the run stops; 0 waits on."""
    chat_template: str = "auto"
    """The prompt: auto (the release's own, or the one it was trained with where that differs: data/supervision.py),
    release, vicuna_v1, chatml, mistral_instruct, plain, Mini-Gemini's mgm_llama_3 and so on, or a file."""
    cache_dir: str | None = None
    """Folder where token counts are kept for the next run on the same conversations; null keeps none."""
    cache_features: str | None = None
    """Folder where each image's visual tokens are kept, computed once before the first step: neither this run's steps
    nor later runs with the same tower, budget and images run the tower; null computes them in every step."""
    cache_teacher: str | None = None
    """With distill: folder where what the teacher says of each row (its likeliest tokens) is kept, computed once
    before the first step: neither this run's steps nor later runs ask a teacher; null asks it in every step."""
    on_bad_sample: Literal["raise", "skip"] = "raise"
    """What a bad row or image gets: an error, or being left out, counted and listed in the run's folder."""
    max_bad_fraction: float = 0.05
    """With on_bad_sample skip: stop when more than this share of the samples is bad."""
    demo_scenes: DemoScenesConfig = field(default_factory=DemoScenesConfig)
    """The drawn scenes that `demo` stands for."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"data.fraction is {self.fraction}: a share above 0 and up to 1 is needed")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"data.max_bad_fraction is {self.max_bad_fraction}: a share from 0 to 1 is needed")
        _at_least(self, "data.", eval_samples=1, video_fps=0.001)
        lengths = {"max_length": (2, 1 << 20), "video_frames": (1, MOST_FRAMES)}
        _within(self, "data.", **lengths, num_workers=(0, 512), worker_timeout=(0, 7 * 24 * 3600))
        if self.eval_instructions is None and (self.eval_image_root or self.eval_samples):
            raise ConfigError("data.eval_image_root and data.eval_samples need data.eval_instructions")


@dataclass(frozen=True)
class TuneConfig:
    """Settings of train/tune_projector.py. Paths are relative to the working directory.

    shortzip tune --config llava-1.5-7b-3090 --instructions subset/subset.json --image_root images
    """

    model: str
    """The release: a folder or a Hub id."""
    data: DataConfig
    """What is trained on, and what is held out."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    mm_projector: str | None = None
    """A projector to start from instead of the release's: mm_projector.bin, its folder, or projector.safetensors."""
    vision_tower: str | None = None
    """For releases in LLaVA's own layout: the vision tower's folder or Hub id, where their config does not find it."""
    visionzip: VisionZipConfig | None = None
    """The budget; null keeps every visual token. visionzip.dominant: patches kept as they are, CLS counted among them;
    visionzip.contextual: tokens that the other patches are merged into; visionzip.method: visionzip, another published
    selection or a baseline in its place, whose parameters are keys beside it (visionzip.seed of random);
    visionzip.per_image: a budget for each image, by visionzip.per_image.chooser (fixed, coverage or image) with
    visionzip.per_image.coverage or visionzip.per_image.scale, visionzip.per_image.min and visionzip.per_image.max."""
    budget_schedule: BudgetScheduleConfig | None = None
    """From a loose budget to this one, linear in tokens; null: this one from the first step on. budget_schedule.start:
    visual tokens per image in the first step; budget_schedule.share: of the steps, after which it is this one;
    budget_schedule.stages: in how many equal parts it falls, few enough for data.cache_features (null: every step)."""
    budgets: list[str | int] = field(default_factory=list)
    """Several budgets for one projector, of which the own is one: 12+4, or a number of tokens in its shares. Each step
    has one of them, drawn with the seed; the checkpoint names them all, and is loaded with any. Empty: the own."""
    sandwich: bool = False
    """With budgets: each step has the largest, the smallest and one drawn of those between. The largest learns as
    ever, the others what it says (train/step/sandwich.py)."""
    shortv: ShortVConfig | None = None
    """The frozen layers; null freezes none. shortv.layers: their indices, from 0; or shortv.freeze: how many, as a
    number or a share (60%), those with the lowest LC (shortv.ranking: lc, cosine or random), measured when the run
    starts on shortv.calibration_samples training conversations."""
    fastv: FastVConfig | None = None
    """Instead of shortv, pruning inside the language model. FastV by fastv.layer: layers passed before the pruning,
    and fastv.keep: share of the visual tokens kept; or another fastv.method (pyramiddrop, sparsevlm, sparsevlm+) by
    fastv.layers, those that prune, and fastv.keep: what is kept at each (reduction/README.md); fastv.positions: those
    of pyramiddrop, where they are not `positions`."""
    positions: Literal["compact", "original"] = "compact"
    """Where tokens stand once visual tokens are left out: numbered anew, or where they would with all of them
    (reduction/positions.py)."""

    distill: DistillConfig | None = None
    """The release itself, reading all visual tokens, teaches the reduced one; null: labels alone. distill.weight: its
    share of the loss; distill.temperature: at which the two are compared."""

    load_in_4bit: bool = False
    """Load the untrained language model in 4 bits (NF4, through bitsandbytes): a 13B release on a 24 GB card."""
    tune: Literal["projector", "projector+mining"] = "projector"
    """What is trained: the two-layer projector; of Mini-Gemini, also the mining before it, as its authors' first stage
    does (then no feature can be cached)."""
    tuning: Literal["full", "lora", "rslora", "dora", "loha", "lokr"] = "full"
    """All weights of the projector, or a PEFT adapter on it (saved in final/adapter, and merged into final)."""
    lora_r: int = 16
    """Rank of the adapter."""
    lora_alpha: float = 32.0
    """Scale of the adapter: its output counts lora_alpha / lora_r times (rslora: lora_alpha / sqrt(lora_r))."""
    learning_rate: float = 2e-5
    """Peak learning rate of the projector (AdamW)."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    num_train_epochs: float | None = None
    """Passes over the conversations; 1 unless max_steps is given."""
    max_steps: int | None = None
    """Optimizer steps, instead of num_train_epochs."""
    global_batch_size: int = 128
    """Conversations per optimizer step, over all processes and micro-batches."""
    per_device_train_batch_size: int | None = None
    """Conversations per micro-batch and process at most. Does not change what is learned. null, and
    max_tokens_per_micro_batch null too: what the memory is estimated to hold (on a CPU without max_memory: 8)."""
    max_tokens_per_micro_batch: int | None = None
    """Tokens per micro-batch at most, padding included; beside or instead of per_device_train_batch_size."""
    max_memory: str | None = None
    """Memory of each device that a step may fill (22GiB), for the limits that are null; null: 90 % of a GPU's."""
    max_grad_norm: float = 1.0
    """The gradient's norm is clipped to this; 0 turns clipping off."""
    max_nonfinite_steps: int = 3
    """Steps in a row with NaN or Inf in loss or gradient (each is skipped) after which the run stops."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Dtype of everything but the projector (always fp32): bf16, or no for fp32."""
    gradient_checkpointing: bool | None = None
    """Recompute LLM layers in the backward pass: less memory, up to half as much time again. null: only where the
    memory is estimated to ask for it."""
    seed: int = 0
    """Seed of the order of the samples and of the subset."""
    cpu_threads: int | None = None
    """Threads that torch computes with on a CPU; null leaves it to the launcher (accelerate's takes one)."""

    output_dir: str = "checkpoints/run"
    """The run's folder."""
    run_name: str | None = None
    """Name shown by trackers; null means the folder's name."""
    overwrite_output_dir: bool = False
    """Begin anew in an output_dir that holds a run. That one is moved aside when settings, release and data have been
    checked, deleted after the new one's first checkpoint, and put back if the new one fails before."""
    resume_from_checkpoint: str | None = None
    """`latest`, or the path of a step-... folder, to continue the run in output_dir."""
    save_steps: int = 100
    """Steps between two checkpoints; the last step always writes one."""
    save_total_limit: int | None = 2
    """Checkpoints kept in the run's folder, the newest ones; null keeps all."""
    logging_steps: int = 1
    """Steps between two lines of metrics.jsonl."""
    report_to: list[Literal["wandb", "tensorboard"]] = field(default_factory=list)
    """Trackers besides metrics.jsonl."""

    eval_steps: int | None = None
    """Steps between two held-out losses; null means only the final evaluation."""
    eval_batch_size: int = 16
    """Conversations (loss) and questions (answers) per batch in evaluations."""
    final_evaluation: bool = True
    """With data.eval_instructions: at the end, compare all tokens, reduced untuned and reduced + tuned in a table."""
    control: bool = False
    """Also tune the projector with all tokens, the same way, as a row of the final table."""
    max_new_tokens: int = 64
    """Longest answer generated in evaluations, in tokens."""
    pictures: int = 4
    """Held-out images drawn with their kept patches and merged groups at the end; 0 draws none."""

    push_to_hub: bool = False
    """Publish the reduced checkpoint when the run has finished, as scripts/publish.py does."""
    hub_model_id: str | None = None
    """With push_to_hub: the repository, user/name."""
    hub_private_repo: bool = False
    """With push_to_hub: make the repository private."""
    hub_shape: Literal["projector", "full", "llava", "engine"] = "projector"
    """What is published: the projector alone, naming its release; everything; LLaVA's own layout; or
    everything but what an engine cannot do."""
    hub_base: str | None = None
    """With hub_shape projector or llava, when model is a folder: the Hub id of the same release."""

    def __post_init__(self) -> None:
        if self.report_to is None:  # which trackers' users write for none
            object.__setattr__(self, "report_to", [])
        self._check_ranges()
        self._check_schedule()
        self._check_reductions()
        self._check_held_out()
        self._check_outputs()
        self._check_packages()

    def _check_ranges(self) -> None:
        _at_least(
            self, "", per_device_train_batch_size=1, max_tokens_per_micro_batch=1, max_nonfinite_steps=1,
            save_steps=1, save_total_limit=1, logging_steps=1, eval_steps=1,
            learning_rate=0, weight_decay=0, max_grad_norm=0, lora_alpha=0,
        )  # fmt: skip
        _within(
            self, "", max_steps=(1, 1_000_000_000), global_batch_size=(1, 1_000_000), cpu_threads=(1, 1024),
            eval_batch_size=(1, 65_536), max_new_tokens=(1, 1 << 20), pictures=(0, 1000), lora_r=(1, 65_536),
        )  # fmt: skip
        check_seed("seed", self.seed)
        for key in ("learning_rate", "lora_alpha"):
            if getattr(self, key) == 0:
                raise ConfigError(f"{key} is 0, with which nothing is learned: more than 0 is needed")
        if self.max_memory is not None:
            try:
                parse_bytes(self.max_memory)
            except ValueError as error:
                raise ConfigError(f"max_memory: {error}") from error

    def _check_schedule(self) -> None:
        if not 0 <= self.warmup_ratio < 1:
            raise ConfigError(f"warmup_ratio is {self.warmup_ratio}: a share from 0 up to, but not including, 1")
        if self.num_train_epochs is not None and not 0 < self.num_train_epochs <= 100_000:
            raise ConfigError(f"num_train_epochs is {self.num_train_epochs}: more than 0, up to 100000, is needed")
        if self.max_steps is not None and self.num_train_epochs is not None:
            raise ConfigError(
                f"max_steps ({self.max_steps}) and num_train_epochs ({self.num_train_epochs}) both say how long: "
                "set one of them to null"
            )
        if self.lr_scheduler_type == "constant" and self.warmup_ratio > 0:
            raise ConfigError(
                f"lr_scheduler_type constant has no warm-up, but warmup_ratio is {self.warmup_ratio}: "
                "choose constant_with_warmup, or warmup_ratio 0"
            )

    def _check_reductions(self) -> None:
        if self.fastv is not None and self.shortv is not None:
            raise ConfigError("fastv and shortv do not go together: set one of them to null")
        if self.distill is not None and self.fastv is not None:
            raise ConfigError("distill and fastv do not go together: set one of them to null")
        if self.tune != "projector" and (self.tuning != "full" or self.data.cache_features is not None):
            other = "data.cache_features" if self.tuning == "full" else f"tuning {self.tuning}"
            raise ConfigError(
                f"tune is {self.tune!r} and does not go with {other}, which is for the projector alone: set tune to "
                f"projector, or {'data.cache_features to null' if self.tuning == 'full' else 'tuning to full'}"
            )
        check_teacher(self.distill, self.data.cache_teacher, self.data.cache_features)
        if self.budget_schedule is not None:
            self.budget_schedule.check(self.visionzip, self.data.cache_features)
        words = check_budgets(
            self.budgets,
            self.sandwich,
            self.visionzip,
            None if self.fastv is None else self.fastv.as_key(),
            {"budget_schedule": self.budget_schedule},
        )
        object.__setattr__(self, "budgets", words)
        refuse_idle_positions(self.positions, self.visionzip, self.fastv)
        if self.data.cache_features is not None and self.visionzip is None:
            raise ConfigError(
                f"data.cache_features is {self.data.cache_features!r}, but with visionzip null there is nothing small "
                "to keep of an image: set visionzip, or data.cache_features to null"
            )
        if self.visionzip is not None:
            others = {"fastv": self.fastv, "distill": self.distill, "budget_schedule": self.budget_schedule}
            self.visionzip.check_per_image(self.data.cache_features, others)
        if self.data.cache_features is not None and self.visionzip is not None:
            self.visionzip.check_cacheable()

    def _check_held_out(self) -> None:
        if self.eval_steps is not None and self.data.eval_instructions is None:
            raise ConfigError(f"eval_steps is {self.eval_steps}, and nothing is held out: set data.eval_instructions")
        if self.control and (self.data.eval_instructions is None or not self.final_evaluation):
            raise ConfigError(
                "control adds a row to the final table: it needs data.eval_instructions and final_evaluation"
            )
        if self.control and self.visionzip is None and self.shortv is None and self.fastv is None:
            raise ConfigError("control is the same tuning without reduction, and this run has none: set it to false")

    def _check_outputs(self) -> None:
        if self.overwrite_output_dir and self.resume_from_checkpoint is not None:
            raise ConfigError(
                "overwrite_output_dir would delete the run that resume_from_checkpoint continues: choose one"
            )
        if self.push_to_hub != (self.hub_model_id is not None):
            raise ConfigError(
                f"push_to_hub is {str(self.push_to_hub).lower()} and hub_model_id is {self.hub_model_id}: "
                "give both (user/name), or neither"
            )
        if len(set(self.report_to)) != len(self.report_to):
            raise ConfigError(f"report_to names a tracker twice: {self.report_to}")

    def _check_packages(self) -> None:
        needs = {f"tuning {self.tuning}": ("peft", "peft")} if self.tuning != "full" else {}
        needs |= {"load_in_4bit": ("bitsandbytes", "4bit")} if self.load_in_4bit else {}
        needs |= {f"report_to {tracker}": (tracker, tracker) for tracker in self.report_to}
        for setting, (package, extra) in needs.items():
            if importlib.util.find_spec(package) is None:
                raise ConfigError(f"{setting}: {package} is not installed: pip install 'shortzip[{extra}]'")

    def shaping_settings(self) -> dict[str, Any]:
        """The settings that decide what comes out, which a continued run must therefore share."""
        settings = {key: value for key, value in flat_settings(self).items() if key not in FREE_KEYS}
        if self.budget_schedule is not None:
            settings["budget_schedule"] = self.budget_schedule.as_setting()
        if self.data.cache_teacher is not None:
            settings["distill.from data.cache_teacher"] = True  # its likeliest tokens, not all
        data = {f"data.{key}": asdict(self.data)[key] for key in SHAPING_DATA_KEYS}
        return {**settings, **data}

    @property
    def name(self) -> str:
        return self.run_name or Path(self.output_dir).resolve().name
