"""scripts/shortzip_demo.ipynb: what is committed says nothing of the machine that ran it, and it runs anywhere."""

import base64
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from shortzip.scripts.__main__ import VERBS

NOTEBOOK = Path(__file__).resolve().parents[2] / "scripts" / "shortzip_demo.ipynb"
LARGEST = 150_000  # bytes of a picture among the outputs


def cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_its_outputs_are_committed_whole_small_and_without_paths_of_a_machine() -> None:
    outputs = [output for cell in cells() for output in cell["outputs"]]
    text = json.dumps(outputs)
    assert all(cell["execution_count"] for cell in cells())
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert "reduced + tuned" in text
    assert not re.findall(r"(?:/tmp|/root|/home|/work|/content|/usr|/opt|/var)/[^\s\"\\]*", text)
    pictures = [
        base64.b64decode(output["data"]["image/png"]) for output in outputs if "image/png" in output.get("data", {})
    ]
    assert pictures
    assert max(map(len, pictures)) < LARGEST


def test_the_verbs_it_calls_are_there() -> None:
    called = re.findall(
        r"^shortzip\(\s*\[\s*\"(\w+)\"", "\n".join("".join(cell["source"]) for cell in cells()), re.MULTILINE
    )
    assert set(called) >= {"show", "tune", "publish"}
    assert set(called) <= set(VERBS)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbclient
    import nbformat

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=1400, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    assert (tmp_path / "tuned" / "final" / "config.json").is_file()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "16 tokens, tuned:" in printed
    assert "modeling_reduced_llava.py" in printed
