"""What the data path costs: padding, images per second, waiting for data, the subset at full size.

    python scripts/benchmarks/loading.py padding
    python scripts/benchmarks/loading.py images
    python scripts/benchmarks/loading.py wait --pace 50 --num_workers 12
    python scripts/benchmarks/loading.py subset

All of it runs on generated data: the rows of `data/generated/mixture.py`, whose lengths stand in for LLaVA-1.5's mix.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from transformers import AutoProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from shortzip.data.batching import BatchPlan, micro_batches_of, padding_share, permutation
from shortzip.data.dataset import Collator, ConversationDataset
from shortzip.data.generated.mixture import estimated_length, rows_of_the_mix, write_mix
from shortzip.data.images import open_image
from shortzip.data.instructions import Conversation, parse_llava_row
from shortzip.data.supervision import Supervision, load_template
from shortzip.train.settings.command_line import run_command

CONSOLE = Console()


def padding(
    rows: int = 20_000,
    visual_tokens: int = 64,
    global_batch_size: int = 128,
    max_length: int = 2048,
    micro_batch_sizes: list[int] | None = None,
) -> None:
    """Share of computed tokens that are padding, against the micro-batch size, for four ways to form micro-batches.

    Args:
        rows: rows of the generated mix to take, text-only ones left out.
        visual_tokens: visual tokens per image.
        global_batch_size: samples per optimizer step.
        max_length: longest row in tokens.
        micro_batch_sizes: sizes to compare; 4, 8, 16 and 32 by default.
    """
    images = (row for row in rows_of_the_mix(0, rows) if "image" in row)
    lengths = np.asarray([min(max_length, estimated_length(row, visual_tokens)) for row in images])
    quantiles = ", ".join(f"{share}%: {np.quantile(lengths, share / 100):.0f}" for share in (5, 25, 50, 75, 95, 99))
    CONSOLE.print(f"{len(lengths)} rows of the generated mix; tokens: mean {lengths.mean():.0f}, {quantiles}")
    table = Table("rows", "random", "length groups", "ours, rows", "ours, tokens", "micro-batches")
    order = permutation(len(lengths), 0, 0)
    for size in micro_batch_sizes or [4, 8, 16, 32]:
        by_rows = BatchPlan(lengths.tolist(), global_batch_size, micro_batch_size=size)
        budget = int(size * np.quantile(lengths, 0.75))
        by_tokens = BatchPlan(lengths.tolist(), global_batch_size, max_tokens_per_micro_batch=budget)
        shares = [
            _padded(lengths[order], size),
            _padded(lengths[_length_groups(lengths, order, 50 * global_batch_size)], size),
            padding_share(by_rows),
            padding_share(by_tokens),
        ]
        counts = [np.mean([len(batch.micro_batches[0]) for batch in plan.batches()]) for plan in (by_rows, by_tokens)]
        cells = [f"{share:.1%}" for share in shares]
        cells[3] += f" ({budget})"
        table.add_row(str(size), *cells, f"{counts[0]:.1f} / {counts[1]:.1f}")
    CONSOLE.print(table)
    CONSOLE.print(
        "length groups: sorted by length within 50 global batches, as transformers' group_by_length does; the samples "
        "of a global batch are alike then. ours: each global batch is random, and only its cut follows the lengths."
    )


def images(count: int = 200, size: int = 336, quality: int = 90) -> None:
    """Images per second of one worker, for JPEG files of 640 x 480 pixels, and what the time goes to.

    Args:
        count: images to measure.
        size: side of the model's image in pixels.
        quality: JPEG quality of the generated files.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photographs(Path(folder), 16, quality)
        weight = np.mean([os.path.getsize(path) for path in paths]) / 1000
        processor = LlavaImageProcessorPil(
            do_pad=True, size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        )
        opened = [open_image(str(path)) for path in paths]
        steps: dict[str, Callable[[int], object]] = {
            "open, decode": lambda number: open_image(str(paths[number % 16])),
            "pad, resize, normalise": lambda number: processor(opened[number % 16], return_tensors="pt"),
        }
        table = Table("step", "ms per image", title=f"640 x 480 JPEG of {weight:.0f} kB to {size} pixels, one core")
        total = 0.0
        for name, step in steps.items():
            start = time.process_time()
            for number in range(count):
                step(number)
            milliseconds = (time.process_time() - start) / count * 1000
            total += milliseconds
            table.add_row(name, f"{milliseconds:.2f}")
        CONSOLE.print(table)
        CONSOLE.print(f"{1000 / total:.0f} images/s per worker (CPU time)")


