"""Writing a reduced checkpoint in one of four shapes: `full`, `projector`, `llava` or `engine`.

full       weights, config, processor and code: loads anywhere. The release's own tensors are copied bit for bit.
projector  the projector, config, processor and code; names the release it belongs to, which is fetched on loading
llava      `mm_projector.bin` and the config.json that LLaVA's own code loads over the original release
engine     as `full`, without what an engine that builds the model itself cannot do (`before_an_engine`)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from transformers.dynamic_module_utils import custom_object_save, get_relative_import_files

from shortzip.data.errors import UserError
from shortzip.data.files import read_text, written_whole
from shortzip.reduction.base_release import PROJECTOR_FILE, describe_files, fetch_base
from shortzip.reduction.configuration_pruning import PRUNING_METHODS, pruning_method
from shortzip.reduction.engines import name_model
from shortzip.reduction.errors import ReductionError
from shortzip.reduction.families import family_of
from shortzip.reduction.reductions import Reductions
from shortzip.reduction.selectors import BASELINES, SELECTORS, VISIONZIP
from shortzip.train.release.convert import ORIGINAL_CONFIG_FILE, write_llava_projector
from shortzip.train.release.foreign_code import leave_out_foreign_code
from shortzip.train.release.layouts import layout_for
from shortzip.train.release.opening import Release, model_classes, release_projector
from shortzip.train.release.tensor_files import (
    TensorSpec,
    open_tensors,
    read_specs,
    weight_files,
    write_index,
    write_safetensors,
)

Shape = Literal["full", "projector", "llava", "engine"]
LINEAGE_FILE = "lineage.json"
SHAPES: tuple[Shape, ...] = ("full", "projector", "llava", "engine")
# Those that hold the release's weights, and so need no name of it.
WHOLE: tuple[Shape, ...] = ("full", "engine")
# Of the code that travels, what transformers imports by name.
ENTRY_FILES = ("configuration_*.py", "modeling_*.py", "processing_*.py")
_MARK = "multi_modal_projector."


def write_reduced_checkpoint(
    target: Path,
    release: Release,
    projector: Mapping[str, torch.Tensor],
    processor: Any,
    reductions: Reductions,
    *,
    shape: Shape = "full",
    base: str | None = None,
    base_revision: str | None = None,
    vision_tower: str | None = None,
    budgets: Sequence[Mapping[str, int]] | None = None,
) -> None:
    """Writes `target` whole or not at all.

    `release`: what was tuned. `projector`: its tuned tensors, `linear_1.weight` … with or without a prefix; written in
    float32. `processor` and `reductions`: what it was tuned with. `base` and `base_revision`: for `projector`, a Hub
    id of the same release (its files are compared by digest before anything is loaded) when the run used a folder; for
    `llava`, the original release's name. `vision_tower`: for `llava`, the tower's name where the release does not tell
    it. `budgets`: those that the projector was tuned for, where they are several.

    Raises FileExistsError when `target` holds something, ValueError for an unknown shape or a projector that does not
    fit.
    """
    if shape not in SHAPES:
        raise UserError(f"shape is {shape!r}, known are {', '.join(SHAPES)}")
    if shape == "engine":
        reductions = reductions.before_an_engine
    tensors = {name.rsplit(_MARK, 1)[-1]: tensor.detach().cpu().float() for name, tensor in projector.items()}
    config_class, model_class, _ = model_classes(release.config["model_type"])
    plain = {key: value for key, value in release.config.items() if key not in ("auto_map", "quantization_config")}
    plain["model_type"] = config_class.model_type
    plain["budgets"] = None if budgets is None else [dict(budget) for budget in budgets]
    untuned = family_of(config_class.model_type).untuned_parts("projector")
    if untuned and shape != "full":  # the file is the whole projector, of whose parts some were not tuned
        tensors = {**{name: tensor.float() for name, tensor in release_projector(release).items()}, **tensors}
    descent = lineage(release, base, base_revision)
    if shape == "llava":
        original = release.original_config
        if original is None:
            layout = layout_for(config_class.model_type)
            original = layout.to_original(config_class.from_dict(plain), vision_tower, release.name)
        original = {key: value for key, value in original.items() if key != "auto_map"}
        original |= {**reductions.as_config(), "budgets": plain["budgets"], "lineage": descent}
        write_llava_projector(target, tensors, original, base=base or base_name(release))
        return
    weights = weights_folder(release)
    config = config_class.from_dict({**plain, **reductions.as_config()})
    config.architectures = [model_class.__name__]
    config.base_release = describe_base(release, base, base_revision) if shape == "projector" else None
    with torch.device("meta"):
        model = model_class(config)
    with written_whole(target) as folder:
        custom_object_save(model, folder, config=config)
        name_model(config, type(model.model))
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / LINEAGE_FILE).write_text(json.dumps(descent, indent=1) + "\n", encoding="utf-8")
        for name in ("generation_config.json", ORIGINAL_CONFIG_FILE):
            if (release.folder / name).is_file():
                shutil.copyfile(release.folder / name, folder / name)
        leave_out_extras(folder, reductions)
        leave_out_foreign_code(folder)
        if shape == "projector":
            save_file({f"{_MARK}{name}": tensor for name, tensor in tensors.items()}, folder / PROJECTOR_FILE)
        else:
            _copy_weights(weights, folder, tensors, untuned)


def leave_out_extras(folder: Path, reductions: Reductions) -> None:
    """Takes out the code of what a checkpoint does not use: lines of extras.py, and the files that nothing imports
    then."""
    prunes = None if reductions.fastv is None else PRUNING_METHODS[pruning_method(reductions.fastv)].module
    used = {"baselines": reductions.method in BASELINES, "pruning": prunes is not None}
    used["image_budgets"] = reductions.visionzip is not None and "per_image" in reductions.visionzip
    used |= {facts.module: facts.module == prunes for facts in PRUNING_METHODS.values()}
    for method, (name, _) in SELECTORS.items():
        used[name] = used.get(name, False) or method in (VISIONZIP, reductions.method)  # whose code others use
    unused = tuple(f"from .{name} import" for name in used if not used[name])
    code = folder / "extras.py"
    lines = code.read_text(encoding="utf-8").splitlines(keepends=True)
    code.write_text("".join(line for line in lines if not line.strip().startswith(unused)), encoding="utf-8")
    entries = [file for kind in ENTRY_FILES for file in folder.glob(kind)]
    needed = {*entries, *(Path(file) for entry in entries for file in get_relative_import_files(entry))}
    for file in set(folder.glob("*.py")) - needed:
        file.unlink()


def base_name(release: Release) -> str:
    """What to call a release so that it is found again: its Hub id, or its absolute folder."""
    if release.revision is not None:
        return release.name
    return str((release.folder if release.converted else release.source).resolve())


def lineage(release: Release, base: str | None = None, base_revision: str | None = None) -> list[dict[str, Any]]:
    """What a reduced checkpoint over `release` (on the Hub: `base`) descends from, the oldest first.

    Each with its name (of a folder, the last part alone: paths of this machine mean nothing elsewhere), its commit on
    the Hub if it has one, and its own reductions.
    """
    older = read_lineage(release.source)
    if release.original_config is not None and not older:
        older = _as_lineage(release.original_config.get("lineage", []), release.source / "config.json")
    name = release.name if release.revision is not None else Path(release.name).resolve().name
    entry = {"name": base or name, "revision": base_revision if base else release.revision}
    return [*older, {**entry, **release.saved_reductions.as_config()}]


def read_lineage(folder: Path) -> list[dict[str, Any]]:
    """The releases and checkpoints that a checkpoint descends from, the oldest first; none where it names none.

    Raises UserError for a file that is no such list: it comes with a release, from whoever made that.
    """
    path = folder / LINEAGE_FILE
    if not path.is_file():
        return []
    try:
        entries = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable as JSON: fetch or write the checkpoint again") from error
    return _as_lineage(entries, path)


def _as_lineage(entries: Any, path: Path) -> list[dict[str, Any]]:
    for entry in entries if isinstance(entries, list) else [entries]:
        named = isinstance(entry, dict) and isinstance(entry.get("name"), str) and "revision" in entry
        if not isinstance(entries, list) or not named or not isinstance(entry["revision"], str | None):
            words = repr(entry)[:80]
            raise UserError(f"{path}: the lineage must be a list of {{name, revision, …}}, and holds {words}")
        try:
            Reductions.from_config(entry)
        except ReductionError as error:
            raise UserError(f"{path}: lineage of {entry['name'][:80]!r}: {error}") from error
    return list(entries)


def weights_folder(release: Release) -> Path:
    """Where the release's weights are: in its folder, or where a projector-only checkpoint says."""
    base = release.config.get("base_release")
    return fetch_base(base, release.name) if base else release.folder


