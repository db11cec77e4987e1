"""Tunes the projector of a LLaVA so that it works on a fraction of its visual tokens: the whole run, top to bottom.

    accelerate launch train/tune_projector.py [--config configs/X.yaml] [--learning_rate 1e-4] ...

Settings: train/settings/config.py, or --help. What a run writes: train/run/run_folder.py. What it starts from:
train/preparation.py. What follows the last step: train/finish.py.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from torch import Tensor

from shortzip.data.batching import BatchPlan, GlobalBatch
from shortzip.data.dataset import MicroBatch
from shortzip.data.drops import Drop
from shortzip.data.errors import UserError
from shortzip.data.files import write_atomically
from shortzip.reduction.refusals import change_budget
from shortzip.train.evaluation.answers import held_out_loss
from shortzip.train.finish import compare_and_draw, control_of, publish_if_asked, write_final
from shortzip.train.inputs.loading import loader_of, step_inputs
from shortzip.train.inputs.preflight import answer_images, refuse_zero_gradient
from shortzip.train.inputs.videos import visual_tokens_of
from shortzip.train.preparation import Prepared, prepare
from shortzip.train.release.spec import dtype_of
from shortzip.train.run.checkpoint import Checkpoint, save_checkpoint
from shortzip.train.run.processes import (
    StopRequest,
    StopRequested,
    failures_recorded,
    on_main_process,
    start_accelerator,
)
from shortzip.train.run.report import Reporter, Speed, matmul_speed, peak_memory, reset_peak_memory
from shortzip.train.run.run_folder import DROPPED, NONFINITE, Metrics
from shortzip.train.run.run_start import RunFolder
from shortzip.train.run.session import Session
from shortzip.train.run.tracking import Trackers
from shortzip.train.settings.command_line import end_stopped, load_config, run_command
from shortzip.train.settings.config import TuneConfig
from shortzip.train.step.flops import StepFlops
from shortzip.train.step.micro_batch import half_the_micro_batch, in_words
from shortzip.train.step.objective import count_supervised
from shortzip.train.step.sandwich import readings_of


class NonFiniteLoss(UserError):
    """Too many steps in a row with NaN or Inf."""


def main(argv: Sequence[str]) -> None:
    run(load_config(argv))


def run(config: TuneConfig) -> None:
    """The run with these settings, and what follows it. Raises what the user can mend."""
    accelerator = start_accelerator(config)
    session = Session(accelerator, Reporter(accelerator.is_main_process), StopRequest())
    try:
        with session.stop, session.report, held_folder(config, session) as folder:
            tune(config, folder, session)
            if config.control:
                session.report.heading("control: the same tuning with all visual tokens")
                control = control_of(config, folder.path)
                with held_folder(control, session) as beneath:
                    tune(control, beneath, session)
            compare_and_draw(config, folder.path, session)
            publish_if_asked(config, folder.path, session)
    except StopRequested as request:
        words = f"stopped by {request}; continue by the same command with --resume_from_checkpoint latest"
        end_stopped(words, by=str(request), silent=not accelerator.is_main_process)
    accelerator.end_training()


@contextmanager
def held_folder(config: TuneConfig, session: Session) -> Iterator[RunFolder]:
    """The run's folder, for this run alone, which says afterwards how the run ended."""
    accelerator, report = session.accelerator, session.report
    with RunFolder(config, accelerator, report.say, report.warn) as run, failures_recorded(run.failed, accelerator):
        yield run


