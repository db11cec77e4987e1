"""LLaVA's own layout → transformers, shard by shard, and back to an `mm_projector.bin`.

The converted release holds every tensor bit for bit in the release's own dtype. Names are those of the published
transformers releases (`language_model.model.…`), which every transformers version loads.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM

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
_NEWLINE = "model.image_newline"
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def check_dtypes(specs: Mapping[str, TensorSpec], part: str, where: str) -> torch.dtype:
    """The one floating dtype of a part (language model, projector or vision tower).

    Raises ValueError naming the dtypes and an example of each when there are several.
    """
    names: dict[torch.dtype, list[str]] = {}
    for name, spec in specs.items():
        if spec.dtype.is_floating_point:
            names.setdefault(spec.dtype, []).append(name)
    if len(names) != 1:
        mix = "; ".join(f"{len(few)} in {dtype_name(dtype)} (such as {few[0]})" for dtype, few in names.items())
        raise UserError(
            f"{where}: the {part}'s tensors have mixed dtypes: {mix or 'none is floating point'}; needed is one. "
            "Choose it: scripts/convert_release.py --dtype float16"
        )
    return next(iter(names))


class Tensors(NamedTuple):
    """The tensors of a folder: what each is, and the file that it is in."""

    specs: dict[str, TensorSpec]
    origin: dict[str, Path]

    @classmethod
    def of(cls, paths: list[Path]) -> Tensors:
        tensors = cls({}, {})
        for path in paths:
            specs = read_specs(path)
            tensors.specs.update(specs)
            tensors.origin.update(dict.fromkeys(specs, path))
        return tensors


class Plan:
    """Which tensor of the converted release comes from which file, and how. `dtype`: of all; None: each its own."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.files: dict[Path, dict[str, str]] = {}
        self.specs: dict[str, TensorSpec] = {}

    def take(self, path: Path, source: str, target: str, spec: TensorSpec) -> None:
        self.files.setdefault(path, {})[target] = source
        self.specs[target] = TensorSpec(spec.shape, self.dtype or spec.dtype)

    def check_dtypes(self, specs: Mapping[str, TensorSpec], part: str, where: str) -> None:
        if self.dtype is None:
            check_dtypes(specs, part, where)


