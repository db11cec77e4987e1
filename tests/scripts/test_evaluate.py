"""scripts/evaluate_models.py: a run is evaluated as it was tuned, unless the command says otherwise."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shortzip.data.errors import FileInTheWay
from shortzip.reduction.reductions import Reductions
from shortzip.scripts.evaluate_models import (
    candidates_for,
    check_output,
    data_for,
    main,
    precision_for,
    read_arguments,
    runs_of,
)
from shortzip.train.run.run_folder import CONFIG
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import MENDABLE, dump_config
from shortzip.train.settings.config import DataConfig, TuneConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run in bf16 and 4 bits."""
    config = TuneConfig(model="m", data=DataConfig("d.json"), mixed_precision="bf16", load_in_4bit=True)
    (tmp_path / CONFIG).write_text(dump_config(config))
    return tmp_path


@pytest.mark.parametrize(
    ("options", "device", "expected"),
    [
        (["--model", "RUN"], CPU, (torch.bfloat16, True)),
        (["--model", "release", "--model", "RUN"], GPU, (torch.bfloat16, True)),
        (["--model", "RUN", "--mixed_precision", "no"], GPU, (torch.float32, True)),
        (["--model", "RUN", "--load_in_4bit", "false"], GPU, (torch.bfloat16, False)),
        (["--model", "release"], CPU, (torch.float32, False)),
        (["--model", "release"], GPU, (torch.bfloat16, False)),
        (["--model", "release", "--load_in_4bit", "true"], GPU, (torch.bfloat16, True)),
    ],
)
def test_a_run_is_evaluated_in_its_own_precision(
    run: Path, options: list[str], device: torch.device, expected: tuple[torch.dtype, bool]
) -> None:
    given = [str(run) if option == "RUN" else option for option in options]
    config = read_arguments([*given, "--data.instructions", "d.json"])
    assert precision_for(config, runs_of(config), device) == expected


def test_a_checkpoint_that_is_none_meets_a_message(tmp_path: Path) -> None:
    with pytest.raises(MENDABLE, match=r"config.json is missing: is .* the folder of a release"):
        main(["--model", str(tmp_path), "--data.instructions", "d.json"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--visionzip.dominant", "30", "--visionzip.contextual", "10"], r"30 \+ contextual 10 = 40 exceeds the 37"),
        (["--shortv.layers", "[9]"], r"layers \[9\] do not exist"),
        (["--visionzip.dominant", "7", "--visionzip.contextual", "0", "--visionzip.method", "pool"], "no grid"),
        (["--data.instructions", "nowhere.json"], "nowhere.json"),
        (["--data.image_root", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_evaluated_meets_a_message(
    tiny_release: Path, tiny_held_out: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    given = ["--model", str(tiny_release), "--data.instructions", str(tiny_held_out), "--output", str(tmp_path)]
    with pytest.raises(MENDABLE, match=f"{message}"):
        main([*given, *options])


def test_a_runs_own_conversations_are_taken_as_asked(tmp_path: Path) -> None:
    data = DataConfig(
        "d.json", eval_instructions="h.json", eval_image_root="there", eval_samples=9, on_bad_sample="skip"
    )
    (tmp_path / CONFIG).write_text(dump_config(TuneConfig(model="m", data=data)))

    def asked(*options: str) -> DataConfig:
        config = read_arguments(["--model", str(tmp_path), *options])
        return data_for(config, runs_of(config))

    assert asked() == data
    options = ("--data.samples", "3", "--data.image_root", "here", "--data.on_bad_sample", "raise")
    assert asked(*options) == replace(data, eval_samples=3, eval_image_root="here", on_bad_sample="raise")
    with pytest.raises(ConfigError, match="eval_samples is 0"):
        asked("--data.samples", "0")


def test_a_revision_is_refused_for_a_run(run: Path) -> None:
    config = read_arguments(["--model", str(run), "--revision", "main", "--data.instructions", "d.json"])
    with pytest.raises(ConfigError, match=r"revision 'main' is of a Hub id, and .* is a run: leave it out"):
        candidates_for(config, runs_of(config))


def test_reductions_are_refused_where_no_release_takes_them(tiny_release: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_release / "config.json").read_text())
    config |= {"model_type": "reduced_llava", "visionzip": {"dominant": 2, "contextual": 1}}
    saved = tmp_path / "saved"
    shutil.copytree(tiny_release, saved)
    (saved / "config.json").write_text(json.dumps(config))
    options = ["--visionzip.dominant", "4", "--visionzip.contextual", "1", "--data.instructions", "d.json"]
    with pytest.raises(ConfigError, match=r"saved: reduced checkpoints .* are evaluated as they were saved"):
        candidates_for(read_arguments(["--model", str(saved), *options]), {})
    both = candidates_for(read_arguments(["--model", str(saved), "--model", str(tiny_release), *options]), {})
    assert [row.reductions for row in both] == [None, Reductions(), Reductions.parse("4+1")]


def test_an_evaluation_replaces_neither_a_runs_nor_an_earlier_one(
    tiny_release: Path, tiny_held_out: Path, run: Path, tmp_path: Path
) -> None:
    given = ["--model", str(tiny_release), "--data.instructions", str(tiny_held_out), "--output"]
    with pytest.raises(FileInTheWay, match="is a run's folder, with an evaluation of its own: choose another one"):
        main([*given, str(run), "--overwrite"])
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "evaluation.json").write_text("kept")
    with pytest.raises(FileInTheWay, match=r"evaluation\.json exists already: give --overwrite to replace it"):
        main([*given, str(earlier)])
    assert [path.name for path in earlier.iterdir()] == ["evaluation.json"]
    check_output(earlier, overwrite=True)
    with pytest.raises(ConfigError, match="model m is given twice"):
        read_arguments(["--model", "m", "--model=m", "--data.instructions", "d.json"])
    assert read_arguments(["--model", 'a"b]\\', "--data.instructions", "d.json"]).model == ['a"b]\\']
