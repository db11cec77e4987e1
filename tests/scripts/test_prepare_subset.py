"""`python scripts/prepare_subset.py` as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "prepare_subset.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_from_a_json_and_a_folder_half_full_of_images_to_the_next_step(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    rows = [{"id": str(number), "image": f"coco/{number}.jpg", "conversations": turns} for number in range(20)]
    (tmp_path / "mix.json").write_text(json.dumps(rows))
    (tmp_path / "images" / "coco").mkdir(parents=True)
    for number in range(10):
        (tmp_path / "images" / "coco" / f"{number}.jpg").write_bytes(b"not looked into")
    out = tmp_path / "out"
    ended = run(
        tmp_path / "mix.json", "--image-root", tmp_path / "images", "--fraction", "0.5", "--seed", "0", "-o", out
    )
    assert ended.returncode == 0, ended.stderr
    assert {file.name for file in out.iterdir()} == {
        "subset.json", "images.txt", "missing_images.txt", "dropped.jsonl", "report.json"
    }  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["written"] == 10
    missing = (out / "missing_images.txt").read_text().splitlines()
    assert len(missing) == report["missing_images"] > 0
    assert f"{len(missing)} of them are missing" in ended.stdout
    assert "tune_projector.py --data.instructions" in ended.stdout
    again = run(tmp_path / "mix.json", "-o", out)
    assert again.returncode == 1
    assert "holds a subset already" in again.stderr
    assert "Traceback" not in again.stderr


def test_a_file_that_is_not_there_is_an_error_without_a_traceback(tmp_path: Path) -> None:
    ended = run(tmp_path / "mix.json", "-o", tmp_path / "out")
    assert ended.returncode == 1
    assert "mix.json" in ended.stderr
    assert "Traceback" not in ended.stderr
