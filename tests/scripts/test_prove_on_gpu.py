"""The proof on a GPU, tried where there is none: with small shapes on the CPU, and without what it can do without."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from shortzip.scripts.proofs.command import prove, run_all, sections
from shortzip.scripts.proofs.report import as_json, as_markdown
from shortzip.scripts.proofs.section import Proof, Result, Section, Settings, Skipped, apart, run_section

SCRIPT = Path(__file__).parents[2] / "scripts" / "prove_on_gpu.py"
# What a machine with torch and transformers lacks; and no install of ShortZip.
BLOCKED = """
import runpy, sys
for name in ("datasets", "deepspeed", "wandb", "jsonargparse", "matplotlib", "peft", "bitsandbytes", "remotezip"):
    sys.modules[name] = None
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder)]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def settings_in(folder: Path) -> Settings:
    return Settings("cpu", tiny=True, memory_limit=1 << 30, folder=folder)


def run_elsewhere(folder: Path, *arguments: str) -> dict[str, dict]:
    """The sections of the script's report, by name; it is run as from a clone, in another folder."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(SCRIPT), "--device", "cpu", "--shapes", "tiny", "--seconds", "3000",
         "--output", str(folder / "proof"), *arguments],
        cwd=folder, capture_output=True, text=True, timeout=3100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "## Proven on a device" in (folder / "proof" / "proof.md").read_text()
    report = json.loads((folder / "proof" / "proof.json").read_text())
    return {section["name"]: section for section in report["sections"]}


@pytest.mark.slow
def test_the_step_is_proven_from_a_clone_with_little_more_than_torch_and_transformers(tmp_path: Path) -> None:
    """The cheapest sections, which import what all others do."""
    found = run_elsewhere(tmp_path, "--sections", "device,step-7b,4bit")
    outcomes = {name: section["outcome"] for name, section in found.items()}
    assert outcomes == {"device": "passed", "step-7b": "passed", "4bit": "skipped"}
    assert found["4bit"]["reason"] == "bitsandbytes is not installed"
    (step,) = (value for name, value in found["step-7b"]["figures"].items() if name.startswith("step_"))
    assert step["samples_per_second"] > 0
    assert step["flops"] > 0
    assert 0 < step["estimated_tensor_bytes"] < 1 << 30
    (table,) = found["step-7b"]["tables"]
    assert table["rows"][0][-1].endswith("minutes")
    assert all(len(row) == len(table["headings"]) for row in table["rows"])


@pytest.mark.slow
def test_every_section_holds_on_the_cpu(tmp_path: Path) -> None:
    found = run_elsewhere(tmp_path)
    assert set(found) == {section.name for section in sections()}
    skipped = {name for name, section in found.items() if section["outcome"] == "skipped"}
    assert skipped == {"4bit", "compiled"}
    assert found["resume"]["figures"]["resumed_bit_for_bit"] is True


def fine(proof: Proof) -> None:
    proof.check("one", True, "detail")
    with proof.part("two"):
        raise KeyError("lost")
    proof.table("Figures", ["a", "b"], [["x|y", "1"]])
    proof.figures(seconds=1.5)


def raising(proof: Proof) -> None:
    proof.check("before", True)
    raise ZeroDivisionError("of a section")


def skipping(proof: Proof) -> None:
    raise Skipped("nothing to prove it on")


def endless(proof: Proof) -> None:
    proof.check("what was known", True)
    time.sleep(600)


def dying(proof: Proof) -> None:
    os._exit(7)


def test_a_section_that_fails_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    each = [
        Section("dying", "dies", 60, dying), Section("raising", "raises", 60, raising),
        Section("skipping", "is skipped", 60, skipping), Section("fine", "has a part that fails", 60, fine),
    ]  # fmt: skip
    results = {result.name: result for result in run_all(each, settings_in(tmp_path), 600)}
    assert [result.outcome for result in results.values()] == ["failed", "failed", "skipped", "failed"]
    assert "7" in results["dying"].reason
    assert results["raising"].reason == "ZeroDivisionError: of a section"
    assert [(check.name, check.holds) for check in results["fine"].checks] == [("one", True), ("two", False)]
    assert results["fine"].figures == {"seconds": 1.5}
    about = {"command": "python scripts/prove_on_gpu.py", "commit": "abc", "date": "today"}
    text = as_markdown(list(results.values()), about)
    assert "3 of 4 sections failed (dying, raising, fine); skipped: skipping" in text
    assert "ZeroDivisionError: of a section" in text
    assert "in raising" in text, "the traceback"
    assert "| x\\|y | 1 |" in text
    assert json.loads(as_json(list(results.values()), about))["sections"][2]["reason"] == "nothing to prove it on"


def test_a_section_ends_with_its_time_and_what_it_has_found_stays(tmp_path: Path) -> None:
    result = run_section(Section("endless", "", 1, endless), settings_in(tmp_path), 1)
    assert (result.outcome, result.reason) == ("failed", "not done after 1 s")
    assert [check.name for check in result.checks] == ["what was known"]
    (late,) = run_all([Section("fine", "", 60, fine)], settings_in(tmp_path), 0)
    assert (late.outcome, late.reason) == ("failed", "no time was left of 0 s")
    assert isinstance(late, Result)


def test_what_is_done_apart_comes_back_or_says_why_not(tmp_path: Path) -> None:
    assert apart(lambda: 6 * 7) == 42
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        apart(lambda: 1 // 0)
    log = tmp_path / "log"
    with pytest.raises(RuntimeError, match=r"status 3\nlast words"):
        apart(lambda: (os.write(1, b"last words"), os._exit(3)), log)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is what is tried")
def test_without_a_gpu_it_says_so_and_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--sections", "device", "--output", str(tmp_path / "proof")]
    assert prove(arguments) == 1
    assert "1 of 1 sections failed (device)" in (tmp_path / "proof" / "proof.md").read_text()
    assert prove(arguments) == 2  # the report is there, and stays
    assert "error:" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        prove(["--sections", "no-such"])
