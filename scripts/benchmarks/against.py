"""Measures a run's steps against what a user would run instead, in turns in one process: same weights, data and
micro-batches, same supervised tokens, AdamW, clipping.

    OMP_NUM_THREADS=1 python scripts/benchmarks/against.py --shape demo --clock cpu
    OMP_NUM_THREADS=1 python scripts/benchmarks/against.py --shape cpu --clock cpu --global_batch_size 2 --rounds 1

Random weights, float32, a frozen tower and a frozen language model; every conversation has an image, for transformers'
Trainer cannot take a micro-batch of which nothing is trained. Its micro-batches are laid out as ShortZip's are, by
similar length: by default it would pad more.

    shortzip               VisionZip, as the run computes it
    shortzip, frozen       with ShortV's layers too
    ..., cached            with the tower's features from data.cache_features
    shortzip, all tokens   the run's step on a LLaVA that keeps every visual token: Trainer's loss
    authors' VisionZip     Trainer, with a tower as VisionZip's authors run it: all blocks, eager, every attention map
                           and hidden state kept, then their selection. What their code computes, not its lines: it
                           reads transformers 4.37's CLIP, and its wheels (visionzip 0.1 to 0.1.3) hold no code
    Trainer                transformers' Trainer on its own LLaVA, all tokens
    SFTTrainer             TRL's, likewise, with a collator that gives it the same micro-batches
    ..., recomputed        with gradient checkpointing, as the flag of TrainingArguments gives it: on in LLaVA's
                           scripts, and in SFTConfig where nothing is said
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from shortzip.data.dataset import MicroBatch
from shortzip.data.errors import UserError
from shortzip.data.files import refuse_to_replace
from shortzip.reduction import ReducedLlavaForConditionalGeneration
from shortzip.reduction.configuration_reduced_llava import selected_block
from shortzip.reduction.modeling_reduced_llava import ReducedLlavaModel
from shortzip.reduction.selectors import selector_of
from shortzip.reduction.visual_tokens import VisualTokens, tokens_of_block
from shortzip.scripts.benchmarks.memory import peak_tensor_bytes
from shortzip.scripts.benchmarks.shapes import (
    SHAPES,
    ModelShape,
    SharedModels,
    build_models,
    draw_conversations,
    share_weights,
)
from shortzip.scripts.benchmarks.sides import Cut, cut, with_features
from shortzip.scripts.benchmarks.timing import Clock, Stopwatch, Timing, write_figures
from shortzip.train.settings.command_line import parse_config, run_command
from shortzip.train.settings.recipes import HOME
from shortzip.train.step.objective import SupervisedLoss, projector_parameters

RATE, CLIP = 1e-3, 1.0
OURS, AUTHORS = "shortzip", "authors' VisionZip"
Batches = list[dict[str, Tensor]]


@dataclass
class AgainstConfig:
    """What `scripts/benchmarks/against.py` takes."""

    shape: Literal["demo", "cpu", "llava-1.5-7b"] = "demo"
    """Sizes of the model, as in scripts/benchmarks/step.py."""
    sides: list[str] = field(default_factory=list)
    """Only these sides; empty means all."""
    device: str = "cpu"
    """cpu or cuda."""
    global_batch_size: int = 16
    """Conversations in a step."""
    micro_batch_size: int = 4
    """Conversations in a micro-batch at most."""
    steps: int = 2
    """Optimizer steps of a turn, over the same conversations; the loss of the last one is shown."""
    rounds: int = 3
    """Turns of each side, of which the median counts."""
    warm_up: int = 0
    """Turns before them that do not count."""
    clock: Clock = "wall"
    """wall time; or the process's CPU time, for one thread (OMP_NUM_THREADS=1) on a machine that others use too."""
    tensor_memory: bool = True
    """Also run a step of each side with its tensors counted, for the bytes that it holds at its peak."""
    output: Path | None = None
    """A JSON file to write the figures to."""
    overwrite: bool = False
    """Replace the file that is there already."""

    def __post_init__(self) -> None:
        for name, least in (("global_batch_size", 1), ("micro_batch_size", 1), ("steps", 1), ("rounds", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} {getattr(self, name)}: must be at least {least}")


class _AuthorsModel(ReducedLlavaModel):
    """The reduced model, with the tower as VisionZip's authors run it (`CLIPVisionTower_VisionZip.forward`)."""

    @torch.no_grad()
    def get_visual_tokens(self, pixel_values: Tensor, vision_feature_layer: Any = None) -> VisualTokens:
        tower, zipped, layer = self.vision_tower, self.config.visionzip, self.config.vision_feature_layer
        attention = tower.encoder.layers[selected_block(layer, len(tower.encoder.layers))].self_attn
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda _, __, states: seen.update({name: states})

        hooks = [getattr(attention, name).register_forward_hook(keep(name)) for name in ("q_proj", "k_proj")]
        try:
            outputs = tower(pixel_values, output_hidden_states=True, output_attentions=True)
        finally:
            for hook in hooks:
                hook.remove()
        queries, keys = (
            seen[name].unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for name in ("q_proj", "k_proj")
        )
        hidden, selector = outputs.hidden_states[layer], selector_of(zipped)
        return tokens_of_block(hidden, queries[:, :, :1], keys, attention.scale, selector, zipped, has_cls=True)


class _AuthorsLlava(ReducedLlavaForConditionalGeneration):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = _AuthorsModel(config)
        self.model.vision_tower = AutoModel.from_config(config.vision_config, attn_implementation="eager")
        self.post_init()


Turn = Callable[[], float]


@dataclass
class Side:
    """One way to train. `prepare(steps)` gives a turn: it tunes the projector as it stands, and gives the last step's
    loss."""

    prepare: Callable[[int], Turn]
    tokens: str
    """Which loss it is to have: that of sides with the same word."""


def arguments(folder: str, steps: int, batches: Batches, *, recomputed: bool) -> dict[str, Any]:
    """What Trainer and SFTTrainer are told alike: schedule and clipping as ours; a micro-batch is one item."""
    return {
        "output_dir": folder, "max_steps": steps, "gradient_accumulation_steps": len(batches),
        "per_device_train_batch_size": 1, "train_sampling_strategy": "sequential", "remove_unused_columns": False,
        "learning_rate": RATE, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": CLIP,
        "optim": "adamw_torch", "gradient_checkpointing": recomputed, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "bf16": False,
        "use_cpu": batches[0]["input_ids"].device.type == "cpu",
    }  # fmt: skip


def with_trainer(model: Any, batches: Batches, steps: int, *, recomputed: bool) -> Turn:
    """`steps` of transformers' Trainer."""
    folder = tempfile.TemporaryDirectory()
    numbers: Any = list(range(len(batches))) * steps
    settings = TrainingArguments(**arguments(folder.name, steps, batches, recomputed=recomputed))
    return _turn_of(Trainer(model, settings, lambda items: dict(batches[items[0]]), numbers), folder)


def with_sft_trainer(model: Any, batches: Batches, steps: int, *, recomputed: bool) -> Turn:
    """`steps` of TRL's SFTTrainer.

    Raises UserError where TRL is not installed.
    """
    if importlib.util.find_spec("trl") is None:
        raise UserError(
            "SFTTrainer: TRL is not installed: pip install trl, or name the sides to measure "
            f"(--sides '[{OURS}, Trainer]')"
        )
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    processor = AutoProcessor.from_pretrained(HOME / "checkpoints" / "demo-llava")  # asked for its padding alone
    folder = tempfile.TemporaryDirectory()
    settings = arguments(folder.name, steps, batches, recomputed=recomputed)
    trainer = SFTTrainer(
        model,
        SFTConfig(**settings, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}),
        data_collator=lambda items: dict(batches[items[0]["number"]]),
        train_dataset=Dataset.from_dict({"number": list(range(len(batches))) * steps}),
        processing_class=processor,
    )
    return _turn_of(trainer, folder)


