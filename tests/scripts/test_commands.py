"""Every command: what its user can mend ends in one line that begins with `error:`, with exit code 1."""

import errno
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled

from shortzip.data.drops import BadSample
from shortzip.data.errors import FileInTheWay, ToldElsewhere, UserError
from shortzip.reduction.errors import ReductionError
from shortzip.train.settings import command_line
from shortzip.train.settings.command_line import end_stopped, one_line, printable, run_command

ROOT = Path(__file__).parents[2]


def module_of(command: str) -> str:
    return f"shortzip.{'train' if command == 'tune_projector' else 'scripts'}.{command}"


def ended(
    main: Callable[[list[str]], Any], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Exit code and what stands in stderr of a command run in this process."""
    with pytest.raises(SystemExit) as stop:
        run_command(main, arguments)
    code = stop.value.code
    said = capsys.readouterr().err + (f"{code}\n" if isinstance(code, str) else "")
    return (1 if isinstance(code, str) else int(code or 0)), said


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, tiny_release: Path, tiny_held_out: Path) -> dict[str, str]:
    """By name: the files and folders that the wrong inputs below are made of."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "broken.json").write_text('{"a": [1, 2')
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "bytes.json").write_bytes(b"\xff\xfe\x00\x01" * 20)
    (folder / "list.json").write_text("[1, 2]")
    (folder / "empty.json").write_text("")
    (folder / "file").write_text("x")
    for name in ("held", "chart.png"):
        (folder / name).write_text("kept")
    (folder / "folder").mkdir()
    for name, content in (
        ("broken", '{"model_type": '), ("deep", "[" * 100_000), ("zero", json.dumps({"model_type": "llava",
         "vision_config": {"patch_size": 0, "image_size": 24}, "text_config": {"num_hidden_layers": 2}})),
        ("null", '{"model_type": "llava", "text_config": null, "vision_config": {"patch_size": null}}'),
        ("words", '{"model_type": "llava", "text_config": {"hidden_size": "wide"}}'),
        ("listed", '["llava"]'), ("other", '{"model_type": "bert"}'),
    ):  # fmt: skip
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(content)
    names = {path.name.replace(".", "_"): str(path) for path in folder.iterdir()}
    return {**names, "at": str(folder), "release": str(tiny_release), "rows": str(tiny_held_out),
            "image": str(next((tiny_held_out.parent / "images").iterdir()))}  # fmt: skip


