"""Loading any release: a transformers LLaVA, LLaVA's own layout, a reduced checkpoint or a run's folder.

Whatever the user names becomes a folder in transformers' layout (`open_release`), from which the reduced model and its
processor are loaded (`load_release`). LLaVA's own layout is converted once into the Hugging Face cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

import shortzip.reduction.auto  # noqa: F401  # has transformers know the reduced models' types
from shortzip.data.errors import MissingFile, UserError
from shortzip.data.files import read_json
from shortzip.reduction.base_release import PROJECTOR_FILE
from shortzip.reduction.configuration_budgets import validate_budgets
from shortzip.reduction.configuration_reduced_llava import check_parts
from shortzip.reduction.errors import ReductionError
from shortzip.reduction.families import family_of
from shortzip.reduction.flops import projector_input
from shortzip.reduction.reductions import Reductions
from shortzip.train.release.content import content_of, folder_content
from shortzip.train.release.conversions import keep_conversion
from shortzip.train.release.convert import ORIGINAL_CONFIG_FILE, check_dtypes, merged_config, refuse_adapter
from shortzip.train.release.hub import fetch
from shortzip.train.release.layout_mini_gemini import mining_names
from shortzip.train.release.layouts import is_original, layout_of
from shortzip.train.release.original_layout import (
    PROJECTOR_NAMES,
    check_projector_widths,
    find_projector,
)
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.release.tensor_files import TensorSpec, folder_specs, open_tensors, read_specs, weight_files

MM_PROJECTOR_FILE = "mm_projector.bin"


@dataclass(frozen=True)
class Release:
    """A release on this machine."""

    spec: ReleaseSpec
    """Where it comes from, as the user gave it, and how it is loaded."""
    revision: str | None
    """The commit, for a Hub id."""
    source: Path
    """The folder it was found in, in whatever layout."""
    folder: Path
    """The same in transformers' layout: config.json, weights, processor."""
    projector: Path | None = None
    """A projector to lay over the weights of `folder`."""
    converted: bool = False
    """Whether `source` is LLaVA's own layout and `folder` its conversion."""

    @property
    def name(self) -> str:
        """As the user gave it: a folder or a Hub id."""
        return self.spec.name

    @property
    def config(self) -> dict[str, Any]:
        """transformers' config.json."""
        return read_json(self.folder / "config.json")

    @property
    def saved_reductions(self) -> Reductions:
        """What the release was saved with; none for one that knows no reductions."""
        path = self.source / "config.json"
        try:
            return Reductions.from_config(read_json(path))
        except ReductionError as error:
            raise UserError(f"{path}: {error}") from error

    @property
    def saved_budgets(self) -> list[dict[str, int]] | None:
        """The budgets that its projector was tuned for, where they are several."""
        path = self.source / "config.json"
        budgets = read_json(path).get("budgets")
        try:
            validate_budgets(budgets)
        except ReductionError as error:
            raise UserError(f"{path}: {error}") from error
        return budgets

    @property
    def original_config(self) -> dict[str, Any] | None:
        """LLaVA's own config.json, where the release has or had one."""
        config = read_json(self.source / "config.json")
        if is_original(config):
            return config
        path = self.folder / ORIGINAL_CONFIG_FILE
        return read_json(path) if path.is_file() else None


def resolve_towers(config: Mapping[str, Any], release: Path, tower: str | None = None) -> list[Path]:
    """The folders of an original release's vision towers: as its config names them, the first one `tower` if given.

    A relative name is looked for beside the release, in it and in the working directory before the Hub.
    """
    names = layout_of(config).tower_names(config)
    return [_find_tower(name, release) for name in ([tower, *names[1:]] if tower else names)]


def _find_tower(name: str, release: Path) -> Path:
    for folder in (release.resolve().parent / name, release / name, Path(name)):
        if (folder / "config.json").is_file():
            return folder
    try:
        return fetch(name)[0]
    except FileNotFoundError as error:
        raise MissingFile(
            f"the vision tower {name!r} that {release} names was not found: {error}. Give its folder with vision_tower"
        ) from error


