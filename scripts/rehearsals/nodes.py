"""Rehearses a run on two machines with one: two network namespaces, a cable between them, a process in each.

    sudo .venv/bin/python scripts/rehearsals/nodes.py      # needs Linux, iproute2 and root

The machines meet as real ones do (torchrun's c10d rendezvous; accelerate launch with DeepSpeed, if it is installed),
and each run's projector is compared with that of the same run in one process.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from shortzip.train.settings.command_line import run_command

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "train" / "tune_projector.py")
STEPS, SECONDS, PORT = 6, 600, 29511
NAMES, ADDRESSES, CABLE = ("shortzip-a", "shortzip-b"), ("10.77.0.1", "10.77.0.2"), "cable"


@contextmanager
def two_machines() -> Iterator[None]:
    """Namespaces with an address each, joined by a veth pair; removed afterwards. Raises CalledProcessError."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    made = []
    try:
        for name in NAMES:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", CABLE, "netns", NAMES[0], "type", "veth", "peer", "name", CABLE, "netns", NAMES[1])
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", CABLE)
            for device in (CABLE, "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield
    finally:
        for name in made:
            ip("netns", "delete", name)


def settings(model: str, scenes: Path, run: Path) -> list[str]:
    return [
        "--model", model, "--output_dir", str(run), "--overwrite_output_dir", "false", "--control", "false",
        "--final_evaluation", "false", "--eval_steps", "null", "--shortv.freeze", "null", "--shortv.layers", "[1, 2]",
        "--max_steps", str(STEPS), "--global_batch_size", "7", "--per_device_train_batch_size", "2",
        "--data.demo_scenes.folder", str(scenes), "--data.demo_scenes.train_scenes", "400",
        "--data.demo_scenes.eval_scenes", "8", "--data.num_workers", "0",
    ]  # fmt: skip


def launchers(machine: int) -> dict[str, tuple[list[str], dict[str, str]]]:
    """By name: the command before the script on this machine, and its environment."""
    endpoint = f"{ADDRESSES[0]}:{PORT}"
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        endpoint,
        "--rdzv_id",
        "rehearsal",
        "--local_addr",
        ADDRESSES[machine],
        # Both "machines" have one name, by which torchrun otherwise tells whether it is the host.
        "--rdzv_conf",
        f"is_host={str(machine == 0).lower()}",
    ]
    by_name = {"torchrun, DDP": (torchrun, {"ACCELERATE_USE_CPU": "true"})}
    sharded = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    by_name["torchrun, FSDP2"] = (torchrun, sharded)
    if importlib.util.find_spec("deepspeed") is not None:
        accelerate = [
            str(Path(sys.executable).parent / "accelerate"), "launch",
            "--config_file", str(ROOT / "configs" / "accelerate" / "deepspeed_zero3.yaml"),
            "--deepspeed_multinode_launcher", "standard", "--num_machines", "2", "--num_processes", "2",
            "--machine_rank", str(machine), "--main_process_ip", ADDRESSES[0], "--main_process_port", str(PORT),
        ]  # fmt: skip
        by_name["accelerate launch, ZeRO-3"] = (accelerate, {})
    return by_name


def run_on_both(name: str, arguments: Sequence[str], environment: dict[str, str]) -> tuple[bool, str]:
    """One launcher's run on both machines: whether it ended well, and what both printed."""
    processes = []
    for machine, namespace in enumerate(NAMES):
        launcher, variables = launchers(machine)[name]
        processes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", namespace, *launcher, SCRIPT, *arguments],
                cwd=ROOT,
                env={**environment, **variables, "GLOO_SOCKET_IFNAME": CABLE},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.terminate()
    return not any(process.returncode for process in processes), "\n".join(outputs)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "demo-llava"), help="a small release")
    options = parser.parse_args(argv)
    if os.geteuid() != 0:
        parser.error("network namespaces need root: sudo")
    folder = Path(tempfile.mkdtemp(prefix="nodes-"))
    scenes, environment = folder / "scenes", {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, SCRIPT, *settings(options.model, scenes, folder / "one")]
    one = subprocess.run(
        command, cwd=ROOT, env={**environment, "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True
    )
    if one.returncode:
        sys.exit(f"the run in one process failed:\n{one.stdout}{one.stderr}")
    expected = load_file(folder / "one" / f"step-{STEPS:06d}" / "projector.safetensors")
    failed = 0
    with two_machines():
        for number, name in enumerate(launchers(0)):
            run = folder / str(number)
            is_done, output = run_on_both(name, settings(options.model, scenes, run), environment)
            if not is_done:
                print(f"FAILED: {name}\n{output}")
                failed += 1
                continue
            assert "on 2 process(es)" in output
            projector = load_file(run / f"step-{STEPS:06d}" / "projector.safetensors")
            differences = [
                float((projector[key] - expected[key]).abs().max() / expected[key].abs().max()) for key in expected
            ]
            same = max(differences) < 1e-5
            failed += not same
            print(f"{'passed' if same else 'FAILED'}: {name}: projector within {max(differences):.0e} of one process'")
    print(f"torch {torch.__version__}; the runs are in {folder}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
