"""The settings of every command but `tune`, `evaluate`, `papers` and `frontier`, as `config.py` holds those of a run.

Nothing here imports what a command works with: its --help needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shortzip.data.errors import UserError
from shortzip.reduction.families import FAMILIES
from shortzip.reduction.layer_choice import Direction
from shortzip.reduction.parsing import parse_budget, read_freeze
from shortzip.reduction.selectors import VISIONZIP
from shortzip.train.settings.checks import ConfigError, check_seed
from shortzip.train.settings.config import DEMO
from shortzip.train.settings.flags import POSITIONAL


@dataclass
class ShowConfig:
    """What `scripts/show_tokens.py` takes, beside the images.

    shortzip show photo.jpg --model checkpoints/demo-llava --budget 14+2,28+4 --output tokens.png
    """

    images: list[str] = field(default_factory=list, metadata=POSITIONAL)
    """The images' files."""
    model: str = "checkpoints/demo-llava"
    """A release, a reduced checkpoint or a run's folder; or a Hub id."""
    revision: str | None = None
    """With a Hub id: the revision."""
    budget: str | None = None
    """Visual tokens per image (LLaVA-NeXT: per tile), dominant+contextual, several separated by commas. Default: the
    model's own, or 54+10,108+20,162+30 scaled to its grid."""
    method: str | None = None
    """How tokens are chosen, with parameters as in vispruner:important=0.25; several separated by commas. Default:
    with budget visionzip, else the model's own."""
    output: Path = Path("tokens.png")
    """The PNG; without an ending it gets .png."""
    overwrite: bool = False
    """Replace pictures that are there already."""


@dataclass(frozen=True)
class AppConfig:
    """Settings of scripts/demo_app.py.

    shortzip app --model llava-hf/llava-1.5-7b-hf --tuned checkpoints/llava-1.5-7b-64 --images photos/
    """

    model: str = "checkpoints/demo-llava"
    """A release that is neither reduced nor tuned: folder or Hub id."""
    tuned: str | None = None
    """A run's folder or reduced checkpoint tuned from it with a budget; null: checkpoints/demo where it is finished,
    else none."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    method: str | None = None
    """How tokens are chosen, as in vispruner:important=0.25; null: as in the tuned run, else visionzip."""
    images: str | None = None
    """Folder of images to choose from; null: the demo's held-out scenes."""
    ranking: list[int] | None = None
    """Layers in the order they are frozen; null: the tuned run's ranking by LC, or the deepest first."""
    max_new_tokens: int = 64
    """Longest answer, in tokens."""
    seconds: float = 30
    """After so many seconds an answer ends where it is."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 7860
    """Port to listen on."""

    def __post_init__(self) -> None:
        for key, least, most in (
            ("max_new_tokens", 1, 4096),
            ("seconds", 1, 3600),
            ("port", 0, 65535),
        ):
            if not least <= getattr(self, key) <= most:
                raise ConfigError(f"{key} is {getattr(self, key)}: {least} to {most} are allowed")


@dataclass
class EstimateConfig:
    """What `scripts/estimate_cost.py` takes.

    shortzip estimate --model llava-1.5-7b --budget 54+10 --freeze 60% --memory 24GiB
    """

    model: str = "llava-1.5-7b"
    """A known release (llava-1.5-7b, llava-1.5-13b, llava-next-7b, llava-next-13b, llava-next-mistral-7b,
    llava-next-video-7b, mgm-7b, mgm-13b, video-llava-7b, demo), a folder with a config.json, or a Hub id (its
    config.json is downloaded)."""
    budget: str | None = None
    """Visual tokens per image (LLaVA-NeXT: per tile), dominant+contextual. Default: the model's own, else 54+10."""
    budgets: list[str] = field(default_factory=list)
    """Instead, several for one projector: dominant+contextual, or numbers that are divided as `budget` is."""
    sandwich: bool = False
    """With budgets: each step has the largest, the smallest and one between, and the largest teaches the others."""
    method: str | None = None
    """How they are chosen, as in vispruner:important=0.25. Default: with budget visionzip, else the model's own."""
    freeze: str | None = None
    """Frozen layers: a number (19), a share (60%) or a list (31,29,30). Default: the model's own, else 60%."""
    memory: str = "24GiB"
    """Memory of the card."""
    text_tokens: int = 64
    """Text tokens of a prefill (the papers use 64)."""
    training_text_tokens: int = 512
    """Text tokens of a training sample."""
    tiles: int | None = None
    """Images per sample, or tiles in LLaVA-NeXT. Default: 1, and 5 in LLaVA-NeXT, as the papers count."""
    frames: int | None = None
    """Instead: a video of so many frames per sample; of families that take videos."""
    global_batch_size: int = 128
    """Samples of an optimiser step."""
    per_device_train_batch_size: int = 16
    """Samples in memory at once."""
    weights: Literal["bfloat16", "float32", "4bit"] = "bfloat16"
    """How the untrained weights are stored (4bit: decoder layers in NF4, the rest in bfloat16)."""
    gradient_checkpointing: bool = True
    """Whether each LLM layer is computed again in the backward pass instead of being kept."""
    distill: bool = False
    """Count a teacher that is asked in every step (distill without data.cache_teacher)."""
    output: Path | None = None
    """A JSON file to write the figures to."""
    overwrite: bool = False
    """Replace the file that is there already."""


