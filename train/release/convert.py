"""LLaVA's own layout → transformers, shard by shard, and back to an `mm_projector.bin`.

The converted release holds every tensor bit for bit in the release's own dtype. Names are those of the published
transformers releases (`language_model.model.…`), which every transformers version loads.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionModel, LlamaForCausalLM

import shortzip.data
from shortzip.data.errors import MissingFile, UserError
from shortzip.data.files import read_json, written_whole
from shortzip.reduction.flops import projector_input
from shortzip.reduction.weight_files import weight_names
from shortzip.train.release.original_layout import (
    PROJECTOR_KEYS,
    PROJECTOR_NAMES,
    build_config,
    build_generation_config,
    check_original_config,
    check_projector_widths,
    find_projector,
    original_processor,
    read_vocabulary,
    text_config,
    tower_config,
)
from shortzip.train.release.tensor_files import (
    TensorSpec,
    dtype_name,
    open_tensors,
    read_specs,
    weight_files,
    write_index,
    write_safetensors,
)

logger = logging.getLogger(__name__)

VICUNA_TEMPLATE = Path(shortzip.data.__file__).parent / "templates" / "vicuna_v1.jinja"
ORIGINAL_CONFIG_FILE = "llava_config.json"
_TOWER_INSIDE = "model.vision_tower.vision_tower."
_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def check_dtypes(specs: Mapping[str, TensorSpec], part: str, where: str) -> torch.dtype:
    """The one floating dtype of a part (language model, projector or vision tower).

    Raises ValueError naming the dtypes and an example of each when there are several.
    """
    names: dict[torch.dtype, list[str]] = {}
    for name, spec in specs.items():
        if spec.dtype.is_floating_point:
            names.setdefault(spec.dtype, []).append(name)
    if len(names) != 1:
        found = "; ".join(f"{len(few)} in {dtype_name(dtype)} (such as {few[0]})" for dtype, few in names.items())
        raise UserError(
            f"{where}: the {part}'s tensors have mixed dtypes: {found or 'none is floating point'}; needed is one. "
            "Choose it: scripts/convert_release.py --dtype float16"
        )
    return next(iter(names))


class _Plan:
    """Which tensor of the converted release comes from which file, and how."""

    def __init__(self) -> None:
        self.files: dict[Path, dict[str, str]] = {}
        self.specs: dict[str, TensorSpec] = {}

    def take(self, path: Path, source: str, target: str, spec: TensorSpec) -> None:
        self.files.setdefault(path, {})[target] = source
        self.specs[target] = spec


def _collect(paths: list[Path]) -> tuple[dict[str, TensorSpec], dict[str, Path]]:
    specs: dict[str, TensorSpec] = {}
    origin: dict[str, Path] = {}
    for path in paths:
        for name, spec in read_specs(path).items():
            specs[name], origin[name] = spec, path
    return specs, origin


def _compare(found: Mapping[str, TensorSpec], needed: Mapping[str, torch.Tensor], part: str, where: str) -> None:
    missing = sorted(set(needed) - set(found))
    if missing:
        raise UserError(
            f"{where}: the {part} lacks {len(missing)} tensors, such as {missing[0]}: download the release again"
        )
    for name, tensor in needed.items():
        if found[name].shape != tuple(tensor.shape):
            raise UserError(
                f"{where}: {name} is {found[name].shape}, needed by its config.json is {tuple(tensor.shape)}"
            )


def convert_to_transformers(
    source: Path,
    target: Path,
    *,
    tower: Path,
    projector: Path | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the original release in `source` as a transformers release into `target`.

    `tower`: folder of the CLIP vision tower that the release names. `projector`: an `mm_projector.bin` to use instead
    of the release's own; its folder's config.json supplies the `mm_*` keys when `source` is a plain Vicuna. `dtype`:
    cast everything to it; by default every part keeps its own.

    Peak memory: about the largest shard (memory-mapped) and one tensor. Nothing appears under `target` before the
    release is whole. Raises ValueError, FileNotFoundError or FileExistsError before writing for what does not fit.
    """
    config = merged_config(source, projector)
    where = str(source)
    check_original_config(config, where)
    paths = weight_files(source)
    if not paths:
        raise MissingFile(f"{where} holds no weights (pytorch_model*.bin or model*.safetensors)")
    specs, origin = _collect(paths)
    specs = {name: spec for name, spec in specs.items() if not name.endswith("rotary_emb.inv_freq")}

    language = {
        name: spec
        for name, spec in specs.items()
        if "mm_projector." not in name and not name.startswith(_TOWER_INSIDE) and name != "model.image_newline"
    }
    if _EMBEDDINGS[0] not in language:
        raise UserError(f"{where} holds no {_EMBEDDINGS[0]}: is this a LLaVA on Llama?")
    rows = language[_EMBEDDINGS[0]].shape[0]
    vocabulary = read_vocabulary(source, rows)
    language_dtype = dtype or check_dtypes(language, "language model", where)
    vision = tower_config(tower)
    new_config = build_config(config, vision, vocabulary, language_dtype, where)
    with torch.device("meta"):
        language_config = text_config(config, rows)
        needed_language = dict(LlamaForCausalLM(language_config).state_dict())
        needed_tower = {
            name.removeprefix("vision_model."): tensor for name, tensor in CLIPVisionModel(vision).state_dict().items()
        }
    if language_config.tie_word_embeddings:
        needed_language.pop("lm_head.weight")
        language.pop("lm_head.weight", None)
    _compare(language, needed_language, "language model", where)
    unexpected = sorted(set(language) - set(needed_language))
    if unexpected:
        raise UserError(f"{where} holds tensors that no Llama has, such as {unexpected[0]}")

    plan = _Plan()
    for name, spec in language.items():
        shape = (vocabulary.rows, *spec.shape[1:]) if name in _EMBEDDINGS else spec.shape
        plan.take(origin[name], name, f"language_model.{name}", TensorSpec(shape, dtype or spec.dtype))
    if isinstance(new_config.architectures, list) and "Next" in new_config.architectures[0]:
        if "model.image_newline" not in specs:
            raise UserError(f"{where}: image_aspect_ratio is anyres, but model.image_newline is missing")
        newline = specs["model.image_newline"]
        plan.take(
            origin["model.image_newline"],
            "model.image_newline",
            "image_newline",
            TensorSpec(newline.shape, dtype or newline.dtype),
        )
    _plan_projector(plan, specs, origin, projector, new_config, dtype, where)
    _plan_tower(plan, specs, origin, config, tower, needed_tower, dtype, where)

    fill_from = vocabulary.tokenizer.unk_token_id or 0
    with written_whole(target) as folder:
        _write_shards(folder, plan, {f"language_model.{name}" for name in _EMBEDDINGS}, fill_from)
        new_config.save_pretrained(folder)
        (folder / ORIGINAL_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        processor = original_processor(config, tower, vision, vocabulary, VICUNA_TEMPLATE.read_text(encoding="utf-8"))
        processor.save_pretrained(folder)
        build_generation_config(source, config, vocabulary).save_pretrained(folder)


def refuse_adapter(folder: Path) -> None:
    """Refuses the folder of a LoRA without weights of its own, saying what it is and what to do."""
    if not (folder / "adapter_config.json").is_file() or weight_names(folder):
        return
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "its base"
    alone = (
        f", or keep {base} as the model and take the LoRA's projector alone: mm_projector "
        f"{folder / 'non_lora_trainables.bin'}"
        if (folder / "non_lora_trainables.bin").is_file()
        else ""
    )
    raise UserError(
        f"{folder} is a LoRA over {base} (adapter_config.json), not a whole release: merge the two into one folder "
        "and give that (a LLaVA's with LLaVA's scripts/merge_lora_weights.py, others with PEFT's merge_and_unload)"
        f"{alone}"
    )


def merged_config(source: Path, projector: Path | None) -> dict[str, Any]:
    """The original config; for a plain Vicuna, with the `mm_*` keys from beside the projector."""
    refuse_adapter(source)
    config = read_json(source / "config.json")
    if "mm_vision_tower" in config:
        return config
    if projector is None:
        raise UserError(
            f"{source} is a text-only language model ({config.get('model_type')}, no mm_vision_tower in its "
            "config.json), needed is a LLaVA release. With a projector from LLaVA's pretraining, give its "
            "mm_projector.bin as well"
        )
    beside = read_json(projector.parent / "config.json")
    kept = {key: value for key, value in beside.items() if key.startswith("mm_") or key == "image_aspect_ratio"}
    return {**config, **kept, "model_type": beside.get("model_type", "llava_llama")}


def _plan_projector(
    plan: _Plan,
    specs: Mapping[str, TensorSpec],
    origin: Mapping[str, Path],
    projector: Path | None,
    config: Any,
    dtype: torch.dtype | None,
    where: str,
) -> None:
    if projector is not None:
        where, specs = str(projector), read_specs(projector)
    found = find_projector(specs, where)
    tensors = {PROJECTOR_NAMES[key]: specs[name] for key, name in found.items()}
    shapes = {name: spec.shape for name, spec in tensors.items()}
    check_projector_widths(shapes, projector_input(config), config.text_config.hidden_size, where)
    if dtype is None:
        check_dtypes(tensors, "projector", where)
    for key, name in found.items():
        spec = TensorSpec(specs[name].shape, dtype or specs[name].dtype)
        plan.take(projector or origin[name], name, f"multi_modal_projector.{PROJECTOR_NAMES[key]}", spec)


def _plan_tower(
    plan: _Plan,
    specs: Mapping[str, TensorSpec],
    origin: Mapping[str, Path],
    config: Mapping[str, Any],
    tower: Path,
    needed: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None,
    where: str,
) -> None:
    inside = {name for name in specs if name.startswith(_TOWER_INSIDE)}
    prefix = _TOWER_INSIDE
    if inside and not config.get("unfreeze_mm_vision_tower"):
        logger.warning(
            "%s holds a vision tower, but unfreeze_mm_vision_tower is not set: as LLaVA itself does, the tower of %s "
            "is used",
            where,
            tower,
        )
    if not (inside and config.get("unfreeze_mm_vision_tower")):
        paths = weight_files(tower)
        if not paths:
            raise MissingFile(f"{tower} holds no weights of the vision tower")
        specs, origin = _collect(paths)
        prefix, where = "", str(tower)
    found = {
        name.removeprefix(prefix).removeprefix("vision_model."): name
        for name in specs
        if name.startswith(f"{prefix}vision_model.") and not name.endswith("position_ids")
    }
    by_key = {key: specs[name] for key, name in found.items()}
    _compare(by_key, needed, "vision tower", where)
    if dtype is None:
        check_dtypes(by_key, "vision tower", where)
    for key in needed:
        name = found[key]
        spec = TensorSpec(specs[name].shape, dtype or specs[name].dtype)
        plan.take(origin[name], name, f"vision_tower.vision_model.{key}", spec)


def _write_shards(folder: Path, plan: _Plan, extended: set[str], fill_from: int) -> None:
    """One shard per source file. Rows beyond the release's repeat row `fill_from`.

    That is `<unk>`: an id the release never generates, so that no new id can win over the release's own.
    """
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(plan.files.items(), start=1):
        shard = f"model-{number:05d}-of-{len(plan.files):05d}.safetensors"
        specs = {name: plan.specs[name] for name in names}
        with open_tensors(path) as tensors:
            write_safetensors(folder / shard, specs, _producer(tensors, names, specs, extended, fill_from))
        weight_map.update(dict.fromkeys(names, shard))
    write_index(folder, weight_map, sum(spec.nbytes for spec in plan.specs.values()))


def _producer(
    tensors: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    specs: Mapping[str, TensorSpec],
    extended: set[str],
    fill_from: int,
) -> Callable[[str], list[torch.Tensor]]:
    def produce(name: str) -> list[torch.Tensor]:
        tensor = tensors[names[name]].to(specs[name].dtype)
        extra = specs[name].shape[0] - tensor.shape[0] if name in extended else 0
        return [tensor, tensor[fill_from].expand(extra, -1)] if extra else [tensor]

    return produce


def write_llava_projector(
    target: Path,
    projector: Mapping[str, torch.Tensor],
    original_config: Mapping[str, Any],
    *,
    base: str,
) -> None:
    """Writes `mm_projector.bin` and the config.json that LLaVA's own code loads over `base` (`--model-base`).

    `projector`: `linear_1.weight` … as in transformers; kept in its dtype. `original_config`: the config with LLaVA's
    own keys. `target`'s name must hold "llava", or LLaVA's loader takes it for a language model: ValueError.
    """
    if "llava" not in target.name.lower():
        raise UserError(
            f"{target}: LLaVA's own loader recognises a LLaVA by its folder's name: let it contain 'llava'"
        )
    with written_whole(target) as folder:
        tensors = {
            f"model.mm_projector.{key}": projector[PROJECTOR_NAMES[key]].detach().cpu().clone()
            for key in PROJECTOR_KEYS
        }
        torch.save(tensors, folder / "mm_projector.bin")
        config = {**original_config, "_name_or_path": base, "tune_mm_mlp_adapter": True}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