def open_release(spec: str | ReleaseSpec, *, cache_dir: Path | None = None) -> Release:
    """Finds the release that `spec` names, fetches and converts it where needed, and checks that it is whole.

    `spec`: text is its name, with everything else as `ReleaseSpec` has it. `cache_dir`: where converted releases are
    kept (default: beside the Hugging Face cache).

    Only file headers are read. Raises FileNotFoundError or ValueError naming what was found, what is needed and the
    cure: a text-only language model, a projector of another width, a file cut short, mixed dtypes and so on.
    """
    if isinstance(spec, str):
        spec = ReleaseSpec(spec)
    source, commit = fetch(spec.name, spec.revision)
    if (source / "config.yaml").is_file():
        if not (source / "final" / "config.json").is_file():
            raise MissingFile(
                f"{spec.name} is the folder of a run that has not finished (no final/): continue it with "
                "--resume_from_checkpoint latest, or name the release it started from"
            )
        source = source / "final"
    projector = find_projector_file(spec.mm_projector) if spec.mm_projector else None
    refuse_adapter(source)
    config = read_json(source / "config.json")
    has_weights = bool(weight_files(source))
    if is_original(config) or (projector is not None and "text_config" not in config):
        if not has_weights and (source / MM_PROJECTOR_FILE).is_file():
            base = config.get("_name_or_path")
            if not base:
                raise UserError(
                    f"{spec.name} holds a projector only, and its config.json names no base (_name_or_path)"
                )
            laid = str(projector or source / MM_PROJECTOR_FILE)
            base_spec = replace(spec, name=_beside(source, str(base)), revision=None, mm_projector=laid)
            release = open_release(base_spec, cache_dir=cache_dir)
            return Release(spec, commit, source, release.folder, release.projector, release.converted)
        folder = _converted(source, projector, spec.vision_tower, cache_dir)
        return Release(spec, commit, source, folder, None, True)
    check_transformers_release(source, config, has_weights)
    release = Release(spec, commit, source, source, projector)
    if projector is not None:
        _check_overlay(projector, config, source)
    return release


def find_projector_file(name: str) -> Path:
    """The projector that a file or a folder names. Raises FileNotFoundError."""
    path = Path(name).expanduser()
    for candidate in (path, path / MM_PROJECTOR_FILE, path / PROJECTOR_FILE):
        if candidate.is_file():
            return candidate
    raise MissingFile(f"mm_projector {name}: no such file, and no folder with {MM_PROJECTOR_FILE}")


def _beside(source: Path, base: str) -> str:
    for folder in (source.resolve().parent / base, source / base):
        if (folder / "config.json").is_file():
            return str(folder)
    return base


def check_transformers_release(folder: Path, config: Mapping[str, Any], has_weights: bool) -> None:
    """Refuses what is no whole LLaVA in transformers' layout, from the headers of its files."""
    model_type = config.get("model_type")
    if "vision_config" not in config:
        raise UserError(
            f"{folder} is a text-only language model (model_type {model_type!r}): needed is a LLaVA with a vision "
            "tower and a projector, such as llava-hf/llava-1.5-7b-hf. With a projector from LLaVA's own pretraining, "
            "give it as mm_projector"
        )
    try:
        family = family_of(model_type, str(folder))
    except ReductionError as error:
        raise UserError(str(error)) from error
    check_parts(folder, config)
    if not has_weights:
        if (folder / PROJECTOR_FILE).is_file() and config.get("base_release"):
            return
        raise MissingFile(f"{folder} holds no weights (model*.safetensors): download the release again")
    specs = folder_specs(folder)
    try:
        family.refuse_weights(specs, str(folder))
    except ReductionError as error:
        raise UserError(str(error)) from error
    parts: dict[str, dict[str, TensorSpec]] = {"vision tower": {}, "projector": {}, "language model": {}}
    for name, spec in specs.items():
        part = (
            "vision tower"
            if any(f"{tower}." in name for tower in family.towers)
            else "projector"
            if "multi_modal_projector." in name
            else "language model"
        )
        parts[part][name] = spec
    shapes = {
        name.split("multi_modal_projector.", 1)[1]: spec.shape
        for name, spec in parts["projector"].items()
        if "multi_modal_projector." in name
    }
    if not {"linear_1.weight", "linear_2.weight"} <= shapes.keys():
        words = f"one with {', '.join(sorted(shapes))}" if shapes else "none"
        raise UserError(
            f"{folder}: needed is LLaVA's two-layer projector (multi_modal_projector.linear_1 and .linear_2), "
            f"found is {words}: take a LLaVA-1.5 or LLaVA-NeXT release"
        )
    check_projector_widths(shapes, *_widths(config, folder), str(folder))
    if config.get("quantization_config") is None:
        for part, tensors in parts.items():
            check_dtypes(tensors, part, str(folder))