def _turn_of(trainer: Trainer, folder: tempfile.TemporaryDirectory[str]) -> Turn:
    """Trains, and leaves the model as it was: the next side trains it too."""
    trainer.remove_callback(PrinterCallback)
    model: Any = trainer.model

    def turn() -> float:
        with folder:
            trainer.train()
        model.activation_checkpointing_disable()
        model.disable_input_require_grads()
        model.eval()
        model.zero_grad()
        return float(next(line["loss"] for line in reversed(trainer.state.log_history) if "loss" in line))

    return turn


def with_shortzip(model: Any, batches: Batches, steps: int) -> Turn:
    """`steps` of the run's own step."""
    module, trained = SupervisedLoss(model), list(projector_parameters(model).values())
    adamw = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    supervised = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)

    def turn() -> float:
        total = 0.0
        for _ in range(steps):
            total = 0.0
            for batch in batches:
                loss = module(MicroBatch(batch, [])) / supervised
                loss.backward()
                total += loss.item()
            nn.utils.clip_grad_norm_(trained, CLIP)
            adamw.step()
            adamw.zero_grad()
        return total

    return turn


def build_sides(models: SharedModels, shape: ModelShape, every: Cut, reduced: Cut) -> dict[str, Side]:
    """Every side by its name. All train the one projector that the models share."""
    authors = share_weights(models.plain, partial(_AuthorsLlava, models.visionzip.config))
    cached = with_features(models.visionzip, reduced.batches, shape.tiles)
    trained = list(projector_parameters(models.plain).values())
    before = [parameter.detach().clone() for parameter in trained]

    def side(tokens: str, way: Callable[..., Turn], model: Any, batches: Batches, **how: bool) -> Side:
        def from_the_beginning(steps: int) -> Turn:
            with torch.no_grad():
                for parameter, value in zip(trained, before, strict=True):
                    parameter.copy_(value)
            return way(model, batches, steps, **how)

        return Side(from_the_beginning, tokens)

    sides = {
        OURS: side("reduced", with_shortzip, models.visionzip, reduced.batches),
        f"{OURS}, frozen": side("frozen", with_shortzip, models.both, reduced.batches),
        f"{OURS}, cached": side("reduced", with_shortzip, models.visionzip, cached),
        f"{OURS}, frozen, cached": side("frozen", with_shortzip, models.both, cached),
        f"{OURS}, all tokens": side("all", with_shortzip, models.plain, every.batches),
    }
    for again in (False, True):
        name = ", recomputed" if again else ""
        sides[AUTHORS + name] = side("reduced", with_trainer, authors, reduced.batches, recomputed=again)
        sides["Trainer" + name] = side("all", with_trainer, models.plain, every.batches, recomputed=again)
        sides["SFTTrainer" + name] = side("all", with_sft_trainer, models.plain, every.batches, recomputed=again)
    return sides


