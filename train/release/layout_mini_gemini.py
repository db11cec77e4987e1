"""Mini-Gemini's own release layout: LLaVA's with a second tower, and the mining's tensors beside the projector's.

Both towers lie in the release's shards, under names of CLIP and of timm's ConvNeXt, whose sizes are read from its
weights; CLIP's config is in the folder that the release names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import ConvNextConfig, LlavaImageProcessorPil

from shortzip.data.errors import MissingFile, UserError
from shortzip.data.supervision import load_template
from shortzip.reduction.configuration_reduced_mini_gemini import ReducedMiniGeminiConfig, tiles_of
from shortzip.reduction.mini_gemini import MiniGeminiProjector, MiniGeminiTower
from shortzip.reduction.processing_reduced_mini_gemini import ReducedMiniGeminiProcessor
from shortzip.train.release.conversion_plan import Plan, Tensors, compare
from shortzip.train.release.layout_llava import LlavaLayout
from shortzip.train.release.layouts import Parts
from shortzip.train.release.original_layout import Vocabulary, check_original_config
from shortzip.train.release.tensor_files import TensorSpec, weight_files

AUX_INSIDE = "model.vision_tower_aux."
AUX_NAME = "model_zoo/OpenAI/openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup"
AUX_FILE = "open_clip_pytorch_model.bin"
AUX_IN_FILE = "visual.trunk."  # of the ConvNeXt in open_clip's file, beside its head and a text tower
_MINING_KEYS = {"query": "query", "aux": "key", "val": "value"}
_AUX_NAMES = (
    (r"^stem\.0\.", "embeddings.patch_embeddings."),
    (r"^stem\.1\.", "embeddings.layernorm."),
    (r"\.downsample\.", ".downsampling_layer."),
    (r"\.blocks\.", ".layers."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.norm\.", ".layernorm."),
    (r"\.mlp\.fc(\d)\.", r".pwconv\1."),
    (r"\.gamma$", ".layer_scale_parameter"),
)


def mining_names(specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """`mining.query.0.weight` … → the names of the mining's tensors in an original file; any prefix is accepted."""
    names = {}
    for name in specs:
        match = re.search(r"vlm_uni_(query|aux|val)_projector\.(\d\.(?:weight|bias))$", name)
        if match:
            names[f"mining.{_MINING_KEYS[match[1]]}.{match[2]}"] = name
    return names