def wait(
    pace: float = 50,
    num_workers: int = 12,
    steps: int = 6,
    micro_batch_size: int = 8,
    global_batch_size: int = 128,
    size: int = 336,
    model: str = "checkpoints/demo-llava",
) -> None:
    """Share of a step spent waiting for data by a loop that takes `pace` samples a second.

    The loop sleeps in place of computing; the samples come from JPEG files of 640 x 480 pixels through the same
    dataset, sampler and collator as in training.

    Args:
        pace: samples a second that the model would take.
        num_workers: loading processes.
        steps: optimizer steps to measure, after one that fills the queues.
        micro_batch_size: most rows of a micro-batch.
        global_batch_size: samples per optimizer step.
        size: side of the model's image in pixels.
        model: whose tokenizer is used.
    """
    with tempfile.TemporaryDirectory() as folder:
        dataset = photographs_of_the_mix(Path(folder), (steps + 2) * global_batch_size, size, model)
        plan = BatchPlan(dataset.lengths.tolist(), global_batch_size, micro_batch_size=micro_batch_size)
        loader = iter(
            DataLoader(
                dataset,
                batch_sampler=micro_batches_of(plan.batches()),
                collate_fn=Collator.of(dataset.supervision),
                num_workers=num_workers,
            )
        )
        waiting = working = samples = 0.0
        for number, batch in enumerate(plan.batches()):
            if number == steps + 1:
                break
            for _ in batch.micro_batches[0]:
                start = time.perf_counter()
                micro = next(loader)
                middle = time.perf_counter()
                time.sleep(len(micro.sample_ids) / pace)
                if number:
                    waiting += middle - start
                    working += time.perf_counter() - middle
                    samples += len(micro.sample_ids)
    share, speed = waiting / (waiting + working), samples / (waiting + working)
    cores = len(os.sched_getaffinity(0))
    CONSOLE.print(f"{cores} cores, {num_workers} workers, a model that takes {pace:g} samples/s")
    CONSOLE.print(f"{share:.1%} of a step spent waiting for data; {speed:.1f} samples/s")


def photographs_of_the_mix(folder: Path, rows: int, size: int, model: str) -> ConversationDataset:
    """Those of the mix's first `rows` that have an image, each with a JPEG file in `folder`."""
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
    processor.image_processor = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    names = [path.name for path in write_photographs(folder, 64)]
    parsed = [parse_llava_row(row) for row in rows_of_the_mix(0, rows) if "image" in row]
    conversations = [
        Conversation(row.id, (names[number % 64],) * len(row.images), row.turns) for number, row in enumerate(parsed)
    ]
    return ConversationDataset(conversations, Supervision(processor, load_template("vicuna_v1")), folder)


def subset(rows: int = 665_298, keep: Path | None = None) -> None:
    """Time and memory of scripts/prepare_subset.py on a generated file of the real size.

    Args:
        rows: rows of the generated file.
        keep: where to keep the file, or where it lies from an earlier run; by default it is deleted.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = keep or Path(folder) / "mix.json"
        if not file.exists():
            write_mix(file, rows=rows)
        script = Path(__file__).with_name("prepare_subset.py")
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, script, file, "-o", Path(folder) / "out"], check=True, stdout=subprocess.DEVNULL
        )
        seconds = time.perf_counter() - start
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu, memory = used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20
        size = file.stat().st_size / 1e9
        CONSOLE.print(f"{size:.2f} GB: {seconds:.0f} s, {cpu:.0f} s of CPU time, {memory:.2f} GiB")


def write_photographs(folder: Path, count: int, quality: int = 90) -> list[Path]:
    """JPEG files of 640 x 480 pixels about as heavy as photographs: smooth shapes with grain on them."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((640, 480), Image.Resampling.BICUBIC), dtype=np.int16)
        pixels = np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(pixels).save(paths[-1], quality=quality)
    return paths


def _padded(lengths: np.ndarray, size: int) -> float:
    """Padding when neighbours form micro-batches of `size` rows."""
    groups = lengths[: len(lengths) // size * size].reshape(-1, size)
    return float(1 - groups.sum() / (groups.max(1) * size).sum())


def _length_groups(lengths: np.ndarray, order: np.ndarray, block: int) -> np.ndarray:
    """The order sorted by length within blocks."""
    blocks = [order[start : start + block] for start in range(0, len(order), block)]
    return np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in blocks])


if __name__ == "__main__":
    run_command(lambda argv: auto_cli([padding, images, wait, subset], as_positional=False, args=argv))
