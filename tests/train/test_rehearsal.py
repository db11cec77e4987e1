"""The rehearsal on fake tensors says what is really allocated, and the estimate follows it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPVisionConfig, LlamaConfig

from shortzip.data.dataset import MicroBatch
from shortzip.data.errors import UserError
from shortzip.reduction import ReducedLlavaConfig
from shortzip.scripts.benchmarks.estimates import MICRO_BATCHES, MODELS, SANDWICHES, WAYS, Way, compare
from shortzip.scripts.benchmarks.shapes import IMAGE_TOKEN, SHAPES
from shortzip.scripts.rehearse_memory import reduced_of
from shortzip.train.rehearsal.fake_models import fake_model
from shortzip.train.rehearsal.rows import RowLengths, integers_of
from shortzip.train.rehearsal.step import DTYPES, StepToRehearse, rehearse
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.commands import RehearseConfig
from shortzip.train.settings.config import DataConfig, DistillConfig, TuneConfig
from shortzip.train.step.objective import SupervisedLoss, projector_parameters, recompute_layers

BEFORE = 35


def shape_config(name: str) -> Any:
    shape = SHAPES[name]
    return ReducedLlavaConfig(
        text_config=LlamaConfig(vocab_size=2000 if name == "demo" else 32000, **shape.text),  # type: ignore[arg-type]
        vision_config=CLIPVisionConfig(**shape.vision),  # type: ignore[arg-type]
        image_token_index=IMAGE_TOKEN,
        tie_word_embeddings=False,
        visionzip={"dominant": shape.dominant, "contextual": shape.contextual},
        shortv={"layers": shape.frozen},
    )


def real_batch(step: StepToRehearse) -> MicroBatch:
    config, integers = step.config, step.integers
    vision, zipped = config.vision_config, config.visionzip
    inputs = {key: vars(integers)[key] for key in ("input_ids", "attention_mask", "labels")}
    if step.cached_features:
        size = (step.tiles, zipped["dominant"] + zipped["contextual"], vision.hidden_size)
        inputs["visual_tokens"] = torch.zeros(size, dtype=DTYPES[step.weights])
        inputs["visual_kept"] = torch.zeros(step.tiles, zipped["dominant"] - 1, dtype=torch.int64)
    else:
        inputs["pixel_values"] = torch.zeros(step.tiles, 3, vision.image_size, vision.image_size)
    return MicroBatch(inputs, [], layout=integers.layout)


def allocated(step: StepToRehearse) -> int:
    """The most bytes that torch's CPU allocator had given out during the same two steps on real tensors, by the
    events that its profiler records: what kernels take for themselves is among them."""
    model = fake_model(step.config, DTYPES[step.weights], four_bit=False, cached_features=step.cached_features)
    if step.recomputed:
        recompute_layers(model)
    trained = projector_parameters(model)
    loss, adamw = SupervisedLoss(model, plain=step.every_token), torch.optim.AdamW(trained.values(), foreach=False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for micro_batches in (1, 2):
            for _ in range(micro_batches):
                batch = real_batch(step)
                value = loss(batch)
                value.backward()
                del value, batch
            nn.utils.clip_grad_norm_(trained.values(), 1.0)
            adamw.step()
            adamw.zero_grad()
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = torch.tensor([change for _, change in changes]).cumsum(0)
    return int(held.max())


PHASES = ["inputs", "tower", "projector", "language model", "logits", "backward", "optimizer"]


def holds(step: StepToRehearse) -> None:
    found = rehearse(step)
    assert [phase for phase in PHASES if phase in found.phases] == list(found.phases)
    assert sum(found.peak.parts.values()) == found.peak.total
    assert found.peak.line or found.peak.node
    beside_weights = found.peak.total - found.resting["weights"] - found.resting["projector"]
    assert beside_weights == pytest.approx(allocated(step), rel=0.005)


@pytest.mark.parametrize(
    "changes",
    [
        {"cached_features": True},
        {"weights": "bfloat16", "recomputed": True},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"every_token": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_rehearsal_says_what_the_cpu_allocates(changes: dict[str, Any]) -> None:
    rows = [RowLengths(BEFORE, 16, 40 + 7 * row, 20 + row) for row in range(4)]
    step = StepToRehearse(
        shape_config("demo"), integers_of(rows, IMAGE_TOKEN), tiles=4, weights="float32", on_cuda=False
    )
    holds(replace(step, **changes))


@pytest.mark.slow
def test_the_rehearsal_says_what_the_cpu_allocates_at_a_tower_s_full_size() -> None:
    rows = [RowLengths(BEFORE, 64, 100 + 7 * row, 100) for row in range(2)]
    holds(
        StepToRehearse(shape_config("cpu"), integers_of(rows, IMAGE_TOKEN), tiles=2, weights="float32", on_cuda=False)
    )


def follows(name: str, rows: int, after: int, layers: int | None, way: Way) -> None:
    """Asserts that the estimate is no less than the rehearsal, and no more than 3 % above it."""
    held = compare(name, rows, after, layers, way)
    assert held.rehearsed <= held.estimated <= 1.03 * held.rehearsed, f"{held.ratio:.4f} of {held.rehearsed:,} bytes"


@pytest.mark.parametrize(
    ("name", "rows", "after", "way"),
    [
        ("llava-1.5-7b", 4, 165, Way()),
        ("llava-1.5-13b", 4, 165, Way(weights="4bit", recomputed=True)),
        ("llava-1.5-7b", 2, 165, Way(every_token=True, processes=8)),
        ("llava-1.5-7b", 48, 40, Way(every_token=True, recomputed=True)),
    ],
    ids=str,
)
def test_the_estimate_follows_the_rehearsal(name: str, rows: int, after: int, way: Way) -> None:
    """Full width, few layers: what is not the layers' weighs more, and it takes a second."""
    follows(name, rows, after, 3, way)