def tune(config: TuneConfig, run: RunFolder, session: Session) -> None:
    """One run, from the release to final/ in its folder. Raises `StopRequested`, after saving, if asked to stop."""
    set_seed(config.seed)
    start = prepare(config, run, session)
    state = start.state
    run.accept(state.step)

    loop = Loop(config, run, start, session)
    if state.evaluation_due:
        loop.evaluate()
    reset_peak_memory(session.accelerator.device)
    while state.step < start.total_steps and not loop.stopping:
        step = loop.step()
        if step is None:  # memory ran out: the same step again, in smaller micro-batches
            continue
        loop.show(step)
        loop.refuse_nonfinite()
        if state.evaluation_due and not loop.stopping:
            loop.evaluate()
        if loop.is_due(config.save_steps) or loop.stopping:
            loop.save()
    loop.close()
    if loop.stopping:
        raise session.stopped()

    if session.accelerator.is_main_process and start.training.drops.drops:
        start.training.drops.write(run.path / DROPPED)
    subject, settings, say = start.subject, config.shaping_settings(), session.report.say
    budgets = [{key: budget[key] for key in ("dominant", "contextual")} for budget in subject.listed] or None
    tuned = subject.adapter or start.engine.projector()
    on_main_process(
        session.accelerator,
        lambda: write_final(
            run.path, subject.release, tuned, subject.processor, subject.reductions, settings, say, budgets
        ),
    )
    session.accelerator.free_memory()


