"""LLaVA's own layout → transformers, shard by shard, and back to an `mm_projector.bin`.

The converted release holds every tensor bit for bit in the release's own dtype. Names are those of the published
transformers releases (`language_model.model.…`), which every transformers version loads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from shortzip.data.errors import MissingFile, UserError
from shortzip.data.files import read_json, written_whole
from shortzip.reduction.flops import projector_input
from shortzip.reduction.weight_files import weight_names
from shortzip.train.release.conversion_plan import Plan, Tensors, check_dtypes, compare
from shortzip.train.release.layout_mini_gemini import original_mining
from shortzip.train.release.layouts import OriginalLayout, Parts, layout_of
from shortzip.train.release.original_layout import (
    PROJECTOR_KEYS,
    PROJECTOR_NAMES,
    build_generation_config,
    check_projector_widths,
    find_projector,
)
from shortzip.train.release.tensor_files import (
    TensorSpec,
    open_tensors,
    weight_files,
    write_index,
    write_safetensors,
)

ORIGINAL_CONFIG_FILE = "llava_config.json"
_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def convert_to_transformers(
    source: Path,
    target: Path,
    *,
    tower: Path,
    more_towers: Sequence[Path] = (),
    projector: Path | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the original release in `source` as a transformers release into `target`.

    `tower`: folder of the vision tower that the release names, `more_towers`: of the others that its layout names
    (`tower_names`). `projector`: an `mm_projector.bin` to use instead
    of the release's own; its folder's config.json supplies the `mm_*` keys when `source` is a plain Vicuna. `dtype`:
    cast everything to it; by default every part keeps its own.

    Peak memory: about the largest shard (memory-mapped) and one tensor. Nothing appears under `target` before the
    release is whole. Raises ValueError, FileNotFoundError or FileExistsError before writing for what does not fit.
    """
    config, where = merged_config(source, projector), str(source)
    layout = layout_of(config)
    layout.check(config, where)
    tensors = _release_tensors(source)
    language = {name: spec for name, spec in tensors.specs.items() if layout.is_language(name)}
    if _EMBEDDINGS[0] not in language:
        raise UserError(f"{where} holds no {_EMBEDDINGS[0]}: is this a LLaVA on {layout.language_model}?")
    vocabulary = layout.vocabulary(source, language[_EMBEDDINGS[0]].shape[0])
    language_dtype = dtype or check_dtypes(language, "language model", where)
    parts = Parts(config, where, tower, tuple(more_towers), layout.tower_config(tower), vocabulary, tensors, projector)
    new_config = layout.config(parts, language_dtype)
    plan = Plan(dtype)
    _plan_language(plan, language, tensors, layout, config, vocabulary.rows, where)
    _plan_projector(plan, tensors, projector, new_config, where)
    layout.plan_rest(plan, parts)

    fill_from = vocabulary.tokenizer.unk_token_id or 0
    with written_whole(target) as folder:
        _write_shards(folder, plan, {f"language_model.{name}" for name in _EMBEDDINGS}, fill_from)
        new_config.save_pretrained(folder)
        (folder / ORIGINAL_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        layout.processor(parts).save_pretrained(folder)
        build_generation_config(source, config, vocabulary).save_pretrained(folder)


def _release_tensors(source: Path) -> Tensors:
    """All that the release holds but what every transformers version computes for itself."""
    paths = weight_files(source)
    if not paths:
        raise MissingFile(f"{source} holds no weights (pytorch_model*.bin or model*.safetensors)")
    specs, origin = Tensors.of(paths)
    return Tensors({name: spec for name, spec in specs.items() if not name.endswith("rotary_emb.inv_freq")}, origin)


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
    if layout_of(config).tower_names(config):
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


def _plan_language(
    plan: Plan,
    language: Mapping[str, TensorSpec],
    tensors: Tensors,
    layout: OriginalLayout,
    config: Mapping[str, Any],
    rows: int,
    where: str,
) -> None:
    """`rows`: of the converted release's embeddings."""
    with torch.device("meta"):
        language_config = layout.language_config(config, language[_EMBEDDINGS[0]].shape[0])
        needed = dict(AutoModelForCausalLM.from_config(language_config).state_dict())
    if language_config.tie_word_embeddings:
        needed.pop("lm_head.weight")
        language = {name: spec for name, spec in language.items() if name != "lm_head.weight"}
    compare(language, needed, "language model", where)
    unexpected = sorted(set(language) - set(needed))
    if unexpected:
        raise UserError(f"{where} holds tensors that no {layout.language_model} has, such as {unexpected[0]}")
    for name, spec in language.items():
        shape = (rows, *spec.shape[1:]) if name in _EMBEDDINGS else spec.shape
        plan.take(tensors.origin[name], name, f"language_model.{name}", TensorSpec(shape, spec.dtype))


def _plan_projector(plan: Plan, tensors: Tensors, projector: Path | None, config: Any, where: str) -> None:
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


def _write_shards(folder: Path, plan: Plan, extended: set[str], fill_from: int) -> None:
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
    own keys. `target`'s name must hold "llava", or LLaVA's loader takes it for a language model: ValueError. Of a
    Mini-Gemini the mining is written beside its projector, as MGM's first stage does, under any name.
    """
    mining = original_mining(projector)
    if "llava" not in target.name.lower() and not mining:
        raise UserError(
            f"{target}: LLaVA's own loader recognises a LLaVA by its folder's name: let it contain 'llava'"
        )
    with written_whole(target) as folder:
        tensors = {
            f"model.mm_projector.{key}": projector[PROJECTOR_NAMES[key]].detach().cpu().clone()
            for key in PROJECTOR_KEYS
        }
        tensors |= {f"model.{name}": tensor.detach().cpu().clone() for name, tensor in mining.items()}
        torch.save(tensors, folder / "mm_projector.bin")
        config = {**original_config, "_name_or_path": base, "tune_mm_mlp_adapter": True}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