@dataclass(frozen=True)
class RehearseConfig:
    """What `scripts/rehearse_memory.py` takes.

    shortzip rehearse llava-1.5-7b-3090
    shortzip rehearse --model llava-1.5-13b --budget 54+10 --freeze 24 --rows 4 --text_tokens 200
    """

    recipe: str | None = field(default=None, metadata=POSITIONAL)
    """A recipe: its name, or a YAML file. Default: none, and bf16 with the settings below."""
    model: str | None = None
    """Instead of the recipe's: a known release, a folder with a config.json or a Hub id, as of `estimate`. Default:
    llava-1.5-7b."""
    budget: str | None = None
    """Visual tokens per image (LLaVA-NeXT: per tile), dominant+contextual, or none. Default: the recipe's, the
    model's own, or 54+10."""
    method: str | None = None
    """With budget: how they are chosen, with parameters as in vispruner:important=0.25. Default: visionzip."""
    freeze: str | None = None
    """Frozen layers: a number (19), a share (60%) or a list. Default: the recipe's, the model's own, or 60%."""
    memory: str = "24GiB"
    """What the card has; the micro-batch is chosen for it, or for the recipe's max_memory where that is less."""
    rows: int | None = None
    """Conversations in a micro-batch. Default: as many as the run would choose for `memory`."""
    text_tokens: int | None = None
    """Text tokens of each of them. Default: what the recipe's max_length leaves beside the image."""
    supervised_tokens: int | None = None
    """How many of these are supervised, the last ones. Default: all that follow the image."""
    shared_tokens: int = 35
    """How many stand before the image, alike in every conversation: 35 in Vicuna's prompt."""
    conversations: bool = False
    """Instead of lengths: the recipe's own conversations, cut as the run would cut them; the micro-batch with most
    tokens of its first 100 steps is rehearsed. Needs the release's tokenizer and the instructions."""
    processes: int = 1
    """Also with the language model spread over so many processes by FSDP2."""
    variants: bool = True
    """Also the other ways: recomputed or kept, cached features, 4 bits (where bitsandbytes is installed)."""
    output: Path | None = None
    """A JSON file to write the figures to."""
    overwrite: bool = False
    """Replace the file that is there already."""

    def __post_init__(self) -> None:
        for key in ("rows", "text_tokens", "supervised_tokens", "processes"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"{key} is {value}: at least 1 is needed")
        if self.method is not None and self.budget in (None, "none"):
            raise ConfigError(f"method {self.method!r}: give the budget that is met by it")
        if self.shared_tokens < 0:
            raise ConfigError(f"shared_tokens is {self.shared_tokens}: at least 0 is needed")
        if self.text_tokens is not None and self.text_tokens <= self.shared_tokens:
            raise ConfigError(
                f"text_tokens is {self.text_tokens}, of which {self.shared_tokens} stand before the image "
                "(shared_tokens): give more text, or fewer shared tokens"
            )
        if self.conversations and (self.recipe is None or self.text_tokens is not None or self.rows is not None):
            raise ConfigError(
                "conversations takes lengths from a recipe's own data: give a recipe, no rows or text_tokens"
            )