@dataclass(frozen=True)
class Step:
    """One global batch, as all processes together saw it."""

    batch: GlobalBatch
    supervised: int
    """Tokens."""
    loss: float
    """The sum over these tokens."""
    norm: float
    """Of the gradient of their mean, before clipping."""
    learning_rate: float
    started: float
    """As time.perf_counter says it."""
    waited: float
    """Seconds without data, on this process."""

    @property
    def is_finite(self) -> bool:
        """Whether the update was made: not with a NaN or Inf."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class Loop:
    """The steps of a run: a turn is one global batch, cut into micro-batches that the processes share."""

    def __init__(self, config: TuneConfig, run: RunFolder, start: Prepared, session: Session) -> None:
        self.config, self.run, self.start, self.session = config, run, start, session
        self.accelerator, self.device = session.accelerator, session.accelerator.device
        self.state, self.engine, self.schedule = start.state, start.engine, start.schedule
        self.plan: BatchPlan = start.plan
        self.stopping = self.has_learned = False
        folder = run.path if self.accelerator.is_main_process else None
        self.metrics = Metrics(folder, self.state.step, run.warn)
        self.trackers = Trackers(self.accelerator, config, run.path, session.report.warn)
        self.inputs = self.inputs_from_here()
        self.flops = StepFlops(start.subject.model, start.training, taught=start.subject.teacher is not None)
        peak = matmul_speed(self.device, dtype_of(config.mixed_precision))
        self.speed = Speed(self.accelerator.num_processes * peak)

    def inputs_from_here(self) -> Iterator[tuple[GlobalBatch, list[MicroBatch]]]:
        start, position = self.start, self.state.samples_seen
        return step_inputs(start.training, self.plan, self.accelerator, self.config, position, start.budgets)

    def keep_own_budget(self) -> None:
        """Has the model keep the run's own budget, where steps have others."""
        if self.start.budgets is not None:
            change_budget(self.start.subject.model.model, dict(self.start.budgets.target))

    def step(self) -> Step | None:
        """Gradient, update and schedule of the next global batch; None, and nothing done, where memory ran out."""
        started = time.perf_counter()
        batch, micro_batches = next(self.inputs)
        waited = time.perf_counter() - started

        # The loss is the mean over the global batch's supervised tokens; their number is known before any gradient.
        local = sum(count_supervised(micro.inputs["labels"]) for micro in micro_batches)
        supervised = max(1, int(self.session.total(local)[0]))
        loss = self.accumulate(micro_batches, supervised)
        if loss is None:
            self.begin_again()
            return None
        is_asked = self.session.stop.signal is not None
        drops = [drop for micro in micro_batches for drop in micro.dropped]
        visual = visual_tokens_of(self.start.subject.processor)
        sees_image = not self.has_learned and answer_images(micro_batches, *visual)  # asked until it is known
        total_loss, stops, dropped, images = self.session.total(loss, is_asked, len(drops), sees_image)

        # Every process has the same loss by now, and will have the same gradient: it decides as the others do.
        learning_rate = float(self.schedule.get_last_lr()[0])
        self.state.step += 1
        self.state.samples_seen = batch.next_position
        norm = self.engine.update(finite=math.isfinite(total_loss))
        if images and not self.has_learned:
            self.has_learned = refuse_zero_gradient(norm, self.state.step)
        step = Step(batch, supervised, total_loss, norm, learning_rate, started, waited)
        self.count(step)
        self.schedule.step()
        if dropped:
            self.count_drops(drops, int(dropped))
        self.stopping = stops > 0
        self.state.evaluation_due = self.is_due(self.config.eval_steps)
        return step

    def accumulate(self, micro_batches: Sequence[MicroBatch], supervised: int) -> Tensor | None:
        """Adds up the gradient of the mean over `supervised` tokens; gives the sum of this process's losses, float64.

        None where memory ran out: then the plan is one of smaller micro-batches. What was raised is gone with this
        method's return, and with it what it held on to: all that filled the memory.
        """
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        scale = self.accelerator.num_processes / supervised  # engines average gradients over the processes
        try:
            for number, micro in enumerate(micro_batches):
                readings = readings_of(micro.to(self.device))
                for place, reading in enumerate(readings):
                    is_last = number == len(micro_batches) - 1 and place == len(readings) - 1
                    loss += self.engine.backward(reading, scale, last=is_last)
        except torch.OutOfMemoryError as error:
            is_halved = self.plan is not self.start.plan
            self.plan = half_the_micro_batch(self.plan, error, again=is_halved or not self.engine.can_repeat)
            return None
        return loss

    def begin_again(self) -> None:
        """Empties the memory and has the step at hand repeated, with what the plan is by now."""
        self.engine.discard()
        torch.cuda.empty_cache()
        rows, tokens = self.plan.micro_batch_size, self.plan.max_tokens
        self.state.micro_batch |= {"rows": rows, "tokens": tokens}
        words = f"out of memory at step {self.state.step + 1}: it is repeated, {in_words(rows, tokens)} from here on"
        self.session.report.warn(words, topic="out of memory")
        self.inputs = self.inputs_from_here()

    def count(self, step: Step) -> None:
        """Adds a step to what is said of those since the last line of metrics.jsonl, or to those without an update."""
        state = self.state
        if step.is_finite:
            state.nonfinite_streak = []
            state.interval_loss += step.loss
            state.interval_tokens += step.supervised
            return
        ids = [self.start.training.conversations[sample].id for sample in step.batch.samples]
        state.nonfinite_steps += 1
        state.nonfinite_streak.append({"step": state.step, "loss": str(step.loss), "norm": str(step.norm), "ids": ids})
        words = f"step {state.step}: loss {step.loss}, gradient norm {step.norm}: the update is skipped"
        self.session.report.warn(words, topic="skipped updates")

    def count_drops(self, drops: Sequence[Drop], total: int) -> None:
        """Notes the `total` rows that the processes could not read. Raises `TooManyBadSamples` where that is so."""
        self.state.dropped += gather_object([asdict(drop) for drop in drops])
        log = self.start.training.drops
        log.extend(Drop(**drop) for drop in self.state.dropped[-total:])
        log.check(self.state.samples_seen)
        self.session.report.warn(f"{log.summary()} (step {self.state.step})", topic="dropped rows")

    def is_due(self, every: int | None) -> bool:
        """Whether what is done every so many steps, and after the last one, is to be done now; None: never."""
        return every is not None and (self.state.step % every == 0 or self.state.step == self.start.total_steps)

    def show(self, step: Step) -> None:
        """Writes a line of metrics.jsonl, if it is time for one, and shows how far the run is."""
        samples, steps_left = step.batch.samples, self.start.total_steps - self.state.step
        budgets, lengths = self.start.budgets, self.plan.lengths_of(step.batch.position, samples)
        visual = []
        if budgets is not None:
            keys = budgets.of_step(budgets.step_at(step.batch.position))
            visual = [budgets.supervision_of(key).placeholders(self.flops.size) for key in keys]
        tokens, seconds = int(lengths.sum()), time.perf_counter() - step.started
        self.speed.add(len(samples), tokens, seconds, step.waited, self.flops(samples, *visual))
        if self.is_due(self.config.logging_steps):
            values = self.measured(step, seconds, steps_left)
            self.metrics.write("train", self.state.step, **values)
            numbers = {f"train/{key}": value for key, value in values.items() if value is not None}
            self.trackers.log(self.state.step, **numbers)
        loss, memory = step.loss / step.supervised, peak_memory(self.device)
        self.session.report.step(self.state.step, self.start.total_steps, loss, self.speed, memory)

    def measured(self, step: Step, seconds: float, steps_left: int) -> dict[str, Any]:
        """The values of a line of metrics.jsonl; its loss is the mean since the last one."""
        state = self.state
        loss = state.interval_loss / state.interval_tokens if state.interval_tokens else None
        state.interval_loss, state.interval_tokens = 0.0, 0
        return {
            "loss": loss,
            "learning_rate": step.learning_rate,
            "grad_norm": step.norm if step.is_finite else None,
            "samples_seen": state.samples_seen,
            "epoch": state.samples_seen / len(self.start.training),
            "supervised_tokens": step.supervised,
            "nonfinite_steps": state.nonfinite_steps,
            "seconds": seconds,
            "peak_memory": peak_memory(self.device),
            "seconds_left": self.speed.seconds_left(steps_left),
            **self.speed.averages(),
        }

    def refuse_nonfinite(self) -> None:
        """Raises `NonFiniteLoss` after too many steps in a row without an update, and writes down their samples."""
        streak, path = self.state.nonfinite_streak, self.run.path / NONFINITE
        if len(streak) < self.config.max_nonfinite_steps:
            return
        if self.accelerator.is_main_process:
            write_atomically(path, json.dumps(streak, indent=1) + "\n")
        raise NonFiniteLoss(
            f"{len(streak)} steps in a row had NaN or Inf in loss or gradient; the ids of their samples are in "
            f"{path}. Lower learning_rate, or look at these samples"
        )

    def evaluate(self) -> None:
        """Measures the held-out loss, unless asked to stop meanwhile: then it stays due."""
        held_out, step = self.start.held_out, self.state.step
        assert held_out is not None
        self.keep_own_budget()
        plan = BatchPlan(
            held_out.lengths.tolist(),
            len(held_out),
            num_processes=self.accelerator.num_processes,
            micro_batch_size=self.config.eval_batch_size,
        )
        micro_batches = loader_of(held_out, plan.batches(), self.accelerator, self.config)
        loss = held_out_loss(self.engine.unwrapped, micro_batches, self.session)
        if loss is not None:
            self.state.evaluation_due = False
            self.metrics.write("eval", step, loss=loss)
            self.trackers.log(step, **{"eval/loss": loss})
            self.session.report.held_out(step, loss)

    def save(self) -> None:
        """Writes a checkpoint. All processes call it."""
        schedule, state = self.schedule.state_dict(), self.state
        checkpoint = Checkpoint(
            projector=self.engine.projector(),
            optimizer=self.engine.moments(),
            state={"step": state.step, "run": asdict(state), "schedule": schedule, **self.start.record},
        )
        folder, keep, warn = self.run.path, self.config.save_total_limit, self.run.warn
        on_main_process(self.accelerator, lambda: save_checkpoint(folder, checkpoint, keep, warn))
        if self.accelerator.is_main_process:
            self.run.saved(state.step)

    def close(self) -> None:
        self.session.report.end_progress()
        self.metrics.close()
        self.trackers.finish()


if __name__ == "__main__":
    run_command(main)