def describe_base(release: Release, base: str | None = None, base_revision: str | None = None) -> dict[str, Any]:
    """`base_release` of a projector-only checkpoint over `release`. Raises ValueError when its weights are no
    safetensors files."""
    inherited = release.config.get("base_release")
    if inherited:
        return inherited if base is None else {**inherited, "name": base, "revision": base_revision}
    files = weight_files(release.folder)
    if any(path.suffix != ".safetensors" for path in files):
        raise UserError(
            f"{release.name} has no safetensors files, which a projector-only checkpoint recognises it by: "
            "choose --shape full"
        )
    names = ["config.json", *(path.name for path in files)]
    if (release.folder / "model.safetensors.index.json").is_file():
        names.append("model.safetensors.index.json")
    return {
        "name": base or base_name(release),
        "revision": base_revision if base else release.revision,
        "files": describe_files(release.folder, names),
    }


def _copy_weights(source: Path, target: Path, projector: Mapping[str, torch.Tensor], untuned: tuple[str, ...]) -> None:
    """Copies weight files tensor by tensor, bit for bit, with another projector in its place; of its `untuned` parts
    what there is."""

    def tuned(key: str) -> bool:
        short = key.split(_MARK, 1)[-1]
        return _MARK in key and (short in projector or not short.startswith(tuple(f"{part}." for part in untuned)))

    weight_map: dict[str, str] = {}
    total = 0
    placed: set[str] = set()
    files = weight_files(source)
    for number, path in enumerate(files, start=1):
        single = len(files) == 1
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        specs = read_specs(path)
        for key in specs:
            if tuned(key):
                short = key.split(_MARK, 1)[1]
                if short not in projector or tuple(projector[short].shape) != specs[key].shape:
                    shape = tuple(projector[short].shape) if short in projector else "missing"
                    raise UserError(f"the projector's {short} is {shape}, needed by {source} is {specs[key].shape}")
                specs[key] = TensorSpec(specs[key].shape, torch.float32)
                placed.add(short)
        with open_tensors(path) as tensors:

            def produce(key: str, tensors: Mapping[str, torch.Tensor] = tensors) -> torch.Tensor:
                return projector[key.split(_MARK, 1)[1]] if tuned(key) else tensors[key]

            write_safetensors(target / name, specs, produce)
        weight_map.update(dict.fromkeys(specs, name))
        total += sum(spec.nbytes for spec in specs.values())
    if placed != set(projector):
        raise UserError(f"{source} has no place for the projector's {', '.join(sorted(set(projector) - placed))}")
    if len(files) > 1:
        write_index(target, weight_map, total)
