"""Mini-Gemini's own release layout: its config, the names of its two towers' and its mining's tensors.

Both towers lie in the release's shards, under names of CLIP and of timm's ConvNeXt. What no file of the release says
is CLIP's config: it is that of the tower's folder, which MGM names beside its working directory, or, by the shapes,
that of CLIP-L/14-336, which every release has. The ConvNeXt's sizes are read from its weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, ConvNextConfig, LlavaImageProcessorPil
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from shortzip.data.errors import MissingFile, UserError
from shortzip.data.files import read_json, written_whole
from shortzip.data.supervision import load_template
from shortzip.reduction.configuration_reduced_mini_gemini import ReducedMiniGeminiConfig, tiles_of
from shortzip.reduction.mini_gemini import MiniGeminiProjector, MiniGeminiTower
from shortzip.reduction.processing_reduced_mini_gemini import ReducedMiniGeminiProcessor
from shortzip.train.release.convert import (
    EMBEDDINGS,
    ORIGINAL_CONFIG_FILE,
    Plan,
    Tensors,
    check_dtypes,
    compare_shapes,
    merged_config,
    plan_language,
    plan_projector,
    release_tensors,
    write_shards,
)
from shortzip.train.release.original_layout import (
    Vocabulary,
    build_generation_config,
    check_original_config,
    read_vocabulary,
    text_config,
    tower_config,
)
from shortzip.train.release.tensor_files import TensorSpec, weight_files

CLIP_INSIDE = "model.vision_tower.vision_tower."
AUX_INSIDE = "model.vision_tower_aux."
AUX_FILE = "open_clip_pytorch_model.bin"
AUX_IN_FILE = "visual.trunk."  # of the ConvNeXt in open_clip's file, beside its head and a text tower
_MINING_KEYS = {"query": "query", "aux": "key", "val": "value"}
_AUX_NAMES = (
    (r"^stem\.0\.", "embeddings.patch_embeddings."),
    (r"^stem\.1\.", "embeddings.layernorm."),
    (r"^stages\.", "encoder.stages."),
    (r"\.downsample\.", ".downsampling_layer."),
    (r"\.blocks\.", ".layers."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.norm\.", ".layernorm."),
    (r"\.mlp\.fc(\d)\.", r".pwconv\1."),
    (r"\.gamma$", ".layer_scale_parameter"),
)


def is_mini_gemini(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is Mini-Gemini's own."""
    return "mm_vision_tower_aux" in config and "text_config" not in config