def original_mining(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`mining.query.0.weight` … among a projector's tensors under MGM's names: `vlm_uni_query_projector.0.weight` …"""
    theirs = {ours: theirs for theirs, ours in _MINING_KEYS.items()}
    found = {}
    for name, tensor in tensors.items():
        if name.startswith("mining."):
            _, part, rest = name.split(".", 2)
            found[f"vlm_uni_{theirs[part]}_projector.{rest}"] = tensor
    return found


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
        if match := re.fullmatch(r"stages\.(\d+)\.layers\.(\d+)\.dwconv\.weight", name):
            depths[int(match[1])] = max(depths.get(int(match[1]), 0), int(match[2]) + 1)
    stem = "embeddings.patch_embeddings.weight"
    if stem not in specs or sorted(depths) != list(range(len(depths))):
        raise UserError(
            f"{where} holds no ConvNeXt ({AUX_INSIDE}* or {AUX_IN_FILE}*; found are {len(specs)} of its tensors): "
            "download the release again, or put the folder of its high-resolution tower beside that of its CLIP"
        )
    widths = [specs[f"stages.{stage}.layers.0.dwconv.weight"].shape[0] for stage in sorted(depths)]
    return ConvNextConfig(
        patch_size=specs[stem].shape[-1],
        num_stages=len(widths),
        hidden_sizes=widths,
        depths=[depths[stage] for stage in sorted(depths)],
        hidden_act="gelu",
    )


class MiniGeminiLayout(LlavaLayout):
    """As LLaVA-1.5's, with two towers in the release itself."""

    config_class = ReducedMiniGeminiConfig
    architecture = "MiniGeminiForConditionalGeneration"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return "mm_vision_tower_aux" in config

    def check(self, config: Mapping[str, Any], where: str) -> None:
        named = (config.get("architectures") or ["?"])[0]
        if "Llama" not in named:
            raise UserError(
                f"{where}: its language model is that of {named}, known are Mini-Geminis on Llama (7B, 13B, 8B, 34B): "
                "the 2B is a Gemma and the 8x7B a Mixtral, which ShortZip does not reduce"
            )
        check_original_config({**config, "model_type": "llava_llama"}, where)
        if config.get("mm_vision_select_feature", "patch") != "patch":
            raise UserError(
                f"{where}: mm_vision_select_feature is {config['mm_vision_select_feature']!r}, needed is patch: CLS "
                "has no window to mine in"
            )
        if config.get("image_size_aux") is None:
            raise UserError(f"{where}: config.json lacks image_size_aux; sizes are never guessed")

    def tower_names(self, config: Mapping[str, Any]) -> list[str]:
        """CLIP's: the ConvNeXt lies in the release, or beside CLIP. MGM's own names are of its working directory."""
        name = str(config["mm_vision_tower"])
        return [f"openai/{Path(name).name}" if name.startswith("model_zoo/") else name]

    def is_language(self, name: str) -> bool:
        return super().is_language(name) and "vlm_uni_" not in name and not name.startswith(AUX_INSIDE)

    def more_config(self, parts: Parts) -> dict[str, Any]:
        tensors, names = _convnext_tensors(parts)
        specs = {short: tensors.specs[name] for short, name in names.items()}
        return {
            "aux_config": convnext_config(specs, parts.where),
            "image_size_aux": parts.original["image_size_aux"],
            "image_grid": parts.original.get("image_grid", 1),
            "image_global": bool(parts.original.get("image_global", False)),
        }

    def build_processor(self, parts: Parts, pixels: dict[str, Any], arguments: dict[str, Any]) -> Any:
        config = self.config(parts, torch.float32)
        side: int = config.image_size_aux
        pixels = {**pixels, "size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        arguments = {**arguments, "chat_template": load_template(template_of(parts.vocabulary))}
        images = LlavaImageProcessorPil(**pixels, do_pad=parts.original.get("image_aspect_ratio") == "pad")
        return ReducedMiniGeminiProcessor(
            images, **arguments, tiles=tiles_of(config), tile_patches=config.image_seq_length
        )

    def plan_rest(self, plan: Plan, parts: Parts) -> None:
        """The mining, and the towers: those in the release, which holds them whether it trained them or not."""
        config = self.config(parts, torch.float32)
        with torch.device("meta"):
            towers, mining = MiniGeminiTower(config), MiniGeminiProjector(config).mining
        _plan_part(plan, *_mining_tensors(parts), mining, "patch info mining", "multi_modal_projector.mining.")
        clip = "vision_tower.clip.vision_model."
        _plan_part(plan, *_clip_tensors(parts), towers.clip, "vision tower", clip)
        _plan_part(plan, *_convnext_tensors(parts), towers.convnext, "high-resolution tower", "vision_tower.convnext.")

    def to_original(self, config: Any, vision_tower: str | None, where: str) -> dict[str, Any]:
        return {
            **super().to_original(config, vision_tower, where),
            "architectures": ["MGMLlamaForCausalLM"],
            "model_type": "mgm",
            "image_aspect_ratio": "pad",
            "mm_vision_tower_aux": AUX_NAME,
            "mm_hidden_size_aux": sum(config.aux_config.hidden_sizes),
            "image_size_aux": config.image_size_aux,
            "image_grid": config.image_grid,
            "image_global": config.image_global,
            "optimize_vision_tower": False,
            "optimize_vision_tower_aux": False,
        }


def _clip_tensors(parts: Parts) -> tuple[Tensors, dict[str, str]]:
    """Where CLIP's tensors are, and transformers' names of them → those there."""
    tensors, prefix = parts.tensors, f"{LlavaLayout.tower_inside}vision_model."
    if not any(name.startswith(prefix) for name in tensors.specs):
        paths = weight_files(parts.tower)
        if not paths:
            raise MissingFile(f"{parts.where} holds no vision tower, and {parts.tower} no weights of it")
        tensors, prefix = Tensors.of(paths), "vision_model."
    return tensors, {
        name.removeprefix(prefix): name
        for name in tensors.specs
        if name.startswith(prefix) and not name.endswith("position_ids")
    }


def _convnext_tensors(parts: Parts) -> tuple[Tensors, dict[str, str]]:
    """As `_clip_tensors`, of the ConvNeXt."""
    names = convnext_names(parts.tensors.specs)
    file = parts.tower.parent / Path(str(parts.original["mm_vision_tower_aux"])).name / AUX_FILE
    if names or not file.is_file():
        return parts.tensors, names
    tensors = Tensors.of([file])
    return tensors, convnext_names(tensors.specs)


def _mining_tensors(parts: Parts) -> tuple[Tensors, dict[str, str]]:
    """As `_clip_tensors`, of the mining: of the projector's own file where that holds one, as MGM's of stage 1 do."""
    for tensors in (*([Tensors.of([parts.projector])] if parts.projector else []), parts.tensors):
        if names := mining_names(tensors.specs):
            return tensors, {short.removeprefix("mining."): name for short, name in names.items()}
    return parts.tensors, {}


def _plan_part(
    plan: Plan, tensors: Tensors, names: Mapping[str, str], module: torch.nn.Module, part: str, prefix: str
) -> None:
    """Takes all tensors of a module, and no others. `names`: the module's own → those in `tensors`."""
    needed = {name.removeprefix("vision_model."): tensor for name, tensor in module.state_dict().items()}
    where = str(next(iter(tensors.origin.values())).parent)
    specs = {short: tensors.specs[name] for short, name in names.items()}
    compare(specs, needed, part, where)
    plan.check_dtypes(specs, part, where)
    for short in needed:
        plan.take(tensors.origin[names[short]], names[short], prefix + short, specs[short])


def template_of(vocabulary: Vocabulary) -> str:
    """The chat template that a release was trained with, told by its vocabulary: each has another language model."""
    tokens = vocabulary.tokenizer.get_vocab()
    if "<|eot_id|>" in tokens:
        return "mgm_llama_3"
    return "mgm_chatml_direct" if "<|im_start|>" in tokens else "vicuna_v1"


LAYOUT = MiniGeminiLayout()
