"""The config's `budgets`: in every family, in what is published, in what is evaluated, and said of other budgets."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import finish
from mini_gemini_releases import copy_of_release
from runs import environment
from tiny import write_next_release
from tiny_onevision import write_onevision
from transformers.utils import logging as transformers_logging

from shortzip.data.errors import UserError
from shortzip.reduction import configuration_budgets
from shortzip.reduction.configuration_budgets import is_listed, other_budget
from shortzip.reduction.errors import ReductionError
from shortzip.reduction.reductions import Reductions
from shortzip.scripts.evaluate_models import candidates_for, read_arguments, runs_of
from shortzip.scripts.make_tiny_release import write_tiny_release
from shortzip.train.publish.push import prepare
from shortzip.train.release.loading import load_processor, load_release, reduced_config
from shortzip.train.release.opening import open_release, release_projector
from shortzip.train.release.writing import write_reduced_checkpoint
from shortzip.train.settings.checks import ConfigError

OWN = {"dominant": 4, "contextual": 2}
LISTED = [{"dominant": 2, "contextual": 1}, OWN, {"dominant": 8, "contextual": 4}]


@pytest.fixture(autouse=True)
def _said_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers says a warning once in a process."""
    logger = configuration_budgets.logger
    monkeypatch.setattr(logger, "warning_once", logger.warning, raising=False)
    transformers_logging.enable_propagation()
    yield  # type: ignore[misc]
    transformers_logging.disable_propagation()


@pytest.fixture(scope="module")
def run(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    own, words = Reductions(OWN, {"layers": [1]}), ["2+1", "4+2", "8+4"]
    return finish(folder, tiny_release, own, budgets=words, vision_tower="openai/clip")


def release_of(family: str, folder: Path, tiny_release: Path) -> Any:
    if family == "llava":
        return open_release(str(tiny_release))
    if family == "llava_next":
        return open_release(str(write_next_release(folder / "next")))
    if family == "llava_onevision":
        return open_release(str(write_onevision(folder / "onevision")))
    if family == "llava_next_video" or family.endswith("video_llava"):
        return open_release(str(write_tiny_release(folder / family, family)))
    return open_release(str(copy_of_release(folder)), cache_dir=folder / "cache")


@pytest.mark.parametrize(
    "family",
    [
        "llava",
        "llava_next",
        "llava_onevision",
        "mini_gemini",
        "llava_next_video",
        "video_llava",
        "temporal_video_llava",
    ],
)
def test_every_family_writes_and_reads_the_list(
    family: str, tiny_release: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    release, own = release_of(family, tmp_path, tiny_release), Reductions(OWN)
    written = tmp_path / "written"
    write_reduced_checkpoint(
        written, release, release_projector(release), load_processor(release, own), own, budgets=LISTED
    )
    saved = open_release(str(written))
    assert saved.saved_budgets == LISTED
    assert reduced_config(saved).budgets == LISTED
    assert (written / "configuration_budgets.py").is_file()
    again = reduced_config(saved)
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["budgets"] == LISTED
    assert "none of the budgets" not in caplog.text
    assert reduced_config(saved, own.with_budget(LISTED[2])).visionzip == LISTED[2]
    assert "none of the budgets" not in caplog.text
    reduced_config(saved, own.with_budget({"dominant": 3, "contextual": 2}))
    assert "visionzip: 3+2 is none of the budgets that this projector was tuned for: 2+1, 4+2, 8+4" in caplog.text


@pytest.mark.parametrize(
    ("budgets", "words"),
    [
        ([OWN], r"a list of two or more .*; got \[\{"),
        ("4+2", "got '4\\+2'"),
        ([OWN, {"dominant": 3}], r"got \{'dominant': 3\}"),
        ([OWN, {**OWN, "method": "scope"}], "got {'dominant': 4, 'contextual': 2, 'method'"),
        ([OWN, {"dominant": 0, "contextual": 4}], "got dominant: 0"),
        ([OWN, {"dominant": 3, "contextual": True}], "got contextual: True"),
        ([OWN, {"dominant": 3, "contextual": 3}], "got 6 tokens 2 times"),
        ([OWN, {"dominant": 30, "contextual": 8}], "dominant 30 .* = 38 exceeds the 37 tokens .*: the sum must be 1"),
    ],
)
def test_lists_that_no_projector_was_tuned_for_are_refused(tiny_release: Path, budgets: Any, words: str) -> None:
    config = reduced_config(open_release(str(tiny_release)), Reductions(OWN))
    with pytest.raises(ReductionError, match=words):
        type(config)(**{**config.to_dict(), "budgets": budgets})


def test_a_damaged_list_is_named(run: Path, tmp_path: Path) -> None:
    config = json.loads((run / "final" / "config.json").read_text())
    folder = tmp_path / "run"
    folder.mkdir()
    for path in (run / "final").iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "budgets": [1]}))
    with pytest.raises(ReductionError, match="budgets must be null or a list of two or more"):
        open_release(str(folder))
    file = shutil.copytree(run / "final", tmp_path / "llava") / "config.json"
    release = replace(open_release(str(run)), source=file.parent)  # LLaVA's own layout, which no config class reads
    file.write_text(json.dumps({**config, "budgets": [1]}))
    with pytest.raises(UserError, match=r"config\.json: budgets must be null or a list"):
        _ = release.saved_budgets


