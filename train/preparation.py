"""What a run starts from: all that is made ready, and refused, before its first step.

In this order: the release and its model, the samples, whether this is the run that a checkpoint belongs to, features
of the images, how global batches are cut, optimizer, schedule and engine. Until the start is accepted
(train/run/run_start.py) nothing of the run is in its folder, so that a refused command leaves no trace.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from shortzip.data.batching import BatchPlan
from shortzip.data.dataset import ConversationDataset
from shortzip.data.drops import Drop, DropLog
from shortzip.reduction.configuration_budgets import tokens_of
from shortzip.reduction.errors import ReductionError
from shortzip.reduction.reductions import Reductions
from shortzip.reduction.refusals import change_budget
from shortzip.train.calibration.choosing import choose_layers, freeze_layers
from shortzip.train.inputs.budgets import Budgets, DrawnBudgets, ScheduledBudgets, budget_of, stages_of
from shortzip.train.inputs.feature_cache import UnderOneBudget
from shortzip.train.inputs.feature_filling import ImageRows, known_tower, store_features
from shortzip.train.inputs.identity import check_same_origin, fingerprint, run_identity
from shortzip.train.inputs.image_budgets import BudgetsKept, budgets_by_tower
from shortzip.train.inputs.lesson_filling import store_lessons
from shortzip.train.inputs.loading import check_shared_memory
from shortzip.train.inputs.preflight import check_learns, conversations_in_words
from shortzip.train.inputs.samples import (
    TrainingRows,
    check_instructions,
    check_positions,
    draw_demo_scenes,
    held_out_conversations,
    held_out_set,
    training_rows,
    training_set,
)
from shortzip.train.publish.push import check_publishable
from shortzip.train.release.loading import load_release, reduced_config
from shortzip.train.release.opening import Release, open_release
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.run.checkpoint import Checkpoint, check_same_run, versions
from shortzip.train.run.processes import on_main_process
from shortzip.train.run.report import component_table
from shortzip.train.run.run_start import RunFolder
from shortzip.train.run.session import Session
from shortzip.train.settings.budget_list import listed_budgets
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.config import TuneConfig
from shortzip.train.settings.reduced import reductions_of
from shortzip.train.step.adapters import ProjectorAdapter, adapter_config
from shortzip.train.step.components import describe_components
from shortzip.train.step.engine import WholeEngine
from shortzip.train.step.engine_choice import start_engine
from shortzip.train.step.micro_batch import plan_micro_batches
from shortzip.train.step.objective import (
    SupervisedLoss,
    projector_parameters,
    recompute_layers,
    train_only_projector,
)
from shortzip.train.step.teacher import Teacher


@dataclass
class RunState:
    """Where a run stands: all that a checkpoint needs to continue it, beside weights, moments and schedule."""

    step: int = 0
    samples_seen: int = 0
    evaluation_due: bool = True
    """The held-out loss at this step is still to be measured."""
    interval_loss: float = 0.0
    """Sum of the losses since the last line of metrics.jsonl."""
    interval_tokens: int = 0
    """Number of those losses: supervised tokens."""
    micro_batch: dict[str, Any] = field(default_factory=dict)
    """How large micro-batches are at most (train/step/micro_batch.py): a continued run is cut the same way."""
    nonfinite_steps: int = 0
    """Steps skipped because of NaN or Inf."""
    nonfinite_streak: list[dict[str, Any]] = field(default_factory=list)
    """Those since the last good step, each with the ids of its samples."""
    dropped: list[dict[str, str]] = field(default_factory=list)
    """Rows that turned out to be unreadable when their turn came."""


@dataclass(frozen=True)
class Subject:
    """What is tuned: a release with its visual tokens reduced; of its weights, only the projector is trained."""

    release: Release
    reductions: Reductions
    layers: list[int] | None
    """The frozen ones; None for none."""
    tower: str | None
    """Its digest, if the model has come without it because its features are known."""
    model: Any
    processor: Any
    adapter: ProjectorAdapter | None
    """What is trained in the projector's place, if anything."""
    parameters: Mapping[str, nn.Parameter]
    """What is trained, by name; fp32."""
    listed: list[dict[str, Any]]
    """The `visionzip` keys of the budgets that it is tuned for, fewest tokens first; empty for its own alone."""
    teacher: Teacher | None
    """The release itself, with all visual tokens; None: labels alone, or lessons that are kept."""