@dataclass(frozen=True)
class PrepareConfig:
    """What `scripts/prepare_subset.py` takes.

    shortzip prepare llava_v1_5_mix665k.json --fraction 0.1 --output subset
    """

    instructions: str = field(metadata=POSITIONAL)
    """A .json, .jsonl or .parquet file, a folder of a datasets table, or the name of a dataset on the Hub."""
    output: Path
    """New folder to write to."""
    image_root: Path | None = None
    """Folder that paths of images and videos start from; without it these are not looked for."""
    fraction: float = 0.1
    """Share of the usable rows."""
    seed: int = 0
    """Another seed draws other rows."""
    keep_text_only: bool = False
    """Keep rows without an image (they do not train the projector)."""
    drop_missing: bool = False
    """Drop chosen rows whose image or video is not there; default: list them."""
    verify_images: bool = False
    """Decode every image, and frames of every video, and drop the rows of those that cannot be."""
    max_bad_fraction: float = 0.01
    """Stop when more than this share of the rows is malformed."""
    num_workers: int | None = None
    """Processes that decode images and videos; null: one per core."""
    split: str | None = None
    """Split of a datasets table; null: train."""
    streaming: bool = False
    """Read a Hub dataset once, as a stream (shares hold on average)."""
    overwrite: bool = False
    """Replace a subset in the folder; files of other names in it stay."""


@dataclass
class FetchConfig:
    """What to fetch, from where, and where to.

    shortzip fetch subset/images.txt --to images
    """

    images: str = field(metadata=POSITIONAL)
    """A file with one path per line, as prepare_subset writes it (images.txt)."""
    to: str = "images"
    """The image root."""
    sources: str | None = None
    """YAML of your own sources, which replace those of configs/sources.yaml folder by folder."""
    workers: int = 16
    """Images fetched at a time."""
    retries: int = 5
    """Attempts after the first, each after a longer wait."""
    timeout: float = 30.0
    """Seconds without a byte after which a connection is given up."""

    def __post_init__(self) -> None:
        if not 1 <= self.workers <= 256:
            raise UserError(f"workers is {self.workers}: give 1 to 256")
        if not 0 <= self.retries <= 100:
            raise UserError(f"retries is {self.retries}: give 0 to 100")
        if not 0 < self.timeout <= 3600:
            raise UserError(f"timeout is {self.timeout}: give seconds, up to 3600")


