"""Converts a release: from LLaVA's own layout to transformers', and a projector back.

    python scripts/convert_release.py liuhaotian/llava-v1.5-7b -o llava-1.5-7b
    python scripts/convert_release.py vicuna-7b-v1.5 --mm-projector llava-v1.5-7b-pretrain -o llava-pretrained
    python scripts/convert_release.py checkpoints/RUN --to llava --base liuhaotian/llava-v1.5-7b -o llava-v1.5-7b-tuned

To transformers: shard by shard, every tensor bit for bit (memory: about one shard). To llava: mm_projector.bin and the
config.json that LLaVA's own code loads with --model-base BASE; the folder's name must contain "llava".
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from shortzip.data.errors import UserError
from shortzip.data.files import read_json
from shortzip.train.release.convert import convert_to_transformers, merged_config, refuse_adapter
from shortzip.train.release.hub import fetch
from shortzip.train.release.loading import load_processor
from shortzip.train.release.opening import find_projector_file, open_release, release_projector, resolve_tower
from shortzip.train.release.original_layout import is_original
from shortzip.train.release.writing import write_reduced_checkpoint
from shortzip.train.settings.command_line import Options, run_command, say

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def main(argv: Sequence[str]) -> None:
    parser = Options(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a Hub id: a release, a reduced checkpoint or a run's folder")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--to", choices=("transformers", "llava"), default="transformers", help="the layout to write")
    parser.add_argument("--revision", help="branch, tag or commit, for a Hub id")
    parser.add_argument("--mm-projector", metavar="FILE", help="a projector to use instead (mm_projector.bin)")
    parser.add_argument("--vision-tower", metavar="NAME", help="the tower, where the config does not find it")
    parser.add_argument("--dtype", choices=DTYPES, help="cast everything to it (default: as the release has it)")
    parser.add_argument("--base", help="with --to llava: the original release that LLaVA's code loads it over")
    given = parser.parse_args(argv)
    if given.to == "transformers":
        to_transformers(given)
    else:
        to_llava(given)


def to_transformers(given: argparse.Namespace) -> None:
    if given.base is not None:
        raise UserError(f"--base {given.base} is for --to llava: to transformers' layout everything is converted")
    source, _ = fetch(given.model, given.revision)
    projector = find_projector_file(given.mm_projector) if given.mm_projector else None
    refuse_adapter(source)
    config = read_json(source / "config.json")
    if not is_original(config) and projector is None:
        raise UserError(
            f"{given.model} is not in LLaVA's own layout (model_type {config.get('model_type')!r}): nothing to convert"
        )
    tower = resolve_tower(merged_config(source, projector), source, given.vision_tower)
    dtype = DTYPES[given.dtype] if given.dtype else None
    convert_to_transformers(source, given.output, tower=tower, projector=projector, dtype=dtype)
    say(f"written: {given.output} (use it as --model)")


def to_llava(given: argparse.Namespace) -> None:
    if given.dtype is not None:
        raise UserError("--dtype is for --to transformers: a projector is written in float32")
    release = open_release(
        given.model, given.revision, mm_projector=given.mm_projector, vision_tower=given.vision_tower
    )
    write_reduced_checkpoint(
        given.output,
        release,
        release_projector(release),
        load_processor(release),
        release.saved_reductions,
        shape="llava",
        base=given.base,
        vision_tower=given.vision_tower,
    )
    say(
        f"python -m llava.serve.cli --model-path {given.output} --model-base {given.base or 'BASE'} --image-file IMAGE"
    )


if __name__ == "__main__":
    run_command(main)
