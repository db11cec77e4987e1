"""The end of a run: the reduced checkpoint, the table that says what it is worth, pictures, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from shortzip.data.errors import shown
from shortzip.data.images import open_image
from shortzip.data.pixels import shrunk
from shortzip.reduction.reductions import Reductions
from shortzip.train.evaluation.comparison import Candidate, compare, recovered_share, table_of, write_evaluation
from shortzip.train.inputs.image_budgets import budgets_by_tower
from shortzip.train.inputs.samples import held_out_set
from shortzip.train.publish.push import PublishError, publish_run
from shortzip.train.release.lineage import base_revision, write_record
from shortzip.train.release.loading import load_viewer
from shortzip.train.release.opening import Release, model_classes, open_release
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.release.tensor_files import folder_specs
from shortzip.train.release.writing import write_reduced_checkpoint
from shortzip.train.run.checkpoint import discard
from shortzip.train.run.processes import on_main_process
from shortzip.train.run.report import draw_loss_curve
from shortzip.train.run.run_folder import (
    ANSWERS,
    CONFIG,
    CONTROL,
    CURVE,
    FINAL,
    HELD_OUT_PICTURE,
    METRICS,
    PICTURES,
    RESULTS,
)
from shortzip.train.run.session import Session
from shortzip.train.settings.config import TuneConfig
from shortzip.train.step.adapters import ADAPTER_FOLDER, ProjectorAdapter


def write_final(
    folder: Path,
    release: Release,
    trained: Mapping[str, torch.Tensor] | ProjectorAdapter,
    processor: Any,
    reductions: Reductions,
    settings: Mapping[str, Any],
    say: Callable[[str], None],
    budgets: Sequence[Mapping[str, int]] | None = None,
) -> None:
    """Writes `folder`/final: the release's untrained tensors bit for bit, and the tuned projector in float32.

    An adapter is merged into the projector, and saved beside it in `folder`/final/adapter. `settings`: what the run
    was tuned with, which is written beside them. `budgets`: those that it was tuned for, where they are several.
    """
    target = folder / FINAL
    if not target.is_symlink():  # of a run that ended here before, and is continued from an older step
        discard(target, say)
    projector = trained.merged() if isinstance(trained, ProjectorAdapter) else trained
    write_reduced_checkpoint(target, release, projector, processor, reductions, budgets=budgets)
    if isinstance(trained, ProjectorAdapter):
        trained.save(target / ADAPTER_FOLDER, release.name)
    write_record(target, release, settings)
    specs = folder_specs(target)
    dtypes = sorted(
        {str(s.dtype).removeprefix("torch.") for n, s in specs.items() if "multi_modal_projector" not in n}
    )
    size = sum(spec.nbytes for spec in specs.values()) / 1e6
    say(
        f"reduced checkpoint: {target} ({size:,.1f} MB; untrained weights in {', '.join(dtypes)}, "
        "projector in float32)"
    )


def control_of(config: TuneConfig, folder: Path) -> TuneConfig:
    """The same tuning with all visual tokens in every layer, as a run of its own beneath the run's folder."""
    started = (folder / CONTROL / CONFIG).is_file()
    return replace(
        config,
        visionzip=None,
        shortv=None,
        fastv=None,
        positions="compact",
        budget_schedule=None,
        budgets=[],
        sandwich=False,
        data=replace(config.data, cache_features=None),
        output_dir=str(folder / CONTROL),
        overwrite_output_dir=False,
        resume_from_checkpoint="latest" if started else None,
        control=False,
        push_to_hub=False,
        hub_model_id=None,
        eval_steps=None,
        report_to=[],
    )


def candidates_of(config: TuneConfig, folder: Path, final: Release) -> list[Candidate]:
    """The rows of a run's table: its release with all tokens and reduced, `final`, and the control."""
    saved = final.saved_reductions
    release = replace(ReleaseSpec.of(config), revision=base_revision(final, asdict(config)))
    tuned = release.tuned(str(folder / FINAL))
    rows = [Candidate("all tokens", release, Reductions())]
    if not saved.is_empty:
        rows.append(Candidate("reduced, untuned", release, saved))
        rows.append(Candidate("reduced + tuned", tuned))
        rows += _of_other_budgets(final, release, tuned)
    else:
        rows.append(Candidate("all tokens + tuned", tuned))
    if config.control:
        control = release.tuned(str(folder / CONTROL / FINAL))
        rows.append(Candidate("all tokens + the same tuning", control))
    return rows


def _of_other_budgets(final: Release, release: ReleaseSpec, tuned: ReleaseSpec) -> list[Candidate]:
    """The checkpoint under each budget that it was tuned for beside the one it is loaded with, and its release."""
    saved, rows = final.saved_reductions, []
    for budget in final.saved_budgets or []:
        under = saved.with_budget(budget)
        if under != saved:
            rows.append(Candidate(f"{under.budget_words}, untuned", release, under))
            rows.append(Candidate(f"{under.budget_words}, tuned", tuned, under))
    return rows