@dataclass(frozen=True)
class Prepared:
    """A run that is ready for its next step."""

    state: RunState
    subject: Subject
    training: ConversationDataset
    held_out: ConversationDataset | None
    """None where the config asks for no held-out loss."""
    plan: BatchPlan
    total_steps: int
    engine: WholeEngine
    schedule: LRScheduler
    record: dict[str, Any]
    """What each of the run's checkpoints says of what it belongs to."""
    budgets: Budgets | None
    """Those of the steps; None: the run's own in each."""


def prepare(config: TuneConfig, run: RunFolder, session: Session) -> Prepared:
    """A run at the step where it begins, or where its checkpoint left it.

    Raises what refuses the start: `UserError` and `ConfigError`, among them `CheckpointError`, `RunFolderError` and
    `NothingToLearn`; and `StopRequested` if asked to stop while features are computed.
    """
    accelerator = session.accelerator
    checkpoint = run.checkpoint()
    state = RunState(**checkpoint.state["run"]) if checkpoint else RunState()
    check_instructions(config.data)
    on_main_process(accelerator, lambda: draw_demo_scenes(config.data))
    release = open_release(ReleaseSpec.of(config))
    check_publishable(config, release)
    run.check_base(release.config.get("base_release"))
    rows = training_rows(config.data, config.seed)
    subject = load_subject(config, run, release, rows, checkpoint, session)
    kept = keep_budgets(config, subject, rows, session)
    training = training_set(config.data, loosest(config, subject), config.seed, rows, kept)
    held_out = held_out_set(config.data, subject.processor, kept) if config.eval_steps is not None else None
    state.evaluation_due &= held_out is not None
    refuse_videos(config, training, held_out)
    check_positions(subject.model.config, training, taught=config.distill is not None)
    check_positions(subject.model.config, held_out, held_out=True)
    record = recognise(config, run, subject, training, checkpoint, session)
    if config.data.cache_teacher is not None:
        run.accept(state.step)  # what follows may take hours
        store_lessons(config, subject.release, subject.model, training, session)
    datasets = [dataset for dataset in (training, held_out) if dataset is not None]
    if kept is not None:
        for dataset in datasets:
            dataset.features, dataset.known_images = kept.features, kept.features.known_images
    elif config.data.cache_features is not None:
        run.accept(state.step)
        release, tower, model, processor = subject.release, subject.tower, subject.model, subject.processor
        several = subject.listed or stages_of(config.budget_schedule, model.config.visionzip)
        store_features(config, release, tower, model, processor, datasets, session, several)
        if held_out is not None and held_out.features is not None and several:
            held_out.features = UnderOneBudget(held_out.features, tokens_of(model.config.visionzip))
    plan, total_steps = plan_batches(config, subject, training, state, session)
    budgets = budgets_of_steps(config, subject, training, total_steps)
    if budgets is not None:
        plan.in_time = budgets.lengths_of
    adamw, schedule = make_optimizer(config, subject.parameters, total_steps)
    check_learns(schedule, plan, training, total_steps)
    check_shared_memory(training, plan, config.data.num_workers)
    if checkpoint:
        restore(checkpoint, subject.parameters, adamw, schedule, accelerator)
    videos = any(dataset.has_videos for dataset in datasets)
    loss = SupervisedLoss(subject.model, teacher=subject.teacher, distill=config.distill, videos=videos)
    engine = start_engine(accelerator, loss, adamw, subject.parameters, config.max_grad_norm)
    if checkpoint:
        engine.restore_moments(checkpoint.optimizer)
    return Prepared(state, subject, training, held_out, plan, total_steps, engine, schedule, record, budgets)


def refuse_videos(config: TuneConfig, training: ConversationDataset, held_out: ConversationDataset | None) -> None:
    """Raises ConfigError for what is not done with videos yet, where rows have some."""
    asked: dict[str, tuple[Any, str]] = {
        "budget_schedule": (config.budget_schedule, "null"),
        "budgets": (config.budgets, "[]"),
        "data.cache_teacher": (config.data.cache_teacher, "null"),
    }
    for key, off in ((key, off) for key, (is_set, off) in asked.items() if is_set and training.has_videos):
        count = int((training.videos > 0).sum())
        raise ConfigError(f"{key} is set, and {count} rows have videos, which it does not know: set it to {off}")
    several = "budgets" if config.budgets else "budget_schedule" if config.budget_schedule else None
    if several and config.data.cache_features is not None and held_out is not None and held_out.has_videos:
        count = int((held_out.videos > 0).sum())
        raise ConfigError(
            f"data.cache_features and {several} are set, and {count} held-out rows have videos, whose features are "
            "not kept under several budgets: set data.cache_features to null, or leave them out of "
            "data.eval_instructions"
        )


