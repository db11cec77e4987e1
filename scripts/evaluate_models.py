"""Compares models on held-out conversations: exact match, loss, visual tokens, LLM FLOPs and prefill time.

    python scripts/evaluate_models.py --model llava-hf/llava-1.5-7b-hf --model checkpoints/run --instructions
    FILE.json

A model is a release (evaluated with all its visual tokens; with --budget or --freeze also reduced, untuned), a
reduced checkpoint, or a run's folder (all tokens, reduced untuned, and tuned). Several GPUs: accelerate launch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from shortzip.data.errors import FileInTheWay
from shortzip.data.files import refuse_to_replace
from shortzip.reduction.configuration_budgets import is_listed
from shortzip.reduction.reductions import Reductions
from shortzip.reduction.selectors import VISIONZIP
from shortzip.train.evaluation.comparison import Candidate, check_candidates, compare, table_of, write_evaluation
from shortzip.train.finish import candidates_of
from shortzip.train.release.lineage import check_run, check_settings, release_of
from shortzip.train.release.opening import Release, open_release
from shortzip.train.release.spec import ReleaseSpec, dtype_of
from shortzip.train.run.processes import PATIENCE, on_main_process
from shortzip.train.run.report import Reporter
from shortzip.train.run.run_folder import ANSWERS, CONFIG, FINAL, RESULTS, STATUS
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import load_config, parse_config, run_command
from shortzip.train.settings.comparing import EvaluateConfig
from shortzip.train.settings.config import DataConfig, TuneConfig
from shortzip.train.settings.method_parameters import flat_settings
from shortzip.train.settings.reduced import reductions_of


def read_arguments(argv: Sequence[str]) -> EvaluateConfig:
    """The settings; `--model` may stand several times. Raises `ConfigError`."""
    return parse_config(EvaluateConfig, argv, program="evaluate_models.py")


def runs_of(config: EvaluateConfig) -> dict[str, TuneConfig]:
    """The settings of the runs among the models, in order."""
    files = {model: Path(model) / CONFIG for model in config.model}
    return {model: load_config(["--config", str(file)]) for model, file in files.items() if file.is_file()}


def candidates_for(config: EvaluateConfig, runs: Mapping[str, TuneConfig]) -> list[Candidate]:
    """The rows that the models give, in order.

    Raises what `open_release` raises, and `ConfigError` for reductions that no model is there to be given.
    """
    rows: list[Candidate] = []
    reduces, has_flags = config.visionzip or config.shortv or config.fastv, False
    for model in config.model:
        several = f"{model}: " if len(config.model) > 1 else ""
        if model in runs:
            if config.revision is not None:
                raise ConfigError(f"revision {config.revision!r} is of a Hub id, and {model} is a run: leave it out")
            final, settings, file = (
                open_release(str(Path(model) / FINAL)),
                flat_settings(runs[model]),
                Path(model) / CONFIG,
            )
            check_settings(final.source, settings, file)
            check_run(final, release_of(final, settings), file)
            rows += [replace(row, name=several + row.name) for row in candidates_of(runs[model], Path(model), final)]
            under = asked_budget(config, final)
            if under is not None:
                has_flags = True
                if not is_listed(under.visionzip, final.saved_budgets):
                    tuned = ReleaseSpec.of(runs[model]).tuned(str(Path(model) / FINAL))
                    rows.append(Candidate(f"{several}{under.budget_words}, tuned", tuned, under))
            continue
        spec = ReleaseSpec(model, config.revision)
        saved = open_release(spec).saved_reductions
        if not saved.is_empty:
            under = asked_budget(config, open_release(spec))
            has_flags |= under is not None
            rows.append(Candidate(model if under is None else f"{model}, {under.budget_words}", spec, under))
            continue
        release = Candidate(several + "all tokens", spec, Reductions())
        rows.append(release)
        if reduces:
            has_flags = True
            layers = config.shortv.layers if config.shortv else None
            reductions = reductions_of(config.visionzip, layers, config.fastv, config.positions)
            rows.append(replace(release, name=several + "reduced, untuned", reductions=reductions))
            if config.text_tower is not None:
                name = several + "reduced by the question, untuned"
                rows.append(replace(rows[-1], name=name, text_tower=config.text_tower))
    if reduces and not has_flags:
        raise ConfigError(
            f"{', '.join(config.model)}: reduced checkpoints and runs are evaluated as they were saved, so visionzip, "
            "shortv and fastv mean nothing here (but for the budget of one that was tuned for several): leave them "
            "out, or add the release as a --model"
        )
    return rows


def asked_budget(config: EvaluateConfig, tuned: Release) -> Reductions | None:
    """What a checkpoint that was tuned for several budgets keeps under the one that is asked for, by its own method;
    None for others, which are evaluated as they were saved."""
    saved = tuned.saved_reductions
    if config.visionzip is None or config.shortv or config.fastv or not tuned.saved_budgets:
        return None
    if saved.visionzip is None or config.visionzip.method not in (VISIONZIP, saved.method):
        return None
    return saved.with_budget(config.visionzip.as_key())


def precision_for(
    config: EvaluateConfig, runs: Mapping[str, TuneConfig], device: torch.device
) -> tuple[torch.dtype, bool]:
    """Dtype of the computation, and whether to load in 4 bits."""
    first = next(iter(runs.values()), None)
    automatic = "bf16" if device.type == "cuda" else "no"
    precision = config.mixed_precision or (first.mixed_precision if first else automatic)
    in_4bit = config.load_in_4bit
    if in_4bit is None:
        in_4bit = first is not None and first.load_in_4bit
    return dtype_of(precision), in_4bit


def data_for(config: EvaluateConfig, runs: Mapping[str, TuneConfig]) -> DataConfig:
    """The held-out conversations: those given, or those of the first run. Raises `ConfigError` without either."""
    if config.data.instructions is not None:
        return DataConfig(
            instructions=config.data.instructions,
            eval_instructions=config.data.instructions,
            eval_image_root=config.data.image_root,
            eval_samples=config.data.samples,
            on_bad_sample=config.data.on_bad_sample or "raise",
            video_frames=config.data.video_frames,
        )
    for run in runs.values():
        if run.data.eval_instructions is not None:
            own = run.data
            return replace(
                own,
                eval_image_root=config.data.image_root or own.eval_image_root,
                eval_samples=own.eval_samples if config.data.samples is None else config.data.samples,
                on_bad_sample=config.data.on_bad_sample or own.on_bad_sample,
                video_frames=config.data.video_frames or own.video_frames,
            )
    raise ConfigError("data.instructions is needed: no run among the models names held-out conversations")


def main(argv: Sequence[str]) -> None:
    run(read_arguments(argv))


def run(config: EvaluateConfig) -> None:
    """Checks everything, then evaluates. Raises what `compare` raises."""
    check_output(Path(config.output), config.overwrite)
    runs = runs_of(config)
    data = data_for(config, runs)
    candidates = candidates_for(config, runs)
    check_candidates(candidates)
    answer(config, data, candidates, runs)


def check_output(folder: Path, overwrite: bool) -> None:
    """Raises `FileInTheWay` for a run's folder, whose evaluation.json is the run's own, and for an evaluation that is
    there already."""
    if (folder / CONFIG).exists() or (folder / STATUS).exists():
        raise FileInTheWay(f"output {folder} is a run's folder, with an evaluation of its own: choose another one")
    if (folder / ANSWERS).is_file():
        raise FileInTheWay(f"{folder / ANSWERS} is a file, and a folder is to be written there: choose another output")
    for written in (folder / RESULTS, folder / ANSWERS / "NAME.jsonl"):
        refuse_to_replace(written, overwrite=overwrite)


def answer(
    config: EvaluateConfig, data: DataConfig, candidates: Sequence[Candidate], runs: Mapping[str, TuneConfig]
) -> None:
    """Evaluates the candidates, prints the table and writes it. Raises what `compare` raises."""
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    dtype, load_in_4bit = precision_for(config, runs, accelerator.device)
    as_asked = [replace(row, spec=replace(row.spec, dtype=dtype, load_in_4bit=load_in_4bit)) for row in candidates]
    report = Reporter(accelerator.is_main_process)
    output = Path(config.output)
    results, answers = compare(
        as_asked,
        data,
        accelerator,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        progress=lambda name, done, total: report.progress(f"evaluating {name}", done, total),
    )
    report.end_progress()
    on_main_process(accelerator, lambda: write_evaluation(output, results, answers, **as_asked[0].spec.precision()))
    report.table(table_of(results, f"held-out conversations of {data.eval_instructions}"))
    report.say(f"written: {output / RESULTS}, {output / ANSWERS}/")
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
