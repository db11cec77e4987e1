"""Runs the training loop into every fault it claims to survive, for real, and prints what came of it as a table.

    python scripts/rehearsals/faults.py                       # everything, on checkpoints/demo-llava
    python scripts/rehearsals/faults.py --only kill --kills 5

Each fault hits a short run in processes of its own (signals, damaged files, a full disk, dead and stopped workers).
Where the run can go on afterwards, it is resumed with `--resume_from_checkpoint latest`, and its final projector is
compared bit for bit with that of a run that nothing happened to (fp32, CPU).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortzip.train.run.checkpoint import damage, list_checkpoints
from shortzip.train.run.run_folder import NONFINITE, is_finished, read_metrics, read_status
from shortzip.train.settings.command_line import run_command

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "train" / "tune_projector.py"
STEPS = 12


@dataclass(frozen=True)
class Outcome:
    """One row of the table."""

    fault: str
    seen: str
    passed: bool


class Laboratory:
    """Starts runs of the same short training, each in a folder of its own beneath `folder`."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self.model = folder, model
        self.whole = folder / "nothing-happens"

    def command(self, run: Path, *arguments: str, processes: int | None = None) -> list[str]:
        launcher = [sys.executable]
        if processes is not None:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        return [
            *launcher, str(SCRIPT), "--model", self.model, "--output_dir", str(run),
            "--overwrite_output_dir", "false", "--control", "false", "--final_evaluation", "false",
            "--shortv.freeze", "null", "--shortv.layers", "[1, 2]", "--max_steps", str(STEPS),
            "--global_batch_size", "8",
            "--per_device_train_batch_size", "4", "--save_steps", "3", "--save_total_limit", "3", "--eval_steps", "4",
            "--data.demo_scenes.folder", str(self.folder / "scenes"), "--data.demo_scenes.train_scenes", "1000",
            "--data.demo_scenes.eval_scenes", "16", "--data.num_workers", "0", *arguments,
        ]  # fmt: skip

    def start(
        self,
        run: Path,
        *arguments: str,
        processes: int | None = None,
        limit: int | None = None,
        environment: dict[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """A run in processes of its own; `limit`: bytes that no file of it may exceed (a disk that is full)."""

        def full_disk() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            assert limit is not None
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        return subprocess.Popen(
            self.command(run, *arguments, processes=processes),
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=full_disk if limit is not None else None,
        )

    def resume(self, run: Path, *arguments: str) -> str:
        """Continues a run to its end; returns what it printed."""
        return self.start(run, "--resume_from_checkpoint", "latest", *arguments).communicate()[0]

    def same(self, run: Path) -> bool:
        """Whether a run came to the same end, bit for bit, as the one that nothing happened to."""
        end = f"step-{STEPS:06d}/projector.safetensors"
        return (run / end).is_file() and (run / end).read_bytes() == (self.whole / end).read_bytes()

    def prepare(self) -> None:
        output = self.start(self.whole).communicate()[0]
        if not is_finished(self.whole):
            raise RuntimeError(f"the run without faults failed:\n{output}")


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 900) -> None:
    """Waits for something that a running process does. Raises `RuntimeError` if it ends, or takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise RuntimeError(f"the run ended before the fault:\n{process.communicate()[0]}")
        if time.monotonic() > end:
            os.killpg(process.pid, signal.SIGKILL)
            raise RuntimeError(f"waited in vain for {seconds} s:\n{process.communicate()[0]}")
        time.sleep(0.005)


def has_steps(run: Path, count: int) -> Callable[[], bool]:
    def reached() -> bool:
        path = run / "metrics.jsonl"
        return path.exists() and sum(line["kind"] == "train" for line in read_metrics(path)) >= count

    return reached


def kill_at_random(lab: Laboratory, kills: int, seed: int) -> Outcome:
    """kill -9 at `kills` moments of training, evaluating and saving, every third in a checkpoint write; resumed."""
    rng = random.Random(seed)
    run = lab.folder / "killed"
    duration = _training_seconds(lab.whole)
    ends = same = broken = killed = in_a_write = 0
    process, started = lab.start(run), time.time()
    while killed < kills or process.poll() is None:
        writing = killed % 3 == 2
        if killed < kills:
            while process.poll() is None and not _in_the_loop(run, started):
                time.sleep(0.005)
            end = time.monotonic() + rng.uniform(0, duration)
            while process.poll() is None and (not _is_writing(run) if writing else time.monotonic() < end):
                time.sleep(0.001)
        if killed < kills and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            killed, in_a_write = killed + 1, in_a_write + _is_writing(run)
            broken += any(damage(path) is not None for path in list_checkpoints(run))
            process, started = lab.start(run, "--resume_from_checkpoint", "latest"), time.time()
            continue
        process.communicate()
        ends, same = ends + 1, same + lab.same(run)
        if killed < kills:
            shutil.rmtree(run)
            process, started = lab.start(run), time.time()
    seen = (
        f"{in_a_write} of them in a checkpoint write; broken checkpoints left visible: {broken}; "
        f"of {ends} run(s) that came to their end so, bit for bit the same: {same}"
    )
    return Outcome(f"kill -9 at {kills} moments", seen, same == ends and broken == 0)


def _in_the_loop(run: Path, started: float) -> bool:
    """Whether the process started then has opened metrics.jsonl, which it does just before its first step."""
    path = run / "metrics.jsonl"
    return path.exists() and path.stat().st_mtime >= started


def _is_writing(run: Path) -> bool:
    return any(run.glob(".writing-step-*"))


def _training_seconds(run: Path) -> float:
    return sum(line["seconds"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train")


def ask_to_stop(lab: Laboratory, number: signal.Signals) -> Outcome:
    run = lab.folder / number.name
    process = lab.start(run)
    wait_for(has_steps(run, 4), process)
    start = time.monotonic()
    os.kill(process.pid, number)
    process.communicate()
    took, status = time.monotonic() - start, read_status(run)
    lab.resume(run)
    seen = f"stopped after {took:.1f} s; status.json: {status['state']}, {status['reason']}, step {status['step']}"
    return Outcome(f"{number.name}", seen + "; resumed", status["reason"] == number.name and lab.same(run))


def fill_the_disk(lab: Laboratory) -> Outcome:
    run = lab.folder / "disk-full"
    process = lab.start(run)
    wait_for(lambda: len(list_checkpoints(run)) > 0, process)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate()
    before = list_checkpoints(run)
    output = lab.start(run, "--resume_from_checkpoint", "latest", limit=60_000).communicate()[0]
    status = read_status(run)
    untouched = all(path.is_dir() and damage(path) is None for path in before)
    names_the_disk = "could not be written" in output and "make space" in output
    lab.resume(run)
    seen = f"status.json: {status['reason'][:60]}…; older checkpoints whole: {untouched}; resumed with space"
    return Outcome("disk full while saving", seen, names_the_disk and untouched and lab.same(run))


def damage_a_checkpoint(lab: Laboratory, harm: str) -> Outcome:
    run = lab.folder / f"damaged-{harm.replace(' ', '-')}"
    shutil.copytree(lab.whole, run, ignore=shutil.ignore_patterns("final"))
    newest, older = list_checkpoints(run)[-1], list_checkpoints(run)[-2]
    file = newest / "projector.safetensors"
    content = bytearray(file.read_bytes())
    if harm == "bit flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif harm == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    refused = lab.start(run, "--resume_from_checkpoint", str(newest)).communicate()[0]
    resumed = lab.resume(run)
    ok = f"--resume_from_checkpoint {older}" in refused and f"continuing from {older}" in resumed and lab.same(run)
    return Outcome(f"checkpoint damaged: {harm}", f"refused by checksum, {older.name} offered and taken", ok)


def kill_one_process(lab: Laboratory) -> Outcome:
    run = lab.folder / "one-process-dies"
    process = lab.start(run, "--max_steps", "100000", "--eval_steps", "100000", processes=2)
    wait_for(has_steps(run, 3), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    victim = next(int(pid) for pid in children if int(pid) != read_status(run)["pid"])
    start = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    process.communicate()
    took, status = time.monotonic() - start, read_status(run)
    seen = f"the other stopped after {took:.1f} s; status.json: {status['state']}, {status['reason'][:60]}…"
    return Outcome("one of two processes dies", seen, took < 60 and status["state"] == "failed")


def overflow(lab: Laboratory) -> Outcome:
    run = lab.folder / "overflow"
    harsh = (
        "--learning_rate",
        "1e30",
        "--max_grad_norm",
        "0",
        "--warmup_ratio",
        "0",
        "--lr_scheduler_type",
        "constant",
    )
    lab.start(run, *harsh).communicate()
    status, streak = read_status(run), json.loads((run / NONFINITE).read_text())
    finite = all(damage(path) is None for path in list_checkpoints(run))
    ids = sum(len(entry["ids"]) for entry in streak)
    seen = f"{len(streak)} updates in a row skipped, then stopped; {ids} ids in {NONFINITE}"
    return Outcome("NaN or Inf", seen, "NonFiniteLoss" in status["reason"] and len(streak) == 3 and finite)


def cut_off_wandb(lab: Laboratory) -> Outcome:
    run = lab.folder / "no-wandb"
    environment = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "5"}
    output = lab.start(run, "--report_to", "[wandb]", environment=environment).communicate()[0]
    shown = output.count("W&B cannot be used")
    return Outcome(
        "W&B unreachable", f"said {shown} time(s), recorded offline; the run went on", shown == 1 and lab.same(run)
    )


def cut_off_hub(lab: Laboratory) -> Outcome:
    run = lab.folder / "no-hub"
    arguments = ("--push_to_hub", "true", "--hub_model_id", "user/model", "--hub_shape", "full")
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_" + "x" * 30}
    output = lab.start(run, *arguments, environment=environment).communicate()[0]
    shown, state = output.count("not published"), read_status(run)["state"]
    return Outcome("the Hub unreachable", f"said {shown} time(s); the run is {state}", shown == 1 and lab.same(run))


def harm_a_worker(lab: Laboratory, number: signal.Signals) -> Outcome:
    run = lab.folder / f"worker-{number.name}"
    workers = ("--data.num_workers", "1", "--data.worker_timeout", "10")
    process = lab.start(run, *workers)
    wait_for(has_steps(run, 4), process)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    start = time.monotonic()
    for child in children:
        os.kill(child, number)
    process.communicate()
    took, status = time.monotonic() - start, read_status(run)
    lab.resume(run, *workers)
    what = "dies" if number == signal.SIGKILL else "hangs"
    seen = f"stopped after {took:.0f} s; status.json: {status['state']}, {status['reason'][:70]}…; resumed"
    return Outcome(f"a data worker {what}", seen, status["state"] == "failed" and took < 60 and lab.same(run))


def experiments(lab: Laboratory, kills: int, seed: int) -> dict[str, Callable[[], Outcome]]:
    """Every fault by the name that `--only` takes."""
    by_name: dict[str, Callable[[], Outcome]] = {
        "kill": lambda: kill_at_random(lab, kills, seed),
        "sigterm": lambda: ask_to_stop(lab, signal.SIGTERM),
        "sigint": lambda: ask_to_stop(lab, signal.SIGINT),
        "disk": lambda: fill_the_disk(lab),
    }
    for harm in ("bit flip", "truncated", "missing"):
        by_name[harm.replace(" ", "-")] = lambda harm=harm: damage_a_checkpoint(lab, harm)  # type: ignore[misc]
    by_name["process"] = lambda: kill_one_process(lab)
    by_name["overflow"] = lambda: overflow(lab)
    by_name["wandb"] = lambda: cut_off_wandb(lab)
    by_name["hub"] = lambda: cut_off_hub(lab)
    by_name["worker-dies"] = lambda: harm_a_worker(lab, signal.SIGKILL)
    by_name["worker-hangs"] = lambda: harm_a_worker(lab, signal.SIGSTOP)
    return by_name


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoints/demo-llava", help="a small release")
    parser.add_argument("--kills", type=int, default=30, help="how many times kill -9")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", nargs="*", help="some of the faults, by name")
    parser.add_argument("--folder", type=Path, help="where the runs go, empty or not there; default: a temporary one")
    options = parser.parse_args(argv)
    folder: Any = options.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    lab = Laboratory(folder, options.model)
    by_name = experiments(lab, options.kills, options.seed)
    unknown = set(options.only or ()) - set(by_name)
    if unknown:
        parser.error(f"no fault {', '.join(sorted(unknown))}: known are {', '.join(by_name)}")
    lab.prepare()
    outcomes = []
    for name, experiment in by_name.items():
        if options.only is None or name in options.only:
            try:
                outcomes.append(experiment())
            except (RuntimeError, OSError, ValueError, StopIteration) as error:
                outcomes.append(Outcome(name, f"the experiment failed: {error}", False))
            print(
                f"{'passed' if outcomes[-1].passed else 'FAILED'}: {outcomes[-1].fault}: {outcomes[-1].seen}",
                flush=True,
            )
    print("\n| fault | what was seen | |\n|---|---|---|")
    for outcome in outcomes:
        print(f"| {outcome.fault} | {outcome.seen} | {'passed' if outcome.passed else '**failed**'} |")
    if not all(outcome.passed for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