@contextmanager
def understood(folder: Path) -> Iterator[None]:
    """Turns whatever transformers stumbles over in the files of a release into `UserError`, naming its folder."""
    try:
        yield
    except (UserError, ReductionError, OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise  # these say what to do
    except Exception as error:
        words = " ".join(str(error).split())[:300]
        raise UserError(
            f"{folder}: transformers cannot make sense of its config, tokenizer or image processor "
            f"({type(error).__name__}: {words}): download the release again, or mend that file"
        ) from error


def _widths(config: Mapping[str, Any], folder: Path) -> tuple[int, int]:
    """What the projector reads (the tower's width, times the layers it is taken from) and writes (the LLM's)."""
    config_class, _, _ = model_classes(config["model_type"])
    with understood(folder):
        full = config_class.from_dict({**config, "model_type": config_class.model_type})
    layers = full.vision_feature_layer
    depth = full.vision_config.num_hidden_layers
    for layer in layers if isinstance(layers, list) else [layers]:
        if not -depth - 1 <= layer <= depth:
            raise UserError(
                f"{folder}: vision_feature_layer in config.json is {layer}, and the vision tower has {depth} layers: "
                f"{-depth - 1} to {depth} are allowed"
            )
    return projector_input(full), full.text_config.hidden_size


def _check_overlay(projector: Path, config: Mapping[str, Any], folder: Path) -> None:
    shapes = {name: spec.shape for name, spec in _projector_specs(projector).items()}
    check_projector_widths(shapes, *_widths(config, folder), str(projector))


def _projector_specs(path: Path) -> dict[str, TensorSpec]:
    specs = read_specs(path)
    return {short: specs[name] for short, name in _projector_names(specs, path).items()}


def _projector_names(specs: Mapping[str, TensorSpec], path: Path) -> dict[str, str]:
    """`linear_1.weight` … → the names in a projector file of ours or of LLaVA's."""
    ours = {name.rsplit("multi_modal_projector.", 1)[-1]: name for name in specs}
    if {"linear_1.weight", "linear_2.weight"} <= ours.keys():
        return ours
    names = {PROJECTOR_NAMES[key]: name for key, name in find_projector(specs, str(path)).items()}
    return {**names, **mining_names(specs)}


def read_projector(path: Path) -> dict[str, torch.Tensor]:
    """The projector of a projector.safetensors or mm_projector.bin, as `linear_1.weight` …, in its own dtype."""
    names = _projector_names(read_specs(path), path)
    with open_tensors(path) as tensors:
        return {short: tensors[name].clone() for short, name in names.items()}


def read_release_projector(folder: Path) -> dict[str, torch.Tensor]:
    """The projector among the weights of a transformers release, as `linear_1.weight` …, in the dtype on disk."""
    projector: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        names = [name for name in read_specs(path) if "multi_modal_projector." in name]
        if names:
            with open_tensors(path) as tensors:
                projector.update({name.split("multi_modal_projector.", 1)[1]: tensors[name].clone() for name in names})
    return projector


def _converted(source: Path, projector: Path | None, vision_tower: str | None, cache_dir: Path | None) -> Path:
    """The conversion of an original release: from the cache, or made now by the first process that asks."""
    tower, *more = resolve_towers(merged_config(source, projector), source, vision_tower)
    cache = (cache_dir or Path(constants.HF_HOME) / "shortzip" / "converted").expanduser()
    return keep_conversion(source, cache, tower=tower, more_towers=more, projector=projector)


def model_classes(model_type: str) -> tuple[Any, Any, Any]:
    """Config, model and processor class of the reduced model for a release's model_type."""
    family = family_of(model_type)
    return family.config_class, family.model_class, family.processor_class


def release_projector(release: Release) -> dict[str, torch.Tensor]:
    """The projector that belongs to a release, as `linear_1.weight` …, in the dtype on disk: the one laid over it, or
    its own."""
    path = release.projector or release.folder / PROJECTOR_FILE
    return read_projector(path) if path.is_file() else read_release_projector(release.folder)


def release_content(release: Release) -> dict[str, dict[str, str]]:
    """The content of what loading a release reads: of its folder in transformers' layout, of the config that it was
    found with, and of the projector that is laid over it."""
    return {
        "release": folder_content(release.folder),
        "found with": content_of([release.source / "config.json"]),
        "projector": content_of([release.projector] if release.projector else []),
    }
