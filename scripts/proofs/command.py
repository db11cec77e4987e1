"""The command: its arguments, its sections in their order, its report."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from shortzip.data.errors import UserError
from shortzip.data.files import refuse_to_replace, write_atomically, writing
from shortzip.reduction.parsing import parse_bytes
from shortzip.scripts.proofs.report import as_json, as_markdown
from shortzip.scripts.proofs.section import Check, Result, Section, Settings, run_section

DEFAULT_OUTPUT = Path("checkpoints/gpu-proof")
CPU_PATIENCE = 20  # the times are for a GPU: a busy CPU is given more
ROOT = Path(__file__).resolve().parents[2]


def sections() -> list[Section]:
    """All of them, those first whose answer is waited for most: the time may run out before the last ones."""
    from shortzip.scripts.proofs import agreement, answers, device, full_size, inference, methods, runs

    return [
        Section("device", "what is measured on", 30, device.describe),
        Section("equality", "the same logits and losses as on the CPU", 60, agreement.equality),
        Section("training", "the same loss and gradient, every way of computing them", 60, agreement.step),
        Section("step-7b", "the step of LLaVA-1.5-7B, random weights", 120, full_size.step_7b),
        Section("methods", "every way of choosing visual tokens", 60, methods.every_method),
        Section("next", "LLaVA-NeXT: tiles", 30, methods.tiles),
        Section("resume", "a run that is killed goes on", 60, runs.killed_and_resumed),
        Section("runs", "runs of every kind give the losses of the CPU", 120, runs.every_kind),
        Section("generation", "greedy, beams, samples, static cache", 60, answers.generation),
        Section("evaluation", "the answers of the CPU", 60, answers.evaluation),
        Section("calibration", "layer contribution", 40, answers.calibration),
        Section("inference-7b", "prefill and generation of LLaVA-1.5-7B", 90, inference.inference_7b),
        Section("step-13b", "the step of LLaVA-1.5-13B, random weights", 120, full_size.step_13b),
        Section("step-next-7b", "the step with LLaVA-NeXT-7B's tokens", 90, full_size.step_next_7b),
        Section("4bit", "the language model in 4 bits", 60, runs.in_4_bits),
        Section("compiled", "a static cache with transformers' compiled decoding", 90, answers.compiled),
    ]


def arguments(argv: Sequence[str], names: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="prove_on_gpu.py", description="Proves ShortZip on a GPU, and writes a report in Markdown and JSON."
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what is proven (default: cuda)")
    parser.add_argument(
        "--shapes", choices=("full", "tiny"), default="full", help="7B and 13B, or small ones to try the script with"
    )
    parser.add_argument(
        "--sections", type=lambda text: text.split(","), default=list(names), help=f"which: {','.join(names)}"
    )
    parser.add_argument(
        "--memory_limit", "--memory-limit", default="24GiB", help="the smaller card that the steps are also run for"
    )
    parser.add_argument("--seconds", type=float, default=600, help="for all sections together (default: 600)")
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, help=f"folder of the report (default: {DEFAULT_OUTPUT})"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the report that is there")
    given = parser.parse_args(argv)
    if unknown := [name for name in given.sections if name not in names]:
        parser.error(f"there is no section {unknown[0]!r}: choose from {', '.join(names)}")
    return given


def prove(argv: Sequence[str]) -> int:
    """Runs the sections and writes the report; the exit status: 0, 1 where something failed, 2 where nothing ran."""
    known = sections()
    given = arguments(argv, [section.name for section in known])
    try:
        paths = [given.output / f"proof.{kind}" for kind in ("md", "json")]
        for path in paths:
            refuse_to_replace(path, overwrite=given.overwrite)
        limit = parse_bytes(given.memory_limit)
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    chosen = [section for section in known if section.name in given.sections]
    with tempfile.TemporaryDirectory(prefix="shortzip-proof-") as scratch:
        shared = Settings(given.device, given.shapes == "tiny", limit, Path(scratch))
        results = run_all(chosen, shared, given.seconds)
    about = {"command": _command(argv), "commit": _commit(), "date": date.today().isoformat()}
    for path, text in zip(paths, (as_markdown(results, about), as_json(results, about)), strict=True):
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
        print(path)
    return int(any(result.outcome == "failed" for result in results))


def run_all(chosen: Sequence[Section], settings: Settings, seconds: float) -> list[Result]:
    """Each section in turn, within its own time and what is left of all."""
    end, results = time.monotonic() + seconds, []
    for section in chosen:
        own_time = section.seconds * (CPU_PATIENCE if settings.device == "cpu" else 1)
        left = min(own_time, end - time.monotonic())
        print(f"{section.name}: {section.title}", flush=True)
        if left <= 0:
            result = Result(section.name, section.title, "failed", reason=f"no time was left of {seconds:g} s")
        else:
            folder = settings.folder / section.name
            folder.mkdir()
            own = Settings(settings.device, settings.tiny, settings.memory_limit, folder)
            result = run_section(section, own, left, _tell)
        results.append(result)
        words = f"  {result.outcome} in {result.seconds:.1f} s" + (f": {result.reason}" if result.reason else "")
        print(words, flush=True)
    return results


def _tell(check: Check) -> None:
    if not check.holds:
        print(f"  does not hold: {check.name}: {check.detail}", flush=True)


def _command(argv: Sequence[str]) -> str:
    return shlex.join(["python", "scripts/prove_on_gpu.py", *argv])


def _commit() -> Any:
    """Of the clone, where there is one."""
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "no git"
    return found.stdout.strip() or "no git"
