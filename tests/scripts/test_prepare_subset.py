"""`python scripts/prepare_subset.py` as a user runs it."""

import importlib.util
import json
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from shortzip.data.errors import UserError
from shortzip.train.settings.command_line import load_config, run_command

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
    (command,) = [line for line in ended.stdout.splitlines() if "shortzip tune" in line]
    config = load_config(command.split("shortzip tune ")[1].split())
    assert config.model == "llava-hf/llava-1.5-7b-hf", "not the demo, which is what a command without --config tunes"
    assert (config.data.instructions, config.data.fraction) == (str(tmp_path / "out" / "subset.json"), 1.0)


def script() -> Any:
    """The script as a module: starting a process for each wrong command would only take longer."""
    spec = importlib.util.spec_from_file_location("prepare_subset", ROOT / "scripts" / "prepare_subset.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_cannot_be_done_is_an_error_without_a_traceback(
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=r"mix\.json"):
        script().main([str(tmp_path / "mix.json"), "-o", str(tmp_path / "out")])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "subset.json").write_text("kept")
    with pytest.raises(UserError, match="holds a subset already"):
        script().main([str(tmp_path / "mix.json"), "-o", str(tmp_path / "out")])
    assert (tmp_path / "out" / "subset.json").read_text() == "kept"


def test_every_option_reaches_the_subset() -> None:
    given = "x.json -o OUT --image-root R --fraction 0.3 --seed 7 --keep-text-only --drop-missing --verify-images"
    more = "--max-bad-fraction 0.2 --num-workers 3 --split s --streaming"
    options = script().parse(f"{given} {more}".split())
    assert (options.instructions, str(options.output), str(options.image_root)) == ("x.json", "OUT", "R")
    assert (options.fraction, options.seed, options.max_bad_fraction, options.num_workers) == (0.3, 7, 0.2, 3)
    assert (options.keep_text_only, options.missing, options.verify_images) == (True, "drop", True)
    assert (options.split, options.streaming) == ("s", True)
    assert options.overwrite is False
    plain = script().parse(["x.json", "-o", "OUT", "--overwrite"])
    assert (plain.missing, plain.split, plain.overwrite) == ("keep", None, True)


def test_the_printed_command_works_whatever_the_folders_are_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    rows = [{"id": str(n), "image": f"[red]coco/{n}.jpg", "conversations": turns} for n in range(9)]
    folder = tmp_path / "my [bold]data[nothing]"
    folder.mkdir()
    (folder / "mix.json").write_text(json.dumps(rows))
    given = [str(folder / "mix.json"), "--image-root", str(folder), "--fraction", "1", "-o", str(folder / "o ut")]
    script().main(given)
    printed = capsys.readouterr().out
    assert "[red]coco" in printed
    (command,) = [line for line in printed.splitlines() if "shortzip tune" in line]
    config = load_config(shlex.split(command.split("shortzip tune ")[1]))
    assert (config.data.instructions, config.data.image_root) == (str(folder / "o ut" / "subset.json"), str(folder))


def test_no_escape_sequence_of_a_name_reaches_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    rows = [{"id": str(n), "image": f"\x1b[2Jcoco/{n}.jpg", "conversations": turns} for n in range(9)]
    (tmp_path / "mix\x1b[1m.json").write_text(json.dumps(rows))
    (tmp_path / "images").mkdir()
    for mix, ends in (("mix\x1b[1m.json", nullcontext()), ("gone\x1b[1m.json", pytest.raises(SystemExit))):
        given = [str(tmp_path / mix), "--image-root", str(tmp_path / "images"), "--fraction", "1"]
        with ends:
            run_command(script().main, [*given, "-o", str(tmp_path / "out")])
        printed = capsys.readouterr()
        assert "\x1b[2J" not in printed.out + printed.err
        assert "\x1b[1m" not in printed.err
