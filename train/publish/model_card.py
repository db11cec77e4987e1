"""The model card of a published reduced checkpoint, written from the run's own records."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from shortzip.data.errors import MissingFile
from shortzip.data.files import read_json
from shortzip.data.subset_folder import subset_report
from shortzip.reduction.configuration_pruning import PRUNING_METHODS, pruning_method
from shortzip.reduction.configuration_reduced_llava import TOWER_HAS_CLS
from shortzip.reduction.families import family_of
from shortzip.reduction.parsing import format_budget, pruned_title
from shortzip.reduction.positions import COMPACT
from shortzip.reduction.reductions import Reductions
from shortzip.reduction.selectors import BASELINES, VISIONZIP, Selector, selector_of
from shortzip.train.publish.card_command import command_of
from shortzip.train.publish.card_text import fenced, inline, is_repository, licence_id, one_line
from shortzip.train.release.hub import fetch
from shortzip.train.release.layouts import layout_for
from shortzip.train.release.lineage import base_revision
from shortzip.train.release.opening import open_release
from shortzip.train.release.writing import Shape, read_lineage
from shortzip.train.run.run_folder import CONFIG, METRICS, RESULTS, read_metrics
from shortzip.train.settings.config import DEMO

PICTURE = "kept_tokens.png"


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder says about it."""

    name: str
    config: dict[str, Any]
    reductions: Reductions
    budgets: list[dict[str, int]]
    """Those that it was tuned for, where they are several."""
    lineage: list[dict[str, Any]]
    model_config: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    licence: str | None


def read_run(folder: Path) -> RunRecord:
    """Reads a finished run. Raises FileNotFoundError for a folder that holds none."""
    if not (folder / CONFIG).is_file():
        raise MissingFile(f"{folder} is no run's folder (no {CONFIG}): name the output_dir of a run")
    release = open_release(str(folder))
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    lineage = read_lineage(release.source)
    return RunRecord(
        name=folder.resolve().name,
        config=config,
        reductions=release.saved_reductions,
        budgets=release.saved_budgets or [],
        lineage=lineage,
        model_config=release.config,
        metrics=read_metrics(folder / METRICS) if (folder / METRICS).is_file() else [],
        evaluation=read_json(folder / RESULTS) if (folder / RESULTS).is_file() else None,
        licence=_licence_of_base(str(config["model"]), base_revision(release, config)),
    )


def _licence_of_base(name: str, revision: str | None) -> str | None:
    try:
        return licence_of(fetch(name, revision)[0])
    except FileNotFoundError:
        return None


def licence_of(release: Path) -> str | None:
    """The licence that a release's own card names (`license:` in its README.md); None where it names none."""
    readme = release / "README.md"
    if not readme.is_file():
        return None
    match = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError, RecursionError):  # others wrote it; a card that cannot be read names nothing
        data = None
    licence = data.get("license") if isinstance(data, dict) else None
    return licence if isinstance(licence, str) else None


def write_card(run: RunRecord, *, repo_id: str, shape: Shape, size: int, picture: bool) -> str:
    """The card, with its metadata.

    `size`: bytes of all published files. `picture`: whether PICTURE is among them.
    """
    # Not ModelCard.from_template: in this environment text is escaped wherever the template does not say `safe`.
    environment = Environment(
        loader=PackageLoader(__package__, ""),
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else inline(value),
    )
    subset = subset_report(str(run.config["data"]["instructions"]))
    lost = run.reductions.lost_in_an_engine if shape == "engine" else []
    if lost:
        run = replace(run, reductions=run.reductions.before_an_engine)
    return environment.get_template("model_card.jinja").render(
        run=run,
        repo_id=repo_id,
        shape=shape,
        size=size,
        picture=PICTURE if picture else None,
        metadata=_metadata(run, repo_id, None if lost else _row(run, "tuned")),
        base=_base(run),
        on_hub=_on_hub(_base(run)),
        loading=loading_lines(repo_id, shape, run),
        in_transformers=loading_lines(repo_id, "full", run),
        lost=lost,
        budget=_budget(run),
        budgets=", ".join(format_budget(budget) for budget in run.budgets),
        other_budget=_other_budget(run),
        selector=_selector(run),
        frozen=_frozen(run),
        pruning=_pruning(run),
        pruning_paper=None if run.reductions.fastv is None else PRUNING_METHODS[pruning_method(run.reductions.fastv)],
        pruned_title=pruned_title,
        dataset=_dataset_name(run) if run.evaluation else None,
        precision=_precision(run) if run.evaluation else None,
        tuned=None if lost else _row(run, "tuned"),
        training=_training(run),
        subset=subset,
        instructions=_instructions(run, subset),
        command=command_of(run.config),
        describe=lambda entry: Reductions.from_config(entry).describe(),
        fenced=fenced,
    )


