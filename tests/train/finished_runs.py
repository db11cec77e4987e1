"""A finished run's folder, written without a step: its config, its checkpoint with a moved projector, a table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from shortzip.reduction.parsing import parse_budget
from shortzip.reduction.reductions import Reductions
from shortzip.train.finish import write_final
from shortzip.train.release.loading import load_release
from shortzip.train.release.opening import open_release, release_projector
from shortzip.train.settings.command_line import dump_config
from shortzip.train.settings.config import DataConfig, FastVConfig, ShortVConfig, TuneConfig, VisionZipConfig


def finish(folder: Path, model: Path, reductions: Reductions, **settings: Any) -> Path:
    """The folder of a run that tuned `model` with `reductions`."""
    release = open_release(str(model))
    config = TuneConfig(model=str(model), data=DataConfig("rows.json"), mixed_precision="no", output_dir=str(folder))
    config = replace(
        config,
        visionzip=VisionZipConfig.of(reductions.visionzip) if reductions.visionzip else None,
        shortv=ShortVConfig(layers=reductions.layers) if reductions.shortv else None,
        fastv=FastVConfig(**reductions.fastv) if reductions.fastv else None,
        positions=reductions.positions,
        **settings,
    )
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    _, processor = load_release(release, reductions)
    projector = {name: tensor + 0.05 for name, tensor in release_projector(release).items()}
    budgets = [parse_budget(str(budget)) for budget in config.budgets] or None
    shaping = config.shaping_settings()
    write_final(folder, release, projector, processor, reductions, shaping, lambda _: None, budgets)
    return folder


def with_setting(folder: Path, **keys: Any) -> None:
    """Replaces settings in the run's config.yaml, as another run's would."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **keys}))


def with_lineage(folder: Path, **keys: Any) -> None:
    """Replaces what the checkpoint says of the release it was tuned from."""
    path = folder / "final" / "lineage.json"
    *older, last = json.loads(path.read_text())
    path.write_text(json.dumps([*older, {**last, **keys}]))
