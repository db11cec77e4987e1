"""The model card of a published reduced checkpoint, written from the run's own records."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from shortzip.data.errors import MissingFile
from shortzip.data.files import read_json
from shortzip.data.subset_folder import subset_report
from shortzip.reduction.baselines import METHODS
from shortzip.reduction.configuration_reduced_llava import TOWER_HAS_CLS
from shortzip.reduction.reductions import NONE, Reductions
from shortzip.train.publish.card_command import command_of
from shortzip.train.publish.card_text import fenced, inline, is_repository, licence_id, one_line
from shortzip.train.release.hub import fetch
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
    found = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        data = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):  # others wrote it; a card that cannot be read names nothing
        data = None
    licence = data.get("license") if isinstance(data, dict) else None
    return licence if isinstance(licence, str) else None


def write_card(run: RunRecord, *, repo_id: str, shape: Shape, size: int, picture: bool) -> str:
    """The card, with its metadata.

    `size`: bytes of all published files. `picture`: whether PICTURE is among them.
    """
    parts = [
        f"# {repo_id.split('/')[-1]}",
        _introduction(run),
        _usage(repo_id, shape, run),
        _table(run),
        _cost(run, size),
        _recipe(run),
        _lineage(run),
        _limits(run, shape),
    ]
    if picture:
        caption = "What the model is given of four held-out images: patches kept as they are, and groups merged."
        parts.append(f"## The tokens that are kept\n\n{caption}\n\n![kept tokens]({PICTURE})")
    parts.append(_licence(run))
    return f"---\n{_metadata(run, repo_id)}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def _base(run: RunRecord) -> dict[str, Any]:
    return run.lineage[-1] if run.lineage else {"name": Path(str(run.config["model"])).name, "revision": None}


def _on_hub(base: Mapping[str, Any]) -> bool:
    return is_repository(str(base["name"]))  # of a folder, the lineage keeps the last part alone


def _metadata(run: RunRecord, repo_id: str) -> str:
    tuned = _row(run, "tuned")
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
        tags=["llava", "visual-token-reduction", "visionzip", "shortv", "shortzip"],
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
    unit = "tile" if "next" in run.model_config["model_type"] else "image"
    if run.reductions.method != METHODS[0]:
        seed = f", seed {visionzip.get('seed', 0)}" if run.reductions.method == "random" else ""
        how = f"chosen by the baseline {run.reductions.method}{seed}, not by VisionZip"
    else:
        tower = run.model_config["vision_config"].get("model_type", "clip_vision_model")
        cls = ", CLS counted among them," if TOWER_HAS_CLS.get(tower) else ""
        how = f"{visionzip['dominant']} dominant{cls} and {visionzip['contextual']} contextual"
    return f"{total} of {_grid(run)} visual tokens per {unit} ({how})"


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
    return (
        f"FastV, {float(fastv['keep']):.3g} of the visual tokens kept after {fastv['layer']} of {_depth(run)} layers"
    )


def _introduction(run: RunRecord) -> str:
    base = _base(run)
    name = f"[{base['name']}](https://huggingface.co/{base['name']})" if _on_hub(base) else inline(base["name"])
    pruned = f"; pruned inside it: {_pruning(run)}" if run.reductions.fastv else ""
    methods = []
    if run.reductions.visionzip and run.reductions.method == METHODS[0]:
        methods.append("The visual tokens are chosen by [VisionZip](https://arxiv.org/abs/2412.04467).")
    if run.reductions.shortv:
        methods.append("Frozen layers are those of [ShortV](https://arxiv.org/abs/2504.00502).")
    if run.reductions.fastv:
        methods.append("The pruning is [FastV](https://arxiv.org/abs/2403.06764)'s.")
    return (
        f"{name} on {_budget(run)}; layers of its language model in which visual tokens are frozen: {_frozen(run)}"
        f"{pruned}. Only the multimodal projector was tuned; vision tower and language model are the release's own. "
        f"{' '.join(methods)} The tuning was done with ShortZip."
    )


def _usage(repo_id: str, shape: Shape, run: RunRecord) -> str:
    lines = loading_lines(repo_id, shape, run)
    if shape == "llava":
        return (
            "## Use\n\nThe projector in LLaVA's own layout, for LLaVA's own code (which uses all visual tokens unless "
            f"VisionZip's patch is applied there):\n\n{fenced('bash', lines)}\n\nShortZip loads it as it is, "
            f"reductions included: `load_release('{repo_id}')`."
        )
    fetched = (
        ""
        if shape == "full"
        else f"\n\nThis repository holds the projector; the release it belongs to ({inline(_base(run)['name'])}, "
        "pinned to a commit and to its files' digests) is fetched when it is loaded."
    )
    stored = inline(run.model_config.get("dtype") or "float32")
    loaded = f"\n\nThe untrained weights are loaded in {stored}, as they are stored, and the projector in float32."
    return f"## Use\n\n{fenced('python', lines)}{fetched}{loaded}"


def loading_lines(repo_id: str, shape: Shape, run: RunRecord) -> str:
    """What loads a published reduced checkpoint: three lines of transformers, or LLaVA's own commands."""
    if shape == "llava":
        folder, base = repo_id.split("/")[-1], shlex.quote(one_line(_base(run)["name"]))
        return (
            f"hf download {repo_id} --local-dir {folder}\n"
            f"python -m llava.serve.cli --model-path {folder} --model-base {base} --image-file IMAGE"
        )
    return (
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f'processor = AutoProcessor.from_pretrained("{repo_id}", trust_remote_code=True)\n'
        f'model = AutoModelForImageTextToText.from_pretrained("{repo_id}", trust_remote_code=True)'
    )


