"""Ten thousand steps of the tiny model: nothing grows, nothing slows down, and what is written can be read meanwhile.

python -m pytest -m slow -s tests/train/test_load.py    # prints the figures
"""

import json
import statistics
import time
from pathlib import Path

import pytest
from runs import output_of, start_there, write_recipe

from shortzip.train.run.checkpoint import damage, list_checkpoints
from shortzip.train.run.run_folder import read_metrics, read_status

STEPS, KEPT = 10_000, 2


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ten_thousand_steps(tiny_release: Path, tiny_instructions: Path, tmp_path: Path) -> None:
    keys = {"max_steps": STEPS, "global_batch_size": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-4}
    keys |= {"save_steps": 250, "save_total_limit": KEPT}
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_release, tiny_instructions, **keys)
    folder = tmp_path / "run"
    process = start_there(recipe, folder)
    resident: dict[int, float] = {}  # MB by step
    reads, most_kept = 0, 0
    while process.poll() is None:
        time.sleep(2)
        if not (folder / "metrics.jsonl").is_file():
            continue
        lines = read_metrics(folder / "metrics.jsonl")  # without one that is not whole, which leaves a gap
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        reads += 1
        most_kept = max(most_kept, len(list_checkpoints(folder)))
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        found = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")]
        if found and lines:
            resident[len(lines)] = int(found[0]) / 1024
    said = output_of(process)
    assert read_status(folder)["state"] == "finished", said
    seconds = [line["seconds"] for line in read_metrics(folder / "metrics.jsonl")]
    assert len(seconds) == STEPS
    early = [size for step, size in resident.items() if STEPS * 0.1 <= step < STEPS * 0.2]
    late = [size for step, size in resident.items() if STEPS * 0.9 <= step < STEPS]
    # The fastest half: other work on the machine slows steps down, and never speeds one up.
    paces = [statistics.mean(sorted(part)[: len(part) // 2]) for part in (seconds[1000:2000], seconds[9000:])]
    figures = {
        "resident_mb_steps_1000_to_2000": round(statistics.mean(early), 1),
        "resident_mb_steps_9000_to_10000": round(statistics.mean(late), 1),
        "ms_per_step_1000_to_2000": round(1000 * paces[0], 2),
        "ms_per_step_9000_to_10000": round(1000 * paces[1], 2),
        "reads_of_metrics_while_written": reads,
        "most_checkpoints_seen": most_kept,
    }
    print(json.dumps(figures, indent=1))
    assert statistics.mean(late) - statistics.mean(early) < 20
    assert paces[1] < 1.3 * paces[0]
    # A new one is renamed into its place before the oldest one goes.
    assert most_kept <= KEPT + 1
    assert len(list_checkpoints(folder)) == KEPT
    assert all(damage(path) is None for path in list_checkpoints(folder))