def _base(run: RunRecord) -> dict[str, Any]:
    return run.lineage[-1] if run.lineage else {"name": Path(str(run.config["model"])).name, "revision": None}


def _on_hub(base: Mapping[str, Any]) -> bool:
    return is_repository(str(base["name"]))  # of a folder, the lineage keeps the last part alone


def _metadata(run: RunRecord, repo_id: str, tuned: Mapping[str, Any] | None) -> str:
    """`tuned`: the row of the table that is of what is published, if there is one."""
    results = []
    if tuned:
        dataset = one_line(_dataset_name(run))
        for key, name, value in (
            ("exact_match", "Exact match", tuned["exact_match"]),
            ("loss", "Loss (nats per supervised token)", tuned["loss"]),
        ):
            results.append(
                EvalResult(
                    task_type="image-text-to-text",
                    dataset_type=re.sub(r"[^a-z0-9-]+", "-", dataset.lower()).strip("-"),
                    dataset_name=dataset,
                    metric_type=key,
                    metric_name=name,
                    metric_value=round(float(value), 6),
                )
            )
    base = _base(run)
    data = ModelCardData(
        license=licence_id(run.licence),
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=[
            "llava",
            "visual-token-reduction",
            *dict.fromkeys([VISIONZIP, run.reductions.method]),
            "shortv",
            "shortzip",
        ],
        base_model=base["name"] if _on_hub(base) else None,
        base_model_relation="finetune" if _on_hub(base) else None,
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _grid(run: RunRecord) -> str:
    vision = run.model_config["vision_config"]
    side = int(vision.get("image_size", 336)) // int(vision.get("patch_size", 14))
    return f"{side * side}"


def _budget(run: RunRecord) -> str:
    visionzip = run.reductions.visionzip
    if visionzip is None:
        return "all visual tokens"
    total = visionzip["dominant"] + visionzip["contextual"]
    family = family_of(run.model_config["model_type"])
    unit = "tile" if family.counts_by_size else "image"
    unit += ", and per frame of a video" if "video" in family.inputs else ""
    selector, words = _selector(run), run.reductions.method_words
    if selector is None:
        how = f"chosen by the baseline {words}, not by VisionZip"
    else:
        tower = run.model_config["vision_config"].get("model_type", "clip_vision_model")
        cls = ", CLS counted among them," if TOWER_HAS_CLS.get(tower) and selector.keeps_cls else ""
        how = f"{visionzip['dominant']} dominant{cls} and {visionzip['contextual']} contextual"
        how = how if selector.merges else "patches as they are"
        how += "" if run.reductions.method == VISIONZIP else f", chosen by {selector.title}: {words}"
        instead = run.reductions.in_place_of_cls(run.model_config)
        how += f"; {instead}" if instead else ""
    if run.reductions.positions != COMPACT:
        how += f"; {run.reductions.positions} positions"
    return f"{total} of {_grid(run)} visual tokens per {unit} ({how})"


def _other_budget(run: RunRecord) -> dict[str, Any] | None:
    """What loads a checkpoint that was tuned for several budgets with another one than its own; None for others."""
    if run.reductions.visionzip is None:
        return None
    keys = [{**run.reductions.visionzip, **budget} for budget in run.budgets]
    return next((key for key in keys if key != run.reductions.visionzip), None)


def _selector(run: RunRecord) -> Selector | None:
    """The published selection that chooses the visual tokens; None for a baseline, and where all are kept."""
    visionzip = run.reductions.visionzip
    return None if visionzip is None or run.reductions.method in BASELINES else selector_of(visionzip)


def _frozen(run: RunRecord) -> str:
    depth = _depth(run)
    if not run.reductions.layers:
        return f"none of {depth}"
    layers = ", ".join(str(layer) for layer in run.reductions.layers)
    return f"{len(run.reductions.layers)} of {depth} (layers {layers})"


def _depth(run: RunRecord) -> int:
    return int(run.model_config["text_config"].get("num_hidden_layers", 32))


def _pruning(run: RunRecord) -> str:
    fastv = run.reductions.fastv
    if fastv is None:
        return "none"
    if "layer" not in fastv:
        return f"{run.reductions.pruning_described.replace('of them', 'of the visual tokens')} of {_depth(run)}"
    return (
        f"FastV, {float(fastv['keep']):.3g} of the visual tokens kept after {fastv['layer']} of {_depth(run)} layers"
    )


def loading_lines(repo_id: str, shape: Shape, run: RunRecord) -> str:
    """What loads a published reduced checkpoint: three lines of transformers, an engine's or LLaVA's own commands."""
    if shape == "llava":
        folder, base = repo_id.split("/")[-1], shlex.quote(one_line(_base(run)["name"]))
        module, file = layout_for(run.model_config["model_type"]).command
        return (
            f"hf download {repo_id} --local-dir {folder}\n"
            f"python -m {module} --model-path {folder} --model-base {base} {file}"
        )
    if shape == "engine":
        return f"vllm serve {repo_id} --trust-remote-code --model-impl transformers"
    return (
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f'processor = AutoProcessor.from_pretrained("{repo_id}", trust_remote_code=True)\n'
        f'model = AutoModelForImageTextToText.from_pretrained("{repo_id}", trust_remote_code=True)'
    )


def _row(run: RunRecord, ending: str) -> dict[str, Any] | None:
    rows = run.evaluation["rows"] if run.evaluation else []
    return next((row for row in rows if row["name"].endswith("+ " + ending)), None)


def _dataset_name(run: RunRecord) -> str:
    source = str(run.config["data"].get("eval_instructions"))
    return "drawn scenes (held out)" if source == DEMO else f"{Path(source).stem} (held out)"


def _precision(run: RunRecord) -> str:
    assert run.evaluation is not None
    of_run = "bfloat16" if run.config.get("mixed_precision", "bf16") == "bf16" else "float32"
    precision = "in bf16 (projector fp32)" if run.evaluation.get("dtype", of_run) == "bfloat16" else "in fp32"
    if run.evaluation.get("load_in_4bit", run.config.get("load_in_4bit")):
        precision += ", the language model's layers in 4 bits (NF4)"
    return precision


def _training(run: RunRecord) -> str | None:
    """Steps, conversations, time and memory of the tuning; None where the run's metrics are gone."""
    train = [line for line in run.metrics if line["kind"] == "train"]
    if not train:
        return None
    seconds = sum(line["seconds"] for line in train) * int(run.config.get("logging_steps", 1))
    speeds = [line["samples_per_second"] for line in train if "samples_per_second" in line]
    speed = f", {speeds[-1]:.1f} samples/s" if speeds else ""
    memory = max(line["peak_memory"] for line in train) / 2**30
    return (
        f"{train[-1]['step']} steps, {train[-1]['samples_seen']} conversations, about "
        f"{seconds / 60:.0f} minutes{speed}, peak memory {memory:.1f} GiB"
    )


def _instructions(run: RunRecord, subset: Mapping[str, Any] | None) -> str:
    source = str(run.config["data"]["instructions"])
    if subset is not None:
        return Path(subset["instructions"]).name
    return "drawn scenes" if source == DEMO else Path(source).name