def test_what_is_tuned_anew_for_one_budget_names_none(run: Path, tmp_path: Path) -> None:
    again = finish(tmp_path / "again", run / "final", Reductions(OWN))
    assert open_release(str(again)).saved_budgets is None


@pytest.mark.parametrize("shape", ["full", "projector", "llava", "engine"])
def test_it_is_published_in_every_shape(run: Path, shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shortzip.train.publish.push._same_on_hub", lambda *_: "5" * 40)
    base = None if shape in ("full", "engine") else "maker/llava"
    with prepare(run, "user/llava-tuned", shape, base=base, say=lambda _: None) as publication:
        config, card = json.loads(publication.files["config.json"].read_text()), publication.card
    assert config["budgets"] == LISTED
    assert "tuned for the budgets 2+1, 4+2, 8+4, of which each step had one" in card
    assert "The projector fits these budgets" in card
    if shape != "llava":
        assert "`visionzip={'dominant': 2, 'contextual': 1}`, given to both `from_pretrained`" in card
    assert "--budgets '[2+1, 4+2, 8+4]'" in card


def test_evaluation_takes_any_budget(run: Path, tiny_held_out: Path) -> None:
    def asked(*arguments: str, model: Path = run / "final") -> list[tuple[str, Any]]:
        given = ["--model", str(model), "--instructions", str(tiny_held_out), *arguments]
        settings = read_arguments(given)
        return [(row.name, row.reductions) for row in candidates_for(settings, runs_of(settings))]

    final = str(run / "final")
    assert asked() == [(final, None)]
    under = Reductions({"dominant": 8, "contextual": 4}, {"layers": [1]})
    assert asked("--budget", "8+4") == [(f"{final}, 8+4", under)]
    names = [name for name, _ in asked("--budget", "8+4", model=run)]
    assert names[:3] == ["all tokens", "reduced, untuned", "reduced + tuned"]
    assert names[3:] == ["2+1, untuned", "2+1, tuned", "8+4, untuned", "8+4, tuned"]
    assert asked("--budget", "3+1", model=run)[-1] == (
        "3+1, tuned",
        under.with_budget({"dominant": 3, "contextual": 1}),
    )
    with pytest.raises(ConfigError, match="evaluated as they were saved"):
        asked("--budget", "8+4", "--freeze", "[1]")
    with pytest.raises(ConfigError, match="evaluated as they were saved"):
        asked("--budget", "8+0", "--method", "scope")


def test_a_budget_is_loaded_as_if_it_were_the_own(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = torch.rand(2, 3, 24, 24)
    for budget in (*LISTED, {"dominant": 5, "contextual": 1}):
        model, processor = load_release(str(run), Reductions(budget))
        assert len(model.model.get_image_features(pixel_values=images).pooler_output[0]) == sum(budget.values())
        assert processor.visionzip == budget
        assert is_listed(budget, LISTED) is (other_budget(budget, LISTED) not in caplog.text)


_LOAD = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
sys.path = [path for path in sys.path if "__editable__" not in path]
import importlib.util
assert not [name for name in ("shortzip", "reduction") if importlib.util.find_spec(name)]
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
for dominant, contextual in ((4, 2), (8, 4), (5, 1)):
    key = {"dominant": dominant, "contextual": contextual}
    model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True, visionzip=key)
    AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True, visionzip=key)
    features = model.model.get_image_features(pixel_values=torch.rand(1, 3, 24, 24)).pooler_output
    print(len(features[0]), [(budget["dominant"], budget["contextual"]) for budget in model.config.budgets])
"""


@pytest.mark.slow
def test_what_is_published_loads_without_shortzip(run: Path, tmp_path: Path) -> None:
    variables = {**environment(), "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-P", "-c", _LOAD, str(run / "final")]
    found = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == [f"{count} [(2, 1), (4, 2), (8, 4)]" for count in (6, 12, 6)]
    assert found.stderr.count("none of the budgets that this projector was tuned for") == 1