def measure(settings: AgainstConfig, shape: ModelShape, device: torch.device) -> dict[str, Any]:
    """Seconds a step, bytes, and the loss after `steps`, of the sides asked for. Raises UserError for unknown ones."""
    models = build_models(shape, device, torch.float32)
    config = models.plain.config
    conversations = draw_conversations(settings.global_batch_size, images_only=True)
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    every, reduced = (
        cut(conversations, visual * shape.tiles, shape.tiles, settings.micro_batch_size, config, device)
        for visual in (patches, shape.dominant + shape.contextual)
    )
    sides = build_sides(models, shape, every, reduced)
    if unknown := set(settings.sides) - set(sides):
        raise UserError(f"sides {sorted(unknown)}: choose of {', '.join(sides)}")
    asked = {name: side for name, side in sides.items() if not settings.sides or name in settings.sides}
    losses: dict[str, float] = {}
    ready: dict[str, Turn] = {}

    def prepare(name: str) -> None:
        ready[name] = asked[name].prepare(settings.steps)

    def turn(name: str) -> None:
        losses[name] = ready.pop(name)()

    watch = Stopwatch(device, settings.rounds, settings.warm_up, settings.clock, tensor_memory=False)
    turns = {name: partial(turn, name) for name in asked}
    timings = watch.alternate(turns, settings.steps * len(conversations), prepare)
    for name, timing in timings.items():
        timing.seconds /= settings.steps
        if settings.tensor_memory:
            timing.tensor_memory = peak_tensor_bytes(asked[name].prepare(1), device)
    return {"sides": {name: _figures(timing, asked[name], losses[name]) for name, timing in timings.items()}}


def _figures(timing: Timing, side: Side, loss: float) -> dict[str, Any]:
    return {**asdict(timing), "loss": loss, "tokens": side.tokens}


def table_of(sides: Mapping[str, Mapping[str, Any]]) -> Table:
    """Every side beside ours and beside the authors'."""
    beside = [name for name in (OURS, AUTHORS) if name in sides]
    table = Table("", "s a step", "samples/s", *(f"of {name}" for name in beside), "tensors MiB", "peak MiB", "loss")
    for name, figures in sides.items():
        ratios = (f"{sides[other]['seconds'] / figures['seconds']:.2f}" for other in beside)
        sizes = (f"{figures[key] / 2**20:,.0f}" for key in ("tensor_memory", "peak_memory"))
        row = (f"{figures['seconds']:.3f}", f"{figures['samples_per_second']:.3f}", *ratios, *sizes)
        table.add_row(name, *row, f"{figures['loss']:.6f}")
    return table


def losses_apart(sides: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """By the tokens that sides compute the loss of: how far their losses lie apart, relative to the largest."""
    groups: dict[str, list[float]] = {}
    for figures in sides.values():
        groups.setdefault(figures["tokens"], []).append(figures["loss"])
    return {tokens: (max(losses) - min(losses)) / max(losses) for tokens, losses in groups.items() if len(losses) > 1}


def main(argv: Sequence[str]) -> None:
    """Measures, prints the table, and writes `output` when given."""
    settings = parse_config(AgainstConfig, argv, program="against.py")
    if settings.output is not None:
        refuse_to_replace(settings.output, overwrite=settings.overwrite)
    results = measure(settings, SHAPES[settings.shape], torch.device(settings.device))
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console.width = 140  # a log file has no edge
    console.print(table_of(results["sides"]))
    for tokens, apart in losses_apart(results["sides"]).items():
        console.print(f"losses of {tokens} tokens lie {apart:.1e} apart", highlight=False)
    if settings.output is not None:
        write_figures(settings.output, {"settings": {**asdict(settings), "output": str(settings.output)}, **results})


if __name__ == "__main__":
    run_command(main)
