"""Data workers and the shared memory that they hand micro-batches over in."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from shortzip.data.batching import BatchPlan
from shortzip.data.dataset import MicroBatch
from shortzip.data.errors import FileInTheWay, UserError
from shortzip.data.generated.scene_questions import write_scenes
from shortzip.train.inputs.loading import SharingCollator, check_shared_memory, loader_of
from shortzip.train.inputs.samples import demo_folder, draw_demo_scenes, training_set
from shortzip.train.release.loading import load_release
from shortzip.train.settings.config import DataConfig, DemoScenesConfig, TuneConfig

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def dataset(tiny_release: Path, tiny_instructions: Path) -> Any:
    processor = load_release(str(tiny_release))[1]
    return training_set(DataConfig(instructions=str(tiny_instructions)), processor, seed=0)


@pytest.fixture
def plan(dataset: Any) -> BatchPlan:
    return BatchPlan(dataset.lengths.tolist(), 8, micro_batch_size=4)


def give_memory(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    real = shutil.disk_usage
    monkeypatch.setattr(
        "shortzip.train.inputs.loading.shutil.disk_usage",
        lambda path: Usage(free, 0, free) if str(path) == "/dev/shm" else real(path),
    )


def test_too_small_a_shared_memory_is_foreseen(dataset: Any, plan: BatchPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 x 24 pixels: 6 912 bytes an image, five of them in the largest micro-batch of the first step or so."""
    images = max(
        sum(len(dataset.conversations[row].images) for row in rows) for rows in plan.global_batch(0).micro_batches[0]
    )
    needed = 3 * 2 * images * 3 * 24 * 24 * 4
    give_memory(monkeypatch, needed)
    check_shared_memory(dataset, plan, 3)
    give_memory(monkeypatch, needed - 1)
    with pytest.raises(UserError, match=r"0\.\d MB are free.*1 processes x 3 data workers .*--shm-size.*--ipc=host"):
        check_shared_memory(dataset, plan, 3)
    check_shared_memory(dataset, plan, 0)
    give_memory(monkeypatch, needed)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes x 3 data workers"):
        check_shared_memory(dataset, plan, 3)
    monkeypatch.setattr("shortzip.train.inputs.loading.SHARED_MEMORY", Path("/no/such/folder"))
    check_shared_memory(dataset, plan, 3)


def test_docker_s_64_mb_are_enough_for_a_demo_and_not_for_a_real_release(
    dataset: Any, plan: BatchPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_memory(monkeypatch, 64 << 20)
    check_shared_memory(dataset, plan, 4)
    real = dataset.supervision.processor.image_processor
    large = type(real)(do_pad=True, size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    monkeypatch.setattr(dataset.supervision.processor, "image_processor", large)
    monkeypatch.setattr("shortzip.data.dataset.ConversationDataset.__getitem__", with_pixels(336))
    with pytest.raises(UserError, match=r"67\.1 MB are free"):
        check_shared_memory(dataset, plan, 8)


def with_pixels(side: int) -> Any:
    def get(self: Any, index: int) -> Any:
        sample = self.load(self.conversations[index])
        sample.pixels[:] = [torch.zeros(3, side, side) for _ in sample.pixels]
        return sample

    return get


def test_a_worker_that_gets_no_shared_memory_is_told_of_at_once(
    dataset: Any, plan: BatchPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch says it in a container with too little; a data worker is a fork, and inherits it."""

    def refuse(tensor: torch.Tensor) -> None:
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    data = DataConfig(instructions="i", num_workers=1, worker_timeout=300)
    config = TuneConfig(model="m", data=data, output_dir=str(tmp_path))
    batches = loader_of(dataset, plan.batches(), Accelerator(mixed_precision="no"), config)
    with pytest.raises(UserError, match=r"^the shared memory \(/dev/shm, .* free\) is too small .*--shm-size"):
        next(batches)


def test_only_data_workers_put_micro_batches_into_shared_memory(dataset: Any) -> None:
    def collate(rows: Any) -> MicroBatch:
        return MicroBatch({"input_ids": torch.zeros(2, 2)}, [])

    assert not SharingCollator(collate)([]).inputs["input_ids"].is_shared()
    loader: Any = DataLoader([1, 2], collate_fn=SharingCollator(collate), num_workers=1)  # type: ignore[arg-type]
    assert all(micro_batch.inputs["input_ids"].is_shared() for micro_batch in loader)


def test_of_two_runs_that_draw_the_scenes_at_a_time_the_later_takes_the_other_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = DemoScenesConfig(folder=str(tmp_path), train_scenes=4, eval_scenes=2)
    config = DataConfig(instructions="demo", eval_instructions="demo", demo_scenes=scenes)
    folders = [demo_folder(scenes, held_out=False), demo_folder(scenes, held_out=True)]

    def overtaken(folder: Path, seed: int, count: int, fraction: float) -> None:
        write_scenes(folder, seed, count, fraction)
        target = next(target for target in folders if f"-{target.name}-" in folder.name)
        shutil.copytree(folder, target)
        (target / "winner").touch()

    monkeypatch.setattr("shortzip.train.inputs.samples.write_scenes", overtaken)
    draw_demo_scenes(config)
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == {"instructions.json", "images", "winner"}
    assert {path.name for path in tmp_path.iterdir()} == {folder.name for folder in folders}
    monkeypatch.setattr("shortzip.train.inputs.samples.write_scenes", lambda *_: pytest.fail("they are there"))
    draw_demo_scenes(config)


def test_scenes_are_drawn_into_an_empty_folder_and_never_over_something_else(tmp_path: Path) -> None:
    scenes = DemoScenesConfig(folder=str(tmp_path), train_scenes=2)
    config = DataConfig(instructions="demo", demo_scenes=scenes)
    folder = demo_folder(scenes, held_out=False)
    folder.mkdir()
    (folder / "mine.txt").touch()
    with pytest.raises(FileInTheWay, match="exists and is not empty"):
        draw_demo_scenes(config)
    (folder / "mine.txt").unlink()
    draw_demo_scenes(config)
    assert (folder / "instructions.json").is_file()