@pytest.mark.slow
@pytest.mark.parametrize("way", SANDWICHES, ids=str)
def test_several_readings_take_what_is_estimated_or_less(way: Way) -> None:
    held = compare("llava-1.5-7b", 4, 165, 3, way)
    assert held.rehearsed <= held.estimated <= 1.06 * held.rehearsed, f"{held.ratio:.4f} of {held.rehearsed:,} bytes"
    alone = compare("llava-1.5-7b", 4, 165, 3, replace(way, sandwich=False))
    assert alone.rehearsed <= held.rehearsed


def test_a_method_without_cls_is_rehearsed_and_what_cannot_be_is_refused() -> None:
    config = reduced_of(RehearseConfig(model="llava-next-7b", budget="64+0", method="scope:alpha=2.0"), None)
    assert config.visionzip == {"dominant": 64, "contextual": 0, "method": "scope", "alpha": 2.0}
    config.text_config.num_hidden_layers, config.shortv = 1, None
    integers = integers_of([RowLengths(BEFORE, 5 * 64, 40, 20)], config.image_token_id)
    step = StepToRehearse(config, integers, image_sizes=[(672, 672)], tiles=5, cached_features=True)
    assert "language model" in rehearse(step).phases
    with pytest.raises(UserError, match="method random draws by each image"):
        reduced_of(RehearseConfig(budget="64+0", method="random"), None)
    with pytest.raises(ConfigError, match="give the budget that is met by it"):
        RehearseConfig(method="scope")
    recipe = TuneConfig("llava-1.5-7b", DataConfig("rows.json"), distill=DistillConfig())
    with pytest.raises(UserError, match="distill: what a teacher takes cannot be rehearsed"):
        reduced_of(RehearseConfig(), recipe)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(("rows", "after"), MICRO_BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_the_estimate_follows_the_rehearsal_in_every_way(name: str, rows: int, after: int, way: Way) -> None:
    follows(name, rows, after, 6, way)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "after", "way"),
    [
        ("llava-1.5-7b", 4, 165, Way()),
        ("llava-1.5-7b", 1, 1965, Way()),
        ("llava-1.5-7b", 16, 165, Way()),
        ("llava-1.5-7b", 16, 165, Way(recomputed=True)),
        ("llava-next-7b", 4, 165, Way()),
        ("llava-1.5-13b", 4, 165, Way()),
        ("llava-1.5-13b", 4, 165, Way(weights="4bit")),
        ("llava-1.5-7b", 4, 165, Way(every_token=True, processes=8)),
    ],
    ids=str,
)
def test_the_estimate_follows_the_rehearsal_at_full_depth(name: str, rows: int, after: int, way: Way) -> None:
    follows(name, rows, after, None, way)