def keep_budgets(config: TuneConfig, subject: Subject, rows: TrainingRows, session: Session) -> BudgetsKept | None:
    """The budgets of a run's images, where the tower finds them: their features are kept in the same pass, so that the
    steps do not run it again. None where it does not find them. Raises as `store_features`."""
    if config.data.cache_features is None or budgets_by_tower(subject.model, subject.processor) is None:
        return None
    images = [ImageRows(rows.conversations, rows.image_root)]
    if config.eval_steps is not None:
        images.append(ImageRows(*held_out_conversations(config.data, DropLog("skip", 1))))
    store_features(config, subject.release, subject.tower, subject.model, subject.processor, images, session)
    assert images[0].features is not None
    return BudgetsKept(images[0].features)


def budgets_of_steps(
    config: TuneConfig, subject: Subject, training: ConversationDataset, total_steps: int
) -> Budgets | None:
    """Those of a run's steps, where they change; else None."""
    own, size = subject.model.config.visionzip, config.global_batch_size
    if config.budgets:
        return DrawnBudgets(own, size, training, subject.listed, config.seed, config.sandwich)
    if config.budget_schedule is not None:
        return ScheduledBudgets(own, size, training, config.budget_schedule, total_steps)
    return None


def loosest(config: TuneConfig, subject: Subject) -> Any:
    """The processor of the loosest budget that a step has. Raises ConfigError for one that no image has."""
    if config.budgets:
        processor = copy.copy(subject.processor)
        processor.visionzip = subject.listed[-1]
        return processor
    if config.budget_schedule is None:
        return subject.processor
    model, own, start = subject.model.model, subject.model.config.visionzip, config.budget_schedule.start
    try:
        stages = [tokens_of(budget) for budget in stages_of(config.budget_schedule, own)]
        for tokens in reversed(stages or range(tokens_of(own) + 1, start + 1)):
            change_budget(model, budget_of(own, tokens))
    except ReductionError as error:
        raise ConfigError(f"budget_schedule.start is {start}: of {tokens} tokens, {error}") from error
    finally:
        change_budget(model, own)
    processor = copy.copy(subject.processor)
    processor.visionzip = budget_of(own, start)
    return processor


def listed_keys(config: TuneConfig, release: Release) -> list[dict[str, Any]]:
    """The `visionzip` keys of `config.budgets`. Raises ConfigError for one that the release's images cannot have."""
    if not config.budgets:
        return []
    assert config.visionzip is not None
    keys = [budget.as_key() for budget in listed_budgets(config.budgets, config.visionzip)]
    for words, key in zip(config.budgets, keys, strict=True):
        try:
            reduced_config(release, Reductions(key))
        except ReductionError as error:
            raise ConfigError(f"budgets: {words}: {error}") from error
    return keys


def load_subject(
    config: TuneConfig,
    run: RunFolder,
    release: Release,
    rows: TrainingRows,
    checkpoint: Checkpoint | None,
    session: Session,
) -> Subject:
    """The model in the compute dtype on the CPU, with what is trained in fp32; said on the screen.

    `rows`: what the frozen layers are chosen on, where the config asks for that and no checkpoint names them.
    """
    dtype, listed = release.spec.dtype, listed_keys(config, release)
    layers, loaded = (
        (checkpoint.state["layers"], None)
        if checkpoint
        else choose_layers(config, release, session.accelerator, run.write, rows)
    )
    reductions = reductions_of(config.visionzip, layers, config.fastv, config.positions)
    tower = known_tower(config, release, dtype)
    if loaded is None:
        model, processor = load_release(release, reductions, with_tower=tower is None)
    else:
        model, processor = freeze_layers(loaded, reductions, with_tower=tower is None)
        del loaded  # and with it a tower that is not needed
    train_only_projector(model, dtype, config.tune)  # until the samples' lengths are known
    teacher = None
    if config.distill is not None and config.data.cache_teacher is None:
        teacher = Teacher(model, dtype)
    adapter = None
    if config.tuning != "full":
        adapter = ProjectorAdapter(model, adapter_config(config.tuning, r=config.lora_r, lora_alpha=config.lora_alpha))
    parameters = adapter.parameters if adapter else projector_parameters(model)
    session.report.table(component_table(describe_components(model)))
    session.report.say(f"budget: {reductions.describe()}; frozen layers: {layers or 'none'}")
    if listed:
        how = "each step has the largest, the smallest and one between" if config.sandwich else "each step has one"
        session.report.say(f"budgets: {', '.join(map(str, config.budgets))}; {how}")
    if (instead := reductions.in_place_of_cls(release.config)) is not None:
        session.report.say(instead)
    return Subject(release, reductions, layers, tower, model, processor, adapter, parameters, listed, teacher)