@dataclass
class CalibrateConfig:
    """What `scripts/calibrate_shortv.py` takes.

    shortzip calibrate --model checkpoints/demo-llava --budget 12+4 --freeze 60%
    """

    model: str = "checkpoints/demo-llava"
    """A release, a reduced checkpoint or a run's folder; or a Hub id. Layers that it freezes count as plain ones."""
    revision: str | None = None
    """With a Hub id: the revision."""
    instructions: str = DEMO
    """Conversations to calibrate on (LLaVA's JSON or JSON Lines, messages, a datasets table); demo draws scenes."""
    image_root: str | None = None
    """Folder that image paths start from; null means the folder of the instructions."""
    samples: int = 200
    """Conversations with an image to measure on (the paper: 2000)."""
    seed: int = 0
    """Which conversations are drawn."""
    budget: str | None = None
    """Visual tokens per image (LLaVA-NeXT: per tile), dominant+contextual, or none. Default: the model's own."""
    method: str = VISIONZIP
    """With budget: how they are chosen, with parameters as in vispruner:important=0.25."""
    positions: Literal["compact", "original"] = "compact"
    """With budget: where they stand, as a run's `positions`; without, as the model was saved."""
    compare_full: bool = False
    """With a budget: also measure with all visual tokens, and show both."""
    freeze: str | None = None
    """Picks the layers to freeze: a number (19) or a share (60%)."""
    direction: Direction = "full_to_frozen"
    """Which KL divergence ranks the layers: the paper's, or frozen_to_full as in their code. Both are written."""
    text_tokens: bool = True
    """Whether LC of the text tokens is measured too, which doubles the work."""
    output: Path = Path("layers.json")
    """The JSON file; the chart gets the same name with .png."""
    overwrite: bool = False
    """Whether to measure anew what is there of other settings, weights or conversations, and to replace a picture."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the model computes in; the LM head and the softmax are float32 in any case."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto: cuda where there is one."""
    load_in_4bit: bool = False
    """Whether the language model is loaded in 4 bits (needs shortzip[4bit] and a GPU)."""
    samples_per_batch: int = 8
    """Conversations measured together, each with all its variants."""
    tokens_per_pass: int | None = None
    """Tokens that go through a layer at once. Default: 1024 on a CPU, else 8192, halved when memory runs out."""
    chat_template: str = "auto"
    """The prompt: auto (the release's own, or the one it was trained with where that differs: data/supervision.py),
    release, vicuna_v1, chatml, mistral_instruct, plain, Mini-Gemini's mgm_llama_3 and so on, or a file."""
    on_bad_sample: Literal["raise", "skip"] = "raise"
    """What a bad row or image gets: an error, or being left out and counted."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"samples={self.samples}: at least 1.")
        check_seed("seed", self.seed)
        if self.budget not in (None, "none"):
            parse_budget(str(self.budget))
        if self.method != VISIONZIP and self.budget in (None, "none"):
            raise UserError(f"method {self.method!r}: give the budget that is met by it")
        if self.positions != "compact" and self.budget in (None, "none"):
            raise UserError(f"positions {self.positions!r}: give the budget, whose tokens have them")
        if self.compare_full and self.budget == "none":
            raise UserError("compare_full compares a budget with all visual tokens: give a budget.")
        if self.freeze is not None and isinstance(read_freeze(self.freeze), list):
            raise UserError(f"freeze {self.freeze!r}: LC picks the layers; write how many (19) or a share (60%).")


@dataclass(frozen=True)
class ConvertConfig:
    """What `scripts/convert_release.py` takes.

    shortzip convert liuhaotian/llava-v1.5-7b --output llava-1.5-7b
    shortzip convert checkpoints/RUN --to llava --base liuhaotian/llava-v1.5-7b --output llava-v1.5-7b-tuned
    """

    model: str = field(metadata=POSITIONAL)
    """A folder or a Hub id: a release, a reduced checkpoint or a run's folder."""
    output: Path
    """A folder that does not exist yet."""
    to: Literal["transformers", "llava"] = "transformers"
    """The layout to write."""
    revision: str | None = None
    """Branch, tag or commit, for a Hub id."""
    mm_projector: str | None = None
    """A projector to use instead (mm_projector.bin, or its folder)."""
    vision_tower: str | None = None
    """The vision tower, where the config does not find it: a folder or a Hub id."""
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """Cast everything to it; null: as the release has it."""
    base: str | None = None
    """With --to llava: the original release that LLaVA's code loads the projector over."""


@dataclass(frozen=True)
class TinyConfig:
    """What `scripts/make_tiny_release.py` takes.

    shortzip tiny --family mini_gemini --layout original --output tiny/mgm
    """

    output: Path
    """A folder that does not exist yet."""
    family: Literal[(*FAMILIES, "llava_interleave")] = "llava"  # type: ignore[valid-type]
    """What it is a release of."""
    layout: Literal["transformers", "original"] = "transformers"
    """transformers', or the one that the family's authors release in."""
    seed: int = 0
    """Of the random weights."""

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)


@dataclass(frozen=True)
class PublishConfig:
    """What `scripts/publish.py` takes.

    shortzip publish checkpoints/RUN --repo_id user/name --dry_run
    """

    run: Path = field(metadata=POSITIONAL)
    """The run's folder (its output_dir)."""
    repo_id: str
    """The repository on the Hub: user/name."""
    private: bool = False
    """Make the repository private."""
    shape: Literal["projector", "full", "llava", "engine"] = "projector"
    """projector: the projector alone, naming its release; full: everything, loads anywhere; llava: LLaVA's own
    layout; engine: everything, for engines that run transformers' models, without frozen layers, pruning and original
    positions."""
    base: str | None = None
    """The run's release on the Hub (user/name), when the run used a folder."""
    tag: str | None = None
    """Name of the revision; null: v1, or the next number."""
    update: bool = False
    """Write to a repository that holds other files."""
    dry_run: bool = False
    """Show every file and the card; touch nothing."""