COMMANDS = {
    "answer": [
        "{at}/none.jsonl --model {release}", "{broken_json} --model {release}", "{empty_json} --model {release}",
        "{rows}", "{rows} --model {at}/nowhere", "{rows} --model {release} --output {held}",
        "{rows} --model {release} --output {rows} --overwrite true", "{rows} --model {release} --output {file}/said",
        "{rows} --model {release} --batch_size 0",
    ],
    "benchmarks.against": ["--output {folder}", "--sides [none]", "--steps 0"],
    "benchmarks.estimates": ["--output {folder}", "--models [none]"],
    "benchmarks.step": [
        "--shape huge", "--output {folder}", "--output {held}", "--memory_limit 1GiB", "--rounds many",
    ],
    "benchmarks.lc": ["--output {folder}", "--prompts x", "--nothing 1"],
    "benchmarks.selection": ["--output {folder}", "--methods [none]"],
    "benchmarks.serving": ["--output {folder}", "--budget x", "--rounds many"],
    "calibrate_shortv": [
        "--model {at}/nowhere", "--model {broken}", "--model {deep}", "--model {file}",
        "--budget 1+2+3", "--seed -1", "--seed 4294967296", "--samples 0",
        "--model {release} --instructions {broken_json}",
        "--model {at} --output {held} --overwrite true", "--instructions {held} --output {held} --overwrite true",
    ],
    "convert_release": [
        "{at}/nowhere --output {at}/new", "{broken} --output {at}/new", "{deep} --output {at}/new",
        "{listed} --output {at}/new",
        "{release} --output {at}/new", "{release} --to llava --output {file}",
        "{release} --to llava --output {file}/llava",
        "{release} --to llava --output /proc/llava", "{file} --output {at}/new",
        "{release} --mm_projector {file} --output {at}/new",
        "{null} --to llava --output {at}/new", "{words} --to llava --output {at}/new",
        "{zero} --to llava --output {at}/new-llava",
        "{release} --dtype int8 --output {at}/new", "{release} --to onnx --output {at}/new", "{release}",
    ],
    "demo_app": [
        "--model {at}/nowhere", "--model {broken}", "--model {file}", "--port many", "--port 99999999",
        "--model {release} --ranking [0]", "--model {release} --images {at}/nowhere", "--max_new_tokens 0",
        "--model {release} --images {file}", "--model {release} --tuned {at}/nowhere", "--longest_question 0",
    ],
    "estimate_cost": [
        "--model {at}/nowhere", "--model {broken}", "--model {deep}", "--model {listed}", "--model {other}",
        "--model {null}", "--model {words}", "--model {zero}", "--model {file}", "--model {folder}", "--budget x",
        "--freeze 500%", "--freeze 1e9", "--memory lots", "--text_tokens -1", "--output {folder}", "--output {held}",
        "--output {file}/x.json", "--output /proc/x.json", "--global_batch_size 0", "--tiles -3",
        "--config {broken_json}", "--config {bytes_json}", "--config {list_json}",
        "--config {folder}", "--config {at}/none.yaml", "--modle x",
        "--model {at} --output {held} --overwrite true",
    ],
    "evaluate_models": [
        "--model {at}/nowhere --data.instructions {rows}", "--model {release} --data.instructions {at}/none.json",
        "--model {release} --data.instructions {broken_json}",
        "--model {release} --data.instructions {bytes_json}", "--model {release} --data.instructions {folder}",
        "--model {release} --data.instructions {list_json}", "--model {release} --data.instructions {empty_json}",
        "--model {release} --data.instructions {rows} --output {file}", "--model", "--model {release} --batch_size 0",
        "--model {release} --model {release} --data.instructions {rows}", "--model {release}",
        "--model {zero} --data.instructions {rows}", "--model {null} --data.instructions {rows}",

    ],
    "evaluate_papers": ["--model {at}/nowhere", "--config {broken_json}", "--config {at}/none.yaml"],
    "frontier": [
        "--recipe {at}/none.yaml", "--recipe {broken_json}", "--recipe {folder}", "--budgets [x]", "--freeze [many]",
        "--output {file}/x",
    ],
    "make_demo_model": ["--seed 1", "--output_dir {broken}", "--output_dir {file}/x", "--scenes x"],
    "make_lmms_task": [
        "--data.instructions {at}/none.json", "--data.instructions {broken_json}",
        "--data.instructions {rows} --name a/b", "--data.instructions {rows} --output {file}",
        "--data.instructions {rows} --output {file}/x", "--data.instructions {rows} --output /proc",
        "--data.instructions {rows} --output configs/eval/tasks --name demo_scenes --overwrite",
        "--data.instructions {rows} --data.image_root {folder} --output {at}/tasks", "--questions {rows}",
        "--questions {rows} --answers {rows} --videos {folder}",
        "--questions {rows} --answers {rows} --videos {folder} --name mine --output {at}/tasks",
        "--questions {at}/none.json --answers {rows} --videos {folder} --name mine",
        "--questions {broken_json} --answers {rows} --videos {at}/none --name mine",
    ],
    "make_tiny_release": [
        "--output {held}", "--output {file}/x", "--output {at}/tiny --family llama", "--output {at}/tiny --seed -1",
        "--output {at}/tiny --layout onnx", "", "--output {at}/tiny --layout original --family llava_interleave",
    ],
    "prepare_subset": [
        "{at}/none.json --output {at}/subset", "{broken_json} --output {at}/subset",
        "{bytes_json} --output {at}/subset",
        "{list_json} --output {at}/subset", "{empty_json} --output {at}/subset", "{folder} --output {at}/subset",
        "{rows} --output {at}/subset --fraction 2", "{rows} --output {file}",
        "{rows} --output {file}/x", "{rows} --output /proc/subset",
        "{rows} --output {at}/subset --num_workers -1 --verify_images",
        "{rows} --output {at}/subset --fraction x", "{rows} --output {at}/subset --seed 1.5", "{rows}",
    ],
    "publish": [
        "{at}/nowhere --repo_id a/b", "{folder} --repo_id a/b", "{file} --repo_id a/b",
        "{folder} --repo_id a/b/c", "", "{folder}", "{folder} {file} --repo_id a/b", "{folder} --repoid a/b",
        "{folder} --repo_id a/b --shape gguf",
    ],
    "serve": [
        "--model {release}", "--model {release} --engine ftp://x", "--model {file} --engine http://x/v1",
        "--model {broken} --engine http://x/v1", "--model {release} --engine http://x/v1 --port 70000",
        "--model {release} --engine http://x/v1 --images {at}/none", "--model {release}@99+9 --engine http://x/v1",
        "--model {release} --engine http://x/v1 --seconds nan",
        "--model {release} --engine http://x/v1 --host 1.2.3.4",
    ],
    "show_tokens": [
        "", "{at}/none.png --model {release}", "{rows} --model {release}", "{folder} --model {release}",
        "{image} --model {at}/nowhere", "{image} --model {broken}", "{image} --model {zero}",
        "{image} --model {release} --budget 1+x", "{image} --model {release} --budget 999+1",
        "{image} --model {release} --output {image}", "{image} --model {release} --output {image} --overwrite",
        "{image} --model {release} --output {folder}", "{image} --model {release} --output {file}/x.png",
        "{image} --model {release} --output {at}/x.jpg", "{image} --model {release} --output /proc/x.png",
        "{image} --model {release} --budget ,",
        "{image} --model {at} --output {at}/chart.png --overwrite true",
    ],
    "tune_projector": [
        "--model {at}/nowhere --data.instructions {rows}", "--model {broken} --data.instructions {rows}",
        "--model {deep} --data.instructions {rows}", "--model {zero} --data.instructions {rows}",
        "--model {words} --data.instructions {rows}", "--model {other} --data.instructions {rows}",
        "--model {release} --data.instructions {at}/none.json",
        "--model {release} --data.instructions {broken_json}", "--model {release} --data.instructions {bytes_json}",
        "--model {release} --data.chat_template {image}",
        "--seed 4294967296", "--seed -1", "--output_dir {file}", "--output_dir {file}/x", "--config {folder}",
        "--model {release} --visionzip.dominant 999", "--output_dir /proc/run", "--mm_projector {file}",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "arguments"), [(name, line) for name, lines in COMMANDS.items() for line in lines]
)
def test_what_the_user_can_mend_is_one_line(
    command: str, arguments: str, given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    main = importlib.import_module(module_of(command)).main
    words = [word.format(**given) for word in arguments.split()]
    defaults = {
        "tune_projector": ["--visionzip", "null", "--shortv", "null", "--max_steps", "1", "--data.num_workers", "0",
                           "--data.eval_instructions", "null", "--eval_steps", "null", "--control", "false",
                           "--mixed_precision", "no", "--num_train_epochs", "null", "--overwrite_output_dir", "false",
                           "--model", given["release"], "--data.instructions", given["rows"],
                           "--output_dir", str(tmp_path / "run")],
        "evaluate_models": ["--output", str(tmp_path / "evaluation")] if "--output" not in words else [],
        "show_tokens": ["--output", str(tmp_path / "x.png")] if "--output" not in words else [],
        "calibrate_shortv": ["--output", str(tmp_path / "layers.json")] if "--output" not in words else [],
    }  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    more = defaults.get(command, [])
    words = [*more, *words] if command == "tune_projector" else [*words, *more]
    before = {path: path.read_bytes() for path in Path(given["at"]).rglob("*") if path.is_file()}
    code, said = ended(main, words, capsys)
    assert code == 1, said
    lines = [line for line in said.splitlines() if line.strip()]
    assert len([line for line in lines if line.startswith("error: ")]) == 1, said
    assert lines[-1].startswith("error: "), said
    assert "Traceback" not in said
    assert len(lines[-1]) < 1500, said
    assert {path: path.read_bytes() for path in Path(given["at"]).rglob("*") if path.is_file()} == before


def raising(error: BaseException) -> Callable[[list[str]], None]:
    def main(argv: list[str]) -> None:
        raise error

    return main


FROM_WORKER = (
    "Caught BadSample in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
    "  File \"worker.py\", line 1\ndata.drops.BadSample: row '7' in a.json: the image is cut off\n"
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("a \x1b[2J\nb"), r"a \x1b[2J b"),
        (ReductionError("dominant 9"), "dominant 9"),
        (BadSample("malformed_row", "7", "no turns", "a.json"), "row '7' in a.json: no turns"),
        (FileInTheWay("x exists"), "x exists"),
        (RuntimeError(FROM_WORKER), "row '7' in a.json: the image is cut off"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x.json"), "/data/x.json: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: make space on the disk"),
        (OSError("x does not hold model.safetensors"), "x does not hold model.safetensors"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "the GPU's memory is full: give a smaller batch"),
        (OfflineModeIsEnabled("offline"), "the Hub cannot be used: offline"),
        (MemoryError(), "the machine's memory is full"),
    ],
)
def test_what_can_be_mended_is_told_with_the_cure(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown = ended(raising(error), [], capsys)
    assert (code, shown.count("\n")) == (1, 1)
    assert shown.startswith(f"error: {said}")


@pytest.mark.parametrize("error", [KeyError("x\x1b[2J"), RuntimeError("shape"), OSError(errno.EMFILE, "many")])
def test_a_fault_of_our_own_keeps_its_traceback_and_asks_for_a_report(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown = ended(raising(error), [], capsys)
    assert code == 1
    assert "Traceback (most recent call last)" in shown
    assert shown.splitlines()[-1].endswith("please report it with the lines above")
    assert "\x1b" not in shown


def test_ctrl_c_ends_with_130_and_a_stop_with_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(raising(KeyboardInterrupt()), [], capsys) == (130, "interrupted\n")
    assert ended(raising(KeyboardInterrupt("go on")), [], capsys) == (130, "go on\n")
    assert ended(lambda _: end_stopped("stopped", "SIGTERM"), [], capsys) == (1, "stopped\n")
    assert ended(lambda _: end_stopped("stopped", "SIGINT", silent=True), [], capsys) == (130, "")


def test_of_several_processes_one_tells(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The launcher ends the others within the time that they wait."""
    waited: list[float] = []
    monkeypatch.setattr(command_line.time, "sleep", waited.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert ended(raising(UserError("x")), [], capsys) == (1, "error: x\n")
    assert waited == []
    ended(raising(RuntimeError("connection closed by peer")), [], capsys)
    monkeypatch.setenv("RANK", "1")
    assert ended(raising(UserError("x")), [], capsys) == (1, "error: x\n")
    assert waited == [2 * command_line.WAIT, command_line.WAIT]
    assert ended(raising(ToldElsewhere("x")), [], capsys) == (1, "")


def test_control_characters_are_shown_and_lines_joined() -> None:
    assert (
        printable("a\x1b]0;t\x07\nb\u202etxt.gpj\x9b\ud83d é")
        == r"a\x1b]0;t\x07" + "\n" + r"b\u202etxt.gpj\x9b\ud83d é"
    )
    assert one_line("a\n  b\r\nc\n") == "a b c"


def test_a_reader_that_has_seen_enough_ends_a_command_in_silence() -> None:
    code = (
        "from shortzip.train.settings.command_line import run_command\n"
        "run_command(lambda argv: [print('x' * 99) for _ in range(9999)])"
    )
    process = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "$1" | head -1', "bash", code], cwd=ROOT, capture_output=True, text=True
    )
    assert (process.stdout, process.stderr) == ("x" * 99 + "\n", "")


def test_help_of_every_command_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        module = importlib.import_module(module_of(command))
        with pytest.raises(SystemExit) as stop:
            run_command(module.main, ["--help"])
        assert stop.value.code in (0, None), command
        assert "usage" in capsys.readouterr().out.lower()