def recognise(
    config: TuneConfig,
    run: RunFolder,
    subject: Subject,
    training: ConversationDataset,
    checkpoint: Checkpoint | None,
    session: Session,
) -> dict[str, Any]:
    """What a run's checkpoints say of what it belongs to: settings that shape the result, content, versions.

    Raises `CheckpointError` if `checkpoint` says something else.
    """
    shaping, begun_with = config.shaping_settings(), fingerprint(training, subject.parameters)
    settings = {**shaping, **begun_with}
    identity = on_main_process(session.accelerator, lambda: run_identity(subject.release, training))
    if checkpoint:
        then, warn = checkpoint.state, session.report.warn
        check_same_run({k: v for k, v in then["settings"].items() if k not in begun_with}, shaping, run.path)
        on_main_process(session.accelerator, lambda: check_same_origin(then, identity, training, run.path, warn))
        check_same_run(then["settings"], settings, run.path)  # older checkpoints name no parts
    return {
        "layers": subject.layers,
        "settings": settings,
        "identity": identity,
        "num_processes": session.accelerator.num_processes,
        "versions": versions(),
    }


def plan_batches(
    config: TuneConfig, subject: Subject, training: ConversationDataset, state: RunState, session: Session
) -> tuple[BatchPlan, int]:
    """The samples in an order that is the same for every number of processes and size of micro-batch; the steps."""
    accelerator, say = session.accelerator, session.report.say
    limits, limits_said = plan_micro_batches(config, subject.model, training, accelerator, state.micro_batch)
    if limits.gradient_checkpointing:
        recompute_layers(subject.model)
    state.micro_batch = asdict(limits)
    plan = BatchPlan(
        training.lengths.tolist(),
        config.global_batch_size,
        seed=config.seed,
        num_epochs=None if config.max_steps is not None else config.num_train_epochs or 1,
        num_processes=accelerator.num_processes,
        micro_batch_size=limits.rows,
        max_tokens_per_micro_batch=limits.tokens,
    )
    total_steps = config.max_steps or plan.total_steps
    assert total_steps is not None
    processes = f"{accelerator.num_processes} process(es), {accelerator.device}"
    rows_said = f"{conversations_in_words(training)}. {training.drops.summary()}."
    if training.drops.drops:
        session.report.warn(rows_said, topic="dropped rows")
    else:
        say(rows_said)
    say(f"{total_steps} steps of {config.global_batch_size} on {processes}")
    say(limits_said)
    training.drops.extend(Drop(**drop) for drop in state.dropped)
    return plan, total_steps


def make_optimizer(
    config: TuneConfig, parameters: Mapping[str, nn.Parameter], total_steps: int
) -> tuple[torch.optim.AdamW, LRScheduler]:
    from transformers import get_scheduler  # imports all that transformers trains with: not to be waited for by --help

    adamw = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    warmup_steps = math.ceil(config.warmup_ratio * total_steps)
    return adamw, get_scheduler(config.lr_scheduler_type, adamw, warmup_steps, total_steps)


def restore(
    checkpoint: Checkpoint,
    parameters: Mapping[str, nn.Parameter],
    adamw: torch.optim.AdamW,
    schedule: LRScheduler,
    accelerator: Accelerator,
) -> None:
    """Puts a checkpoint back: weights and schedule; the moments, which are an engine's, come later."""
    for name, parameter in parameters.items():
        parameter.data.copy_(checkpoint.projector[name])
    schedule.load_state_dict(checkpoint.state["schedule"])
    for group, rate in zip(adamw.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate
