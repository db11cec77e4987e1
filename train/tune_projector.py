"""Tunes the projector of a LLaVA so that it works on a fraction of its visual tokens: the whole run, top to bottom.

    accelerate launch train/tune_projector.py [--config configs/X.yaml] [--learning_rate 1e-4] ...

Settings: train/settings/config.py, or --help. What a run writes: train/run/run_folder.py.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed

from shortzip.data.batching import BatchPlan
from shortzip.data.dataset import MicroBatch
from shortzip.data.drops import Drop
from shortzip.data.errors import UserError
from shortzip.data.files import write_atomically
from shortzip.train.calibration.choosing import choose_layers
from shortzip.train.evaluation.answers import held_out_loss
from shortzip.train.finish import compare_and_draw, control_of, publish_if_asked, write_final
from shortzip.train.inputs.feature_filling import known_tower, store_features
from shortzip.train.inputs.identity import check_same_origin, fingerprint, run_identity
from shortzip.train.inputs.loading import check_shared_memory, loader_of
from shortzip.train.inputs.preflight import answer_images, check_learns, conversations_in_words, refuse_zero_gradient
from shortzip.train.inputs.samples import (
    check_instructions,
    check_positions,
    draw_demo_scenes,
    held_out_set,
    training_set,
)
from shortzip.train.publish.push import check_publishable
from shortzip.train.release.loading import dtype_of, load_release
from shortzip.train.release.opening import open_release
from shortzip.train.run.checkpoint import (
    Checkpoint,
    check_same_run,
    random_states,
    restore_random_states,
    save_checkpoint,
    versions,
)
from shortzip.train.run.processes import (
    StopRequest,
    StopRequested,
    failures_recorded,
    on_main_process,
    start_accelerator,
)
from shortzip.train.run.report import (
    Reporter,
    Speed,
    component_table,
    matmul_speed,
    peak_memory,
    reset_peak_memory,
)
from shortzip.train.run.run_folder import DROPPED, NONFINITE, Metrics
from shortzip.train.run.run_start import RunFolder
from shortzip.train.run.tracking import Trackers
from shortzip.train.settings.command_line import end_stopped, load_config, run_command
from shortzip.train.settings.config import TuneConfig, reductions_of
from shortzip.train.step.adapters import ProjectorAdapter, adapter_config
from shortzip.train.step.flops import StepFlops
from shortzip.train.step.micro_batch import half_the_micro_batch, in_words, plan_micro_batches
from shortzip.train.step.objective import (
    SupervisedLoss,
    count_supervised,
    describe_components,
    projector_parameters,
    recompute_layers,
    train_only_projector,
)
from shortzip.train.step.start import start_engine


class NonFiniteLoss(UserError):
    """Too many steps in a row with NaN or Inf."""


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


def main(argv: Sequence[str]) -> None:
    config = load_config(argv)
    accelerator = start_accelerator(config)
    report = Reporter(accelerator.is_main_process)
    try:
        with StopRequest() as stop, held_folder(config, accelerator, report) as run:
            tune(config, run, accelerator, report, stop)
            if config.control:
                report.heading("control: the same tuning with all visual tokens")
                control = control_of(config, run.path)
                with held_folder(control, accelerator, report) as beneath:
                    tune(control, beneath, accelerator, report, stop)
            compare_and_draw(config, run.path, accelerator, report, stop)
            publish_if_asked(config, run.path, accelerator, report)
    except StopRequested as request:
        words = f"stopped by {request}; continue by the same command with --resume_from_checkpoint latest"
        end_stopped(words, by=str(request), silent=not accelerator.is_main_process)
    accelerator.end_training()


@contextmanager
def held_folder(config: TuneConfig, accelerator: Accelerator, report: Reporter) -> Iterator[RunFolder]:
    """The run's folder, for this run alone, which says afterwards how the run ended."""
    with RunFolder(config, accelerator, report.say) as run, failures_recorded(run.failed, accelerator):
        yield run


def tune(config: TuneConfig, run: RunFolder, accelerator: Accelerator, report: Reporter, stop: StopRequest) -> None:
    """One run, from the release to final/ in its folder. Raises `StopRequested`, after saving, if asked to stop."""
    device, folder = accelerator.device, run.path
    set_seed(config.seed)

    # ---- the checkpoint to continue from, if any
    checkpoint = run.checkpoint()
    state = RunState(**checkpoint.state["run"]) if checkpoint else RunState()

    # ---- the release with its visual tokens reduced; of its weights, only the projector is trained
    check_instructions(config.data)
    on_main_process(accelerator, lambda: draw_demo_scenes(config.data))
    dtype = dtype_of(config.mixed_precision)
    release = open_release(
        config.model, config.revision, mm_projector=config.mm_projector, vision_tower=config.vision_tower
    )
    check_publishable(config, release)
    run.check_base(release.config.get("base_release"))
    layers = (
        checkpoint.state["layers"] if checkpoint else choose_layers(config, release, dtype, accelerator, run.write)
    )
    reductions = reductions_of(config.visionzip, layers, config.fastv)
    tower = known_tower(config, release, dtype)
    model, processor = load_release(
        release,
        reductions,
        dtype=dtype,
        chat_template=config.data.chat_template,
        load_in_4bit=config.load_in_4bit,
        with_tower=tower is None,
    )
    train_only_projector(model, dtype, gradient_checkpointing=False)  # until the samples' lengths are known
    adapter = None
    if config.tuning != "full":
        adapter = ProjectorAdapter(model, adapter_config(config.tuning, r=config.lora_r, lora_alpha=config.lora_alpha))
    parameters = adapter.parameters if adapter else projector_parameters(model)
    report.table(component_table(describe_components(model)))
    report.say(f"budget: {reductions.describe()}; frozen layers: {layers or 'none'}")

    # ---- the samples, in an order that is the same for every number of processes and size of micro-batch
    dataset = training_set(config.data, processor, config.seed)
    held_out = held_out_set(config.data, processor) if config.eval_steps is not None else None
    state.evaluation_due &= held_out is not None
    check_positions(model.config, dataset)
    check_positions(model.config, held_out, held_out=True)
    shaping, begun_with = config.shaping_settings(), fingerprint(dataset, parameters)
    settings = {**shaping, **begun_with}
    identity = on_main_process(accelerator, lambda: run_identity(release, dataset))
    if checkpoint:
        state_then, saved = checkpoint.state, checkpoint.state["settings"]
        check_same_run({key: value for key, value in saved.items() if key not in begun_with}, shaping, folder)
        on_main_process(accelerator, lambda: check_same_origin(state_then, identity, dataset, folder, report.say))
        check_same_run(saved, settings, folder)  # older checkpoints name no parts
    if config.data.cache_features is not None:
        run.accept(state.step)  # what follows may take hours
        store_features(config, release, tower, model, processor, dataset, held_out, accelerator, report, stop)
    limits, limits_said = plan_micro_batches(config, model, dataset, accelerator, state.micro_batch)
    if limits.gradient_checkpointing:
        recompute_layers(model)
    state.micro_batch = asdict(limits)
    plan = BatchPlan(
        dataset.lengths.tolist(),
        config.global_batch_size,
        seed=config.seed,
        num_epochs=None if config.max_steps is not None else config.num_train_epochs or 1,
        num_processes=accelerator.num_processes,
        micro_batch_size=limits.rows,
        max_tokens_per_micro_batch=limits.tokens,
    )
    total_steps = config.max_steps or plan.total_steps
    assert total_steps is not None
    report.say(f"{conversations_in_words(dataset)}. {dataset.drops.summary()}.")
    report.say(
        f"{total_steps} steps of {config.global_batch_size} on {accelerator.num_processes} process(es), {device}"
    )
    report.say(limits_said)
    dataset.drops.extend(Drop(**drop) for drop in state.dropped)

    # ---- optimizer and schedule, as they were
    from transformers import get_scheduler  # imports all that transformers trains with: not to be waited for by --help

    adamw = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    warmup_steps = math.ceil(config.warmup_ratio * total_steps)
    schedule = get_scheduler(config.lr_scheduler_type, adamw, warmup_steps, total_steps)
    check_learns(schedule, plan, dataset, total_steps)
    check_shared_memory(dataset, plan, config.data.num_workers)
    if checkpoint:
        for name, parameter in parameters.items():
            parameter.data.copy_(checkpoint.projector[name])
        schedule.load_state_dict(checkpoint.state["schedule"])
        for group, rate in zip(adamw.param_groups, schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        if accelerator.process_index < len(checkpoint.rng):
            restore_random_states(checkpoint.rng[accelerator.process_index])
    engine = start_engine(accelerator, SupervisedLoss(model), adamw, parameters, config.max_grad_norm)
    if checkpoint:
        engine.restore_moments(checkpoint.optimizer)
    run.accept(state.step)
    metrics = Metrics(folder if accelerator.is_main_process else None, state.step if checkpoint else None, run.say)
    trackers = Trackers(accelerator, config, folder, report.say)

    def save() -> None:
        saved = Checkpoint(
            projector=engine.projector(),
            optimizer=engine.moments(),
            rng=gather_object([random_states()]),
            state={
                "step": state.step,
                "run": asdict(state),
                "schedule": schedule.state_dict(),
                "layers": layers,
                "settings": settings,
                "identity": identity,
                "num_processes": accelerator.num_processes,
                "versions": versions(),
            },
        )
        on_main_process(accelerator, lambda: save_checkpoint(folder, saved, config.save_total_limit, run.say))
        if accelerator.is_main_process:
            run.saved(state.step)

    def evaluate() -> None:
        assert held_out is not None
        cut = BatchPlan(
            held_out.lengths.tolist(),
            len(held_out),
            num_processes=accelerator.num_processes,
            micro_batch_size=config.eval_batch_size,
        )
        batches = loader_of(held_out, cut, accelerator, config)
        loss = held_out_loss(engine.unwrapped, batches, accelerator, stop)
        if loss is not None:
            state.evaluation_due = False
            metrics.write("eval", state.step, loss=loss)
            trackers.log(state.step, **{"eval/loss": loss})
            report.say(f"step {state.step}: held-out loss {loss:.4f}")

    # ---- the loop: one turn is one global batch
    micro_batches = loader_of(dataset, plan, accelerator, config, state.samples_seen)
    stopping = out_of_memory = halved = has_learned = False
    flops, speed = StepFlops(model, dataset), Speed(accelerator.num_processes * matmul_speed(device, dtype))
    if state.evaluation_due:
        evaluate()
    reset_peak_memory(device)
    while state.step < total_steps and not stopping:
        started = time.perf_counter()
        batch = plan.global_batch(state.samples_seen)
        mine: list[MicroBatch] = [next(micro_batches) for _ in batch.micro_batches[accelerator.process_index]]
        waited = time.perf_counter() - started

        # The loss is the mean over the global batch's supervised tokens; their number is known before any gradient.
        # Engines average gradients over the processes, hence the factor that undoes it.
        local = torch.tensor(sum(count_supervised(micro.inputs["labels"]) for micro in mine), device=device)
        supervised = max(1, int(accelerator.reduce(local)))
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        try:
            for number, micro in enumerate(mine):
                scale, is_last = accelerator.num_processes / supervised, number == len(mine) - 1
                loss_sum += engine.backward(micro.to(device).inputs, scale, last=is_last)
        except torch.OutOfMemoryError as error:
            plan, out_of_memory = half_the_micro_batch(plan, error, again=halved or not engine.can_repeat), True
            state.micro_batch |= {"rows": plan.micro_batch_size, "tokens": plan.max_tokens}
        if out_of_memory:  # and past the handler, whose exception holds on to what filled the memory
            out_of_memory, halved = False, True
            engine.discard()
            torch.cuda.empty_cache()
            report.say(
                f"out of memory at step {state.step + 1}: it is repeated, "
                f"{in_words(plan.micro_batch_size, plan.max_tokens)} from here on"
            )
            micro_batches = loader_of(dataset, plan, accelerator, config, state.samples_seen)
            continue
        drops = [asdict(drop) for micro in mine for drop in micro.dropped]
        counts = [stop.signal is not None, len(drops), answer_images(mine, model.config.image_token_id)]
        local = torch.tensor([loss_sum, *counts], dtype=torch.float64, device=device)
        total_loss, stops, dropped, images = accelerator.reduce(local).tolist()

        # Every process has the same loss by now, and will have the same gradient: it decides as the others do.
        learning_rate = schedule.get_last_lr()[0]
        state.step += 1
        state.samples_seen = batch.next_position
        norm = engine.update(finite=math.isfinite(total_loss))
        finite = math.isfinite(total_loss) and math.isfinite(norm)
        if images and not has_learned:
            has_learned = refuse_zero_gradient(norm, state.step)
        if finite:
            state.nonfinite_streak = []
            state.interval_loss += total_loss
            state.interval_tokens += supervised
        else:
            state.nonfinite_steps += 1
            ids = [dataset.conversations[sample].id for sample in batch.samples]
            state.nonfinite_streak.append({"step": state.step, "loss": str(total_loss), "norm": str(norm), "ids": ids})
            report.say(f"step {state.step}: loss {total_loss}, gradient norm {norm}: the update is skipped")
        schedule.step()
        if dropped:
            state.dropped += gather_object(drops)
            dataset.drops.extend(Drop(**drop) for drop in state.dropped[-int(dropped) :])
            dataset.drops.check(state.samples_seen)
        stopping = stops > 0
        state.evaluation_due = config.eval_steps is not None and (
            state.step % config.eval_steps == 0 or state.step == total_steps
        )

        # ---- what it measured
        seconds = time.perf_counter() - started
        speed.add(len(batch.samples), int(plan.lengths[batch.samples].sum()), seconds, waited, flops(batch.samples))
        if state.step % config.logging_steps == 0 or state.step == total_steps:
            loss_mean = state.interval_loss / state.interval_tokens if state.interval_tokens else None
            state.interval_loss, state.interval_tokens = 0.0, 0
            values = {
                "loss": loss_mean,
                "learning_rate": learning_rate,
                "grad_norm": norm if finite else None,
                "samples_seen": state.samples_seen,
                "epoch": state.samples_seen / len(dataset),
                "supervised_tokens": supervised,
                "nonfinite_steps": state.nonfinite_steps,
                "seconds": seconds,
                "peak_memory": peak_memory(device),
                "seconds_left": speed.seconds_left(total_steps - state.step),
                **speed.averages(),
            }
            metrics.write("train", state.step, **values)
            trackers.log(state.step, **{f"train/{key}": value for key, value in values.items() if value is not None})
        report.progress(
            "tuning",
            state.step,
            total_steps,
            f"loss {total_loss / supervised:.4f} {speed.text(total_steps - state.step)}",
        )
        if len(state.nonfinite_streak) >= config.max_nonfinite_steps:
            if accelerator.is_main_process:
                write_atomically(folder / NONFINITE, json.dumps(state.nonfinite_streak, indent=1) + "\n")
            raise NonFiniteLoss(
                f"{len(state.nonfinite_streak)} steps in a row had NaN or Inf in loss or gradient; the ids of their "
                f"samples are in {folder / NONFINITE}. Lower learning_rate, or look at these samples"
            )
        if state.evaluation_due and not stopping:
            evaluate()
        if state.step % config.save_steps == 0 or state.step == total_steps or stopping:
            save()
    report.end_progress()
    metrics.close()
    trackers.finish()
    if stopping:
        raise StopRequested(stop.signal or "a signal to another process")

    # ---- the reduced checkpoint
    if accelerator.is_main_process and dataset.drops.drops:
        dataset.drops.write(folder / DROPPED)
    tuned = adapter or engine.projector()
    on_main_process(
        accelerator,
        lambda: write_final(folder, release, tuned, processor, reductions, config.shaping_settings(), report.say),
    )
    accelerator.free_memory()


if __name__ == "__main__":
    run_command(main)