def compare_shapes(specs: Mapping[str, TensorSpec], needed: Mapping[str, torch.Tensor], part: str, where: str) -> None:
    missing = sorted(set(needed) - set(specs))
    if missing:
        raise UserError(
            f"{where}: the {part} lacks {len(missing)} tensors, such as {missing[0]}: download the release again"
        )
    for name, tensor in needed.items():
        if specs[name].shape != tuple(tensor.shape):
            raise UserError(
                f"{where}: {name} is {specs[name].shape}, needed by its config.json is {tuple(tensor.shape)}"
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
    config, where = merged_config(source, projector), str(source)
    check_original_config(config, where)
    tensors = release_tensors(source)
    language = _language_specs(tensors.specs, where)
    vocabulary = read_vocabulary(source, language[EMBEDDINGS[0]].shape[0])
    language_dtype = dtype or check_dtypes(language, "language model", where)
    vision = tower_config(tower)
    new_config = build_config(config, vision, vocabulary, language_dtype, where)
    plan = Plan(dtype)
    plan_language(plan, language, tensors, config, vocabulary.rows, where)
    if isinstance(new_config.architectures, list) and "Next" in new_config.architectures[0]:
        _plan_newline(plan, tensors, where)
    plan_projector(plan, tensors, projector, new_config, where)
    _plan_tower(plan, tensors, config, tower, vision, where)

    fill_from = vocabulary.tokenizer.unk_token_id or 0
    with written_whole(target) as folder:
        write_shards(folder, plan, {f"language_model.{name}" for name in EMBEDDINGS}, fill_from)
        new_config.save_pretrained(folder)
        (folder / ORIGINAL_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        processor = original_processor(config, tower, vision, vocabulary, VICUNA_TEMPLATE.read_text(encoding="utf-8"))
        processor.save_pretrained(folder)
        build_generation_config(source, config, vocabulary).save_pretrained(folder)


def release_tensors(source: Path) -> Tensors:
    """All that the release holds but what every transformers version computes for itself."""
    paths = weight_files(source)
    if not paths:
        raise MissingFile(f"{source} holds no weights (pytorch_model*.bin or model*.safetensors)")
    specs, origin = Tensors.of(paths)
    return Tensors({name: spec for name, spec in specs.items() if not name.endswith("rotary_emb.inv_freq")}, origin)


def _language_specs(specs: Mapping[str, TensorSpec], where: str) -> dict[str, TensorSpec]:
    language = {
        name: spec
        for name, spec in specs.items()
        if "mm_projector." not in name and not name.startswith(_TOWER_INSIDE) and name != _NEWLINE
    }
    if EMBEDDINGS[0] not in language:
        raise UserError(f"{where} holds no {EMBEDDINGS[0]}: is this a LLaVA on Llama?")
    return language


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
    multimodal = {key: value for key, value in beside.items() if key.startswith(("mm_", "image_"))}
    return {**config, **multimodal, "model_type": beside.get("model_type", "llava_llama")}


def plan_language(
    plan: Plan,
    language: Mapping[str, TensorSpec],
    tensors: Tensors,
    config: Mapping[str, Any],
    rows: int,
    where: str,
) -> None:
    """`rows`: of the converted release's embeddings."""
    with torch.device("meta"):
        language_config = text_config(config, language[EMBEDDINGS[0]].shape[0])
        needed = dict(LlamaForCausalLM(language_config).state_dict())
    if language_config.tie_word_embeddings:
        needed.pop("lm_head.weight")
        language = {name: spec for name, spec in language.items() if name != "lm_head.weight"}
    compare_shapes(language, needed, "language model", where)
    unexpected = sorted(set(language) - set(needed))
    if unexpected:
        raise UserError(f"{where} holds tensors that no Llama has, such as {unexpected[0]}")
    for name, spec in language.items():
        shape = (rows, *spec.shape[1:]) if name in EMBEDDINGS else spec.shape
        plan.take(tensors.origin[name], name, f"language_model.{name}", TensorSpec(shape, spec.dtype))


def _plan_newline(plan: Plan, tensors: Tensors, where: str) -> None:
    if _NEWLINE not in tensors.specs:
        raise UserError(f"{where}: image_aspect_ratio is anyres, but {_NEWLINE} is missing")
    plan.take(tensors.origin[_NEWLINE], _NEWLINE, "image_newline", tensors.specs[_NEWLINE])


def plan_projector(plan: Plan, tensors: Tensors, projector: Path | None, config: Any, where: str) -> None:
    """`config`: the converted release's."""
    if projector is not None:
        where, tensors = str(projector), Tensors.of([projector])
    names = find_projector(tensors.specs, where)
    specs = {PROJECTOR_NAMES[key]: tensors.specs[name] for key, name in names.items()}
    shapes = {name: spec.shape for name, spec in specs.items()}
    check_projector_widths(shapes, projector_input(config), config.text_config.hidden_size, where)
    plan.check_dtypes(specs, "projector", where)
    for key, name in names.items():
        short = PROJECTOR_NAMES[key]
        plan.take(tensors.origin[name], name, f"multi_modal_projector.{short}", specs[short])


def _plan_tower(
    plan: Plan, tensors: Tensors, config: Mapping[str, Any], tower: Path, vision: CLIPVisionConfig, where: str
) -> None:
    """The tower inside the release where LLaVA's `config` says that it was trained, else the one in `tower`."""
    is_inside = any(name.startswith(_TOWER_INSIDE) for name in tensors.specs)
    is_trained = bool(config.get("unfreeze_mm_vision_tower"))
    prefix = _TOWER_INSIDE
    if is_inside and not is_trained:
        logger.warning(
            "%s holds a vision tower, but unfreeze_mm_vision_tower is not set: as LLaVA itself does, the tower of %s "
            "is used",
            where,
            tower,
        )
    if not (is_inside and is_trained):
        paths = weight_files(tower)
        if not paths:
            raise MissingFile(f"{tower} holds no weights of the vision tower")
        tensors, prefix, where = Tensors.of(paths), "", str(tower)
    names = {
        name.removeprefix(prefix).removeprefix("vision_model."): name
        for name in tensors.specs
        if name.startswith(f"{prefix}vision_model.") and not name.endswith("position_ids")
    }
    specs = {key: tensors.specs[name] for key, name in names.items()}
    with torch.device("meta"):
        model = CLIPVisionModel(vision)
    needed = {name.removeprefix("vision_model."): tensor for name, tensor in model.state_dict().items()}
    compare_shapes(specs, needed, "vision tower", where)
    plan.check_dtypes(specs, "vision tower", where)
    for key in needed:
        plan.take(tensors.origin[names[key]], names[key], f"vision_tower.vision_model.{key}", specs[key])


def write_shards(folder: Path, plan: Plan, extended: set[str], fill_from: int) -> None:
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