def mining_names(specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """`mining.query.0.weight` … → the names of the mining's tensors in an original file; any prefix is accepted."""
    names = {}
    for name in specs:
        match = re.search(r"vlm_uni_(query|aux|val)_projector\.(\d\.(?:weight|bias))$", name)
        if match:
            names[f"mining.{_MINING_KEYS[match[1]]}.{match[2]}"] = name
    return names


def original_mining_name(name: str) -> str:
    """`mining.query.0.weight` as MGM calls it: `vlm_uni_query_projector.0.weight`."""
    _, part, rest = name.split(".", 2)
    original = {ours: theirs for theirs, ours in _MINING_KEYS.items()}[part]
    return f"vlm_uni_{original}_projector.{rest}"


def convnext_names(specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """transformers' name of every ConvNeXt tensor → its name in a release's shards, or in open_clip's file."""
    names = {}
    for name in specs:
        if name.startswith(AUX_INSIDE):
            short = name.removeprefix(AUX_INSIDE).removeprefix("vision_")
        elif name.startswith(AUX_IN_FILE):
            short = name.removeprefix(AUX_IN_FILE)
        else:
            continue
        for pattern, new in _AUX_NAMES:
            short = re.sub(pattern, new, short)
        names[short] = name
    return names


def convnext_config(specs: Mapping[str, TensorSpec], where: str) -> ConvNextConfig:
    """The ConvNeXt's config, of its tensors under transformers' names.

    Raises:
        UserError: they are those of no ConvNeXt.
    """
    depths: dict[int, int] = {}
    for name in specs:
        if match := re.fullmatch(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.dwconv\.weight", name):
            depths[int(match[1])] = max(depths.get(int(match[1]), 0), int(match[2]) + 1)
    stem = "embeddings.patch_embeddings.weight"
    if stem not in specs or sorted(depths) != list(range(len(depths))):
        raise UserError(
            f"{where} holds no ConvNeXt ({AUX_INSIDE}* or {AUX_IN_FILE}*; found are {len(specs)} of its tensors): "
            "download the release again, or give the folder of its high-resolution tower"
        )
    widths = [specs[f"encoder.stages.{stage}.layers.0.dwconv.weight"].shape[0] for stage in sorted(depths)]
    return ConvNextConfig(
        patch_size=specs[stem].shape[-1],
        num_stages=len(widths),
        hidden_sizes=widths,
        depths=[depths[stage] for stage in sorted(depths)],
        hidden_act="gelu",
    )


def known_clip(specs: Mapping[str, TensorSpec]) -> CLIPVisionConfig | None:
    """The config of CLIP-L/14-336, if that is what a release's tower is by its shapes. None: it is another."""
    prefix = f"{CLIP_INSIDE}vision_model."
    large = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    shapes = {
        "embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        "embeddings.position_embedding.weight": (577, 1024),
        "encoder.layers.23.mlp.fc1.weight": (4096, 1024),
    }
    found = {name: specs[prefix + name].shape for name in shapes if prefix + name in specs}
    deeper = f"{prefix}encoder.layers.24.layer_norm1.weight" in specs
    return large if found == shapes and not deeper else None


def find_clip(config: Mapping[str, Any], release: Path, tower: str | None = None) -> Path | None:
    """CLIP's folder: `tower`, or what the release names, where that is on this machine. None: there is none.

    A name is looked for beside the release, in it and in the working directory: MGM's own are relative to that.
    """
    name = tower or str(config["mm_vision_tower"])
    for folder in (release.resolve().parent / name, release / name, Path(name)):
        if (folder / "config.json").is_file():
            return folder
    if tower is not None:
        raise MissingFile(f"vision_tower {tower}: no such folder with a config.json")
    return None


def convert_mini_gemini(
    source: Path,
    target: Path,
    *,
    tower: Path | None,
    projector: Path | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the original release in `source` as one of ShortZip's Mini-Gemini into `target`; see
    `convert_to_transformers`.

    `tower`: CLIP's folder, where there is one. Both towers are read from the release where it holds them, as all do
    that were saved by MGM's code, else from `tower` and from the folder of `mm_vision_tower_aux` beside it.
    """
    config, where = merged_config(source, projector), str(source)
    _check_config(config, where)
    tensors = release_tensors(source)
    language = {name: spec for name, spec in tensors.specs.items() if name not in _of_towers_and_projector(tensors)}
    if EMBEDDINGS[0] not in language:
        raise UserError(f"{where} holds no {EMBEDDINGS[0]}: is this a Mini-Gemini on Llama?")
    vocabulary = read_vocabulary(source, language[EMBEDDINGS[0]].shape[0])
    language_dtype = dtype or check_dtypes(language, "language model", where)
    clip, clip_names = _clip_tensors(tensors, tower, where)
    aux, aux_names = _convnext_tensors(tensors, tower, config, where)
    vision = tower_config(tower) if tower is not None else known_clip(tensors.specs)
    if vision is None:
        raise UserError(
            f"{where}: its CLIP is not CLIP-L/14-336, and {config['mm_vision_tower']}, whose config says what it is, "
            "was not found: give its folder with vision_tower"
        )
    convnext = convnext_config({short: aux.specs[name] for short, name in aux_names.items()}, where)
    new_config = _build_config(config, vision, convnext, vocabulary, language_dtype)
    plan = Plan(dtype)
    plan_language(plan, language, tensors, config, vocabulary.rows, where)
    plan_projector(plan, tensors, projector, new_config, where)
    _plan_mining(plan, tensors, projector, new_config, where)
    with torch.device("meta"):
        towers = MiniGeminiTower(new_config)
    _plan_part(plan, clip, clip_names, towers.clip, "clip", where)
    _plan_part(plan, aux, aux_names, towers.convnext, "convnext", where)

    fill_from = vocabulary.tokenizer.unk_token_id or 0
    with written_whole(target) as folder:
        write_shards(folder, plan, {f"language_model.{name}" for name in EMBEDDINGS}, fill_from)
        new_config.save_pretrained(folder)
        (folder / ORIGINAL_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _processor(config, tower, new_config, vocabulary).save_pretrained(folder)
        generation = build_generation_config(source, config, vocabulary)
        generation.eos_token_id = _ends(vocabulary, generation.eos_token_id)
        generation.save_pretrained(folder)


def _check_config(config: Mapping[str, Any], where: str) -> None:
    named = (config.get("architectures") or ["?"])[0]
    if "Llama" not in named:
        raise UserError(
            f"{where}: its language model is that of {named}, known are Mini-Geminis on Llama (7B, 13B, 8B, 34B): the "
            "2B is a Gemma and the 8x7B a Mixtral, which ShortZip does not reduce"
        )
    check_original_config({**config, "model_type": "llava_llama", "mm_vision_select_feature": "patch"}, where)
    if config.get("mm_vision_select_feature", "patch") != "patch":
        raise UserError(
            f"{where}: mm_vision_select_feature is {config['mm_vision_select_feature']!r}, needed is patch: CLS has "
            "no window to mine in"
        )
    if config.get("image_size_aux") is None:
        raise UserError(f"{where}: config.json lacks image_size_aux; sizes are never guessed")


def _of_towers_and_projector(tensors: Tensors) -> set[str]:
    marks = ("mm_projector.", "vlm_uni_", CLIP_INSIDE, AUX_INSIDE)
    return {name for name in tensors.specs if any(mark in name for mark in marks)}


def _clip_tensors(tensors: Tensors, tower: Path | None, where: str) -> tuple[Tensors, dict[str, str]]:
    """Where CLIP's tensors are, and transformers' names of them → those there."""
    prefix = f"{CLIP_INSIDE}vision_model."
    if not any(name.startswith(prefix) for name in tensors.specs):
        if tower is None:
            raise MissingFile(f"{where} holds no vision tower, nor was its folder found: give it with vision_tower")
        tensors, prefix = Tensors.of(weight_files(tower)), "vision_model."
    names = {
        name.removeprefix(prefix): name
        for name in tensors.specs
        if name.startswith(prefix) and not name.endswith("position_ids")
    }
    return tensors, names


def _convnext_tensors(
    tensors: Tensors, tower: Path | None, config: Mapping[str, Any], where: str
) -> tuple[Tensors, dict[str, str]]:
    """As `_clip_tensors`, of the ConvNeXt."""
    names = convnext_names(tensors.specs)
    if names or tower is None:
        return tensors, names
    file = tower.parent / Path(str(config["mm_vision_tower_aux"])).name / AUX_FILE
    if not file.is_file():
        raise MissingFile(f"{where} holds no high-resolution tower, and there is no {file}: put its folder there")
    tensors = Tensors.of([file])
    return tensors, convnext_names(tensors.specs)


def _build_config(
    config: Mapping[str, Any],
    vision: CLIPVisionConfig,
    convnext: ConvNextConfig,
    vocabulary: Vocabulary,
    dtype: torch.dtype,
) -> ReducedMiniGeminiConfig:
    result = ReducedMiniGeminiConfig(
        vision_config=vision,
        text_config=text_config(config, vocabulary.rows),
        aux_config=convnext,
        image_size_aux=config["image_size_aux"],
        image_grid=config.get("image_grid", 1),
        image_global=bool(config.get("image_global", False)),
        image_token_index=vocabulary.image_token_id,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        projector_hidden_act="gelu",
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default",
        dtype=dtype,
    )
    result.architectures = ["MiniGeminiForConditionalGeneration"]
    return result


def _plan_mining(plan: Plan, tensors: Tensors, projector: Path | None, config: Any, where: str) -> None:
    """The mining of the projector's own file, where that holds one, as those of MGM's first stage do."""
    own = Tensors.of([projector]) if projector is not None else tensors
    if projector is not None and mining_names(own.specs):
        tensors, where = own, str(projector)
    names = mining_names(tensors.specs)
    specs = {short: tensors.specs[name] for short, name in names.items()}
    with torch.device("meta"):
        needed = {f"mining.{name}": tensor for name, tensor in MiniGeminiProjector(config).mining.state_dict().items()}
    compare_shapes(specs, needed, "patch info mining (vlm_uni_*)", where)
    plan.check_dtypes(specs, "patch info mining", where)
    for short, name in names.items():
        plan.take(tensors.origin[name], name, f"multi_modal_projector.{short}", specs[short])


def _plan_part(
    plan: Plan, tensors: Tensors, names: Mapping[str, str], part: torch.nn.Module, under: str, where: str
) -> None:
    """A tower's tensors, all of them and no others, to `vision_tower.UNDER`."""
    needed = {name.removeprefix("vision_model."): tensor for name, tensor in part.state_dict().items()}
    specs = {short: tensors.specs[name] for short, name in names.items()}
    compare_shapes(specs, needed, f"{under} tower", where)
    plan.check_dtypes(specs, f"{under} tower", where)
    level = "vision_model." if under == "clip" else ""
    for short in needed:
        name = names[short]
        plan.take(tensors.origin[name], name, f"vision_tower.{under}.{level}{short}", specs[short])


def _processor(
    config: Mapping[str, Any], tower: Path | None, new_config: ReducedMiniGeminiConfig, vocabulary: Vocabulary
) -> ReducedMiniGeminiProcessor:
    """The processor: pads to a square, resizes to the high resolution (bicubic, Pillow), normalises as CLIP's."""
    path = None if tower is None else tower / "preprocessor_config.json"
    settings = read_json(path) if path is not None and path.is_file() else {}
    side: int = new_config.image_size_aux
    images = LlavaImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        resample=settings.get("resample", 3),
        image_mean=settings.get("image_mean", OPENAI_CLIP_MEAN),
        image_std=settings.get("image_std", OPENAI_CLIP_STD),
        do_pad=config.get("image_aspect_ratio") == "pad",
    )
    vision: Any = new_config.vision_config
    return ReducedMiniGeminiProcessor(
        images,
        vocabulary.tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        chat_template=load_template(template_of(vocabulary)),
        tiles=tiles_of(new_config),
        tile_patches=new_config.image_seq_length,
    )


def template_of(vocabulary: Vocabulary) -> str:
    """The chat template that a release was trained with, told by its vocabulary: each has another language model."""
    tokens = vocabulary.tokenizer.get_vocab()
    if "<|eot_id|>" in tokens:
        return "mgm_llama_3"
    return "mgm_chatml_direct" if "<|im_start|>" in tokens else "vicuna_v1"


def _ends(vocabulary: Vocabulary, ends: Any) -> Any:
    """What generation ends at: also the end of a turn, where that is not the end of the text."""
    tokens = vocabulary.tokenizer.get_vocab()
    turn = [tokens[end] for end in ("<|eot_id|>", "<|im_end|>") if end in tokens]
    known = list(ends) if isinstance(ends, list) else [ends]
    more = [token for token in turn if token not in known]
    return [*known, *more] if more else ends