def _row(run: RunRecord, ending: str) -> dict[str, Any] | None:
    rows = run.evaluation["rows"] if run.evaluation else []
    return next((row for row in rows if row["name"].endswith("+ " + ending)), None)


def _dataset_name(run: RunRecord) -> str:
    given = str(run.config["data"].get("eval_instructions"))
    return "drawn scenes (held out)" if given == DEMO else f"{Path(given).stem} (held out)"


def _table(run: RunRecord) -> str:
    if not run.evaluation:
        return (
            "## What was measured\n\nThis run was not evaluated on held-out conversations: "
            "`shortzip evaluate --model RUN --instructions FILE.json` does it."
        )
    rows = run.evaluation["rows"]
    first = rows[0]
    lines = [
        "| model | exact match | loss | visual tokens | frozen layers | LLM FLOPs | prefill |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        pruned = f", FastV {inline(row['fastv'])}" if row.get("fastv", NONE) != NONE else ""
        lines.append(
            f"| {inline(row['name'])} | {row['exact_match']:.1%} | {row['loss']:.4f} | "
            f"{row['visual_tokens']:g}{pruned} | {int(row['frozen_layers'])} | {row['llm_flops']:.3g} "
            f"({row['llm_flops'] / first['llm_flops']:.0%}) | "
            f"{row['prefill_ms']:.1f} ms ({row['prefill_ms'] / first['prefill_ms']:.0%}) |"
        )
    share = run.evaluation.get("recovered_share")
    said = f" Tuning won back {share:.0%} of the exact match that the reduction cost." if share is not None else ""
    machine = run.evaluation.get("machine")
    where = f" on {inline(machine)}" if machine else ""
    of_run = "bfloat16" if run.config.get("mixed_precision", "bf16") == "bf16" else "float32"
    precision = " in bf16 (projector fp32)" if run.evaluation.get("dtype", of_run) == "bfloat16" else " in fp32"
    if run.evaluation.get("load_in_4bit", run.config.get("load_in_4bit")):
        precision += ", the language model's layers in 4 bits (NF4)"
    return (
        f"## What was measured\n\n{int(first['questions'])} questions of {inline(_dataset_name(run))}, answered "
        "greedily; an answer is right when it equals the expected one. `scripts/evaluate_models.py` measured "
        "the published "
        f"weights{precision}{where}; prefill is from pixels to the first token, {int(first['prefill_batch'])} prompts "
        f"at once.{said}\n\n" + "\n".join(lines)
    )


def _cost(run: RunRecord, size: int) -> str:
    lines = [f"- published files: {size / 1e6:,.1f} MB"]
    if run.evaluation:
        first, tuned = run.evaluation["rows"][0], _row(run, "tuned")
        if tuned:
            lines.append(
                f"- language model, one prompt: {tuned['llm_flops'] / 1e9:,.3g} GFLOPs instead of "
                f"{first['llm_flops'] / 1e9:,.3g}; {tuned['visual_tokens']:g} visual tokens instead of "
                f"{first['visual_tokens']:g}"
            )
    train = [line for line in run.metrics if line["kind"] == "train"]
    if train:
        seconds = sum(line["seconds"] for line in train) * int(run.config.get("logging_steps", 1))
        speeds = [line["samples_per_second"] for line in train if "samples_per_second" in line]
        speed = f", {speeds[-1]:.1f} samples/s" if speeds else ""
        memory = max(line["peak_memory"] for line in train) / 2**30
        lines.append(
            f"- tuning: {train[-1]['step']} steps, {train[-1]['samples_seen']} conversations, about "
            f"{seconds / 60:.0f} minutes{speed}, peak memory {memory:.1f} GiB"
        )
    return "## Cost\n\n" + "\n".join(lines)


def _recipe(run: RunRecord) -> str:
    data = run.config["data"]
    instructions = "drawn scenes" if data["instructions"] == DEMO else Path(str(data["instructions"])).name
    tuning = run.config.get("tuning", "full")
    tuned = "all weights of the projector" if tuning == "full" else f"{inline(tuning)} on the projector, merged"
    subset = subset_report(str(data["instructions"]))
    if subset is None:
        share = f"{data.get('fraction', 1.0):.0%} of {inline(instructions)}"
    else:
        source = inline(Path(subset["instructions"]).name)
        drawn = f"prepare_subset, seed {int(subset['seed'])}"
        share = f"{subset['written']:,} rows, {subset['fraction']:.0%} of {source} ({drawn})"
    return (
        f"## How it was made\n\n- base: {inline(_base(run)['name'])}"
        + (f" at {inline(_base(run)['revision'])}" if _base(run)["revision"] else "")
        + f"\n- data: {share}\n- budget: {_budget(run)}\n- frozen layers: {_frozen(run)}\n"
        f"- pruned inside the language model: {_pruning(run)}\n"
        f"- tuned: {tuned}\n\n{fenced('bash', command_of(run.config))}"
    )


def _lineage(run: RunRecord) -> str:
    if len(run.lineage) < 2:
        return ""
    lines = []
    for entry in run.lineage:
        commit = f" at {inline(entry['revision'])}" if entry["revision"] else ""
        lines.append(f"1. {inline(entry['name'])}{commit}: {Reductions.from_config(entry).describe()}")
    return "## Lineage\n\nThis checkpoint was tuned from another one; the oldest first:\n\n" + "\n".join(lines)


def _limits(run: RunRecord, shape: Shape) -> str:
    lines = [
        "- Details that the kept tokens do not hold are lost: small print and small objects suffer first.",
        "- The projector fits this budget and these layers; with others, tune again, from here if you like.",
        "- Everything that the base release gets wrong or should not be used for holds here too.",
    ]
    if shape != "llava":
        lines.insert(
            1,
            "- Load it with `trust_remote_code=True`. In plain LLaVA classes the weights load, but every visual token "
            "is used there: with this processor's fewer placeholders, transformers then reports that image features "
            "and image tokens do not match.",
        )
    if run.reductions.shortv:
        lines.append("- Frozen layers need `attn_implementation` `sdpa` or `eager`.")
    return "## Limits\n\n" + "\n".join(lines)


def _licence(run: RunRecord) -> str:
    name = inline(_base(run)["name"])
    said = (
        f"The weights are derived from {name} and stand under its licence: {inline(run.licence)}."
        if run.licence
        else f"The weights are derived from {name}, whose card names no licence: ask its authors before you use them."
    )
    return f"## Licence\n\n{said} The code in this repository stands under Apache-2.0."
