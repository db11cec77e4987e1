"""Converts a release: from LLaVA's own layout to transformers', and a projector back.

    shortzip convert liuhaotian/llava-v1.5-7b --output llava-1.5-7b
    shortzip convert vicuna-7b-v1.5 --mm_projector llava-v1.5-7b-pretrain --output llava-pretrained
    shortzip convert checkpoints/RUN --to llava --base liuhaotian/llava-v1.5-7b --output llava-v1.5-7b-tuned

To transformers: shard by shard, every tensor bit for bit (memory: about one shard). To llava: mm_projector.bin and the
config.json that LLaVA's own code loads with --model-base BASE; the folder's name must contain "llava".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shortzip.data.errors import UserError
from shortzip.data.files import read_json
from shortzip.train.release.convert import convert_to_transformers, merged_config, refuse_adapter
from shortzip.train.release.hub import fetch
from shortzip.train.release.layouts import is_original, layout_for
from shortzip.train.release.loading import load_processor
from shortzip.train.release.opening import find_projector_file, open_release, release_projector, resolve_towers
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.release.writing import write_reduced_checkpoint
from shortzip.train.settings.command_line import parse_config, run_command, say
from shortzip.train.settings.commands import ConvertConfig

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def main(argv: Sequence[str]) -> None:
    run(parse_config(ConvertConfig, argv, program="convert_release.py"))


def run(config: ConvertConfig) -> None:
    """Converts. Raises `UserError` for what cannot be."""
    if config.to == "transformers":
        to_transformers(config)
    else:
        to_llava(config)


def to_transformers(settings: ConvertConfig) -> None:
    if settings.base is not None:
        raise UserError(f"--base {settings.base} is for --to llava: to transformers' layout everything is converted")
    source, _ = fetch(settings.model, settings.revision)
    projector = find_projector_file(settings.mm_projector) if settings.mm_projector else None
    refuse_adapter(source)
    config = read_json(source / "config.json")
    if not is_original(config) and projector is None:
        raise UserError(
            f"{settings.model} is not in LLaVA's own layout (model_type {config.get('model_type')!r}): nothing to "
            "convert"
        )
    tower, *more = resolve_towers(merged_config(source, projector), source, settings.vision_tower)
    dtype = DTYPES[settings.dtype] if settings.dtype else None
    convert_to_transformers(source, settings.output, tower=tower, more_towers=more, projector=projector, dtype=dtype)
    say(f"written: {settings.output} (use it as --model)")


def to_llava(settings: ConvertConfig) -> None:
    if settings.dtype is not None:
        raise UserError("--dtype is for --to transformers: a projector is written in float32")
    spec = ReleaseSpec(
        settings.model, settings.revision, settings.mm_projector, settings.vision_tower, chat_template="release"
    )
    release = open_release(spec)
    write_reduced_checkpoint(
        settings.output,
        release,
        release_projector(release),
        load_processor(release),
        release.saved_reductions,
        shape="llava",
        base=settings.base,
        vision_tower=settings.vision_tower,
        budgets=release.saved_budgets,
    )
    module, file = layout_for(release.config["model_type"]).command
    say(f"python -m {module} --model-path {settings.output} --model-base {settings.base or 'BASE'} {file}")


if __name__ == "__main__":
    run_command(main)