def compare_and_draw(config: TuneConfig, folder: Path, session: Session) -> None:
    """The table, the pictures and the last words. Raises `StopRequested` if asked to stop meanwhile."""
    accelerator, report = session.accelerator, session.report

    def progress(name: str, done: int, total: int) -> None:
        if session.stop.signal is not None:
            raise session.stopped()
        report.progress(f"evaluating {name}", done, total)

    on_main_process(accelerator, lambda: draw_loss_curve(folder / METRICS, folder / CURVE))
    if config.final_evaluation and config.data.eval_instructions is not None:
        spec = ReleaseSpec.of(config)
        results, answers = compare(
            candidates_of(config, folder, open_release(str(folder / FINAL))),
            config.data,
            accelerator,
            batch_size=config.eval_batch_size,
            max_new_tokens=config.max_new_tokens,
            progress=progress,
        )
        report.end_progress()
        share = recovered_share(*results[:3]) if len(results) > 2 else None
        on_main_process(
            accelerator,
            lambda: write_evaluation(folder, results, answers, recovered_share=share, **spec.precision()),
        )
        report.table(table_of(results, f"held-out conversations of {config.data.eval_instructions}"))
        if share is not None:
            report.say(f"tuning won back {share:.0%} of the exact match that the reduction cost")
        if config.control:
            gain = results[-1].exact_match - results[0].exact_match
            report.say(f"control: the same tuning with all tokens changed exact match by {100 * gain:+.1f} points")
        if config.pictures and config.visionzip is not None:
            on_main_process(accelerator, lambda: draw_held_out(config, folder))
    report.heading("what next")
    written = [name for name in (METRICS, CURVE, RESULTS, ANSWERS, PICTURES) if (folder / name).exists()]
    report.say(f"the run       {shown(str(folder))}: {', '.join(written)}")
    _, model, _ = model_classes(open_release(str(folder / FINAL)).config["model_type"])
    for what, command in next_commands(config, folder).items():
        report.say(f"{what:<12}  {command}")
    report.say(f"in Python     {model.__name__}.from_pretrained({str(folder / FINAL)!r})")


def next_commands(config: TuneConfig, folder: Path) -> dict[str, str]:
    """What a user may do with a run, by a word for it, as lines for a shell; capitals stand for what is theirs."""
    run, release = shlex.quote(str(folder)), shlex.quote(config.model)
    repository = shlex.quote(config.hub_model_id or "USER/NAME")
    held_out = "" if config.data.eval_instructions is not None else " --instructions FILE.json"
    return {
        "look": f"shortzip show PHOTO.jpg --model {run}",
        "ask": f"shortzip app --model {release} --tuned {run}",
        "evaluate": f"shortzip evaluate --model {run}{held_out}",
        "publish": f"shortzip publish {run} --repo_id {repository} --shape {config.hub_shape}",
        "a real LLaVA": "shortzip tune --config llava-1.5-7b-3090 --instructions FILE.json --image_root IMAGES",
    }


def draw_held_out(config: TuneConfig, folder: Path) -> None:
    """The first held-out images with their kept patches and merged groups, in `folder`/pictures."""
    from shortzip.reduction.pictures import (
        draw_images,
        map_tokens,
    )  # matplotlib takes as long to import as a small model to load

    model, processor = load_viewer(open_release(str(folder / FINAL)))
    dataset = held_out_set(config.data, processor, budgets_by_tower(model, processor))
    pictured = [conversation for conversation in dataset.conversations if conversation.images][: config.pictures]
    images = [open_image(conversation.images[0], dataset.image_root) for conversation in pictured]
    if images:
        (folder / PICTURES).mkdir(exist_ok=True)
        maps = [map_tokens(model, processor, shrunk(image, processor.image_processor))[0][0] for image in images]
        draw_images(maps, folder / PICTURES / HELD_OUT_PICTURE, [conversation.id for conversation in pictured])


def publish_if_asked(config: TuneConfig, folder: Path, session: Session) -> None:
    """With push_to_hub: publishes `folder`/final. A Hub that refuses or cannot be reached ends no run: it is said."""

    report = session.report

    def publish() -> None:
        try:
            published = publish_run(config, folder, report.say)
        except (PublishError, OSError, ValueError) as error:
            report.heading("not published")
            report.warn(str(error))
            report.say(f"the run is whole; publish it later: {next_commands(config, folder)['publish']}")
        else:
            report.heading("published")
            report.say(published.describe())

    if config.push_to_hub:
        on_main_process(session.accelerator, publish)
