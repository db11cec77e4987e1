"""A run and a checkpoint of before the packages had one name (tests/golden/earlier_run): both go on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from elsewhere import PROMPT, environment, logits_from_hub, picture
from forks import Forks
from hub_server import WRITER, Hub
from runs import ROOT
from safetensors.torch import load_file

from shortzip.scripts.evaluate_models import main as evaluate
from shortzip.scripts.publish import main as publish
from shortzip.train.release.loading import load_release
from shortzip.train.tune_projector import main as tune

OLDER = ROOT / "tests" / "golden" / "earlier_run"
BASE = "maker/tiny-llava"
LOAD = """
import sys, torch
from PIL import Image
from shortzip.train.release.loading import load_release
model, processor = load_release("user/tuned")
with torch.no_grad():
    inputs = processor(images=Image.open(sys.argv[1]), text=sys.argv[2], return_tensors="pt")
    torch.save(model(**inputs).logits, sys.argv[3])
"""


@pytest.fixture
def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the recorded folder, which is the working directory: the run's config names files relative to it."""
    folder = tmp_path / "older"
    shutil.copytree(OLDER, folder)
    monkeypatch.chdir(folder)
    return folder


def losses(path: Path) -> list[float]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_an_older_run_is_resumed_evaluated_and_published(older: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tune(["--config", "recipe.yaml", "--output_dir", "run", "--resume_from_checkpoint", "latest"])
    assert losses(older / "run" / "metrics.jsonl") == pytest.approx(losses(older / "run_to_the_end.jsonl"), rel=1e-5)
    torch.testing.assert_close(
        load_file(older / "run" / "step-000004" / "projector.safetensors"),
        load_file(older / "run_to_the_end.safetensors"),
    )
    evaluate(["--model", "run", "--data.instructions", "held_out/instructions.json", "--output", "evaluated"])
    assert {row["name"] for row in json.loads((older / "evaluated" / "evaluation.json").read_text())["rows"]} >= {
        "all tokens"
    }
    publish(["run", "--repo-id", "user/tuned", "--shape", "full", "--dry-run"])
    assert "modeling_reduced_llava.py" in capsys.readouterr().out


@pytest.mark.slow
def test_what_was_published_loads_with_shortzip_and_without(older: Path, tmp_path: Path) -> None:
    picture().save(tmp_path / "image.png")
    (tmp_path / "load.py").write_text(LOAD)
    arguments = [str(tmp_path / "image.png"), PROMPT, str(tmp_path / "logits.pt")]
    with Hub() as hub:
        hub.add(BASE, older / "release")
        hub.add("user/tuned", older / "published")
        there = logits_from_hub(hub, "user/tuned", tmp_path / "home", tmp_path / "work")
        with Forks(environment(hub, tmp_path / "home", WRITER)) as forks:
            run = forks.run(str(tmp_path / "load.py"), *arguments)
    assert run.returncode == 0, run.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), there)
    plain, processor = load_release(str(older / "release"))
    with torch.no_grad():
        untuned = plain(**processor(images=picture(), text=PROMPT, return_tensors="pt")).logits
    assert untuned.shape != there.shape, "the published checkpoint reads fewer visual tokens"
